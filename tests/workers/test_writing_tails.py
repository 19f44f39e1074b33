"""Tails that write into what they are given: the rule sees the activations all the same."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from graph_blocks import Probe, forward_of, image, made_layer
from torch import Tensor, nn

from unlocked.kernels import cpp, reference
from unlocked.models import Block, OutputBlock
from unlocked.rules import LLS, LayerPass, Rule
from unlocked.runtime import Trainer


class _Clamped(nn.Module):
    """Somebody's own, of which no attribute tells; in evaluation it does nothing."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x.clamp_(-0.2, 0.2) if self.in_place else x.clamp(-0.2, 0.2)


class PassProbe(Probe):
    """The same by whole passes."""

    def step(self, layer_pass: LayerPass) -> Tensor:
        return super().forward(layer_pass.activations, layer_pass.labels)


SGD = partial(torch.optim.SGD, lr=0.1)
TAILS: dict[str, Callable[[bool], nn.Module]] = {
    "module": lambda writes: nn.Sequential(nn.ReLU(inplace=writes), nn.MaxPool2d(2)),
    "alone": lambda writes: nn.ELU(inplace=writes),
    "of a view": lambda writes: nn.Sequential(nn.Flatten(), nn.ReLU(inplace=writes)),
    "after a pool": lambda writes: nn.Sequential(nn.MaxPool2d(2), nn.ReLU(inplace=writes)),
    "own": lambda writes: _Clamped(in_place=writes),
}


@pytest.mark.parametrize("rule", [LLS(), Probe, PassProbe])
@pytest.mark.parametrize("backend", [cpp, reference, None])
@pytest.mark.parametrize("name", TAILS)
def test_the_rule_sees_what_it_sees_before_another_tail(name: str, backend: Any, rule: Rule) -> None:
    """Outputs, scores and weights are those of the same tail that writes nowhere, bit for bit."""
    found = []
    x = image(3, 8, 8)
    labels = torch.arange(len(x)) % 5
    for writes in (False, True):
        torch.manual_seed(0)
        block = Block("layer", nn.Sequential(nn.Conv2d(3, 5, 3)), TAILS[name](writes), latent_size=2)
        layer = made_layer(block, x, backend, rule=rule)
        values = []
        for _ in range(2):
            values.append(forward_of(layer, x, labels).clone())
            layer.update(labels)
            output, scores = layer.evaluate(x)
            values += [output.clone()] if scores is None else [output.clone(), scores]
        found.append([*values, *(value for _, value in layer.tensors())])
    for expected, got in zip(*found, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("rule", [LLS(), "DFA"])
def test_networks_train_alike(rule: Any) -> None:
    def losses(writes: bool) -> list[float]:
        torch.manual_seed(0)
        first = Block("first", nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh()), TAILS["module"](writes), latent_size=2)
        blocks = [first, OutputBlock(5 * 9, 4)]
        trainer = Trainer(blocks, rule=rule, optimizer=SGD, kernels="torch", seed=0, progress=False)
        images = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        told = trainer.fit((images, torch.arange(24) % 4), epochs=2, batch_size=8).epochs[-1]
        return [told.train_loss, *(loss for _, loss in told.local_losses)]

    assert losses(True) == losses(False)
