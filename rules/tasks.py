"""What a run learns: which targets it has, what the output layer minimises, and which figures tell how good it is.

A task of one's own is a `Task` with a `loss(scores, targets)`, and `measure` where it reports more than that:

    class Quantile(Task):
        name = "quantile"

        def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
            error = targets - scores[:, 0]
            return torch.maximum(0.9 * error, -0.1 * error).mean()

        def measure(self, scores: Tensor, targets: Tensor) -> dict[str, Tensor]:
            return {"below": (targets < scores[:, 0]).double().sum()}
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CLASS_NUMBER", "NO_TARGETS", "Figures", "TargetForm", "Task", "refuse_non_finite"]


class TargetForm(NamedTuple):
    """Of one sample's target."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def made_up(self, rows: int) -> Tensor:
        """Targets that every task takes: zeros [rows, *shape]."""
        return torch.zeros(rows, *self.shape, dtype=self.dtype)

    def __str__(self) -> str:
        sizes = ", ".join(["N", *map(str, self.shape)])
        return "none" if self == NO_TARGETS else f"{str(self.dtype).removeprefix('torch.')} [{sizes}]"


CLASS_NUMBER = TargetForm((), torch.int64)
NO_TARGETS = TargetForm((0,), torch.uint8)


class Figures(NamedTuple):
    """How good predictions are, over some samples."""

    loss: float
    """Mean over what counts."""
    acc1: float | None = None
    """Percent of what counts whose target has the highest score; None: the task has nothing of the kind."""
    acc5: float | None = None
    others: tuple[tuple[str, float], ...] = ()
    """The task's own, by name."""


class Task:
    """What a run learns. Sums are taken on the device, in float64, and read now and then; all figures come of them."""

    name: str = "own"
    dense: bool = False
    """Targets and scores are of positions rather than of whole samples."""
    needs_targets: bool = True
    best: tuple[str, bool] = ("loss", False)
    """The figure by which evaluations are ranked ("loss", "acc1" or one of its own), and whether more is better."""

    def num_scores(self, targets: TargetForm, outputs: tuple[int, ...]) -> int:
        """How many scores one prediction has.

        Args:
            outputs: one sample's shape of what the network gives.

        Raises:
            ValueError: targets or outputs that are not of this task; says which would be.
        """
        return outputs[-1]

    def form(self, targets: TargetForm, outputs: tuple[int, ...]) -> TargetForm:
        """What every stage gets of targets of that form."""
        return targets

    def check(self, targets: Tensor, num_scores: int | None) -> None:
        """Raises: ValueError: targets [B, ...] with values that nothing can be learnt from. None: of the number of
        scores nothing is known yet."""
        refuse_non_finite(targets)

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A network's outputs [B, ...] and targets [B, ...] as predictions: scores [N, n] and targets [N, ...]."""
        return outputs, targets

    def targets_at(self, targets: Tensor, shape: Sequence[int]) -> Tensor:
        """The targets [N, ...] of what a layer with activations of that `shape` per sample predicts."""
        return targets

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """The mean over what counts, a scalar that autograd can follow, of scores and targets as `rows` gives them."""
        raise NotImplementedError

    def projected_loss(
        self,
        latents: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        bias: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """`loss` of the scores latents [N, D] weightT [n, D] + bias [n]."""
        if label_smoothing:
            raise ValueError(f"label_smoothing is for classes; the task is {self.name}, leave it at 0")
        return self.loss(F.linear(latents, weight, bias), targets)

    def count(self, targets: Tensor) -> Tensor:
        """Over how many the mean of `loss` is, float64 []."""
        return targets.new_full((), len(targets), dtype=torch.float64)

    def measure(self, scores: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Sums over the rows, by name: scalars, or vectors of a fixed length."""
        return {}

    def figures(self, sums: Mapping[str, Any], count: float) -> Mapping[str, float]:
        """Figures from the sums of `measure` (numbers, or lists of them) over `count`; by default their means. Those
        called acc1 and acc5 are percent. Numbers of any kind (NumPy's, too), which are read as Python's; a figure that
        there is none of is left out."""
        return {name: value / max(count, 1) for name, value in sums.items() if isinstance(value, float)}

    # --- what the workers call

    def tally(self, scores: Tensor, targets: Tensor) -> Tensor:
        """[2 + measures] float64: the sum of losses, what they are of, and the sums of `measure`, flat."""
        count = self.count(targets)
        measured = [one.double().reshape(-1) for one in self.measure(scores, targets).values()]
        return torch.cat([(self.loss(scores, targets).double() * count)[None], count[None], *measured])

    def sizes(self, num_scores: int, target: TargetForm, outputs: tuple[int, ...]) -> dict[str, int]:
        """How long each sum of `measure` is (0: a scalar), tried on made-up predictions."""
        made_up = self.rows(torch.zeros(2, *outputs), target.made_up(2))
        return {name: 0 if one.dim() == 0 else one.numel() for name, one in self.measure(*made_up).items()}

    def read(self, sums: Sequence[float], samples: int, sizes: Mapping[str, int]) -> Figures:
        """The figures of sums as `tally` makes them, over `samples` samples.

        Raises:
            ValueError: the task gives a figure that is no number.
        """
        count, measured, at = sums[1], {}, 2
        for name, size in sizes.items():
            measured[name] = list(sums[at : at + size]) if size else sums[at]
            at += size or 1
        given = dict(self.figures(measured, count)) if count else {}
        found = {name: _number(value, f"figure {name} of the task {self.name}") for name, value in given.items()}
        first = {name: found.pop(name, None) for name in ("acc1", "acc5")}
        return Figures(self.mean_loss(sums, samples), first["acc1"], first["acc5"], tuple(found.items()))

    def mean_loss(self, sums: Sequence[float], samples: int) -> float:
        return sums[0] / max(sums[1], 1)

    def settings(self) -> dict[str, Any]:
        """What makes it this task and no other: its attributes."""
        return {key: value for key, value in sorted(vars(self).items()) if not key.startswith("_")}

    def __repr__(self) -> str:
        told = ", ".join(f"{key}={value!r}" for key, value in self.settings().items())
        return f"{type(self).__name__}({told})"


def _number(value: Any, what: str) -> float:
    try:
        if isinstance(value, str | bytes) or getattr(value, "ndim", None):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        told = f"{type(value).__name__} {' '.join(repr(value).split())[:60]}"
        raise ValueError(f"{what} is no number but the {told}; give a number, or leave it out") from None


def refuse_non_finite(targets: Tensor) -> None:
    """Raises: ValueError: NaN or infinity among them; says where."""
    if targets.is_floating_point() and not bool(targets.isfinite().all()):
        place = [int(number) for number in targets.isfinite().logical_not().nonzero()[0]]
        raise ValueError(f"targets hold {float(targets[tuple(place)])}, at {place}; leave the sample out, or mend it")
