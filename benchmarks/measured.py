"""What an H200 has measured, for the columns `measured` of docs/feasibility.md. Read from benchmarks/results."""

import json
import statistics
from functools import lru_cache
from pathlib import Path
from typing import Any

from step_trace import Node
from traced_backend import JOINED

__all__ = ["NOT_MEASURED", "measured_head", "measured_node", "measured_plan", "measured_step"]

NOT_MEASURED = "not measured"
_RESULTS = Path(__file__).parent / "results"

_DAY = "h200_2026-11-29.json"
# Contender -> the file, its name there, what differs. The joins of `auto` came after most of these measurements.
_NOTHING_JOINED = "nothing joined: "
_STEPS = {
    "LLS streams": ("single_gpu_few_joined", "LLS streams", ""),
    "LLS sequential graph": ("single_gpu_sequential", "LLS sequential graph", _NOTHING_JOINED),
    "BP graph": ("single_gpu", "BP graph", ""),
}
_PLANS = {
    "as it is": _STEPS["LLS streams"],
    "B as built: `triton_joined`": ("single_gpu", "LLS streams, joined", ""),
    "bf16, as it is": ("single_gpu", "LLS streams bf16", _NOTHING_JOINED),
    "bf16, B as built": ("single_gpu", "LLS streams bf16, joined", ""),
}
# Of one launch: how `launches_*.json` calls the kernel and the geometry that is in use, of all layers or by layer.
_LAUNCHES: dict[str, tuple[str, str | dict[str, str]]] = {
    "norm_act_forward: reduction": (
        "moments",
        {
            "conv1": "partials 64 elements 8192 warps 8 programs 256",
            "conv2": "partials 64 elements 8192 warps 8 programs 256",
            "conv3": "partials 64 elements 2048 warps 4 programs 256",
        },
    ),
    "norm_act_forward: pass": ("pass", "tile 2048 warps 2"),
    "norm_act_backward: reduction": ("window totals", ""),
    "norm_act_backward: pass": ("back pass", "tile 2048 warps 4"),
    JOINED: ("wgrad", "steps 8 warps 8 bytes 256"),
    "weight gradient's sum": ("wgrad sum", "steps 8"),
}
# Of one call: how `kernels_*.json` begins the operation, and the contender. A library's weight gradient is one call.
_CALLS = {
    "load_batch": ("load_batch plain", "triton"),
    "convolution forward": ("convolution forward", "tf32 channels-last"),
    "convolution weight gradient": ("convolution weight gradient", "tf32 channels-last"),
    "local_head": ("local_head LLS", "triton"),
    "optimizer (Adam)": ("optimizer adam", "triton"),
}
_HEADS = {"conv1": "linear1", "conv3": "linear1"}  # as many latents


def measured_step(contender: str) -> str:
    """Microseconds per step of SmallConv at batch 64 in tf32, as a table's cell."""
    return _step(_STEPS.get(contender))


def measured_plan(plan: str) -> str:
    return _step(_PLANS.get(plan))


def measured_node(node: Node) -> str:
    """Of a kernel of SmallConv's step, by itself in a graph: with the start of a node, as in the predictions."""
    if node.name == "convolution weight gradient's sum":
        return "with the one before"
    if launch := _LAUNCHES.get(node.name):
        kernel, variant = launch
        wanted = variant if isinstance(variant, str) else variant.get(node.layer)
        for row in _file("launches")["rows"]:
            if (row["layer"], row["dtype"], row["kernel"], row["variant"]) == (node.layer, "float32", kernel, wanted):
                return f"{row['us']:.1f}"
    if call := _CALLS.get(node.name):
        layer = _HEADS.get(node.layer, node.layer) if node.name == "local_head" else node.layer
        for row in _file("kernels")["rows"]:
            of_layer = row["shape"].split()[0] == layer or node.name == "load_batch"
            if of_layer and (row["operation"], row["contender"]) == call and "median" in row:
                return f"{row['median']:.1f}"
    return NOT_MEASURED


def measured_head(name: str, arch: str) -> str:
    """Microseconds of a head of LLS with 512 latents, by the name that `ahead_of_time.py` gives it."""
    contender = {"LLS 512, written by hand": "hand", "LLS 512, of pieces": "triton"}.get(name)
    for row in _file("kernels")["rows"] if arch == "sm_90" else ():
        if (
            row["operation"] == "local_head LLS"
            and row["shape"].startswith("linear1")
            and row["contender"] == contender
        ):
            return f"{row['median']:.1f} us"
    return NOT_MEASURED


def _step(where: tuple[str, str, str] | None) -> str:
    if where is None:
        return NOT_MEASURED
    stem, name, before = where
    return f"{before}{statistics.median(run['us_per_step'] for run in _file(stem)['runs'][name]):.1f}"


@lru_cache
def _file(stem: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((_RESULTS / f"{stem}_{_DAY}").read_text())
    return found
