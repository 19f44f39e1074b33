"""Predicted times of the local step on an H200, beside those that one has measured: the tables of docs/feasibility.md.

    python benchmarks/predict.py                             # a short summary
    python benchmarks/predict.py --update docs/feasibility.md  # rewrites the tables between the document's marks
    python benchmarks/predict.py --json predictions.json

The kernels are those that the workers launch (step_trace.py), their times come from the cost model (cost_model.py) and
the pipeline's from `unlocked.runtime.schedules.simulate`. What was measured (measured.py), and the ahead-of-time tables
(ahead_of_time.py), are read from benchmarks/results.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from cost_model import CASES, H200, Machine, Prediction, floor_us, node_us, predict
from measured import NOT_MEASURED, measured_head, measured_node, measured_plan, measured_step
from plans import PLANS
from step_trace import Node, StepTrace, trace_backpropagation, trace_local

from unlocked.runtime.saving.whole_file import write_json

__all__ = ["TABLES", "main", "update_document"]

RESULTS = Path(__file__).parent / "results"
RULES = ("LLS", "LLS_M", "LLS_MxM", "LLS_MxM_reduced", "LLS_Random", "LLS_M_Random", "LLS_MxM_Random", "LocalLosses")
_MARK = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", type=Path, metavar="FILE", help="rewrite this document's tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all predictions")
    options = parser.parse_args()
    print(_steps())
    if options.update:
        text = options.update.read_text()
        options.update.write_text(update_document(text))
        print(f"rewrote the tables of {options.update}")
    if options.json:
        write_json(options.json, _report())
    return 0


def update_document(text: str) -> str:
    """`text` with every `<!-- table: NAME -->` ... `<!-- end -->` filled anew.

    Raises:
        ValueError: a name that is not in `TABLES`.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"table {name!r} is not known; valid: {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end -->"

    return _MARK.sub(fill, text)


# What is predicted


@lru_cache
def _local(
    model: str, batch: int, rule: str = "LLS", one_stage: bool = False, bf16: bool = False, joined: bool = False
) -> StepTrace:
    precision = "bf16" if bf16 else "fp32"
    return trace_local(model, batch, rule, one_stage=one_stage, precision=precision, joined=joined)


@lru_cache
def _backpropagation(model: str, batch: int) -> StepTrace:
    return trace_backpropagation(model, batch)


def _contenders(model: str, batch: int) -> list[tuple[str, StepTrace, bool]]:
    """Name, trace, whether it is streamed."""
    rules = ("LLS", "LLS_M", "LLS_MxM") if model == "SmallConv" else ("LLS",)
    streamed = [(f"{rule} streams", _local(model, batch, rule), True) for rule in rules]
    streamed.append(("LLS streams without small operations", _without_small(_local(model, batch)), True))
    rest = [("LLS sequential graph", _local(model, batch, "LLS", True), False)]
    return [*streamed, *rest, ("BP graph", _backpropagation(model, batch), False)]


def _without_small(trace: StepTrace) -> StepTrace:
    """What if all kernels of PyTorch on a few kilobytes were part of ours?"""
    return replace(trace, stages=[[n for n in stage if not _is_small(n)] for stage in trace.stages])


def _us(prediction: Prediction, streamed: bool) -> float:
    return prediction.streamed if streamed else prediction.serial


# The tables


def _assumptions() -> str:
    sheet, fitted = "vendor datasheet", "fitted to SmallConv's layers on an H200"
    numbers: list[tuple[str, str, Callable[[Machine], float], str]] = [
        ("device-to-device copy", "TB/s", lambda m: m.bandwidth / 1e12, "measured on an H200"),
        ("tf32, dense", "TFLOP/s", lambda m: m.tf32 / 1e12, sheet),
        ("fp32", "TFLOP/s", lambda m: m.fp32 / 1e12, sheet),
        ("multiprocessors", "", lambda m: m.multiprocessors, sheet),
        ("library's share of the tf32 rate", "", lambda m: m.efficiency_tf32, "assumed"),
        ("library's share of the fp32 rate", "", lambda m: m.efficiency_fp32, fitted),
        ("the same of convolutions of fewer than eight channels", "", lambda m: m.efficiency_few, fitted),
        ("joined weight gradient's share of the tf32 rate", "", lambda m: m.efficiency_joined, fitted),
        ("fixed time of a convolution", "us", lambda m: m.ramp, fitted),
        ("fixed time of a weight gradient", "us", lambda m: m.weight_ramp, fitted),
        ("fixed time of a joined weight gradient", "us", lambda m: m.joined_ramp, fitted),
        ("latency of a graph node", "us", lambda m: m.node, "assumed"),
        ("a load that others wait for", "us", lambda m: m.trip, "assumed"),
        ("gap between two captured graphs", "us", lambda m: m.block_gap, "assumed"),
        ("a micro-batch issued outside of a graph, per stage", "us", lambda m: m.tick, "assumed"),
        ("work of stages side by side over one after the other", "", lambda m: m.overlap, "measured on an H200: 1.58"),
    ]
    body = [[name, unit, *(f"{value(m):g}" for m in CASES.values()), source] for name, unit, value, source in numbers]
    return _table(["number", "unit", *CASES, "source"], body, "ll" + "r" * len(CASES) + "l")


def _steps(model: str = "SmallConv", batch: int = 64) -> str:
    rows = []
    base = {c: _us(predict(_backpropagation(model, batch), m), False) for c, m in CASES.items()}
    for name, trace, streamed in _contenders(model, batch):
        found = {case: predict(trace, machine) for case, machine in CASES.items()}
        times = [_us(found[case], streamed) for case in CASES]
        fp32 = _us(predict(trace, H200, tf32=False), streamed)
        runs = [found[case].run_seconds(machine, streamed=streamed) for case, machine in CASES.items()]
        ratios = [base[case] / _us(found[case], streamed) for case in CASES]
        row = [name, str(found["middle"].nodes), _range(times, 1), f"{fp32:.1f}", _range(ratios, 1)]
        rows.append([*row, *([_range(runs, 2)] if model == "SmallConv" else [])])
        rows[-1].append(measured_step(name) if model == "SmallConv" else NOT_MEASURED)
    heads = ["contender", "kernels per step", "us/step, tf32", "us/step, fp32", "BP graph / this"]
    heads += ["25 epochs, s"] if model == "SmallConv" else []
    return _table([*heads, "measured"], rows, "lr" + "r" * (len(heads) - 2) + "l")


def _stages() -> str:
    trace = _local("SmallConv", 64)
    found = {case: predict(trace, machine) for case, machine in CASES.items()}
    rows = []
    for k, stage in enumerate(trace.stages):
        kinds = [sum(n.kind == kind for n in stage) for kind in ("fused", "conv", "matmul", "torch")]
        times = _range([found[case].stages[k] for case in CASES], 1)
        rows.append([stage[0].layer, *map(str, kinds), str(len(stage)), times, NOT_MEASURED])
    device = _range([f.device for f in found.values()], 1)
    rows.append(["device, all stages", "", "", "", "", str(found["middle"].nodes), device, NOT_MEASURED])
    heads = ["stage", "ours", "convolution", "matrix product", "other torch", "kernels", "us", "measured"]
    return _table(heads, rows, "lrrrrrrl")


def _pieces() -> str:
    rows = []
    for node, count in _merged(_local("SmallConv", 64).nodes):
        times = _range([node_us(node, machine) * count for machine in CASES.values()], 1)
        floor = floor_us(node, H200) * count
        name = f"{node.name} ({count})" if count > 1 else node.name
        moved, work = f"{node.bytes * count / 1e6:.3g}", f"{node.flops * count / 1e6:.3g}"
        rows.append([node.layer, name, node.kind, moved, work, f"{floor:.2f}", times, measured_node(node)])
    heads = ["layer", "kernel", "kind", "MB", "MFLOP", "floor, us", "predicted, us", "measured"]
    return _table(heads, rows, "lllrrrrl")


def _plans() -> str:
    rows = []
    now = predict(_local("SmallConv", 64), H200).streamed
    for plan in PLANS:
        trace = plan.apply(_local("SmallConv", 64, bf16=plan.bf16, joined=plan.joined))
        found = {case: predict(trace, machine) for case, machine in CASES.items()}
        middle = found["middle"]
        slowest = max(range(len(middle.stages)), key=middle.stages.__getitem__)
        moved, floor = sum(n.bytes for n in trace.nodes) / 1e6, sum(floor_us(n, H200) for n in trace.nodes)
        row = [plan.name, str(len(trace.nodes)), f"{moved:.0f}", f"{floor:.1f}", f"{middle.device:.1f}"]
        row += [f"{trace.stages[slowest][0].layer}: {middle.stages[slowest]:.1f}"]
        row += [_range([f.streamed for f in found.values()], 1), f"{100 * (1 - middle.streamed / now):.0f} %"]
        rows.append([*row, f"{middle.run_seconds(H200, streamed=True):.2f}", measured_plan(plan.name)])
    heads = ["plan", "kernels", "MB", "floor, us", "device, us", "slowest chain, us", "us/step, tf32", "less"]
    return _table([*heads, "25 epochs, s", "measured"], rows, "lrrrrlrrrl")


def _layers(model: str) -> str:
    trace = _local(model, 128)
    rows = []
    for fused, stage in zip(trace.fused, trace.stages, strict=True):
        groups = [[n for n in stage if n.kind in kinds] for kinds in (("conv", "matmul"), ("fused",), ("torch",))]
        cells = []
        for group in groups:
            floor = sum(floor_us(n, H200) for n in group)
            cells.append(f"{len(group)}: {floor:.1f} / {sum(node_us(n, H200) for n in group):.1f}")
        moved, work = sum(n.bytes for n in stage) / 1e6, sum(n.flops for n in stage) / 1e9
        total = _range([sum(node_us(n, machine) for n in stage) for machine in CASES.values()], 0)
        step = "closed form" if fused else "autograd"
        rows.append([stage[0].layer, step, f"{moved:.0f}", f"{work:.2f}", *cells, total, NOT_MEASURED])
    heads = ["layer", "step", "MB", "GFLOP", "library", "ours", "other torch", "us", "measured"]
    return _table(heads, rows, "llrrrrrrl")


def _rules() -> str:
    rows = []
    for rule in RULES:
        trace = _local("SmallConv", 64, rule)
        prediction = predict(trace, H200)
        kernels = "/".join(str(len(stage)) for stage in trace.stages)
        extra = sorted(_names(trace) - _names(_local("SmallConv", 64)))
        step = "closed form" if all(trace.fused) else "autograd"
        rows.append(
            [
                rule,
                step,
                kernels,
                ", ".join(extra) or "-",
                f"{prediction.streamed:.1f}",
                measured_step(f"{rule} streams"),
            ]
        )
    heads = ["rule", "step", "kernels per stage", "beyond those of LLS", "us/step", "measured"]
    return _table(heads, rows, "llrlrl")


def _heads() -> str:
    rows = [
        [r["name"], r["arch"], *(str(r[k]) for k in _HEAD_COLUMNS), measured_head(r["name"], r["arch"])]
        for r in _newest("aot_heads_triton")
    ]
    heads = ["head", "target", *(k.replace("_", " ") for k in _HEAD_COLUMNS), "time"]
    return _table(heads, rows, "ll" + "r" * len(_HEAD_COLUMNS) + "l")


_HEAD_COLUMNS = ("registers", "spills", "shared_bytes", "instructions", "loads", "stores", "barriers", "shuffles")


def _ahead(prefix: str, wanted: str, archs: Sequence[str]) -> str:
    """One row per kernel, a column group per architecture."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in _newest(prefix):
        if re.search(wanted, row["name"]):
            found.setdefault(row["name"], {})[row["arch"]] = row
    rows = []
    for name, by_arch in found.items():
        cells = [by_arch.get(arch) for arch in archs]
        columns = [str(c[k]) if c else "-" for k in ("registers", "spills", "shared_bytes") for c in cells]
        rows.append([f"`{name}`", *columns])
    heads = [f"{what}, {arch}" for what in ("registers", "spills", "shared bytes") for arch in archs]
    return _table(["kernel", *heads], rows, "l" + "r" * len(heads))


def _spills() -> str:
    rows = []
    for prefix, what in (("aot_triton", "Triton"), ("aot_nvcc", "CUDA C++")):
        for report in _reports(prefix):
            kernels: list[dict[str, Any]] = json.loads(report.read_text())
            for arch in sorted({r["arch"] for r in kernels}):
                found = [r for r in kernels if r["arch"] == arch]
                registers = [r["registers"] for r in found]
                spilled = [f"{r['name']}: {r['spills']} bytes" for r in found if r["spills"] > 0]
                count = f"{len(spilled)} ({', '.join(spilled)})" if spilled else "0"
                span = f"{min(registers)} .. {max(registers)}"
                rows.append([what, report.name, arch, str(len(found)), span, count])
    return _table(["compiler", "report", "target", "kernels", "registers", "kernels that spill"], rows, "lllrrr")


TABLES: dict[str, Callable[[], str]] = {
    "assumptions": _assumptions,
    "steps": _steps,
    "steps-vgg8": lambda: _steps("VGG8", 128),
    "steps-mobilenet": lambda: _steps("MobileNetV1", 128),
    "stages": _stages,
    "pieces": _pieces,
    "plans": _plans,
    "vgg8": lambda: _layers("VGG8"),
    "mobilenet": lambda: _layers("MobileNetV1"),
    "resnet18": lambda: _layers("ResNet18"),
    "vit": lambda: _layers("ViT"),
    "rules": _rules,
    "heads": _heads,
    "spills": _spills,
    "aot-triton": lambda: _ahead(
        "aot_triton",
        r"^(?!.*(bf16|fp16|2048)).*(_64x|local_head|batch_product|sum_act|gelu|max_pool|load_batch|optimizer)",
        ("sm_90", "sm_80"),
    ),
    "aot-nvcc": lambda: _ahead("aot_nvcc", r"^(?!.*(half|bfloat)).*(<float|head_sums|load_batch)", ("sm_90a", "sm_80")),
}


# Tools


def _merged(nodes: Sequence[Node]) -> list[tuple[Node, int]]:
    """Small kernels of PyTorch of one layer in one row."""
    merged: list[tuple[Node, int]] = []
    for node in nodes:
        small = _is_small(node)
        if small and merged and merged[-1][0].layer == node.layer and merged[-1][0].name == "small operations":
            merged[-1] = (merged[-1][0], merged[-1][1] + 1)
        elif small:
            merged.append((Node(node.layer, node.phase, "small operations", "torch", node.bytes, node.flops, 1), 1))
        else:
            merged.append((node, 1))
    return merged


def _names(trace: StepTrace) -> set[str]:
    """Of the kernels of SmallConv's convolutional stages."""
    return {node.name for stage in trace.stages[:3] for node in stage}


def _is_small(node: Node) -> bool:
    return node.kind == "torch" and node.bytes < 1 << 16


def _newest(prefix: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(_reports(prefix)[-1].read_text())
    return rows


def _reports(prefix: str) -> list[Path]:
    """One for each version of a compiler, the newest last."""
    found = sorted(RESULTS.glob(f"{prefix}-*.json"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])
    if not found:
        raise ValueError(f"no {prefix}-*.json in {RESULTS}; run python benchmarks/ahead_of_time.py")
    return found


def _range(values: Sequence[float], digits: int) -> str:
    """low / middle / high as `middle (low .. high)`."""
    low, middle, high = values
    return f"{middle:.{digits}f} ({min(low, high):.{digits}f} .. {max(low, high):.{digits}f})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    rule = [{"l": "---", "r": "---:"}[a] for a in align]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, rule, *rows])


def _report() -> dict[str, Any]:
    def case(trace: StepTrace, machine: Machine) -> dict[str, Any]:
        return {"tf32": asdict(predict(trace, machine)), "fp32": asdict(predict(trace, machine, tf32=False))}

    steps = {
        f"{model} {name}": {c: case(trace, machine) for c, machine in CASES.items()}
        for model, batch in (("SmallConv", 64), ("VGG8", 128), ("MobileNetV1", 128))
        for name, trace, _ in _contenders(model, batch)
    }
    machines = {c: asdict(machine) for c, machine in CASES.items()}
    return {"kind": "prediction, not measured", "torch": torch.__version__, "machines": machines, "steps": steps}


if __name__ == "__main__":
    sys.exit(main())
