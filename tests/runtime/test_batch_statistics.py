"""A micro-batch too small for a layer's statistics is refused before training, by all engines and kernels alike."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unlocked.data import LoaderDataset
from unlocked.models import Block, ConvBlock, LinearBlock, OutputBlock
from unlocked.rules import LLS
from unlocked.runtime import RunResult, Trainer
from unlocked.runtime.batch_statistics import BatchStatistics, check_batch_statistics
from unlocked.runtime.network import build_network
from unlocked.runtime.schedules.stream import StreamPlan

SGD = partial(torch.optim.SGD, lr=0.1)
ENGINES_AND_KERNELS = [("sequential", "torch"), ("sequential", "cpp"), ("streams", "torch"), ("streams", "cpp")]


def _data(rows: int, side: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 1, side, side, generator=generator), torch.arange(rows) % 3


def _linear_net(side: int = 2) -> list[Block]:
    return [LinearBlock(side * side, 5, name="hidden"), OutputBlock(5, 3)]


def _fit(engine: str, kernels: str, rows: int, batch: int, **options: object) -> RunResult:
    trainer = Trainer(_linear_net(), rule=LLS(), optimizer=SGD, engine=engine, kernels=kernels)
    return trainer.fit(_data(rows), epochs=2, batch_size=batch, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("engine", "kernels"), ENGINES_AND_KERNELS)
def test_a_last_micro_batch_of_one_row(engine: str, kernels: str) -> None:
    message = (
        r"layer hidden normalises .*norm = BatchNorm1d\(5, .*9 training rows in micro-batches of 4 give one of 1; "
        r"drop_last=True \(--drop-last\) leaves it out, or batch_size \(--batch-size\) 3 or 5 would fit"
    )
    with pytest.raises(ValueError, match=message):
        _fit(engine, kernels, 9, 4)
    with pytest.raises(ValueError, match=r"micro-batches of 1 give one of 1; batch_size .--batch-size. 2 would fit"):
        _fit(engine, kernels, 4, 1)
    for batch in (3, 5):
        assert _fit(engine, kernels, 9, batch).steps == 2 * -(-9 // batch)
    dropped = _fit(engine, kernels, 9, 4, drop_last=True, eval_data=_data(9), eval_batch_size=4)
    assert dropped.steps == 4
    assert dropped.test_acc1 is not None
    # What max_steps leaves out is no reason to refuse, but statistics are re-estimated from a whole epoch.
    assert _fit(engine, kernels, 9, 4, max_steps=2).steps == 2
    with pytest.raises(ValueError, match="9 training rows"):
        _fit(engine, kernels, 9, 4, max_steps=2, eval_data=_data(6))


@pytest.mark.parametrize(("engine", "kernels"), ENGINES_AND_KERNELS)
def test_one_row_of_many_pixels_is_enough(engine: str, kernels: str) -> None:
    def fit(side: int) -> RunResult:
        net = [ConvBlock(1, 4, name="conv", padding=0, pool="average", pool_size=1), OutputBlock(4, 3)]
        trainer = Trainer(net, rule=LLS(), optimizer=SGD, engine=engine, kernels=kernels)
        return trainer.fit(_data(5, side), epochs=2, batch_size=2, eval_data=_data(3, side), eval_batch_size=2)

    assert fit(4).steps == 6
    with pytest.raises(ValueError, match=r"layer conv .*BatchNorm2d"):
        fit(3)  # one pixel


def test_epochs_without_a_rest_are_those_of_the_data_without_it() -> None:
    """Of 9 rows the order of an epoch is of all 9, and what is left over differs from epoch to epoch."""
    rows, labels = _data(9)
    seen: list[Tensor] = []

    class Noting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.append(x.clone())
            return x * 1.0

    net = [Block("noting", Noting()), *_linear_net()]
    Trainer(net, rule=LLS(), optimizer=SGD).fit((rows, labels), epochs=4, batch_size=4, drop_last=True)
    # The others are of the trials before training, or stand for values while the block is traced.
    seen = [x for x in seen if isinstance(x, Tensor) and len(x) != 2]
    assert [len(x) for x in seen] == [4] * 8
    epochs = [
        frozenset(int((rows == x).flatten(1).all(1).nonzero()) for x in torch.cat(seen[i : i + 2]))
        for i in (0, 2, 4, 6)
    ]
    assert [len(epoch) for epoch in epochs] == [8] * 4
    assert len(set(epochs)) > 1


def test_a_loader_drops_its_own() -> None:
    samples, labels = _data(9)
    batches = [(samples[i : i + 4], labels[i : i + 4]) for i in (0, 4, 8)]
    trainer = Trainer([nn.Flatten(), nn.Linear(4, 3)], rule=LLS(), optimizer=SGD)
    with pytest.raises(ValueError, match=r"ends an epoch in a batch of 1 rows, .*DataLoader\(..., drop_last=True\)"):
        trainer.fit(LoaderDataset.wrap(batches), epochs=1, drop_last=True)
    assert trainer.fit(batches[:2], epochs=1, drop_last=True).steps == 2
    with pytest.raises(ValueError, match="layer hidden normalises"):
        Trainer(_linear_net(), rule=LLS(), optimizer=SGD).fit(batches, epochs=1)


def test_evaluation_without_running_statistics() -> None:
    """Such a layer normalises by the evaluation's own micro-batches, where one row is refused as well."""

    def fit(norm: nn.Module, evaluated: int) -> RunResult:
        net = [Block("odd", nn.Sequential(nn.Flatten(), norm)), nn.Linear(4, 3)]
        trainer = Trainer(net, rule=LLS(), optimizer=SGD)
        return trainer.fit(_data(8), epochs=1, batch_size=4, eval_data=_data(evaluated), eval_batch_size=4)

    for norm in (nn.BatchNorm1d(4, track_running_stats=False), nn.GroupNorm(4, 4)):
        with pytest.raises(ValueError, match=r"layer odd .*1 = .*Norm.* 5 evaluation rows .*eval_batch_size .*3 or 5"):
            fit(norm, 5)
        fit(norm, 6)
    fit(nn.BatchNorm1d(4), 5)
    fit(nn.GroupNorm(2, 4), 5)


class Frozen(nn.BatchNorm1d):
    """Reads its running statistics always, as fine-tuning may want it."""

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


@pytest.mark.parametrize("engine", ["sequential", "streams"])
def test_what_is_never_trained_on_its_batch_may_have_one_row(engine: str) -> None:
    net = [Block("frozen", nn.Sequential(nn.Flatten(), nn.Linear(4, 4), Frozen(4))), nn.Linear(4, 3)]
    assert Trainer(net, rule=LLS(), optimizer=SGD, engine=engine).fit(_data(5), epochs=1, batch_size=2).steps == 3


def test_uses_that_see_more_than_the_rows() -> None:
    tokens = nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(6), nn.Unflatten(0, (-1, 5)))
    blocks = [Block("tokens", tokens), Block("flat", nn.Flatten()), nn.Linear(30, 3)]
    (use,) = build_network(blocks, input_shape=(5, 6), num_classes=3, seed=0).batch_statistics
    assert (use.layer, use.values, use.training, use.evaluation) == ("tokens", (10, 15), True, False)
    assert all(module.training for block in blocks for module in block.modules())
    check_batch_statistics([use], StreamPlan(epochs=1, train_size=3, batch_size=2))


@settings(max_examples=200)
@given(st.integers(1, 12), st.integers(1, 12), st.booleans(), st.integers(1, 3), st.none() | st.integers(1, 6))
def test_what_is_said_to_fit_fits(rows: int, batch: int, drop: bool, per_row: int, most: int | None) -> None:
    batch = min(rows, batch)
    use = BatchStatistics(
        layer="one", module="norm", values=(2 * per_row, 3 * per_row), training=True, evaluation=False
    )

    def plan(batch: int, drop: bool = False) -> StreamPlan:
        return StreamPlan(epochs=2, train_size=rows, batch_size=batch, eval_size=3, drop_last=drop, max_steps=most)

    small = [i for i in plan(batch, drop) if i.kind in ("train", "statistics") and i.size * per_row < 2]
    if not small:
        check_batch_statistics([use], plan(batch, drop))
        return
    with pytest.raises(ValueError, match="layer one") as caught:
        check_batch_statistics([use], plan(batch, drop))
    _, _, fixes = str(caught.value).partition("; ")
    if "drop_last" in fixes:
        check_batch_statistics([use], plan(batch, drop=True))
    sizes = [int(word) for word in fixes.replace("--batch-size", "").split() if word.isdecimal()]
    assert sizes or rows == 1
    for size in sizes:
        check_batch_statistics([use], plan(size))
