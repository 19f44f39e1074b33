"""LLS against backpropagation on one GPU: 25 epochs and per-step times of every engine, in one command.

    python benchmarks/single_gpu.py --json results.json          # synthetic data of CIFAR-10's size
    python benchmarks/single_gpu.py --dataset CIFAR10 --dataset-dir datasets --json results.json
    python benchmarks/single_gpu.py --device cpu --max-steps 20  # the same code without a GPU; says nothing of speed
    python benchmarks/single_gpu.py --device stand-in --in-process --max-steps 9   # and the engine's device side

Every contender runs in a process of its own, with a time budget; they take turns in rounds, so that a drifting machine
favours nobody, and the table gives medians. Set-up (compilation, capture, warm-up) is outside of the times and stands
beside them. The results are written after every run. When `--time-limit` is near, what is left is skipped, so the
command ends in under nine minutes whatever happens.

All contenders read the same resident data by the same input operation, in channels-last memory, with the optimizer in
one kernel; "BP graph" is backpropagation in a CUDA graph with loss and hits from one kernel. `floor` is the work of a
step's kernels at the datasheet's rates, `predicted` what docs/feasibility.md predicts for it (bf16 at tf32's rates).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from on_stand_in import STAND_IN, on_stand_in

from unlocked.comparison.environment import environment
from unlocked.data import ImageDataset, load_dataset
from unlocked.models import get_model
from unlocked.rules import get_rule
from unlocked.runtime import RunResult, Sequential, Streams, Trainer
from unlocked.runtime.saving.whole_file import json_text, write_json
from unlocked.runtime.typed import to_plain

__all__ = ["CONTENDERS", "Contender", "main", "overlap", "table"]

EPOCHS, STEPS_PER_EPOCH = 25, 782
_LEAST = 15.0  # seconds that a run needs at least to be worth starting


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to train."""

    name: str
    rule: str = "LLS"
    options: dict[str, Any] | None = None
    """Of the streams engine; None: the plain loop of the sequential one."""
    kernels: str = "auto"
    precision: str = "tf32"
    compile: bool = False
    traced: bool = False
    evaluate: bool = False
    model: str = "SmallConv"
    four_channels: bool = False
    """The images have a channel of zeros more: whole vectors of four for the first convolution's products."""
    batch_size: int = 64
    steps: int | None = 4000
    """Training micro-batches of a run; None: all 25 epochs."""
    rounds: int = 1
    budget: float = 40.0
    """Seconds for the process."""

    @property
    def engine(self) -> Streams | Sequential:
        return Sequential() if self.options is None else Streams(**self.options)


_ONE_GRAPH = {"stages": 1}


def _streams(name: str, options: dict[str, Any] | None = None, **more: Any) -> Contender:
    return Contender(name=name, options=options or {}, **more)


def _bp(name: str, options: dict[str, Any] | None = _ONE_GRAPH, **more: Any) -> Contender:
    return Contender(name=name, options=options, rule="BP", **more)


# The order is that of importance: what time does not suffice for stands at the end.
CONTENDERS = [
    _streams("LLS streams", steps=None, rounds=3),
    _bp("BP graph", rounds=3),
    _streams("LLS streams, joined", kernels="triton_joined", rounds=2),
    _bp("BP eager", None, kernels="torch", steps=400, rounds=2),
    _streams("LLS sequential graph", _ONE_GRAPH, rounds=2),
    _bp("BP compiled graph", compile=True, rounds=2, budget=90.0),
    _streams("LLS_M streams", rule="LLS_M", steps=None, rounds=2),
    _streams("LLS_MxM streams", rule="LLS_MxM", steps=None, rounds=2),
    _streams("LLS streams, traced", traced=True, steps=2000),
    Contender(name="LLS sequential plain", steps=1000),
    _bp("BP compiled", None, kernels="torch", compile=True, steps=1000, budget=90.0),
    _streams("LLS streams bf16", precision="bf16"),
    _streams("LLS streams bf16, joined", precision="bf16", kernels="triton_joined"),
    _bp("BP graph bf16", precision="bf16"),
    _bp("BP compiled graph bf16", precision="bf16", compile=True, budget=90.0),
    _streams("LLS streams, four channels", four_channels=True),
    _streams("LLS streams, joined, four channels", kernels="triton_joined", four_channels=True),
    _bp("BP graph, four channels", four_channels=True),
    _streams("LLS streams bf16, four channels", precision="bf16", four_channels=True),
    _streams("LLS streams fp32", precision="fp32"),
    _bp("BP graph fp32", precision="fp32"),
    _streams("LLS streams, graph per stage", {"graph_ticks": 0}),
    _streams("LLS streams, graphs of 128 ticks", {"graph_ticks": 128}),
    _streams("LLS streams, no graphs", {"graphs": False}, steps=1000),
    _streams("LLS streams, green sms", {"green_contexts": "sms"}),
    _streams("LLS streams, green queues", {"green_contexts": "queues"}),
    _streams("VGG8 LLS streams", model="VGG8", batch_size=128, steps=400),
    _bp("VGG8 BP graph", model="VGG8", batch_size=128, steps=400),
    _streams("VGG8 LLS streams bf16", model="VGG8", batch_size=128, steps=400, precision="bf16"),
    _bp("VGG8 BP graph bf16", model="VGG8", batch_size=128, steps=400, precision="bf16"),
    _streams("LLS streams, evaluated", evaluate=True, steps=5 * STEPS_PER_EPOCH),
    _bp("BP graph, evaluated", evaluate=True, steps=5 * STEPS_PER_EPOCH),
    _streams("LLS sequential graph, evaluated", _ONE_GRAPH, evaluate=True, steps=5 * STEPS_PER_EPOCH),
    _streams("LLS streams, CUDA C++ kernels", kernels="cuda"),
    _bp("VGG8 BP compiled graph", model="VGG8", batch_size=128, steps=400, compile=True, budget=90.0),
]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("single_gpu: needs a CUDA device; none is there (--device cpu tries the code)", file=sys.stderr)
        return 1
    if options.child:
        contender = Contender(**json.loads(options.child))
        print(json_text(measure(contender, options)))
        return 0
    chosen = [c for c in CONTENDERS if not options.only or c.name in options.only]
    if missing := set(options.only or ()) - {c.name for c in chosen}:
        print(
            f"single_gpu: {sorted(missing)} are no contenders; valid: {[c.name for c in CONTENDERS]}", file=sys.stderr
        )
        return 2
    report: dict[str, Any] = {
        "environment": to_plain(environment()),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "contenders": {c.name: asdict(c) for c in chosen},
        "predicted": {c.name: predicted(c) for c in chosen},
        "runs": {c.name: [] for c in chosen},
    }
    began = time.monotonic()
    for turn in range(max(c.rounds for c in chosen)):
        for contender in chosen:
            if turn >= min(contender.rounds, options.rounds):
                continue
            left = options.time_limit - (time.monotonic() - began)
            result = {"skipped": "no time was left"} if left < _LEAST else run(contender, options, left)
            report["runs"][contender.name].append(result)
            print(f"{contender.name}: {_short(result)}", flush=True)
            if options.json:
                _write(options.json, report)
    print(table(report))
    return 0


def run(contender: Contender, options: argparse.Namespace, left: float) -> dict[str, Any]:
    """One run of one contender, in a process of its own; what went wrong instead, if something did."""
    if options.device != "cuda" and (problem := _adapt(contender, options.device)[1]):
        return {"skipped": problem}
    if options.in_process:
        return measure(contender, options)
    command = [sys.executable, __file__, "--child", json_text(asdict(contender)), "--device", options.device]
    command += ["--dataset", options.dataset, "--dataset-dir", str(options.dataset_dir)]
    for flag in ("max_steps", "train_size", "compile_backend"):
        if (value := getattr(options, flag)) is not None:
            command += [f"--{flag.replace('_', '-')}", str(value)]
    budget = min(contender.budget, left)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=budget, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"out of time after {budget:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        return {"error": f"exit status {done.returncode}: {lines[-1][:300]}", "stderr": lines[-25:]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def measure(contender: Contender, options: argparse.Namespace) -> dict[str, Any]:
    """Trains, in this process."""
    if options.device != "cuda":
        contender, _ = _adapt(contender, options.device)
    torch.backends.cudnn.benchmark = True  # for all alike: the library times its algorithms in the warm-up
    train, test = _load(options.dataset, options.dataset_dir, options.train_size)
    if contender.four_channels:
        train, test = map(with_fourth_channel, (train, test))
    channels, *sides = train.image_shape
    model = get_model(contender.model, in_channels=channels, num_classes=train.num_classes, image_size=sides)
    rule: Any = "BP"
    usual = {
        "optimizer": partial(torch.optim.Adam, lr=0.01, fused=contender.kernels == "torch" or None),
        "device": options.device,
        "kernels": contender.kernels,
    }
    if contender.rule != "BP":
        rule = get_rule(contender.rule, temperature=0.5, label_smoothing=0.0, waveform="cosine")
    stand_in = on_stand_in() if options.device == STAND_IN else nullcontext({})
    with tempfile.TemporaryDirectory() as folder, stand_in as given:
        trace = Path(folder) / "trace.json" if contender.traced else None
        trainer = Trainer(
            model,
            rule=rule,
            engine=contender.engine,
            precision=contender.precision,
            compile=contender.compile and (options.compile_backend or True),
            print_freq=200,
            trace=trace,
            **{**usual, **given},
        )
        if contender.options is None and options.device == "cuda":
            # A plain loop warms up nothing: kernels would be compiled and algorithms chosen in its first steps' time.
            trainer.fit(train, epochs=1, batch_size=contender.batch_size, max_steps=30)
        began = time.perf_counter()
        steps = contender.steps if options.max_steps is None else options.max_steps
        result: RunResult = trainer.fit(
            train,
            epochs=EPOCHS,
            batch_size=min(contender.batch_size, len(train)),
            eval_data=test if contender.evaluate else None,
            eval_batch_size=min(128, len(test)),
            max_steps=steps,
        )
        wall = time.perf_counter() - began
        overlapped = None if trace is None else overlap(json.loads(trace.read_text())["traceEvents"])
    last = result.epochs[-1]
    on_gpu = options.device == "cuda"
    return {
        "steps": result.steps,
        "seconds": result.train_seconds,
        "us_per_step": 1e6 * result.train_seconds / result.steps,
        "images_per_second": result.images_per_second,
        "setup_seconds": result.setup_seconds,
        "wall_seconds": wall,
        "peak_allocated_mib": result.peak_memory_bytes[0] / 2**20,
        "peak_reserved_mib": torch.cuda.max_memory_reserved() / 2**20 if on_gpu else None,
        "busy_fraction": result.busy_fraction,
        "overlapped": overlapped,
        "train_loss": last.train_loss,
        "train_acc1": last.train_acc1,
        "test_acc1": result.test_acc1,
        "local_losses": result.local_losses,
        "weights_sha256": result.weights_sha256,
    }


def with_fourth_channel(data: ImageDataset) -> ImageDataset:
    """The same images with a last channel that is zero, also after normalisation: it adds nothing to any product."""
    padded = torch.nn.functional.pad(data.images, (0, 0, 0, 0, 0, 1))
    return replace(data, images=padded, mean=(*data.mean, 0.0), std=(*data.std, 1.0))


def overlap(events: Iterable[dict[str, Any]]) -> float:
    """The share of all stages' busy time in which another stage is busy too, of a trace's events."""
    edges = []
    for event in events:
        if event["ph"] == "X":
            edges += [(event["ts"], 1), (event["ts"] + event["dur"], -1)]
    total = shared = 0.0
    active, before = 0, 0.0
    for when, change in sorted(edges):  # of equal times ends come first
        total += active * (when - before)
        shared += (active if active > 1 else 0) * (when - before)
        active, before = active + change, when
    return shared / max(total, 1e-9)


def predicted(contender: Contender) -> dict[str, float] | None:
    """Microseconds per step by the cost model, and the floor; None where the model has nothing to say."""
    engine = contender.engine
    joined = contender.kernels == "triton_joined"
    plain = not contender.compile and (joined or contender.kernels == "auto") and not contender.evaluate
    if not plain or (contender.precision == "bf16" and contender.rule == "BP") or isinstance(engine, Sequential):
        return None
    if not engine.graphs or engine.green_contexts != "off":
        return None
    sys.path.insert(0, str(Path(__file__).parent))
    from cost_model import H200, floor_us, predict
    from step_trace import trace_backpropagation, trace_local

    tf32, streamed = contender.precision != "fp32", engine.stages != 1
    if contender.rule == "BP":
        trace = trace_backpropagation(contender.model, contender.batch_size)
    else:
        trace = trace_local(
            contender.model,
            contender.batch_size,
            contender.rule,
            one_stage=not streamed,
            precision="bf16" if contender.precision == "bf16" else "fp32",
            joined=joined,
            in_channels=4 if contender.four_channels else 3,
        )
    found = predict(trace, H200, tf32=tf32)
    floor = sum(floor_us(node, H200, tf32=tf32) for node in trace.nodes)
    return {"us_per_step": found.streamed if streamed else found.serial, "floor_us": floor}


def table(report: dict[str, Any]) -> str:
    """One line per contender: medians over its runs, against the floor and the prediction for an H200."""
    heads = ("us/step", "min", "max", "images/s", "25 epochs s", "MiB", "floor us", "pred. us")
    lines = [f"{'contender':<34}" + "".join(f"{head:>12}" for head in heads)]
    medians = {}
    for name, results in report["runs"].items():
        done = [r for r in results if "us_per_step" in r]
        if not done:
            reasons = [r.get("error") or r.get("skipped") for r in results]
            lines.append(f"{name:<34}  {reasons[0] if reasons else 'not run'}")
            continue
        times = [r["us_per_step"] for r in done]
        medians[name] = median = statistics.median(times)
        images = statistics.median(r["images_per_second"] for r in done)
        small = report["contenders"][name]["model"] == "SmallConv"
        whole = f"{median * EPOCHS * STEPS_PER_EPOCH / 1e6:.2f}" if small else "-"
        guess = report["predicted"].get(name) or {}
        cells = [f"{median:.1f}", f"{min(times):.1f}", f"{max(times):.1f}", f"{images:.0f}", whole]
        cells += [f"{done[0]['peak_allocated_mib']:.0f}"]
        cells += [f"{guess[key]:.1f}" if key in guess else "-" for key in ("floor_us", "us_per_step")]
        lines.append(f"{name:<34}" + "".join(f"{cell:>12}" for cell in cells))
    for rival in ("BP graph", "BP compiled graph", "BP eager", "LLS sequential graph"):
        if "LLS streams" in medians and rival in medians:
            lines.append(f"LLS streams: {medians[rival] / medians['LLS streams']:.2f} x the images/s of {rival}")
    for traced in report["runs"].get("LLS streams, traced", ()):
        if traced.get("overlapped") is not None:
            lines.append(f"overlapped in the trace: {100 * traced['overlapped']:.0f} % of stage time")
    return "\n".join(lines)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--dataset-dir", type=Path, default=Path("datasets"))
    parser.add_argument("--only", nargs="*", metavar="NAME", help="names of contenders")
    parser.add_argument("--rounds", type=int, default=3, help="at most so many runs of each")
    parser.add_argument("--time-limit", type=float, default=500.0, help="seconds after which nothing new is started")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rewritten after every run")
    parser.add_argument("--max-steps", type=int, help="training micro-batches of every run")
    parser.add_argument("--train-size", type=int, help="only the first so many training images")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu", STAND_IN))
    parser.add_argument("--compile-backend", help="of torch.compile, instead of its default")
    parser.add_argument("--in-process", action="store_true", help="all in this process, without time budgets")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _adapt(contender: Contender, device: str) -> tuple[Contender, str]:
    """The contender's form on a CPU or on the stand-in for a GPU, or why it has none."""
    if device == STAND_IN and contender.compile:
        return contender, "compiled kernels have no form on the stand-in"
    if isinstance(contender.engine, Streams) and contender.engine.green_contexts != "off":
        return contender, "green contexts have no CPU form"
    if contender.kernels in ("cuda", "triton_joined"):
        return contender, f"{contender.kernels} kernels have no CPU form"
    return replace(contender, precision="fp32" if contender.precision == "tf32" else contender.precision), ""


@lru_cache(maxsize=1)
def _load(dataset: str, folder: Path, size: int | None) -> tuple[ImageDataset, ImageDataset]:
    train, test = load_dataset(dataset, folder)
    if not isinstance(train, ImageDataset) or not isinstance(test, ImageDataset):
        raise ValueError(f"single_gpu: {dataset} is read from a loader; give a dataset that a device can hold")
    if size is not None:
        train, test = (replace(data, images=data.images[:size], labels=data.labels[:size]) for data in (train, test))
    return train, test


def _write(path: Path, report: dict[str, Any]) -> None:
    """Never half a file, should the process be ended."""
    write_json(path, report)


def _short(result: dict[str, Any]) -> str:
    if "us_per_step" not in result:
        return str(result.get("error") or result.get("skipped"))
    return f"{result['us_per_step']:.1f} us/step, {result['seconds']:.2f} s, set-up {result['setup_seconds']:.1f} s"


if __name__ == "__main__":
    sys.exit(main())
