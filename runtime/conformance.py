"""Whether a rule is what it has to be: local, deterministic, exact wherever its layers are placed, and resumable.

Each check trains a network of four small layers for ten micro-batches, on made-up images, and compares bits.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.data import ImageDataset
from unlocked.rules import LLS, Rule
from unlocked.runtime.engines.sequential import Sequential
from unlocked.runtime.engines.streams.engine import Streams
from unlocked.runtime.input import probe_sample
from unlocked.runtime.network import build_network
from unlocked.runtime.result import RunResult
from unlocked.runtime.rule_trial import check_rules
from unlocked.runtime.trainer import Trainer
from unlocked.workers.cargo import CargoLayout
from unlocked.workers.edges import SlotLayout

__all__ = ["Check", "check_conformance", "leaks", "train_small"]

CLASSES, SIDE, LAYERS = 5, 8, 4
_STOP = 7  # of ten micro-batches: in the middle of the second epoch


@dataclass(frozen=True, slots=True)
class Check:
    """One property, whether the rule has it, and what was seen."""

    name: str
    passed: bool
    seen: str


def check_conformance(rule: Rule, *, processes: Callable[[int], str] | None = None) -> Iterator[Check]:
    """Yields a check after the other, and stops early where the rule does not even fit.

    Args:
        processes: trains the same in so many processes and gives the weights' digest; None: that check is left out.
    """
    try:
        first = train_small(rule)
    except ValueError as error:
        yield Check("fits", False, str(error))
        return
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in first.local_losses.items())
    yield Check("fits", True, f"local losses of the second epoch: {losses}")
    again = train_small(rule)
    yield _same("deterministic", [first, again], "two runs")
    with tempfile.TemporaryDirectory(prefix="unlocked-") as folder:
        saving: dict[str, Any] = {"snapshot_every": _STOP, "snapshot_dir": Path(folder)}
        placed = [train_small(rule, Streams(stages=2)), train_small(rule, Streams(stages=3), **saving)]
        yield _same("exact", [first, *placed], "sequential, streams of 2 and of 3 stages")
        on = Path(folder) / f"step-{_STOP:08d}"
        resumed = [train_small(rule, engine, resume=on, **saving) for engine in (Sequential(), Streams(stages=4))]
    yield _same("resumable", [first, *resumed], f"resumed after micro-batch {_STOP} in 1 and 4 stages")
    if processes is not None:
        digests = {str(count): processes(count) for count in (2, 3)}
        differ = [count for count, digest in digests.items() if digest != first.weights_sha256]
        seen = f"{' and '.join(differ)} processes give other bits" if differ else "2 and 3 processes give the same bits"
        yield Check("exact over processes", not differ, seen)
    found = leaks(rule, first)
    yield Check("local", not found, found[0] if found else "no later layer changes a bit of an earlier one")
    yield Check("cost", True, _cost(rule, again.train_seconds))


def train_small(
    rule: Any, engine: Any = "sequential", *, changed: int | None = None, threads: int = 1, **options: Any
) -> RunResult:
    """Ten micro-batches of the small network.

    Args:
        changed: a layer that begins with other weights.
        options: the trainer's.
    """
    trainer = Trainer(
        _network(changed),
        rule=rule,
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        engine=engine,
        seed=3,
        statistics_batches=1,
        threads=threads,
        **options,
    )
    train, test = _images(70, "train"), _images(20, "test")
    return trainer.fit(train, epochs=2, batch_size=16, eval_data=test, eval_batch_size=16)


def leaks(rule: Any, first: RunResult | None = None) -> list[str]:
    """Which layers' other start values reach an earlier layer, and what they change there; none if the rule is local.

    Args:
        first: the run with all layers as they are, if it is there already.
    """
    reference = (first or train_small(rule)).weights
    names = _names()
    found = []
    for k in range(1, LAYERS):
        other = train_small(rule, changed=k).weights
        earlier = tuple(f"{name}." for name in names[:k])
        differ = [n for n, value in reference.items() if n.startswith(earlier) and not torch.equal(value, other[n])]
        if differ:
            found.append(f"other start values of layer {names[k]} change {differ[0]}")
    return found


def _same(name: str, runs: Sequence[RunResult], what: str) -> Check:
    digests = [run.weights_sha256 for run in runs]
    passed = len(set(digests)) == 1
    figures = [[(e.eval_acc1, e.local_losses) for e in run.epochs[-1:]] for run in runs]
    if passed and any(one != figures[0] for one in figures):
        return Check(name, False, f"{what}: the same weights, but other figures")
    return Check(name, passed, f"{what}: {'the same bits' if passed else 'other bits'}")


def _cost(rule: Rule, seconds: float) -> str:
    ratio = seconds / train_small(LLS()).train_seconds
    blocks = build_network(_network(None), input_shape=(3, SIDE, SIDE), num_classes=CLASSES, seed=3)
    network = check_rules(blocks, rule, sample=probe_sample(_images(2, "train")))
    plain = more = 0
    for layer, shape in enumerate(network.output_shapes[:-1]):
        plain += SlotLayout(16, shape).nbytes(16)
        traffic = network.side_channel.traffic(layer)
        more += (CargoLayout(16, shape, traffic=traffic) if traffic else SlotLayout(16, shape)).nbytes(16)
    return f"{ratio:.1f} times the seconds of LLS, {more / plain:.2f} times its bytes over the edges"


def _names() -> list[str]:
    return list(dict(_network(None).named_children()))


def _network(changed: int | None) -> nn.Sequential:
    layers: dict[str, Callable[[], nn.Module]] = {
        "conv1": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        "conv2": lambda: nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.LeakyReLU()),
        "output": lambda: nn.Linear(24, CLASSES),
    }
    made = nn.Sequential()
    state = torch.random.get_rng_state()
    for k, (name, make) in enumerate(layers.items()):
        torch.manual_seed(1000 + k if k == changed else k)
        made.add_module(name, make())
    torch.random.set_rng_state(state)
    return made


def _images(count: int, split: str) -> ImageDataset:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    labels: Tensor = torch.arange(count) % CLASSES
    return ImageDataset(
        name="made up",
        split=split,
        images=images,
        labels=labels,
        num_classes=CLASSES,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
