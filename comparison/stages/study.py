"""Throughput against the number of stages: measured on this machine, predicted by the simulator to 1,024.

    python launch/compare.py --study stages

The network grows with the pipeline: every stage holds the same number of equal convolutional blocks, so an ideal
pipeline keeps its images per second however deep the network becomes. Measured are the local step of chains of several
depths, a hop between two processes for several sizes, backpropagation's parts of a block, and the pipeline itself on 1
to N processes of one thread. A cost model is fitted to all but the last, and the simulator plays LLS, GPipe, 1F1B and
zero-bubble (ZB-H1) with it; the measured pipelines test it. More processes than cores share them and are marked so.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from unlocked.comparison.memory.chain import build_chain, chain
from unlocked.comparison.memory.results import ChainSettings
from unlocked.comparison.report.figures import require_plotting
from unlocked.comparison.report.sections import Headline, render
from unlocked.comparison.stages.hops import measure_hops
from unlocked.comparison.stages.page import stages_section
from unlocked.comparison.stages.results import MeasuredStages, StagesSettings, StagesStudy
from unlocked.comparison.stages.scaling_model import LOCAL, CostModel, Line, Link, Prediction, predict, stage_factors
from unlocked.comparison.stages.worker import train_chain
from unlocked.data.cores import usable_cores
from unlocked.runtime.machine import keep_freed_memory
from unlocked.runtime.saving.whole_file import write_whole
from unlocked.runtime.schedules.backpropagation import SCHEDULES
from unlocked.runtime.schedules.simulate import transfer_seconds
from unlocked.runtime.settings import LineParser

__all__ = ["StagesStudy", "fit_cost_model", "main", "measure_stages", "run_predictions", "write_stages_study"]

_HOP_WIDTHS = (16, 256, 2048, 8192)  # floats per sample


def main(arguments: Sequence[str] | None = None) -> int:
    """The study on the command line: what was measured and fitted, a table, and a page."""
    options = _parse(arguments)
    require_plotting()
    settings = StagesSettings(
        chain=ChainSettings(
            channels=options.channels,
            image_size=options.image_size,
            batch_size=options.batch_size,
            kernels=options.kernels,
        ),
        blocks_per_stage=options.blocks_per_stage,
        rule=options.training_mode,
        cores=usable_cores(),
        repeats=options.repeats,
        run_seconds=options.run_seconds,
        microbatches=options.microbatches,
        spread=options.spread,
        speed=options.compute_speed,
        link_latency=options.link_latency,
        link_bandwidth=options.link_bandwidth,
        torch=str(torch.__version__),
    )
    most = options.max_stages or 2 * settings.cores
    counts = sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most})
    torch.set_num_threads(1)
    model = fit_cost_model(settings)
    print(*describe_model(model, settings), sep="\n")
    measured = measure_stages(settings, model, counts)
    study = StagesStudy(
        settings=settings, model=model, measured=measured, predictions=run_predictions(settings, model, options.predict)
    )
    print(*study.table(), sep="\n")
    write_stages_study(study, options.output)
    print(f"wrote {options.output / 'stages.html'}, stages.json and stages.csv")
    return 0


def fit_cost_model(settings: StagesSettings) -> CostModel:
    """Measures chains, hops and backpropagation's parts on one core each, and fits."""
    keep_freed_memory()  # as every training process does; page faults are none of a step's costs
    k = settings.blocks_per_stage
    depths = [k, 2 * k, 4 * k]
    steps = [_StepTimer(settings, depth) for depth in depths]
    whole = _BackpropagationTimer(settings, 4 * k)
    for _ in range(settings.repeats + 1):  # in turns, for a machine that drifts; the first round warms up
        for timer in steps:
            timer.run(2 * settings.step_repeats)
        whole.run(settings.step_repeats)
    steps[-1].block_times()  # to warm up
    forward, update = (statistics.median(part) for part in zip(*steps[-1].block_times(), strict=True))
    hops = measure_hops(
        {str(width): (width,) for width in _HOP_WIDTHS},
        batch_size=settings.chain.batch_size,
        transport="auto",
        batches=settings.hop_batches,
    )
    sizes, seconds = zip(*hops.values(), strict=True)
    return CostModel(
        step=Line.fit(depths, [timer.median for timer in steps]),
        forward_share=forward / (forward + update),
        output=steps[-1].output_seconds(),
        hop=Line.fit([float(size) for size in sizes], list(seconds)),
        backpropagation=whole.per_block(),
    )


def measure_stages(settings: StagesSettings, model: CostModel, counts: Sequence[int]) -> list[MeasuredStages]:
    """Trains the pipelines, taking turns."""
    rates: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(settings.repeats):
        for count in counts:
            rates[count].append(_train(settings, model, count))
    return [
        MeasuredStages(
            stages=count,
            images_per_second=statistics.median(values),
            low=min(values),
            high=max(values),
            repeats=len(values),
            oversubscribed=count > settings.cores,
        )
        for count, values in rates.items()
    ]


def run_predictions(settings: StagesSettings, model: CostModel, most: int) -> list[Prediction]:
    """Every schedule on 1, 2, 4, ... `most` stages, equal ones and ones that differ by the spread."""
    counts = [2**i for i in range(most.bit_length()) if 2**i <= most]
    common: dict[str, Any] = {
        "blocks": settings.blocks_per_stage,
        "link": _link(settings, model),
        "speed": settings.speed,
    }
    found = []
    for schedule in (LOCAL, *SCHEDULES):
        for spread in sorted({0.0, settings.spread}):
            for count in counts:
                found.append(
                    predict(model, schedule, count, microbatches=settings.microbatches, spread=spread, **common)
                )
    # What backpropagation could do if its batch grew with the pipeline.
    for count in counts:
        if 4 * count > settings.microbatches and count <= settings.growing_limit:
            found.append(predict(model, "1F1B", count, microbatches=4 * count, **common))
    return found


def describe_model(model: CostModel, settings: StagesSettings) -> list[str]:
    """The fitted costs with their residuals, one per line."""
    parts = ", ".join(f"{kind} {seconds * 1e3:.3f}" for kind, seconds in model.backpropagation.items())
    return [
        f"a local step: {model.step.intercept * 1e3:.3f} ms + {model.step.slope * 1e3:.3f} ms per block "
        f"(residuals up to {model.step.largest_residual:.1%}), of which forward {model.forward_share:.0%}",
        f"a hop: {model.hop.intercept * 1e6:.0f} us + {model.hop.slope * 2**20 * 1e6:.0f} us per MiB "
        f"(residuals up to {model.hop.largest_residual:.1%}); here {settings.hop_bytes / 2**10:,.0f} KiB",
        f"backpropagation, ms per block: {parts}",
    ]


def write_stages_study(study: StagesStudy, folder: Path) -> None:
    """stages.json, stages.csv and stages.html."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "stages.json", json.dumps(study.as_dict(), indent=1))
    rows = [asdict(prediction) for prediction in study.predictions]
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    write_whole(folder / "stages.csv", "\n".join(lines) + "\n")
    s = study.settings
    conditions = (
        f"{s.blocks_per_stage} blocks per stage",
        f"batch {s.chain.batch_size}",
        f"{s.cores} cores",
        f"torch {s.torch}",
    )
    what = Headline(sentence=study.sentence(), conditions=conditions)
    write_whole(folder / "stages.html", render("Throughput against stages", what, [stages_section(study)]))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = LineParser(
        prog="unlocked compare --study stages",
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--max-stages", type=int, default=None, help="most processes to measure (default: twice the cores)")
    add("--predict", type=int, default=1024, help="most stages to predict")
    add("--blocks-per-stage", type=int, default=2)
    add("--channels", type=int, default=32)
    add("--image-size", type=int, default=16)
    add("--batch-size", type=int, default=32, help="rows of a micro-batch")
    add("--training-mode", default="LLS", help="the local rule")
    add("--kernels", default="auto")
    add("--repeats", type=int, default=3)
    add("--run-seconds", type=float, default=3.0, help="of a measured pipeline, about")
    add("--microbatches", type=int, default=32, help="of one step of backpropagation, whatever the number of stages")
    add("--spread", type=float, default=0.1, help="of the stages' speeds: standard deviation of the logarithm")
    add("--compute-speed", type=float, default=1.0, help="of a stage; this machine's core is 1")
    add(
        "--link-latency",
        type=float,
        default=None,
        help="microseconds; with --link-bandwidth instead of the measured hop",
    )
    add("--link-bandwidth", type=float, default=None, help="GB/s")
    add(
        "--output",
        type=Path,
        default=Path("runs/comparison"),
        help="folder for stages.json, .csv and .html",
    )
    options = parser.parse_args(arguments)
    for flag in ("max_stages", "predict", "blocks_per_stage", "repeats", "microbatches"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value} is not valid. Give at least 1.")
    for flag in ("compute_speed", "link_bandwidth", "run_seconds"):
        value = getattr(options, flag)
        if value is not None and not value > 0:
            raise ValueError(f"--{flag.replace('_', '-')} {value} is not valid. Give more than 0.")
    stage_factors(1, options.spread)  # says now what is wrong with a spread
    if (options.link_latency is None) != (options.link_bandwidth is None):
        raise ValueError(
            "--link-latency and --link-bandwidth belong together. Give both, or neither for the measured hop."
        )
    return options


def _link(settings: StagesSettings, model: CostModel) -> Link:
    if settings.link_latency is None or settings.link_bandwidth is None:
        return Link(seconds=max(model.hop.at(settings.hop_bytes), 0.0), occupies_sender=True)
    seconds = transfer_seconds(
        settings.hop_bytes, latency=settings.link_latency * 1e-6, bandwidth=settings.link_bandwidth * 1e9
    )
    return Link(seconds=seconds, occupies_sender=False)


class _StepTimer:
    """The local step of one chain in this process: with the loop, as a whole, and block by block."""

    def __init__(self, settings: StagesSettings, depth: int) -> None:
        self._settings, self._depth = settings, depth
        self._stage, self._x, self._labels = build_chain(settings.rule, depth, settings.chain, torch.device("cpu"))
        self._rounds: list[float] = []

    def run(self, steps: int) -> None:
        s = self._settings
        result = train_chain(blocks=self._depth, stages=1, steps=steps, rule=s.rule, settings=s.chain)
        self._rounds.append(result.train_seconds / steps)

    @property
    def median(self) -> float:
        """Seconds of a step, of all rounds but the first."""
        return statistics.median(self._rounds[1:])

    def block_times(self) -> list[tuple[float, float]]:
        """(forward, update) of every block, one step each."""
        pairs, x = [], self._x
        for layer in self._stage.layers[:-1]:
            out, forward = _timed(layer.forward, x)
            _, update = _timed(layer.update, self._labels)
            pairs.append((forward, update))
            x = out
        return pairs

    def output_seconds(self) -> float:
        layer = self._stage.layers[-1]
        x = torch.randn(self._x.shape[0], self._x.shape[1], 2, 2)
        return statistics.median(_timed(layer.forward, x)[1] + _timed(layer.update, self._labels)[1] for _ in range(9))


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - began


class _BackpropagationTimer:
    """The parts of backpropagation's step through a chain of blocks, in this process."""

    def __init__(self, settings: StagesSettings, depth: int) -> None:
        s = settings.chain
        blocks = chain(depth, s)[:-2]  # equal ones: neither the last, which pools, nor the output layer
        self._body = torch.nn.Sequential(*blocks).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        shape = (s.batch_size, s.channels, s.image_size, s.image_size)
        self._x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
        self._gradient = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        self._weights = list(self._body.parameters())
        self._optimizer = torch.optim.Adam(self._weights, lr=0.01, fused=True)
        self._rounds: list[list[tuple[float, ...]]] = []

    def run(self, steps: int) -> None:
        self._rounds.append([self._step() for _ in range(steps)])

    def _step(self) -> tuple[float, ...]:
        """Seconds of F, B, W and U. W is what a whole backward pass takes beyond B: cutting it is taken to be free."""
        out, forward = _timed(self._body, self._x)
        _, inputs = _timed(lambda: torch.autograd.grad(out, self._x, self._gradient))
        again = self._body(self._x)
        grads, whole = _timed(lambda: torch.autograd.grad(again, [self._x, *self._weights], self._gradient))
        for weight, grad in zip(self._weights, grads[1:], strict=True):
            weight.grad = grad
        _, update = _timed(self._optimizer.step)
        return forward, inputs, max(whole - inputs, 0.0), update

    def per_block(self) -> dict[str, float]:
        """Medians of all rounds but the first."""
        columns = zip(*(step for steps in self._rounds[1:] for step in steps), strict=True)
        medians = [statistics.median(column) / len(self._body) for column in columns]
        return dict(zip(("F", "B", "W", "U"), medians, strict=True))


def _train(settings: StagesSettings, model: CostModel, count: int) -> float:
    """Images per second of `count` processes of one thread."""
    blocks = count * settings.blocks_per_stage
    step = model.step.at(blocks) / min(count, settings.cores)
    with tempfile.TemporaryDirectory() as folder:
        summary = Path(folder) / "summary.json"
        given = {
            "blocks": blocks,
            "stages": count,
            "steps": max(16, round(settings.run_seconds / step)),
            "rule": settings.rule,
            "settings": asdict(settings.chain),
            "summary": str(summary),
        }
        launcher = [sys.executable]
        if count > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command = [*launcher, "-m", "unlocked.comparison.stages.worker", json.dumps(given)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            tail = " ".join(done.stderr.split()[-60:])
            raise RuntimeError(f"the pipeline of {count} processes failed: {tail}")
        return float(json.loads(summary.read_text())["images_per_second"])
