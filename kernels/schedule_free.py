"""Schedule-free AdamW with the averaging weights of the LLS authors' release: `AdamWSF`.

Defazio et al. 2024, "The Road Less Scheduled". Three sequences of weights: z takes plain steps, x is their average (the
training's result), and gradients are taken at y = (1 - beta1) z + beta1 x. The package `schedulefree` corrects the
second moment's bias in the moment itself, so that its first steps weigh in x as much as all others. Here the
correction scales the rate instead, and a step weighs in x by a power of the largest rate so far: the first steps, poor
and small, count for little. Otherwise the two are the same optimizer, with the same names in options and state.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["AdamWSF", "StepSize"]


class StepSize(NamedTuple):
    """The scalars of one step, from the options and the counts that a parameter group holds."""

    rate: float
    share: float  # of the new z in the average x

    @classmethod
    def advance(cls, group: dict[str, Any]) -> "StepSize":
        """Those of the group's next step, which is counted: `k`, `lr_max` and `weight_sum` move on."""
        k, (_, beta2) = group["k"], group["betas"]
        schedule = (k + 1) / group["warmup_steps"] if k < group["warmup_steps"] else 1.0
        rate = group["lr"] * schedule * math.sqrt(1 - beta2 ** (k + 1))
        largest = max(rate, group["lr_max"])
        weight = (k + 1) ** group["r"] * largest ** group["weight_lr_power"]
        total = group["weight_sum"] + weight
        group.update(k=k + 1, lr_max=largest, weight_sum=total)
        return cls(rate, weight / total if total else 0.0)


class AdamWSF(torch.optim.Optimizer):
    """Schedule-free AdamW as the LLS authors trained with it.

    It starts in evaluation mode: call `train()` before the first step, and `eval()` before the weights are evaluated.
    One group's step k = 0, 1, ...: v <- beta2 v + (1 - beta2) g^2; r = lr * warm-up * sqrt(1 - beta2^(k+1));
    n = g / (sqrt(v) + eps) + weight_decay * y; c = w_k / (w_0 + ... + w_k) with w_k = (k+1)^r * (largest r so
    far)^weight_lr_power; y <- lerp(y, z, c) + r (beta1 (1 - c) - 1) n; z <- z - r n.

    Args:
        params: tensors, or groups of them, as torch.optim takes them.
        lr: the learning rate.
        betas: the average's weight in y (above 0), and the decay of the second moment; both below 1.
        eps: added to the root of the second moment.
        weight_decay: decoupled, taken at y.
        warmup_steps: steps over which the rate rises linearly.
        r: the power of the step's number in its weight.
        weight_lr_power: the power of the largest rate so far in a step's weight.

    Raises:
        ValueError: an option out of its range; a step in evaluation mode.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("warmup_steps", warmup_steps)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not (0 < betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas must be below 1, the first above 0 and the second at least 0; got {betas}")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "warmup_steps": warmup_steps}
        options |= {"r": r, "weight_lr_power": weight_lr_power}
        counts = {"train_mode": False, "k": 0, "weight_sum": 0.0, "lr_max": -1.0}
        super().__init__(params, options | counts)

    def train(self) -> None:
        """Puts the weights at which gradients are taken (y) into the parameters."""
        self._switch(True)

    def eval(self) -> None:
        """Puts the averaged weights (x), the training's result, into the parameters."""
        self._switch(False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient, which it leaves as it is. Returns the closure's loss."""
        if not all(group["train_mode"] for group in self.param_groups):
            raise ValueError("the schedule-free optimizer is in evaluation mode; call train() before step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            size = StepSize.advance(group)
            owned = [p for p in group["params"] if p.grad is not None]
            if owned:
                self._update(owned, group, size)
        return loss

    def _update(self, owned: list[Tensor], group: dict[str, Any], size: StepSize) -> None:
        (beta1, beta2), grads = group["betas"], [p.grad for p in owned if p.grad is not None]
        for p in owned:
            if "z" not in self.state[p]:
                self.state[p]["z"] = p.detach().clone(memory_format=torch.preserve_format)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        z, squares = ([self.state[p][name] for p in owned] for name in ("z", "exp_avg_sq"))
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
        spread = torch._foreach_sqrt(squares)
        torch._foreach_add_(spread, group["eps"])
        direction = torch._foreach_div(grads, spread)
        if group["weight_decay"]:
            torch._foreach_add_(direction, owned, alpha=group["weight_decay"])
        torch._foreach_lerp_(owned, z, size.share)
        torch._foreach_add_(owned, direction, alpha=size.rate * (beta1 * (1 - size.share) - 1))
        torch._foreach_add_(z, direction, alpha=-size.rate)

    @torch.no_grad()
    def _switch(self, training: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == training:
                continue
            beta1 = group["betas"][0]
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], 1 - beta1 if training else 1 - 1 / beta1)
            group["train_mode"] = training
