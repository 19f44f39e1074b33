"""Times every operation of the local step on one GPU: our kernels beside PyTorch's eager modules and torch.compile.

    python benchmarks/kernels.py --json benchmarks/results/latest/kernels.json
    python benchmarks/kernels.py --quick           # SmallConv and one size of the rest, batch 64, no torch.compile
    python benchmarks/kernels.py --check           # compares all contenders with the reference, times nothing

Every contender is first compared with the reference. Times are medians (and 20th and 80th percentiles) of CUDA graph
replays, read by events, contenders in turns. Buffers rotate: where one call's data are a large part of the L2 cache,
over several times its size; smaller ones stay in it, as they do in training. Bandwidth and rate stand beside what this
card reached in the same run on a large copy and on matrix products. --check also runs without a GPU, on small shapes
(with TRITON_INTERPRET=1 for the Triton kernels).
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from block_cases import IMAGES, TOKENS, block_cases
from gpu_timing import Captured, capture, ceilings, environment, measure_in_turns
from kernel_cases import Case, Context, head_cases, layers_of, norm_act_cases
from step_cases import CONVOLUTIONS, convolution_cases, load_cases, optimizer_cases, step_case
from weight_grad_cases import weight_grad_cases

from unlocked.kernels.dispatch import get_backend
from unlocked.runtime.saving.whole_file import write_json

_TOLERANCES = {"bf16": 2e-2, "tf32": 3e-3}  # else 1e-3: float32 arithmetic in another order
_LARGE = 0.25  # of the L2 cache: from here on buffers rotate beyond it


def main() -> int:
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.check:
        print("kernels: needs a CUDA device; none is there (--check runs without one)", file=sys.stderr)
        return 1
    torch.backends.cudnn.benchmark = True
    # A compiled way back is timed again and again on one way forward, so its buffers can't be given away.
    torch._functorch.config.donated_buffer = False
    context, missing = make_context(device, compiled=not (options.quick or options.check))
    cases = small_cases(context) if options.check and device.type == "cpu" else all_cases(context, options.quick)
    if options.only:
        cases = (case for case in cases if options.only in f"{case.operation} {case.shape}")
    if options.check:
        return check_all(cases, device)
    report: dict[str, Any] = {
        "environment": environment(),
        "missing": missing,
        "ceilings": ceilings(quick=options.quick),
    }
    report["rows"], report["left_out"] = measure_all(cases, context, report["ceilings"], options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, report)
    print(summary(report))
    return 1 if any("error" in row and _is_ours(row["contender"]) for row in report["rows"]) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="few sizes at batch 64, without torch.compile")
    parser.add_argument("--check", action="store_true", help="compare with the reference, time nothing")
    parser.add_argument("--only", metavar="TEXT", help="cases whose operation and shape contain this text")
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument(
        "--time-limit", type=float, default=math.inf, metavar="SECONDS", help="begin no further case after so long"
    )
    return parser.parse_args()


def make_context(device: torch.device, *, compiled: bool) -> tuple[Context, dict[str, str]]:
    """The context, and why a backend is missing."""
    backends, missing = {}, {}
    for name in ("triton", "cuda"):
        try:
            backends[name] = get_backend(name, device)
        except (ValueError, RuntimeError, ImportError) as error:
            missing[name] = str(error)
            print(f"kernels: without {name}: {error}", file=sys.stderr)
    return Context(device, backends, compiled), missing


def all_cases(context: Context, quick: bool) -> Iterator[Case]:
    """The most wanted first, since the time may be limited."""
    hand = _hand(context)
    yield step_case(64, context)
    small = layers_of("SmallConv", 64)
    for layer in small:
        yield from norm_act_cases(layer, context)
    yield from weight_grad_cases(64, context)
    for layer in {layer.latents: layer for layer in small}.values():
        yield from head_cases(layer, context, hand)
    yield from load_cases(64, 10_000, context)
    for name, inputs, outputs, _ in CONVOLUTIONS:
        yield from optimizer_cases(name, [(outputs, inputs, 3, 3), (outputs,), (outputs,), (outputs,)], context)
    yield from optimizer_cases("linear1", [(512, 512), (512,), (512,), (512,)], context)
    yield from convolution_cases(64, context)
    yield from block_cases(64, context, IMAGES[:1], TOKENS[:1])
    if quick:
        return
    yield from block_cases(64, context, IMAGES[:1], TOKENS[:1], torch.bfloat16)
    yield from block_cases(64, context, IMAGES[1:], TOKENS[1:])
    for model, batch in (("SmallConv", 2048), ("VGG8", 128), ("MobileNetV1", 128)):
        for layer in layers_of(model, batch):
            yield from norm_act_cases(layer, context)
    yield from head_cases(layers_of("SmallConv", 2048)[0], context, hand)
    yield from load_cases(2048, 10_000, context)


def small_cases(context: Context) -> Iterator[Case]:
    """Each kind of case once, on shapes for the interpreter."""
    yield step_case(2, context, count=1)
    layers = layers_of("SmallConv", 2)
    inside = next(layer for layer in layers_of("MobileNetV1", 2) if layer.latent_size == 0)
    for layer in (layers[2], layers[3], inside):
        yield from norm_act_cases(layer, context)
    yield from weight_grad_cases(1, context, count=1)
    yield from head_cases(layers[1], context, _hand(context))
    for dtype in (torch.float32, torch.bfloat16):
        yield from block_cases(2, context, ((20, 8, 2),), ((5, 24),), dtype)
    yield from load_cases(2, 8, context)
    yield from optimizer_cases("small", [(5, 3, 3, 3), (7,)], context)
    yield from convolution_cases(1, context)


def check(case: Case, names: list[str]) -> dict[str, float]:
    """Contender -> largest relative error of a result, in the norm, against the reference on the same values."""
    wanted = [t.detach().double().clone() for t in case.makers["reference"](0)()]
    errors = {}
    for name in names:
        found = [t.detach().double() for t in case.makers[name](0)()]
        if [t.shape for t in found] != [t.shape for t in wanted]:
            raise AssertionError(f"{case.operation} {case.shape}: {name} gives {[tuple(t.shape) for t in found]}")
        distances = [float((f - w).norm() / w.norm().clamp_min(1e-30)) for f, w in zip(found, wanted, strict=True)]
        errors[name] = max(d if math.isfinite(d) else math.inf for d in distances)
    return errors


def tolerance(name: str) -> float:
    return next((value for word, value in _TOLERANCES.items() if word in name), 1e-3)


def check_all(cases: Iterator[Case], device: torch.device) -> int:
    wrong = 0
    for case in cases:
        names = [name for name in case.makers if name != "reference"]
        for name, error in check(case, names).items():
            verdict = "ok" if error <= tolerance(name) else "WRONG"
            wrong += verdict != "ok"
            print(f"{case.operation:<26} {case.shape:<34} {name:<20} {error:.1e} {verdict}")
    print(f"{wrong} wrong on {device.type}")
    return 1 if wrong else 0


def measure_all(
    cases: Iterator[Case], context: Context, top: dict[str, float], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row per case and contender, and the cases that the time limit left out."""
    began, rows, left_out = time.monotonic(), [], []
    print(
        f"{'operation':<26} {'shape':<34} {'contender':<20} {'us':>9} {'20 %':>9} {'80 %':>9} {'GB/s':>7} "
        f"{'of copy':>8}"
    )
    for case in cases:
        if time.monotonic() - began > options.time_limit:
            left_out.append(f"{case.operation} {case.shape}")
            continue
        for row in measure(case, context, top, options.replays):
            rows.append(row)
            print(_line(row), flush=True)
        torch.cuda.empty_cache()
        torch.compiler.reset()
    return rows, left_out


def measure(case: Case, context: Context, top: dict[str, float], replays: int) -> list[dict[str, Any]]:
    """One case's contenders, in turns. One that fails or is wrong is a row with its error."""
    l2 = torch.cuda.get_device_properties(context.device).L2_cache_size
    sets = 4 if case.bytes < _LARGE * l2 else max(2, min(16, math.ceil(3 * l2 / case.bytes)))
    stream = torch.cuda.Stream(context.device)
    rows: list[dict[str, Any]] = []
    captured: list[Captured] = []
    for name in case.makers:
        if name == "reference":
            continue
        row: dict[str, Any] = {"operation": case.operation, "shape": case.shape, "contender": name, "bytes": case.bytes}
        row |= {"flops": case.flops, "buffer_sets": sets}
        rows.append(row)
        try:
            row["relative_error"] = off = check(case, [name])[name]
            if off > tolerance(name):
                row["error"] = f"wrong: relative error {off:.1e}"
                continue
            stream.wait_stream(torch.cuda.current_stream(context.device))
            with torch.cuda.stream(stream):
                calls = [case.makers[name](index) for index in range(sets)]
            captured.append(capture(name, calls, stream))
        except Exception as error:  # one contender's failure is a result; the others still report
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            torch.cuda.synchronize()
    for name, sample in measure_in_turns(captured, stream, replays).items():
        row = next(found for found in rows if found["contender"] == name)
        row |= asdict(sample) | {"gb_per_second": case.bytes / sample.median / 1e3}
        row |= {"tflop_per_second": case.flops / sample.median / 1e6}
        row["share_of_copy"] = 1e6 * case.bytes / sample.median / top["copy"]
        rate = name.split()[0] if name.split()[0] in top else case.unit
        row["share_of_rate"] = 1e6 * case.flops / sample.median / top[rate]
    return rows


def summary(report: dict[str, Any]) -> str:
    """What matters most, short, last."""
    top, rows = report["ceilings"], report["rows"]
    rates = ", ".join(f"{name} {top[name] / 1e12:.0f}" for name in ("bf16", "tf32", "fp32"))
    lines = [
        "== summary",
        f"{report['environment']['gpus'][0]}: copy {top['copy'] / 1e12:.2f} TB/s; matrix products {rates} TFLOP/s",
    ]
    for wanted in ("SmallConv local step", "local_head LLS", "norm_act", "sum_act", "gelu", "max_pool"):
        groups: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            if row["operation"].startswith(wanted) and "64x" in row["shape"] + "64x" * ("batch" in row["shape"]):
                time_or_not = f"{row['median']:.1f}" if "median" in row else "failed"
                groups.setdefault((row["operation"], row["shape"]), []).append(f"{row['contender']} {time_or_not}")
        lines += [f"{op} {shape}: {', '.join(found)} us" for (op, shape), found in groups.items()]
    failed = [row for row in rows if "error" in row]
    lines += [f"failed: {r['operation']} {r['shape']} {r['contender']}: {r['error'][:90]}" for r in failed[:8]]
    lines.append(f"{len(rows)} rows, {len(failed)} failed, {len(report['left_out'])} cases left out by the time limit")
    return "\n".join(lines)


def _is_ours(contender: str) -> bool:
    return contender.split()[0] in ("triton", "cuda", "hand")  # behind it may stand a type


def _line(row: dict[str, Any]) -> str:
    head = f"{row['operation']:<26} {row['shape']:<34} {row['contender']:<20}"
    if "error" in row:
        return f"{head} {row['error'][:80]}"
    times = " ".join(f"{row[key]:>9.2f}" for key in ("median", "low", "high"))
    return f"{head} {times} {row['gb_per_second']:>7.0f} {row['share_of_copy']:>8.1%}"


def _hand(context: Context) -> Any:
    if "triton" not in context.backends:
        return None
    from hand_head import hand_head

    return hand_head


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "8")
    sys.exit(main())
