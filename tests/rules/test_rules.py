"""Every rule of the family against plain formulas in float64, through autograd and in closed form."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.reference import local_head, pool_latents
from unlocked.rules import RULES, LayerInfo, LocalRule, get_rule

CLASSES, ROWS, HIDDEN = 5, 8, 24


def info(shape: tuple[int, ...], latent_size: int, *, seed: int = 0, index: int = 1) -> LayerInfo:
    return LayerInfo(
        name="conv1",
        index=index,
        activation_shape=shape,
        num_classes=CLASSES,
        latent_size=latent_size,
        hidden=HIDDEN,
        reduced_rank=ROWS,
        seed=seed,
    )


CONV, FLAT = info((6, 4, 4), 2), info((30,), 30)


def scores(name: str, rule: LocalRule, z: Tensor) -> Tensor:
    """The table of the design, row by row, from the rule's own parameters (all float64)."""
    parameters = dict(rule.named_parameters())
    unit = z / z.norm(dim=1, keepdim=True).clamp_min(1e-12)
    count = ROWS if name == "LLS_MxM_reduced" else CLASSES
    # The basis is made of float32 products, whatever the precision of the rest.
    angles = torch.linspace(50, 512, count)[:, None] * torch.arange(z.shape[1], dtype=torch.float32)
    waves = torch.sin(angles).double()
    if name == "LLS":
        return unit @ waves.T
    if name == "LLS_M":
        return parameters["feedback"] * (unit @ waves.T)
    if name in ("LLS_MxM", "LLS_MxM_reduced"):
        return unit @ waves.T @ parameters["feedback"]
    feedback = parameters["feedback"]
    if name == "LLS_M_Random":
        feedback = parameters["modulation"] * feedback
    if name == "LLS_MxM_Random":
        feedback = parameters["modulation"] @ feedback
    return z @ F.adaptive_avg_pool1d(feedback[None], z.shape[1])[0].T


def build(name: str, layer: LayerInfo, smoothing: float = 0.0) -> LocalRule:
    rule = get_rule(name, temperature=0.7, label_smoothing=smoothing, waveform="cosine")(layer).double()
    for parameter in rule.parameters():  # far from the small start values, so that every term counts
        parameter.data.normal_()
    return rule


def case(layer: LayerInfo) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    activations = torch.randn(9, *layer.activation_shape, generator=generator, dtype=torch.float64)
    return activations, torch.randint(0, CLASSES, (9,), generator=generator)


@pytest.mark.parametrize("layer", [CONV, FLAT], ids=["conv", "flat"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", RULES)
def test_loss_is_the_tables_formula(name: str, smoothing: float, layer: LayerInfo) -> None:
    rule = build(name, layer, smoothing)
    activations, labels = case(layer)
    z = F.adaptive_avg_pool2d(activations, 2).flatten(1) if activations.dim() == 4 else activations
    expected = F.cross_entropy(scores(name, rule, z) / 0.7, labels, label_smoothing=smoothing)
    torch.testing.assert_close(rule(activations, labels), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [CONV, FLAT], ids=["conv", "flat"])
@pytest.mark.parametrize("name", RULES)
def test_closed_form_gives_autograds_gradients(name: str, layer: LayerInfo) -> None:
    rule = build(name, layer, 0.1)
    activations, labels = case(layer)
    latents = pool_latents(activations, layer.latent_size).requires_grad_()
    trained = [p for p in rule.parameters() if p.requires_grad]
    # The latents stand in for the activations: a pooling to their own size changes nothing.
    shaped = latents if activations.dim() == 2 else latents.reshape(9, 6, 2, 2)
    expected = torch.autograd.grad(rule(shaped, labels), [latents, *trained])
    arguments = rule.head_arguments()
    assert arguments is not None
    result = local_head(latents.detach(), labels, **arguments._asdict())
    torch.testing.assert_close(result.latents_grad, expected[0], rtol=1e-10, atol=1e-12)
    grads = rule.head_gradients(result)
    assert len(grads) == len(trained)
    for got, wanted in zip(grads, expected[1:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_parameters_have_the_authors_names_shapes_and_scales() -> None:
    shapes = {
        "LLS": {},
        "LLS_M": {"feedback": (CLASSES,)},
        "LLS_MxM": {"feedback": (CLASSES, CLASSES)},
        "LLS_MxM_reduced": {"feedback": (ROWS, CLASSES)},
        "LLS_Random": {"feedback": (CLASSES, HIDDEN)},
        "LLS_M_Random": {"feedback": (CLASSES, HIDDEN), "modulation": (CLASSES, 1)},
        "LLS_MxM_Random": {"feedback": (CLASSES, HIDDEN), "modulation": (CLASSES, CLASSES)},
        "LocalLosses": {"feedback": (CLASSES, HIDDEN)},
    }
    assert set(shapes) == set(RULES)
    for name, expected in shapes.items():
        rule = RULES[name]()(CONV)
        assert {k: tuple(v.shape) for k, v in rule.named_parameters()} == expected, name
        random = "Random" in name or name == "LocalLosses"
        trained = {k for k, v in rule.named_parameters() if v.requires_grad}
        fixed = {"feedback"} if random and name != "LocalLosses" else set()
        assert trained == set(expected) - fixed, name
        for key, value in rule.named_parameters():
            scale = 0.1 if key == "feedback" and random else 0.01
            # wide bounds for few draws; a wrong scale is off by ten
            assert scale / 3 < float(value.std(correction=0)) < 3 * scale, (name, key)


@pytest.mark.parametrize("name", ["LLS_MxM", "LLS_M_Random"])
def test_start_values_depend_on_seed_and_layer_alone(name: str) -> None:
    def values(layer: LayerInfo) -> list[Tensor]:
        torch.rand(3)  # the global generator must not matter
        return [p.detach() for p in RULES[name]()(layer).parameters()]

    first, again = values(info((6, 4, 4), 2)), values(info((6, 4, 4), 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (info((6, 4, 4), 2, seed=1), info((6, 4, 4), 2, index=2)):
        assert not any(torch.equal(a, b) for a, b in zip(first, values(other), strict=True))


def test_a_loaded_feedback_is_pooled_anew() -> None:
    rule = RULES["LLS_Random"]()(CONV)
    before = rule.head_arguments()
    rule.load_state_dict({"feedback": torch.ones(CLASSES, HIDDEN)})
    after = rule.head_arguments()
    assert before is not None
    assert after is not None
    assert not torch.equal(before.basis, after.basis)
    assert torch.equal(after.basis, torch.ones_like(after.basis))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": 0.0}, "positive"),
        ({"label_smoothing": 1.0}, r"\[0, 1\)"),
        ({"waveform": "saw"}, "cosine, square"),
    ],
)
def test_values_out_of_range_are_refused(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RULES["LLS"](**values)


def test_square_waves_are_signs() -> None:
    rule = RULES["LLS"](waveform="square")(CONV)
    basis = rule.head_arguments().basis
    assert set(basis.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert isinstance(rule, nn.Module)
