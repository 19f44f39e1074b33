"""The library's own layers and stages against the golden trajectories: a few training steps of the authors' code.

[Note: biases] A bias in front of BatchNorm has no gradient: the mean is subtracted again. Autograd computes rounding
noise for it, which Adam turns into steps of the full learning rate. Such biases, and what they shift (the running mean
and through it the evaluation), differ between any two correct programs by what the noise can move them; all else is
compared tightly. SGD leaves the noise small, and its trajectories agree in everything.
"""

import importlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import joining_backend
import numpy as np
import pytest
import torch
from golden import Golden, golden_batches, golden_files, golden_parameters, load_golden
from torch import Tensor, nn

from unlocked import AdamWSF
from unlocked.kernels import reference
from unlocked.models import get_model
from unlocked.rules import get_rule
from unlocked.runtime.network import Network, backpropagation_network, build_layer, build_network
from unlocked.workers.actions import Item
from unlocked.workers.fused import FusedStep, fused_step
from unlocked.workers.layer import Layer, StepFactory
from unlocked.workers.stage import Stage

schedulefree = pytest.importorskip("schedulefree")

CPU = torch.device("cpu")
LOCAL = [path for path in golden_files() if "-BP-" not in path.stem]


@dataclass
class Trajectory:
    """What one run of the library has to say about a golden file's steps."""

    logits: list[Tensor]
    losses: list[Tensor]
    parameters: dict[str, Tensor]  # by the authors' name
    buffer_sums: dict[str, float]
    eval_logits: Tensor
    averages: dict[str, Tensor]  # the weights that are evaluated: of a schedule-free optimizer the averaged ones
    average_logits: Tensor
    layers: list[Layer]


def _network(meta: dict[str, Any]) -> Network:
    channels, side, classes = meta["in_channels"], meta["image"], meta["n_classes"]
    blocks = get_model(meta["model"], in_channels=channels, num_classes=classes, image_size=side)
    network = build_network(blocks, input_shape=(channels, side, side), num_classes=classes, seed=0)
    return backpropagation_network(network) if meta["training_mode"] == "BP" else network


def _optimizer(meta: dict[str, Any]) -> Callable[[list[nn.Parameter]], Any]:
    lr, decay = meta["lr"], meta["weight_decay"]
    if meta["optimizer"] == "SGD":
        return partial(torch.optim.SGD, lr=lr, momentum=meta["momentum"], weight_decay=decay)
    if meta["optimizer"] == "Adam":
        return partial(torch.optim.Adam, lr=lr, weight_decay=decay)
    assert meta["optimizer"] == "AdamWSF"
    if meta.get("optimizer_release") == "bundled":
        return partial(AdamWSF, lr=lr, weight_decay=decay)
    return partial(schedulefree.AdamWScheduleFree, lr=lr, weight_decay=decay)


def _layers(meta: dict[str, Any], step: Callable[[int], StepFactory | None]) -> tuple[list[Layer], dict[str, Tensor]]:
    """The library's layers with the golden start values, and their parameters by the authors' names."""
    network = _network(meta)
    mode = meta["training_mode"]
    rule: Any = []
    if mode != "BP":
        rule = get_rule(
            mode,
            temperature=meta["temperature"],
            label_smoothing=meta["label_smoothing"],
            waveform=meta["waveform"],
        )
    layers = [
        build_layer(network, i, rule=rule, optimizer=_optimizer(meta), device=CPU, step=step(i))
        for i in range(len(network.blocks))
    ]
    values = golden_parameters(meta)
    found = [p for layer in layers for module in (layer.rule, layer.block) for p in module.parameters()]
    named = dict(zip(values, found, strict=True))
    with torch.no_grad():
        for name, value in values.items():
            assert named[name].shape == value.shape, name
            named[name].copy_(value)
    return layers, dict(named)


def run(
    golden: Golden,
    step: Callable[[int], StepFactory | None] = lambda index: None,
    steps: int = 0,
    begin: Callable[[int], object] = lambda s: None,
) -> Trajectory:
    """Trains as the golden file did; `step` chooses each layer's step, `steps` is how many (0: all).

    `begin` is called before each step.
    """
    meta = golden.meta
    layers, named = _layers(meta, step)
    stage = Stage(0, layers)
    images, labels = golden_batches(meta)
    logits, losses = [], []
    for s in range(steps or meta["steps"]):
        item = Item(s, "train", 0, s, meta["batch"], False)
        begin(s)
        stage.begin_epoch()
        logits.append(stage.forward(item, _channels_last(images[s]), labels[s]).clone())
        stage.update(item)
        losses.append(torch.stack(stage.sums())[: len(layers) - 1, 0].float() / meta["batch"])
    parameters = {name: value.detach().clone() for name, value in named.items()}
    buffers = [(key, b) for layer in layers for key, b in layer.block.named_buffers() if "running" in key]
    expected_sums = meta.get("buffer_sums", [key for key, _ in buffers])
    sums = {name: float(b.sum()) for name, (_, b) in zip(expected_sums, buffers, strict=True)}
    # Not through Stage.evaluate: one schedule-free file was evaluated at the training weights.
    eval_logits = _evaluate(layers, images[0])
    for layer in layers:
        layer.set_mode("evaluate")
    averages = {name: value.detach().clone() for name, value in named.items()}
    return Trajectory(logits, losses, parameters, sums, eval_logits, averages, _evaluate(layers, images[0]), layers)


@torch.no_grad()
def _evaluate(layers: list[Layer], images: Tensor) -> Tensor:
    """The prediction in evaluation mode, with the weights as they are."""
    x = _channels_last(images)
    for layer in layers:
        x = layer.block.eval()(x)
    return x


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def distance(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected|, Euclidean."""
    return float((value - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Tolerance:
    """Relative to the norm of what is compared; about three times what float32 on several machines' libraries shows."""

    logits: tuple[float, ...]  # by step
    losses: tuple[float, ...]
    parameters: float  # of an entry, relative to the parameter's root mean square
    variances: float
    evaluation: float


# SGD passes rounding on as it is; in deep networks every layer's BatchNorm over few values magnifies it.
SGD = Tolerance((1e-5,) * 4, (3e-6,) * 4, 1e-5, 1e-6, 4e-5)
DEEP_SGD = Tolerance((5e-5, 2e-4, 2e-3, 6e-3), (1e-5, 3e-5, 2e-4, 4e-4), 1e-2, 1e-5, 5e-3)
# Adam's first steps move every weight by the full rate in its gradient's direction, be that gradient rounding noise.
ADAM = Tolerance((1e-5, 4e-3, 2e-2, 4e-2, 4e-2), (3e-6, 2e-4, 5e-3, 5e-3, 5e-3), 2e-2, 1e-3, 6e-2)
STRAY_ENTRIES = 3  # of 32 sampled, under Adam: gradients that are noise


def _tolerance(meta: dict[str, Any]) -> Tolerance:
    if meta["optimizer"] != "SGD":
        return ADAM
    return SGD if "SmallConv" in meta["model"] else DEEP_SGD


def check_steps(golden: Golden, found: Trajectory) -> None:
    tolerance = _tolerance(golden.meta)
    for s, (logits, losses) in enumerate(zip(found.logits, found.losses, strict=True)):
        assert distance(logits, golden.logits[s]) < tolerance.logits[s], f"logits of step {s}"
        if golden.meta["training_mode"] != "BP":
            assert distance(losses, golden.local_losses[s]) < tolerance.losses[s], f"local losses of step {s}"


def check_parameters(golden: Golden, found: Trajectory) -> None:
    meta, tolerance = golden.meta, _tolerance(golden.meta)
    if meta["optimizer"] == "SGD":
        assert list(found.parameters) == meta["param_names"]
    farthest = 2 * meta["lr"] * meta["steps"] * 1.01  # one run goes up at the full rate, the other down
    for i, (name, expected) in enumerate(zip(meta["param_names"], golden.samples, strict=True)):
        value = found.parameters[name].to(torch.float64).contiguous().flatten()
        picked = np.random.default_rng([meta["seed"], i, 7]).integers(0, value.numel(), 32)
        errors = np.sort(np.abs(value[picked].numpy() - expected[2:]))
        if meta["optimizer"] != "SGD":
            assert errors[-1] <= farthest, name
            if name.endswith((".conv.bias", ".linear.bias")) and name.count(".") > 1:
                continue  # [Note: biases]
            errors = errors[:-STRAY_ENTRIES]
        scale = expected[1] / value.numel() ** 0.5
        assert errors[-1] < tolerance.parameters * scale, (name, errors[-1] / scale)
        assert abs(float(value.norm()) - expected[1]) < tolerance.parameters * expected[1], name


def _check_statistics(golden: Golden, found: Trajectory) -> None:
    meta, tolerance = golden.meta, _tolerance(golden.meta)
    for name, expected in meta["buffer_sums"].items():
        value = found.buffer_sums[name]
        if name.endswith("running_var"):
            assert value == pytest.approx(expected, rel=tolerance.variances), name
        elif meta["optimizer"] == "SGD":
            assert value == pytest.approx(expected, rel=1e-3, abs=100 * tolerance.variances), name
        else:  # a tenth of every step's shift, summed over up to 512 channels with random signs; [Note: biases]
            assert value == pytest.approx(expected, abs=0.2), name
    assert distance(found.eval_logits, golden.eval_logits) < tolerance.evaluation


def _check(golden: Golden, found: Trajectory) -> None:
    check_steps(golden, found)
    check_parameters(golden, found)
    _check_statistics(golden, found)


@pytest.mark.parametrize("path", LOCAL, ids=lambda path: path.stem)
def test_layers_follow_the_authors_trajectory(path: Path) -> None:
    """Every rule, model and optimizer there is, through autograd."""
    golden = load_golden(path)
    _check(golden, run(golden))


@pytest.mark.parametrize("path", LOCAL, ids=lambda path: path.stem)
def test_the_closed_form_follows_the_authors_trajectory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # else the optimizer would be Triton's as well
    golden = load_golden(path)
    found = run(golden, lambda index: fused_step(reference))
    assert all(isinstance(layer.step, FusedStep) for layer in found.layers)
    _check(golden, found)
    start = golden_parameters(golden.meta)
    biases = [name for name in start if name.endswith((".block.conv.bias", ".block.linear.bias"))]
    assert biases
    for name in biases:  # their gradient is exactly zero here
        torch.testing.assert_close(found.parameters[name], start[name], rtol=0, atol=0)


@pytest.mark.parametrize("path", golden_files("*-BP-*"), ids=lambda path: path.stem)
def test_backpropagation_follows_the_authors_trajectory(path: Path) -> None:
    golden = load_golden(path)
    found = run(golden)
    assert [layer.name for layer in found.layers] == ["network"]
    _check(golden, found)


SMALL = 8 * 512  # elements: the linear layer's; the interpreter takes most of its time for the convolutions' tensors


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is chosen where there is no GPU")
@pytest.mark.parametrize(
    ("mode", "largest"),
    [("LLS-SGD-square", math.inf), ("LLS_M-Adam-cosine", SMALL), ("LLS_MxM-Adam-cosine", SMALL)],
)
def test_the_triton_kernels_follow_the_authors_trajectory(
    mode: str, largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step in the interpreter, and one that shows what weights it has left.

    Normalisation does not depend on the rule: one mode has all of it interpreted, the others that of small tensors. The
    second step's is the reference's; heads and optimizers are Triton's throughout.
    """
    if not (paths := golden_files(f"LLS_SmallConv-{mode}")):
        pytest.skip("no golden files beside the checkout")
    triton = pytest.importorskip("unlocked.kernels.triton.optim")
    backend = importlib.import_module("unlocked.kernels.triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    golden = load_golden(paths[0])
    steps: list[int] = []
    interpreted: Counter[str] = Counter()

    def substitute(name: str) -> Callable[..., Any]:
        kernel, plain = getattr(backend, name), getattr(joining_backend, name)

        def call(*tensors: Any, **options: Any) -> Any:
            size = max(tensor.numel() for tensor in tensors if isinstance(tensor, Tensor))
            if steps[-1] > 0 or size > largest:
                return plain(*tensors, **options)
            interpreted[name] += 1
            return kernel(*tensors, **options)

        return call

    for name in ("norm_act_forward", "norm_act_backward", "norm_act_backward_full", "norm_act_weight_grad"):
        monkeypatch.setattr(backend, name, substitute(name))
    found = run(golden, lambda index: fused_step(backend), steps=2, begin=steps.append)
    if largest > SMALL:  # of the first layer, of three channels, the way back is inside of the weight gradient
        assert interpreted == {"norm_act_forward": 4, "norm_act_backward": 3, "norm_act_weight_grad": 1}
    else:
        assert interpreted == {"norm_act_forward": 1, "norm_act_backward": 1}
    assert all(isinstance(layer.optimizer, triton.FusedOptimizer) for layer in found.layers)
    assert [getattr(layer.step, "backend", None) for layer in found.layers] == [backend] * 5
    check_steps(golden, found)
