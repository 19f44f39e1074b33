"""Reads the golden trajectories: a few steps of the authors' own code, which lie beside the checkout or are absent.

Their format, start values and images are described in the README beside them; this file is that text as code.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "GOLDEN_DIR",
    "SCHEDULE_FREE_DIR",
    "Golden",
    "check_samples",
    "copy_into_blocks",
    "golden_batches",
    "golden_files",
    "golden_parameters",
    "load_golden",
    "rule_parameters",
]

GOLDEN_DIR = Path(__file__).resolve().parents[1].parent / "shared" / "golden"
SCHEDULE_FREE_DIR = GOLDEN_DIR.parent / "golden_schedule_free"  # with the optimizer that the authors bundle
_NUM_SAMPLES = 32
_RULE_WORDS = ("feedback", "modulation")


@dataclass(frozen=True)
class Golden:
    name: str
    meta: dict[str, Any]
    logits: Tensor  # [steps, batch, num_classes], in training mode, before each step's update
    local_losses: Tensor  # [steps, local layers]
    eval_logits: Tensor  # [batch, num_classes], of step 0's images after the last step
    samples: list[np.ndarray]  # of each parameter after the last step: sum, norm, sampled entries
    averages: list[np.ndarray]  # the same of the averaged weights, where the file has them


def golden_files(pattern: str = "*", folder: Path = GOLDEN_DIR) -> list[Path]:
    """The trajectories whose names match; none where the folder is absent (an empty parametrize is skipped)."""
    return sorted(folder.glob(f"{pattern}.npz"))


def load_golden(path: Path) -> Golden:
    with np.load(path) as file:
        meta = json.loads(str(file["meta"]))
        logits, losses, evaluated = (
            torch.from_numpy(np.asarray(file[key], np.float32)) for key in ("logits", "local_losses", "eval_logits")
        )
        samples, averages = (
            [file[key] for i in range(len(meta["param_names"])) if (key := f"{letter}{i:03d}") in file]
            for letter in "px"
        )
    return Golden(path.stem, meta, logits, losses, evaluated, samples, averages)


def golden_parameters(meta: Mapping[str, Any]) -> dict[str, Tensor]:
    """The start value of every parameter, by the authors' name, in their order."""
    values = {}
    for i, (name, shape) in enumerate(zip(meta["param_names"], meta["param_shapes"], strict=True)):
        draw = np.random.default_rng([meta["seed"], i]).standard_normal(shape).astype(np.float32)
        *_, owner, kind = name.split(".")
        if owner.startswith("bn") and kind == "weight":
            draw = np.float32(1) + np.float32(0.1) * draw
        elif draw.ndim == 1 or kind in _RULE_WORDS:
            draw = np.float32(0.1) * draw
        else:
            draw = draw / np.float32(math.sqrt(math.prod(shape[1:])))
        values[name] = torch.from_numpy(draw)
    return values


def golden_batches(meta: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Images [steps, batch, C, side, side] float32 and labels [steps, batch] int64."""
    draws = np.random.default_rng([meta["seed"], 1_000_000])
    shape = (meta["steps"], meta["batch"], meta["in_channels"], meta["image"], meta["image"])
    images = draws.standard_normal(shape).astype(np.float32)
    labels = draws.integers(0, meta["n_classes"], shape[:2])
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def rule_parameters(values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The rules' parameters: the authors' layer name -> {"feedback": ..., "modulation": ...}, those that exist."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        layer, _, kind = name.rpartition(".")
        if kind in _RULE_WORDS:
            found.setdefault(layer, {})[kind] = value
    return found


def copy_into_blocks(blocks: Sequence[nn.Module], values: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Set the blocks' parameters, which are in the authors' order; returns them by the authors' names."""
    names = [name for name in values if name.rpartition(".")[2] not in _RULE_WORDS]
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    named = dict(zip(names, parameters, strict=True))
    with torch.no_grad():
        for name, parameter in named.items():
            assert parameter.shape == values[name].shape, (name, parameter.shape, values[name].shape)
            parameter.copy_(values[name])
    return named


def check_samples(golden: Golden, parameters: Mapping[str, Tensor], *, rtol: float, atol: float) -> None:
    """Compare all parameters after the last step, given by the authors' names, with the golden ones.

    The sampled entries agree within atol + rtol * |expected|; the norm and the sum within rtol of the norm (the
    entries' signs make the sum itself no measure of its error).
    """
    names = golden.meta["param_names"]
    assert sorted(parameters) == sorted(names)
    for i, (name, expected) in enumerate(zip(names, golden.samples, strict=True)):
        value = parameters[name].detach().to("cpu", torch.float64).contiguous().flatten()
        picked = np.random.default_rng([golden.meta["seed"], i, 7]).integers(0, value.numel(), _NUM_SAMPLES)
        where = f"{golden.name}: parameter {i}, {name}"
        np.testing.assert_allclose(value[picked].numpy(), expected[2:], rtol=rtol, atol=atol, err_msg=where)
        scale = expected[1]
        totals = np.array([value.sum().item(), value.norm().item()])
        np.testing.assert_allclose(totals, expected[:2], rtol=0, atol=rtol * scale + atol, err_msg=where)
