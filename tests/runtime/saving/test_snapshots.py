"""Snapshots: any of them leads to the uninterrupted run's end, on any placement; what is not whole is refused."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import split_options
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.data.synthetic import load_synthetic
from unlocked.models import small_conv
from unlocked.rules import LLS_M_Random
from unlocked.runtime import RunResult, Trainer
from unlocked.runtime.saving import writer
from unlocked.runtime.saving.layer_files import LayerFile, read_layer, state_digest, write_layer
from unlocked.runtime.saving.snapshots import find_snapshot, prune_snapshots, snapshot_folder, write_manifest
from unlocked.workers.errors import StageError

TRAIN, TEST = load_synthetic(num_train=26, num_test=9, num_classes=4, image_size=8, seed=2)
ADAM = partial(torch.optim.Adam, lr=1e-2)


def _fit(engine: str = "sequential", optimizer: Any = ADAM, evaluate: bool = True, **options: Any) -> RunResult:
    """Four micro-batches an epoch, the last one of two rows."""
    made, others = split_options(engine, options)
    trainer = Trainer(
        small_conv(3, 4, 8, dropout=0.3),
        rule=LLS_M_Random(),
        optimizer=optimizer,
        engine=made,
        statistics_batches=1,
        **others,  # type: ignore[arg-type]
    )
    return trainer.fit(TRAIN, epochs=3, batch_size=8, eval_data=TEST if evaluate else None)


def _figures(result: RunResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in asdict(epoch).items() if k != "seconds"} for epoch in result.epochs]


@pytest.fixture(scope="module", params=[True, False], ids=["evaluated", "not evaluated"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Path, bool]:
    folder = tmp_path_factory.mktemp("run")
    return _fit(evaluate=request.param, snapshot_every=1, snapshot_dir=folder), folder, request.param


@settings(max_examples=10)
@given(
    step=st.integers(1, 12),
    engine=st.sampled_from(["sequential", "streams"]),
    stages=st.integers(1, 5),
    queue_depth=st.integers(1, 4),
)
def test_every_snapshot_leads_to_the_same_end(
    whole: tuple[RunResult, Path, bool],
    tmp_path_factory: pytest.TempPathFactory,
    step: int,
    engine: str,
    stages: int,
    queue_depth: int,
) -> None:
    expected, folder, evaluate = whole
    options: dict[str, Any] = {"stages": stages, "queue_depth": queue_depth} if engine == "streams" else {}
    resume = snapshot_folder(folder, step)
    options |= {"snapshot_every": 1, "snapshot_dir": tmp_path_factory.mktemp("resumed"), "resume": resume}
    if step == 12 and not evaluate:
        with pytest.raises(ValueError, match="is at step 12, where this run of 3 epochs has nothing left to do"):
            _fit(engine, evaluate=evaluate, **options)
        return
    resumed = _fit(engine, evaluate=evaluate, **options)
    assert resumed.weights_sha256 == expected.weights_sha256
    assert resumed.steps == expected.steps == 12
    # An epoch's figures are complete even if it was interrupted; without evaluation it ends with its last step.
    first = (step - 1) // 4 if evaluate else step // 4
    assert _figures(resumed) == _figures(expected)[first:]


def test_snapshots_of_streams_are_those_of_the_plain_loop(whole: tuple[RunResult, Path, bool], tmp_path: Path) -> None:
    _, folder, evaluate = whole
    _fit("streams", evaluate=evaluate, stages=3, queue_depth=2, snapshot_every=1, snapshot_dir=tmp_path)
    for path in sorted(folder.rglob("layer-*.pt")):
        states = [read_layer(root / path.relative_to(folder), torch.device("cpu")) for root in (folder, tmp_path)]
        assert _equal(*states), path
    assert find_snapshot(tmp_path).steps == find_snapshot(folder).steps == 12


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def test_an_unfinished_snapshot_does_not_count(tmp_path: Path) -> None:
    for steps in (3, 6):
        _declare(tmp_path, steps)
    snapshot_folder(tmp_path, 9).mkdir()
    found = find_snapshot(tmp_path)
    assert (found.steps, found.position, found.folder.name) == (6, 7, "step-00000006")
    assert find_snapshot(snapshot_folder(tmp_path, 3)).steps == 3
    assert [path.name for path in found.folder.iterdir()] == ["manifest.json"]  # no temporary file is left


def test_the_newest_is_found_beyond_the_digits_that_names_are_padded_to(tmp_path: Path) -> None:
    for steps in (99_999_999, 100_000_000):
        _declare(tmp_path, steps)
    assert find_snapshot(tmp_path).steps == 100_000_000


def test_a_run_that_was_cut_does_not_leave_a_mixture_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run writes to the same folder with another learning rate, and ends between two layers of a snapshot."""
    _fit(snapshot_every=5, snapshot_dir=tmp_path)
    assert find_snapshot(tmp_path).steps == 10

    def write(path: Path, state: Any, *, run: str, position: int, layer: str) -> LayerFile:
        if layer == "conv2" and state["clock"] >= 10:
            raise RuntimeError("killed")
        return write_layer(path, state, run=run, position=position, layer=layer)

    monkeypatch.setattr(writer, "write_layer", write)
    with pytest.raises(StageError, match=r"0SNAP.*killed"):
        _fit(optimizer=partial(torch.optim.Adam, lr=1e-3), snapshot_every=5, snapshot_dir=tmp_path)
    assert find_snapshot(tmp_path).steps == 5


@pytest.mark.parametrize("text", ["", "{", "[]", '{"position": 3}', '{"position": "x", "steps": 1, "settings": {}}'])
def test_a_damaged_manifest_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"snapshot manifest .*manifest\.json is damaged"):
        find_snapshot(tmp_path)


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes:
    """One bit inside the largest tensor, which the file's own format does not notice."""
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 4]) + content[half + 1 :]


@pytest.mark.parametrize(
    "damage",
    [_cut, lambda content: b"", lambda content: b"no archive at all", lambda content: content[:-1], _flipped],
    ids=["half", "empty", "text", "a byte short", "a bit"],
)
def test_a_damaged_file_is_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    _fit(snapshot_every=11, snapshot_dir=tmp_path)
    path = tmp_path / "step-00000011" / "layer-002-conv3.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"layer-002-conv3\.pt is damaged or of another network"):
        _fit(snapshot_every=11, snapshot_dir=tmp_path, resume=tmp_path)


def test_a_checksum_covers_names_numbers_and_tensors() -> None:
    state = {"a": torch.arange(4.0), "b": [{"lr": 0.1, "betas": (0.9, 0.99), "on": True}]}
    digest = state_digest(state)
    assert state_digest({"a": torch.arange(4.0), "b": [{"lr": 0.1, "betas": (0.9, 0.99), "on": True}]}) == digest
    others: list[Any] = [
        {**state, "a": torch.arange(4.0).view(2, 2)},
        {**state, "a": torch.arange(4)},
        {**state, "a": torch.tensor([0.0, 1.0, 2.0, 3.0000002])},
        {**state, "b": [{"lr": 0.2, "betas": (0.9, 0.99), "on": True}]},
        {**state, "b": [{"lr": 0.1, "betas": (0.9, 0.99), "on": 1}]},
        {"c": state["a"], "b": state["b"]},
    ]
    assert digest not in {state_digest(other) for other in others}


def test_a_snapshot_of_another_release_is_refused(tmp_path: Path) -> None:
    _declare(_folder(tmp_path), 3)
    path = snapshot_folder(tmp_path, 3) / "manifest.json"
    path.write_text(path.read_text().replace('"format": 3', '"format": 2'))
    with pytest.raises(ValueError, match="has format 2, this release reads 3"):
        find_snapshot(tmp_path)


def _declare(root: Path, steps: int) -> None:
    _declare_in(snapshot_folder(root, steps), steps)


def _declare_in(folder: Path, steps: int = 3) -> None:
    folder.mkdir(exist_ok=True)
    write_manifest(folder, run="run", position=steps + 1, steps=steps, settings={"seed": 0}, files={})


def _folder(root: Path) -> Path:
    snapshot_folder(root, 3).mkdir()
    return root


@pytest.mark.parametrize("content", [[1, 2], {"rule": 3, "block": 4, "optimizer": 5}], ids=["list", "numbers"])
def test_a_file_of_something_else_is_named(content: Any, tmp_path: Path) -> None:
    _fit(snapshot_every=11, snapshot_dir=tmp_path)
    torch.save(content, tmp_path / "step-00000011" / "layer-000-conv1.pt")
    with pytest.raises(ValueError, match=r"layer-000-conv1\.pt is damaged or of another network"):
        _fit(snapshot_every=11, snapshot_dir=tmp_path, resume=tmp_path)


def test_every_other_setting_is_listed(tmp_path: Path) -> None:
    _fit(snapshot_every=11, snapshot_dir=tmp_path)
    with pytest.raises(ValueError, match="seed is 1 but was 0; precision is 'bf16' but was 'fp32'; give the same"):
        _fit(seed=1, precision="bf16", snapshot_dir=tmp_path, resume=tmp_path)


def test_names_say_the_order(tmp_path: Path) -> None:
    """Also of snapshots whose number is longer; what a user has put there counts for nothing, and is left alone."""
    names = ["step-00000009", "step-00000010", "step-00000010-evaluated", "step-00000011", "step-100000000"]
    for name in [*reversed(names), "step-00000010-mine", "step-", "step-200000000.bak"]:
        _declare_in(tmp_path / name)
    for count in range(len(names), 0, -1):
        prune_snapshots(tmp_path, count)
        assert find_snapshot(tmp_path).folder.name == names[-1]
        left = sorted(path.name for path in tmp_path.iterdir())
        assert left == sorted([*names[-count:], "step-00000010-mine", "step-", "step-200000000.bak"])
