"""Every source of chance in a layer is keyed or refused, as docs/chance.md says line by line, by every engine."""

import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import chance_worker
import numpy as np
import pytest
import torch
from chance_worker import LINES, train
from ranks import ranks
from torch import Tensor

from unlocked.runtime import Streams

KEYED = [code for code, outcome, _ in LINES if outcome == "keyed"]
REFUSED = [code for code, outcome, _ in LINES if outcome == "refused"]


class Plain(NamedTuple):
    """What the plain loop made of a line, and snapshots in the middle of both epochs."""

    digest: str
    test_loss: float | None
    folder: Path


PlainRuns = Callable[[str], Plain]


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> PlainRuns:
    @functools.cache
    def run(code: str) -> Plain:
        folder = tmp_path_factory.mktemp("line")
        result = train(code, 1, snapshot_every=3, snapshot_dir=folder)
        return Plain(result.weights_sha256, result.test_loss, folder)

    return run


def _states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]]


def test_the_table_is_read() -> None:
    assert len(KEYED) > 15
    assert len(REFUSED) >= 3


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("code", KEYED)
def test_streams_draw_what_the_plain_loop_draws(code: str, stages: int, sequential: PlainRuns) -> None:
    result = train(code, 10 + stages, engine=Streams(stages=stages, graph_ticks=2))
    assert (result.weights_sha256, result.test_loss) == sequential(code)[:2]


@pytest.mark.parametrize("code", KEYED)
def test_a_run_that_is_resumed_in_mid_epoch_draws_on(code: str, sequential: PlainRuns, tmp_path: Path) -> None:
    digest, loss, folder = sequential(code)
    result = train(code, 20, resume=folder / "step-00000003", snapshot_every=3, snapshot_dir=tmp_path)
    assert (result.weights_sha256, result.test_loss) == (digest, loss)


@pytest.mark.parametrize("code", KEYED)
def test_the_global_generators_are_left_as_they_were(code: str) -> None:
    chance_worker.unsettle(30)
    before = _states()
    train(code, 30)
    assert _states() == before


class Drawn:
    """A loader that draws its samples from the global generator, where it is read ahead in a thread."""

    def __len__(self) -> int:
        return 60

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(len(self)):
            yield torch.cat([torch.rand(1, 8, 8) for _ in range(16)]), torch.randint(0, 4, (16,))


def test_a_loader_and_a_layer_that_draw_side_by_side_do_not_mix() -> None:
    def digest(prefetch: int) -> str:
        layers = chance_worker.model("F.dropout(x.repeat(1, 40, 1), 0.3)[:, :8]")
        one = chance_worker.trainer(layers, prefetch=prefetch)
        torch.manual_seed(5)
        return one.fit(Drawn(), epochs=1).weights_sha256

    assert digest(4) == digest(0)


@pytest.mark.parametrize("engine", ["sequential", "streams"])
@pytest.mark.parametrize("code", REFUSED)
def test_what_no_key_reaches_is_refused_by_name(code: str, engine: str) -> None:
    with pytest.raises(ValueError, match=r"layer drawing, module 1 \(Drawing\): "):
        train(code, 0, engine=engine)


@pytest.mark.alone
def test_two_processes_draw_what_the_plain_loop_draws(sequential: PlainRuns, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with ranks(2, [chance_worker.__file__, str(out)]) as started:
        texts = [process.communicate(timeout=300)[1] for process in started]
        assert [process.returncode for process in started] == [0, 0], texts
    assert json.loads(out.read_text()) == {code: [*sequential(code)[:2]] for code in KEYED}
