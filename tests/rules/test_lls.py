"""The eight rules against their table, written with NumPy in float64: scores, losses, gradients, start values."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from golden import golden_files, load_golden
from torch import Tensor

from unlocked.kernels.reference import local_head, pool_latents
from unlocked.models import small_conv
from unlocked.rules import LLS, RULES, LayerInfo, LocalRule, get_rule
from unlocked.runtime.network import build_network

Array = npt.NDArray[np.float64]
CLASSES = 5
IMAGES = LayerInfo(
    name="conv",
    index=1,
    activation_shape=(6, 8, 8),
    num_classes=CLASSES,
    latent_size=2,
    hidden=40,
    reduced_rank=3,
    seed=7,
)
LAYERS = {
    "tiling": IMAGES,
    "hidden as wide as the latents": replace(IMAGES, hidden=24),
    "hidden narrower than the latents": replace(IMAGES, hidden=10),
    "windows that overlap": replace(IMAGES, activation_shape=(6, 7, 7), latent_size=3),
    "flat": replace(IMAGES, activation_shape=(24,), latent_size=24),
    "flat, fewer latents": replace(IMAGES, activation_shape=(30,), latent_size=12),
    "flat, more latents": replace(IMAGES, activation_shape=(16,), latent_size=32),
}
TRAINED = {
    "LLS": [],
    "LLS_M": ["feedback"],
    "LLS_MxM": ["feedback"],
    "LLS_MxM_reduced": ["feedback"],
    "LLS_Random": [],
    "LLS_M_Random": ["modulation"],
    "LLS_MxM_Random": ["modulation"],
    "LocalLosses": ["feedback"],
}
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}  # sums of some dozen terms in float64


def _averages(size: int, windows: int) -> Array:
    """[windows, size]: adaptive average pooling as a matrix; window i spans floor(i s / w) to ceil((i + 1) s / w)."""
    matrix = np.zeros((windows, size))
    for i in range(windows):
        begin, end = i * size // windows, -(-(i + 1) * size // windows)
        matrix[i, begin:end] = 1.0 / (end - begin)
    return matrix


def _latents(activations: Array, p: int) -> Array:
    if activations.ndim == 2:
        return activations @ _averages(activations.shape[1], p).T
    rows, columns = (_averages(side, p) for side in activations.shape[2:])
    return np.einsum("ih,bchw,jw->bcij", rows, activations, columns).reshape(len(activations), -1)


def _waves(rows: int, dim: int, waveform: str) -> Array:
    frequencies = np.linspace(50, 512, rows, dtype=np.float32)
    phase = frequencies[:, None] * np.arange(dim, dtype=np.float32)  # rounded to float32 before the sine
    wave = np.sin(phase.astype(np.float64))
    return np.sign(wave) if waveform == "square" else wave


def _scores(mode: str, z: Array, waveform: str, feedback: Array, modulation: Array) -> Array:
    """Design: the local head's table, before the division by the temperature."""
    dim = z.shape[1]
    unit = z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)

    def pool(matrix: Array) -> Array:
        return matrix @ _averages(matrix.shape[1], dim).T

    table: dict[str, Callable[[], Array]] = {
        "LLS": lambda: unit @ _waves(CLASSES, dim, waveform).T,
        "LLS_M": lambda: feedback * (unit @ _waves(CLASSES, dim, waveform).T),
        "LLS_MxM": lambda: (unit @ _waves(CLASSES, dim, waveform).T) @ feedback,
        "LLS_MxM_reduced": lambda: (unit @ _waves(3, dim, waveform).T) @ feedback,
        "LLS_Random": lambda: z @ pool(feedback).T,
        "LLS_M_Random": lambda: z @ pool(modulation * feedback).T,
        "LLS_MxM_Random": lambda: z @ pool(modulation @ feedback).T,
        "LocalLosses": lambda: z @ pool(feedback).T,
    }
    return table[mode]()


def _cross_entropy(scores: Array, labels: npt.NDArray[np.int64], smoothing: float) -> float:
    shifted = scores - scores.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    targets = np.full_like(scores, smoothing / scores.shape[1])
    targets[np.arange(len(labels)), labels] += 1 - smoothing
    return float(-(targets * log_probabilities).sum(1).mean())


def _case(mode: str, layer: LayerInfo, *, smoothing: float = 0.1) -> tuple[LocalRule, Tensor, Tensor]:
    """The rule in float64, activations that ask for a gradient, labels."""
    rule = get_rule(mode, temperature=0.7, label_smoothing=smoothing, waveform="cosine")(layer).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in TRAINED[mode]:  # start values near zero would hide what they multiply
            parameter = rule.get_parameter(name)
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    activations = torch.randn(9, *layer.activation_shape, dtype=torch.float64, generator=generator)
    return rule, activations.requires_grad_(), torch.randint(0, CLASSES, (9,), generator=generator)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("mode", RULES)
def test_forward_is_the_formula(mode: str, layer: LayerInfo) -> None:
    rule, activations, labels = _case(mode, layer)
    own = {name: value.detach().numpy() for name, value in rule.named_parameters()}
    empty = np.zeros(0)
    z = _latents(activations.detach().numpy(), layer.latent_size)
    assert z.shape[1] == layer.num_latents
    scores = _scores(mode, z, "cosine", own.get("feedback", empty), own.get("modulation", empty))
    # The wave itself is float32: its sine differs between libraries by a unit in the last place.
    expected = _cross_entropy(scores / 0.7, labels.numpy(), 0.1)
    assert rule(activations, labels).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", ["LLS", "LLS_MxM_reduced"])
def test_the_square_waveform_is_the_sign(mode: str) -> None:
    layer = IMAGES
    rule = RULES[mode](waveform="square", temperature=1.0)(layer).double()
    _, activations, labels = _case("LLS", layer)
    own = {name: value.detach().numpy() for name, value in rule.named_parameters()}
    z = _latents(activations.detach().numpy(), layer.latent_size)
    scores = _scores(mode, z, "square", own.get("feedback", np.zeros(0)), np.zeros(0))
    assert rule(activations, labels).item() == pytest.approx(_cross_entropy(scores, labels.numpy(), 0.0), rel=1e-12)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("mode", RULES)
def test_the_closed_form_has_autograds_gradients(mode: str, layer: LayerInfo) -> None:
    rule, activations, labels = _case(mode, layer)
    trained = [p for p in rule.parameters() if p.requires_grad]
    assert [name for name, p in rule.named_parameters() if p.requires_grad] == TRAINED[mode]
    loss = rule(activations, labels)
    activations_grad, *expected = torch.autograd.grad(loss, [activations, *trained])

    latents = pool_latents(activations, layer.latent_size)
    arguments = rule.head_arguments()
    assert arguments is not None
    result = local_head(latents.detach(), labels, **arguments._asdict())
    torch.testing.assert_close(result.loss_sum / len(labels), loss.detach(), **EXACT)
    (through_pool,) = torch.autograd.grad(latents, activations, result.latents_grad)
    torch.testing.assert_close(through_pool, activations_grad, **EXACT)
    for found, grad in zip(rule.head_gradients(result), expected, strict=True):
        torch.testing.assert_close(found, grad, **EXACT)


@pytest.mark.parametrize("mode", ["LLS_Random", "LLS_M_Random", "LLS_MxM_Random"])
def test_a_loaded_feedback_takes_the_place_of_the_pooled_one(mode: str) -> None:
    """R is pooled once and kept, but not beyond a load_state_dict."""
    first, activations, labels = _case(mode, IMAGES)
    second = RULES[mode](temperature=0.7, label_smoothing=0.1)(replace(IMAGES, seed=8)).double()
    assert float(second(activations, labels)) != pytest.approx(float(first(activations, labels)))
    second.load_state_dict(first.state_dict())
    assert float(second(activations, labels)) == float(first(activations, labels))


@pytest.mark.parametrize("mode", [mode for mode in RULES if mode != "LLS"])
def test_start_values_depend_on_seed_and_layer_alone(mode: str) -> None:
    def draw(**changes: int) -> Tensor:
        rule = RULES[mode]()(replace(IMAGES, **changes))
        return torch.cat([p.detach().flatten() for p in rule.parameters()])

    torch.manual_seed(1)
    before = torch.get_rng_state()
    once = draw()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(draw(), once)
    assert not torch.equal(draw(seed=8), once)
    assert not torch.equal(draw(index=2), once)


def test_start_values_have_the_authors_scales() -> None:
    layer = replace(IMAGES, num_classes=100, hidden=400)
    random = RULES["LLS_MxM_Random"]()(layer)
    scales = {name: (float(p.mean()), float(p.std())) for name, p in random.named_parameters()}
    assert scales["feedback"] == (pytest.approx(0, abs=2e-3), pytest.approx(0.1, rel=0.02))
    assert scales["modulation"] == (pytest.approx(0, abs=5e-4), pytest.approx(0.01, rel=0.03))
    mixing = RULES["LLS_MxM"]()(layer).get_parameter("feedback")
    assert float(mixing.std()) == pytest.approx(0.01, rel=0.03)


@pytest.mark.parametrize("path", golden_files("*SmallConv-L*"), ids=lambda path: path.stem)
def test_parameters_have_the_authors_names_and_shapes(path: Path) -> None:
    meta = load_golden(path).meta
    network = build_network(
        small_conv(meta["in_channels"], meta["n_classes"], meta["image"]),
        input_shape=(meta["in_channels"], meta["image"], meta["image"]),
        num_classes=meta["n_classes"],
        seed=0,
    )
    rule = RULES[meta["training_mode"]](waveform=meta["waveform"])
    found = [
        (f"{layer}.{name}", list(parameter.shape))
        for layer, info in zip(meta["local_layers"], network.infos, strict=False)
        for name, parameter in rule(info).named_parameters()
    ]
    shapes = zip(meta["param_names"], meta["param_shapes"], strict=True)
    assert found == [(name, shape) for name, shape in shapes if name.endswith(("feedback", "modulation"))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1.0; it must lie in \[0, 1\)"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"waveform": "triangle"}, "waveform 'triangle' is not known; valid: cosine, square"),
    ],
)
def test_bad_values_say_what_is_valid(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLS(**options)


@pytest.mark.parametrize("name", ["lls", "LLS_", "Hebb", ""])
def test_unknown_names_list_the_valid(name: str) -> None:
    with pytest.raises(ValueError, match=r"valid: LLS, LLS_M, .*LocalLosses, DRTP, MonoForward, .*BP, DFA"):
        get_rule(name, temperature=0.5, label_smoothing=0.0, waveform="cosine")
