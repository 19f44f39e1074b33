"""SoftHebb (Journe, Rodriguez, Guo and Moraitis, "Hebbian deep learning without feedback", ICLR 2023).

Neurons k with weights w_k see inputs x, u_k = w_k . x, and compete softly: y = softmax(u / T). The winner learns
Hebbian, all others anti-Hebbian: dw_k = rate s_k y_k (x - u_k w_k), s = 1 for the largest u and -1 for the others;
the update is divided by its largest entry. No labels, no loss, no gradient. A neuron's rate falls as its norm comes
to 1, where the rule has its fixed point: rate |  |w_k| - 1 |^power. T is 0.1, not 1: docs/rules.md says why.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.rules.base import LayerInfo, LocalRule
from unlocked.rules.passes import LayerPass

__all__ = ["SoftHebb"]


class SoftHebb(LocalRule):
    """Level 2: changes the weights of the block's one Linear or Conv2d by itself, by at most `rate` a step. Its figure
    in `local_losses` is the mean square of the update: no loss, but it falls as neurons settle. `temperature` is T."""

    optimizer = None
    needs_graph = False

    def __init__(self, layer: LayerInfo, *, rate: float = 0.02, temperature: float = 0.1, power: float = 0.5) -> None:
        super().__init__(layer)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature!r}; it must be positive")
        self.rate, self.temperature, self.power = rate, temperature, power

    def step(self, layer_pass: LayerPass) -> Tensor:
        learner = _learner(layer_pass.block)
        x = _patches(learner, layer_pass.input)  # [N, D]
        weight = learner.weight.detach().flatten(1)  # [K, D]
        u = x @ weight.T
        y = torch.softmax(u / self.temperature, 1)
        winner = u.argmax(1, keepdim=True)
        signed = (-y).scatter_(1, winner, y.gather(1, winner))
        delta = (signed.T @ x - (signed * u).sum(0)[:, None] * weight) / len(x)
        delta = delta / delta.abs().max().clamp_min(1e-30)
        near = (weight.norm(dim=1, keepdim=True) - 1).abs().pow(self.power)
        update = self.rate * layer_pass.lr_factor * near * delta
        learner.weight.data.add_(update.view_as(learner.weight))
        return update.square().mean()


def _learner(block: nn.Module) -> nn.Linear | nn.Conv2d:
    found = [m for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if len(found) != 1 or getattr(found[0], "groups", 1) != 1:
        raise ValueError(f"SoftHebb learns in blocks with one Linear or plain Conv2d, this one has {len(found)}")
    return found[0]


def _patches(learner: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """What each neuron sees, once per place."""
    if isinstance(learner, nn.Linear):
        return x.reshape(-1, learner.in_features)
    how = {"dilation": learner.dilation, "padding": learner.padding, "stride": learner.stride}
    return F.unfold(x, learner.kernel_size, **how).transpose(1, 2).flatten(0, 1)  # type: ignore[arg-type]
