"""What a block may give: one float32 tensor whose shape does not depend on the batch, out of weights of its own."""

import pytest
import torch
from torch import Tensor, nn

from unlocked.models import Block, KeyedDropout
from unlocked.runtime.network import build_network


def _check(model: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(model, input_shape=(1, 8, 8), num_classes=10, seed=0)  # type: ignore[arg-type]


class _Function(nn.Module):
    """Flattens, applies a linear layer and then whatever it is told to."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(64, 10), function

    def forward(self, x: Tensor) -> object:
        return self.function(self.linear(x.flatten(1)))  # type: ignore[operator]


HEAD = Block("head", nn.Sequential(nn.Flatten(), nn.Linear(10, 10)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda y: (y, y), "layer odd gives a tuple as its activations; .*return the tensor alone"),
        (lambda y: {"y": y}, "layer odd gives a dict"),
        (
            lambda y: y.argmax(1, keepdim=True),
            "layer odd gives torch.int64 as its activations; it must be torch.float32",
        ),
        (lambda y: y.double(), "layer odd gives torch.float64"),
        (lambda y: y.sum(1), r"layer odd gives activations of shape \(2,\) for a micro-batch of 2"),
        (lambda y: y.T, r"layer odd gives activations of shape \(10, 2\) for a micro-batch of 2"),
        (lambda y: y @ y.T, r"activations of \(2,\) per sample in a micro-batch of 2 but \(3,\) in one of 3"),
    ],
)
def test_outputs_that_no_layer_can_hand_on(function: object, message: str) -> None:
    _check([Block("odd", _Function(function)), HEAD], message)


def test_a_misfit_names_both_layers_both_shapes_and_the_module() -> None:
    model = [
        Block("first", nn.Conv2d(1, 4, 3)),
        Block("second", nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(6, 4, 3))),
        Block("third", nn.Sequential(nn.Flatten(), nn.Linear(16, 10))),
    ]
    _check(
        model,
        r"don't chain: layer first gives \(4, 6, 6\) per sample, which layer second can't take: its 1 = "
        r"Conv2d\(6, 4, .*\) got \(4, 4, 4\)",
    )


def test_weights_belong_to_one_layer() -> None:
    square = nn.Linear(64, 64)
    tied = nn.Linear(64, 64)
    tied.weight = square.weight
    norm = nn.BatchNorm1d(64, affine=False)
    drop = KeyedDropout(0.5)
    flat, head = Block("flat", nn.Flatten()), Block("head", nn.Linear(64, 10))
    for one, other, what in [
        (square, square, "weight"),
        (square, nn.Sequential(nn.ReLU(), tied), "weight"),
        (norm, nn.Sequential(nn.Linear(64, 64), norm), "running_mean"),
        (nn.Sequential(nn.Linear(64, 64), drop), nn.Sequential(nn.Linear(64, 64), drop), "1"),
    ]:
        _check([flat, Block("one", one), Block("other", other), head], rf"layers one and other share 'body.{what}'")
    _check([nn.Flatten(), square, square, nn.Linear(64, 10)], "layers linear2 and linear3 share 'body.weight'")
    inside = nn.Sequential(square, nn.ReLU(), square)  # within one layer weights may be used as often as one likes
    act = nn.ReLU()  # and what has none may be anywhere
    build_network([flat, inside, act, act, head], input_shape=(64,), num_classes=10, seed=0)


def test_the_output_layer_is_the_last() -> None:
    _check([nn.Flatten(), Block("early", nn.Linear(64, 9), is_output=True), nn.Linear(9, 10)], "is_output .* for early")


def test_a_model_is_a_sequence_of_modules() -> None:
    _check(nn.Linear(64, 10), r"the model is one Linear; .*unlocked.models.split\(model, at=\[...\]\)")
    _check([nn.Flatten(), torch.relu], "entry 2 of the model is a builtin_function_or_method")


def test_following_restores_the_mode_also_after_a_failure() -> None:
    first, second = nn.Conv2d(1, 4, 3), nn.Conv2d(3, 4, 3).eval()
    _check([first, second], "don't chain")
    assert first.training
    assert not second.training


def test_modules_that_learn_their_shape_at_the_first_call_are_initialised() -> None:
    make = [nn.Flatten(), nn.Sequential(nn.LazyLinear(20), nn.ReLU()), nn.LazyLinear(10)]
    state = torch.get_rng_state()
    network = build_network(make, input_shape=(1, 8, 8), num_classes=10, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    plain = [nn.Flatten(), nn.Sequential(nn.Linear(64, 20), nn.ReLU()), nn.Linear(20, 10)]
    expected = build_network(plain, input_shape=(1, 8, 8), num_classes=10, seed=0, redraw=True)
    for a, b in zip(network.blocks, expected.blocks, strict=True):
        for name, value in b.state_dict().items():
            assert torch.equal(a.state_dict()[name], value)
