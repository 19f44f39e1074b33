"""A layer: one block with its rule and its optimizer, and the two halves of its local step.

`forward` computes the output with the weights before the update and keeps what the update needs; `update` spends it.
The output never carries a gradient, so nothing can come back from later layers. How the step is computed is a
`Step`: through autograd (any block, any rule), or in closed form with fused kernels (`workers.fused`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.kernels.vocabulary import pieces, using
from unlocked.models import Block, KeyedDropout, set_dropout_keys
from unlocked.models.overwriting import Writes
from unlocked.rules import LayerInfo, LocalRule, has_scores
from unlocked.workers.block_calls import BlockCalls
from unlocked.workers.delivery import as_delivered, count_correct
from unlocked.workers.errors import NonFiniteLossError
from unlocked.workers.finite import FiniteState
from unlocked.workers.frozen import frozen_modules
from unlocked.workers.group_norms import GroupNormGuard
from unlocked.workers.optimizers import OptimizerFactory, build_optimizer
from unlocked.workers.rule_convolutions import convolving
from unlocked.workers.step import Step

__all__ = [
    "AutogradStep",
    "Layer",
    "OptimizerFactory",
    "Step",
    "StepFactory",
    "as_delivered",
    "count_correct",
    "frozen_modules",
]


_NOTHING = Writes()


class Layer(BlockCalls):
    """Block, rule and optimizer of one layer, on one device.

    Args:
        block: the layer's network; its parameters are already initialised.
        rule: the built local rule.
        info: what the layer is called and where it stands.
        optimizer: builds the layer's own optimizer; None for a layer that has no parameters.
        step: chooses how the local step is computed; by default through autograd.
        precision: of the arithmetic and of what passes between layers; see `unlocked.kernels.precision`.
        sample: a micro-batch of the block's inputs, made up; what the step is made of is tried with it.
        needs, writes: see `BlockCalls`.
        sums: how many the task adds up (`Task.tally`).
        kernels: the backend of losses over a vocabulary; None: plain PyTorch.
    """

    def __init__(
        self,
        block: Block,
        rule: LocalRule,
        info: LayerInfo,
        optimizer: OptimizerFactory,
        *,
        device: torch.device,
        step: "StepFactory | None" = None,
        precision: str = "fp32",
        sample: Tensor | None = None,
        needs: Sequence[str] = (),
        writes: Writes = _NOTHING,
        sums: int = 3,
        kernels: ModuleType | None = None,
    ) -> None:
        self.info, self.kernels = info, kernels
        block = block.to(device=device)
        if device.type == "cuda" or any(p.dim() == 4 for p in block.parameters()):
            # Convolutions and 2x2 pooling are faster with channels last, on CPUs and GPUs alike.
            block = block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().__init__(block, device, precision, needs, writes)
        self.rule = rule.to(device)
        self.group_norms = GroupNormGuard(device.type)
        self.frozen = frozen_modules(block)
        """What stays in eval mode, also in training and while statistics are re-estimated."""
        self.parameters = [p for module in (rule, block) for p in module.parameters() if p.requires_grad]
        self.optimizer: Any = build_optimizer(optimizer, self.parameters) if self.parameters else None
        self.base_lr = [float(g["lr"]) for g in self.optimizer.param_groups] if self.optimizer else []
        self.task = info.task
        self.classifies = self.task.name == "classification"
        self.finite = FiniteState(info.name, {"rule": self.rule, "block": self.block})
        # Sums as the task has them (of a classification: loss, hits, hits among the first five), read every N steps.
        self.totals = torch.zeros(sums, dtype=torch.float64, device=device)
        self.eval_totals = torch.zeros(sums, dtype=torch.float64, device=device)
        # Of the layer's own prediction in evaluation, a classification's loss being left out.
        self.score_totals = torch.zeros(sums, dtype=torch.float64, device=device)
        self.has_scores = has_scores(rule) and not self.is_output
        # Training micro-batches seen, on the device: the key of everything random in this layer.
        self.clock = torch.zeros((), dtype=torch.int64, device=device)
        self._keeps_clock = any(isinstance(m, KeyedDropout) and m.p > 0 for m in block.modules())
        set_dropout_keys(block, info.seed, info.index, self.clock)
        self._pending = 0  # training steps that the clock has not been told of, where nothing reads it per step
        self._counted = torch.zeros_like(self.clock)  # the part of the clock that BatchNorm's own count knows of
        self._mode: str | None = None
        self.sample = sample
        self.step: Step = (step or AutogradStep)(self)
        if self.optimizer is not None:  # groups of equal options may have become one
            self.base_lr = self.base_lr[: len(self.optimizer.param_groups)]

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def is_capturable(self) -> bool:
        """A CUDA graph can hold this layer's local step: the optimizer keeps all its state on the device."""
        return self.optimizer is None or not isinstance(self.optimizer, torch.optim.Optimizer)

    def uncounted_steps(self) -> int:
        """Steps that only the host has counted so far; see `restore_uncounted`."""
        return self._pending

    def restore_uncounted(self, steps: int) -> None:
        """Undoes the counting of steps that were captured but not run."""
        self._pending = steps

    def set_mode(self, mode: str) -> None:
        """`train`, `statistics` (train-mode forward without updates) or `evaluate`; free when nothing changes. What is
        `frozen` stays in eval mode.

        A schedule-free optimizer holds other weights for training than for the rest: its `train` and `eval` switch.
        """
        if mode == self._mode:
            return
        self._mode = mode
        self.block.train(mode != "evaluate")
        self.rule.train(mode != "evaluate")
        for module in self.frozen:
            module.training = False
        switch = getattr(self.optimizer, "train" if mode == "train" else "eval", None)
        if switch is not None:
            switch()
        renew = getattr(self.optimizer, "renew_bfloat16", None)
        if renew is not None and mode == "train":
            renew()  # the weights may have been switched, or loaded

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Action F of a training micro-batch."""
        self.set_mode("train")
        output = self.step.forward(self._entering(x), out)
        return as_delivered(output) if out is None else output

    def update(self, labels: Tensor) -> None:
        """Action U: the local loss, its gradients, the optimizer's step.

        Raises:
            NonFiniteLossError: on the CPU, at once. On CUDA the totals tell when they are read.
        """
        loss = self.step.update(labels)
        if self.device.type == "cpu" and not math.isfinite(loss.item()):
            raise NonFiniteLossError(self.name, float(loss) / labels.shape[0])
        self.advance(1)

    def advance(self, steps: int, *, on_device: bool = True) -> None:
        """Counts training steps. A launched graph has moved the device's clock itself (`on_device=False`)."""
        if not self._keeps_clock:
            self._pending += steps
        elif on_device:
            self.clock += steps

    def set_clock(self, clock: Tensor) -> None:
        """From now on the micro-batch is number `clock`, an int64 scalar."""
        self.clock.copy_(clock)

    def _sync_clock(self) -> None:
        """Brings the clock, and the count that BatchNorm keeps of its batches, up to date."""
        if self._pending:
            self.clock += self._pending
            self._pending = 0
        for module in self.step.counts:
            if isinstance(count := module.num_batches_tracked, Tensor):
                count += self.clock - self._counted
        self._counted.copy_(self.clock)

    @torch.no_grad()
    def infer(self, x: Tensor, mode: str) -> Tensor:
        """Forward without an update: `statistics` re-estimates BatchNorm in train mode, `evaluate` is eval mode."""
        self.set_mode(mode)
        with self.autocast(), self._convolving():
            hidden = getattr(self.step, "hidden", None) if mode == "statistics" else None  # of which nobody asks scores
            result: Tensor = (
                self.block(self.own(self._entering(x)), **self.beside) if hidden is None else hidden(self._entering(x))
            )
        return as_delivered(self.leaving(result))

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Eval-mode forward: the output, and what `score` counts if the rule makes scores: a classification's scores
        [B, num_classes], else the activations. An output layer whose head works in pieces gives what the head reads."""
        hidden = getattr(self.step, "hidden", None)
        if not self.has_scores and hidden is None:
            return self.infer(x, "evaluate"), None
        self.set_mode("evaluate")
        with self.autocast(), self._convolving():
            if hidden is not None:
                return as_delivered(hidden(self._entering(x)).float()), None
            activations = self.body(self._entering(x))
            result = self.tail(activations)
        seen = activations.float() if activations.dtype == torch.bfloat16 else activations
        return as_delivered(self.leaving(result)), self.rule.scores(seen) if self.classifies else seen

    def _convolving(self) -> AbstractContextManager[None]:
        """Inside, convolutions are the backend's own where those of training steps are."""
        own = getattr(getattr(self.step, "body", None), "convolves", False)
        return convolving(self.kernels if own else None)

    @torch.no_grad()
    def score(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Adds up how good the layer's own prediction is; returns the sums of these samples: of a classification the
        hits [2], else all of the task's."""
        if self.classifies:
            hits = count_correct(scores, labels)
            self.score_totals[1:] += hits
            return hits
        in_pieces = getattr(self.step, "tally", None)
        found = self._tally_scores(scores, labels) if not self.is_output else (in_pieces or self._tally)(scores, labels)
        self.score_totals += found
        return found

    def account(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> Tensor:
        """Adds a training micro-batch with that mean loss to the totals, of the output layer with its hits; returns the
        sum of losses."""
        if self.classifies:
            loss_sum = loss * labels.shape[0]
            self.totals[0] += loss_sum
            if self.is_output:
                self.totals[1:] += count_correct(outputs, labels)
            return loss_sum
        count = self.task.count(labels)
        loss_sum = loss.double() * count
        if self.is_output:
            self.totals[2:] += self._tally(outputs, labels)[2:]
        self.totals[:2] += torch.stack([loss_sum, count])
        return loss_sum

    def _tally(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self.task.tally(*self.task.rows(outputs, labels))

    def _tally_scores(self, activations: Tensor, labels: Tensor) -> Tensor:
        """Sample by sample where a sample's scores are many already."""
        per_sample = self.info.num_classes * (activations.shape[1:-1].numel() if self.task.dense else 1)
        total = torch.zeros_like(self.score_totals)
        for rows in pieces(len(activations), per_sample):
            total += self.task.tally(self.rule.scores(activations[rows]), self.info.targets(labels[rows]))
        return total

    def set_lr_factor(self, factor: float) -> None:
        """Scales the optimizer's initial learning rates (a schedule's value for the epoch)."""
        if self.optimizer is None:
            return
        for group, base in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base * factor)
            else:
                group["lr"] = base * factor

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Every parameter and buffer that is saved, by name, in a fixed order: the rule's, then the block's."""
        self._sync_clock()
        for prefix, module in (("rule", self.rule), ("block", self.block)):
            for name, value in module.state_dict().items():
                yield f"{self.name}.{prefix}.{name}", value

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to go on exactly from here."""
        self._sync_clock()
        return {
            "rule": self.rule.state_dict(),
            "block": self.block.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else {},
            "totals": self.totals,
            "clock": self.clock,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, in place: device addresses stay, so captured graphs stay valid."""
        self._load(state, None if self.optimizer is None else self.optimizer.load_state_dict)
        self._mode = None  # the optimizer's weights may be at another point now

    def exact_state(self) -> dict[str, Any]:
        """What a worker needs that goes on amid anything: `state_dict`, an evaluation's sums so far, and the mode,
        which a schedule-free optimizer can't leave and take up again without rounding."""
        self._sync_clock()
        optimizer: Any = {}
        if self.optimizer is not None:
            exact = getattr(self.optimizer, "exact_state", None)
            optimizer = self.optimizer.state_dict() if exact is None else exact()
        return {
            "rule": self.rule.state_dict(),
            "block": self.block.state_dict(),
            "optimizer": optimizer,
            "totals": self.totals,
            "clock": self.clock,
            "eval_totals": self.eval_totals,
            "score_totals": self.score_totals,
            "mode": self._mode,
        }

    def load_exact_state(self, state: dict[str, Any]) -> None:
        """The inverse of `exact_state`, in a layer that has just been built."""
        exact = getattr(self.optimizer, "load_exact_state", None)
        self._load(state, self.optimizer.load_state_dict if exact is None and self.optimizer is not None else exact)
        self.eval_totals.copy_(state["eval_totals"])
        self.score_totals.copy_(state["score_totals"])
        self._mode = state["mode"]
        self.block.train(self._mode != "evaluate")
        self.rule.train(self._mode != "evaluate")
        for module in self.frozen:
            module.training = False

    def _load(self, state: dict[str, Any], load_optimizer: Callable[[dict[str, Any]], object] | None) -> None:
        self.rule.load_state_dict(state["rule"])
        self.block.load_state_dict(state["block"])
        if load_optimizer is not None:
            load_optimizer(state["optimizer"])
        self.totals.copy_(state["totals"])
        self.set_clock(state["clock"])
        self._counted.copy_(self.clock)
        self._pending = 0


class AutogradStep:
    """The local step of any differentiable block and rule."""

    counts: Sequence[nn.Module] = ()
    why = ""  # what stands against a closed form

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._activations: Tensor | None = None

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        layer = self.layer
        with torch.enable_grad(), layer.autocast(), layer.group_norms.active():
            activations = layer.body(x.detach())
        self._activations = activations
        with torch.no_grad():
            result = layer.leaving(layer.tail(activations.detach()))
            return result if out is None else out.copy_(result)

    def update(self, labels: Tensor) -> Tensor:
        layer, activations = self.layer, self.take_activations()
        with torch.enable_grad(), using(layer.kernels), convolving(layer.kernels):
            loss = layer.rule(activations, labels)
        self.descend(loss)
        with torch.no_grad():
            return layer.account(loss.detach(), activations, labels)

    def descend(self, loss: Tensor) -> None:
        """One step of the optimizer by the gradients of `loss`."""
        if self.layer.optimizer is not None:
            self.layer.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.layer.optimizer.step()

    def take_activations(self) -> Tensor:
        """What `forward` kept, with its graph; nothing of the micro-batch outlives the update."""
        activations = self._activations
        assert activations is not None, "update without a forward"
        self._activations = None
        with torch.enable_grad():
            # A rule computes in float32, whatever the block did.
            return activations.float() if activations.dtype == torch.bfloat16 else activations


StepFactory = Callable[[Layer], Step]
