"""The output layer's loss, an optimizer per layer, clipped gradients, warm-up: in every engine as in a plain loop."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.rules import LLS, CrossEntropy, Margin, SquaredError
from unlocked.runtime import PerStep, ReduceLROnPlateau, RunResult, Streams, Trainer, WarmUp
from unlocked.runtime.learning_rate import MultiStepLR

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 3
NAMES = ("sequential1", "linear2")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(6, 9), nn.Tanh()), nn.Linear(9, 3))


def mean_square(activations: Tensor, labels: Tensor) -> Tensor:
    return (activations - labels[:, None].to(activations)).square().mean()


class MeanSquare:
    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return mean_square(activations, labels)


def fit(engine: Any = "sequential", **options: Any) -> RunResult:
    options = {"rule": MeanSquare, "optimizer": partial(torch.optim.SGD, lr=0.1), **options}
    return Trainer(network(), engine=engine, seed=1, **options).fit((X, LABELS), epochs=2, batch_size=16)


def plain_loop(
    *,
    output: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    rates: tuple[float, float] = (0.1, 0.1),
    momentum: float = 0.0,
    norm: float | None = None,
    factor: Callable[[int, int], float] = lambda epoch, step: 1.0,
) -> list[Tensor]:
    from unlocked.data import epoch_order

    layers = list(network())
    both = zip(layers, rates, strict=True)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=rate, momentum=momentum) for layer, rate in both]
    step = 0
    for epoch in range(2):
        order = epoch_order(40, 1, epoch)
        for start in range(0, 40, 16):
            x, y = X[order[start : start + 16]], LABELS[order[start : start + 16]]
            for k, (layer, optimizer) in enumerate(zip(layers, optimizers, strict=True)):
                activations = layer(x)
                loss = output(activations, y) if k else mean_square(activations, y)
                optimizer.zero_grad()
                loss.backward()
                if norm is not None:
                    torch.nn.utils.clip_grad_norm_(layer.parameters(), norm)
                optimizer.param_groups[0]["lr"] = rates[k] * factor(epoch, step)
                optimizer.step()
                x = activations.detach()
            step += 1
    return [p.detach() for layer in layers for p in layer.parameters()]


def check(expected: list[Tensor], **options: Any) -> None:
    runs = [fit(engine, **options) for engine in ("sequential", Streams(stages=2, graph_ticks=1, queue_depth=1))]
    assert runs[0].weights_sha256 == runs[1].weights_sha256
    for value, other in zip(runs[0].weights.values(), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - torch.eye(3)[labels]).square().mean()


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    missing = [1 + max(row[c] for c in range(3) if c != y) - row[y] for row, y in zip(logits, labels, strict=True)]
    return torch.stack(missing).clamp_min(0).mean()


@pytest.mark.parametrize(("rule", "loss"), [(SquaredError, squared_error), (Margin, margin)])
def test_the_output_layers_loss(rule: Any, loss: Any) -> None:
    check(plain_loop(output=loss), output_rule=rule)


def test_an_optimizer_and_a_rate_per_layer() -> None:
    optimizers = {
        "sequential1": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        "linear2": partial(torch.optim.SGD, lr=0.2, momentum=0.9),
    }
    check(plain_loop(rates=(0.05, 0.2), momentum=0.9), optimizer=optimizers)


def test_clipped_gradients() -> None:
    check(plain_loop(norm=0.05), clip_grad_norm=0.05)


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        (WarmUp(4), lambda epoch, step: min(1, (step + 1) / 4)),
        (WarmUp(2, MultiStepLR((1,), 0.5)), lambda epoch, step: min(1, (step + 1) / 2) * 0.5**epoch),
        (PerStep(lambda step: 1 / (1 + step)), lambda epoch, step: 1 / (1 + step)),
        (WarmUp(3, PerStep(lambda step: 0.9**step)), lambda epoch, step: min(1, (step + 1) / 3) * 0.9**step),
    ],
    ids=["warm-up", "then epochs", "per step", "then per step"],
)
def test_rates_per_step(schedule: Any, factor: Callable[[int, int], float]) -> None:
    check(plain_loop(factor=factor), lr_factor=schedule)


def test_clipping_leaves_the_closed_form_to_torchs_optimizer() -> None:
    """Fused kernels compute the gradients; the step is the library's. A norm that nothing reaches changes nothing."""
    from engine_runs import fit as fit_images
    from engine_runs import trainer

    options: dict[str, Any] = {"rule": LLS(), "optimizer": partial(torch.optim.SGD, lr=1e-2)}
    plain, loose, tight = (
        fit_images(trainer(**options, clip_grad_norm=norm), max_steps=3, epochs=1) for norm in (None, 1e9, 1e-3)
    )
    for name, value in plain.weights.items():
        torch.testing.assert_close(loose.weights[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(tight.weights["conv1.block.body.conv.weight"], plain.weights["conv1.block.body.conv.weight"])


def test_a_resumed_warm_up_goes_on(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"snapshot_every": 2, "snapshot_dir": tmp_path, "lr_factor": WarmUp(5)}
    expected = fit(**saving)
    resumed = fit(Streams(stages=2), resume=tmp_path / "step-00000002", **saving)
    assert resumed.weights_sha256 == expected.weights_sha256
    with pytest.raises(ValueError, match=r"output_rule is 'SquaredError' but was 'CrossEntropy'"):
        fit(resume=tmp_path, output_rule=SquaredError, **saving)
    with pytest.raises(ValueError, match=r"clip_grad_norm is 1.0 but was None"):
        fit(resume=tmp_path, clip_grad_norm=1.0, **saving)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"optimizer": {"linear2": torch.optim.SGD}},
            "no optimizer for sequential1; the layers are sequential1, linear2",
        ),
        ({"optimizer": dict.fromkeys((*NAMES, "x"), torch.optim.SGD)}, "an optimizer for x; the layers are"),
        ({"optimizer": {"sequential1": 3}}, "optimizer is 3; give what builds one"),
        ({"clip_grad_norm": 0}, "clip_grad_norm is 0; it must be a positive number that float32 can hold"),
        ({"clip_grad_norm": float("nan")}, "clip_grad_norm is nan"),
        ({"output_rule": 3}, "rule is 3; give a rule"),
        ({"output_rule": lambda layer: CrossEntropy}, "the rule of layer linear2 makes a type"),
        ({"lr_factor": PerStep(lambda step: -1.0)}, r"schedule gives -1.0 for .* 0; a factor .* at least 0"),
    ],
)
def test_mistakes_are_one_line(options: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        fit(**options)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WarmUp(0), "WarmUp has steps 0; it must be a whole number of at least 1"),
        (lambda: WarmUp(3, ReduceLROnPlateau()), "WarmUp is followed by ReduceLROnPlateau"),  # type: ignore[arg-type]
    ],
)
def test_a_warm_up_waits_for_no_loss(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
