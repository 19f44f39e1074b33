"""Language models by local learning: what is lost against backpropagation, and what a pipeline gains, on bytes.

    python benchmarks/language.py --json language.json --train-only     # bits per byte: may share the machine
    python benchmarks/language.py --json language.json --speed-only     # tokens/s and memory: wants it alone
    python benchmarks/language.py --json language.json --report-only    # the tables of what the file holds

A GPT over bytes (6 layers, width 256, 256 positions) reads the source of Python's standard library once, every byte at
most once, and is tested on modules that it has not seen. All contenders start from the same weights and read the same
sequences in the same order; AdamW throughout, and of several learning rates (--lr) each contender's best one counts.

Contenders, by rule and number of parts with a loss of their own: 8 is one for each layer (the embedding, six
transformer layers, the head), 3 one for each process. Bits per byte are those of the plain loop, to which every
placement is equal to the last bit; backpropagation's pipeline takes means over pieces of a micro-batch, which are its
plain loop's but for rounding. Speed: three processes of one thread on the machine's cores, in turns; backpropagation in
one process as well, with one thread and with one for each core.

Every run is added to the file as it ends. What is there already is not run again, so that the command may be stopped,
and several may run at once (with other --seeds, say).
"""

import argparse
import fcntl
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from language_tables import print_tables, read_figures, write_tables
from torch import Tensor, nn

from unlocked.comparison.environment import environment
from unlocked.data import ImageDataset, load_dataset
from unlocked.models import Block, gpt
from unlocked.rules import LLS, LocalLosses, Rule, TaskAndConsistency, Tokens
from unlocked.runtime import Trainer
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

RULES: dict[str, Rule | str] = {
    "BP": "BP",
    "LLS": LLS(temperature=1.0),
    "LocalLosses": LocalLosses(temperature=1.0),
    "TaskAndConsistency": TaskAndConsistency,  # ZeroLock's
}
CONTENDERS = ("BP", "LLS/8", "LocalLosses/8", "LocalLosses/3", "TaskAndConsistency/3")
MORE = ("LLS/3", "TaskAndConsistency/8")
PARTS = 3
SIZES = ("depth", "width", "length", "batch", "test_samples")


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(arguments)
        if not (options.speed_only or options.report_only):
            train_missing(options)
        if not (options.train_only or options.report_only):
            from language_speed import measure_speed

            measure_speed(options, partial(figures_of, options), partial(add, options), PARTS)
        print_tables(read_figures(options.json))
        if options.page:
            write_tables(read_figures(options.json), options.page)
    except ValueError as error:
        print(f"language.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="the file that the figures are added to")
    names = ", ".join(MORE)
    parser.add_argument(
        "--only",
        nargs="+",
        help=f"default: {', '.join(CONTENDERS)}; there are {names} as well",
        default=list(CONTENDERS),
        choices=CONTENDERS + MORE,
        metavar="CONTENDER",
    )
    parser.add_argument("--page", type=Path, help="write the tables into this page, too, between its marks")
    what = parser.add_mutually_exclusive_group()
    for name, told in (("train", "bits per byte"), ("speed", "tokens/s and memory"), ("report", "print what is there")):
        what.add_argument(f"--{name}-only", action="store_true", help=told)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--tokens", type=int, default=327_680, help="that a run learns from")
    parser.add_argument("--points", type=int, default=5, help="evaluations of a run, evenly apart")
    parser.add_argument("--turns", type=int, default=3, help="speed runs of every contender")
    parser.add_argument("--speed-steps", type=int, default=24, help="micro-batches of a speed run")
    group = parser.add_argument_group("sizes, the same for all figures of a file")
    for name, value in zip(SIZES, (6, 256, 256, 8, 48), strict=True):
        group.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    options = parser.parse_args(arguments)
    for name in ("tokens", "points", "turns", "speed_steps", *SIZES):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    if min(options.lr) <= 0 or options.depth < PARTS:
        parser.error(f"--lr must be positive, and --depth at least {PARTS}")
    if steps_of_part(options) < 1:
        parser.error(
            f"--tokens {options.tokens} are less than one micro-batch of {options.batch} x {options.length} for each "
            f"of {options.points} points"
        )
    return options


# Training


def train_missing(options: argparse.Namespace) -> None:
    """All runs that the file does not hold, seed by seed, so that a file that is cut short compares all contenders."""
    torch.set_num_threads(1)
    data: tuple[ImageDataset, ImageDataset] | None = None
    for seed in options.seeds:
        for rate in options.lr:
            for contender in options.only:
                key = {"contender": contender, "seed": seed, "lr": rate, "tokens": tokens_of_run(options)}
                if any(run.items() >= key.items() for run in figures_of(options)["runs"]):
                    continue
                data = data or text(options)
                run = key | train(contender, seed, rate, options, data)
                add(options, "runs", [run])
                print(f"{contender}, seed {seed}, lr {rate:g}: {told(run)}", flush=True)


def train(
    contender: str, seed: int, rate: float, options: argparse.Namespace, data: tuple[ImageDataset, ImageDataset]
) -> dict[str, Any]:
    """One run's curve. Raises: ValueError: it did not stay finite."""
    train_data, test = data
    trainer = trainer_of(contender, seed, rate, options, engine="sequential")
    spent = time.process_time()
    result = trainer.fit(
        OnceThrough(train_data, seed, options.batch, steps_of_part(options)),
        epochs=options.points,
        batch_size=options.batch,
        eval_data=(test.images.long(), test.labels.long()),
        eval_batch_size=options.batch,
    )
    if result.stopped_by is not None:
        raise KeyboardInterrupt
    return {
        "curve": [
            {
                "tokens": (epoch.epoch + 1) * tokens_of_run(options) // options.points,
                "bits_per_byte": dict(epoch.eval_figures)["bits_per_byte"],
                "acc1": epoch.eval_acc1,
                "layer_acc1": dict(epoch.layer_acc1),
            }
            for epoch in result.epochs
        ],
        "processor_seconds": round(time.process_time() - spent, 3),
        "weights_sha256": result.weights_sha256,
        "environment": to_plain(environment()),
    }


def trainer_of(contender: str, seed: int, rate: float, options: argparse.Namespace, **more: Any) -> Trainer:
    name, _, parts = contender.partition("/")
    return Trainer(
        network(seed, options, in_parts=parts == str(PARTS)),
        rule=RULES[name],
        optimizer=partial(torch.optim.AdamW, lr=rate, fused=True),
        task=Tokens(shift=False, bytes_per_token=1),
        seed=seed,
        threads=1,
        progress=False,
        **more,
    )


def network(seed: int, options: argparse.Namespace, *, in_parts: bool) -> list[Block]:
    """A block for each layer, or three of several layers each, of the same start weights."""
    blocks = gpt(num_classes=256, image_size=options.length, width=options.width, depth=options.depth, seed=seed)
    if not in_parts:
        return blocks
    cuts = [0, *(1 + options.depth * part // PARTS for part in range(1, PARTS)), len(blocks)]
    found = []
    for number, (begin, end) in enumerate(pairwise(cuts), start=1):
        body = nn.Sequential(OrderedDict((block.name, block.body) for block in blocks[begin:end]))
        found.append(
            Block(f"part{number}", body, layout="tokens", hidden=2048)
            if number < PARTS
            else Block("output", body, is_output=True)
        )
    return found


class OnceThrough:
    """Micro-batches of sequences, drawn by the seed without putting back: an epoch's begin where the one before
    ended."""

    def __init__(self, data: ImageDataset, seed: int, batch: int, steps: int) -> None:
        self.data, self.batch, self.steps, self.epoch = data, batch, steps, 0
        self.order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(self.epoch * self.steps, (self.epoch + 1) * self.steps):
            rows = self.order[torch.arange(step * self.batch, (step + 1) * self.batch) % len(self.order)]
            yield self.data.images[rows].long(), self.data.labels[rows].long()


def text(options: argparse.Namespace) -> tuple[ImageDataset, ImageDataset]:
    return load_dataset("stdlib", sequence_length=options.length, num_test=options.test_samples)


def steps_of_part(options: argparse.Namespace) -> int:
    """Micro-batches between two evaluations."""
    found: int = options.tokens // (options.batch * options.length * options.points)
    return found


def tokens_of_run(options: argparse.Namespace) -> int:
    found: int = steps_of_part(options) * options.points * options.batch * options.length
    return found


def told(run: dict[str, Any]) -> str:
    rate = run["tokens"] / run["processor_seconds"]
    curve = " ".join(f"{point['bits_per_byte']:.3f}" for point in run["curve"])
    return f"bits per byte {curve}, {rate:,.0f} tokens per processor second"


# The file


def figures_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the file holds; of a new one, its frame.

    Raises:
        ValueError: it holds figures of other sizes.
    """
    sizes = {name: getattr(options, name) for name in SIZES}
    if not options.json.exists():
        return {"sizes": sizes, "runs": [], "forms": [], "speed": []}
    found = read_figures(options.json)
    if other := {name: was for name, was in found["sizes"].items() if was != sizes[name]}:
        told = ", ".join(f"--{name.replace('_', '-')} {was}" for name, was in other.items())
        raise ValueError(f"{options.json} holds figures of {told}; give these, or another file")
    return found


def add(options: argparse.Namespace, kind: str, more: list[dict[str, Any]]) -> None:
    """Adds figures to the file, whoever else does."""
    with locked(options.json):
        found = figures_of(options)
        found[kind] += more
        write_json(options.json, found)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    raise SystemExit(main())
