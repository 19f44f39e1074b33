"""The tasks that the library knows, and which one targets are of where nobody says."""

from collections.abc import Mapping, Sequence
from math import exp, log, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unlocked.kernels.vocabulary import IGNORED, linear_cross_entropy
from unlocked.rules.tasks import CLASS_NUMBER, NO_TARGETS, Figures, TargetForm, Task

__all__ = [
    "CLASSIFICATION",
    "TASKS",
    "Classification",
    "MultiLabel",
    "Regression",
    "Segmentation",
    "Tokens",
    "infer_task",
]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_LARGEST_PERPLEXITY = 700.0  # of a loss whose exponential a float64 holds


class Classification(Task):
    """A class number int64 [N] for scores [N, n]: cross-entropy, the percent of samples whose class comes first and
    among the first five."""

    name = "classification"
    best = ("acc1", True)

    def num_scores(self, targets: TargetForm, outputs: tuple[int, ...]) -> int:
        if targets != CLASS_NUMBER or len(outputs) != 1:
            raise _misfit(self, "int64 [N] class numbers", "(classes,)", targets, outputs)
        return outputs[0]

    def check(self, targets: Tensor, num_scores: int | None) -> None:
        refuse_beyond(targets, num_scores, "labels")

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(scores, targets)

    def projected_loss(
        self,
        latents: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        bias: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        return F.cross_entropy(F.linear(latents, weight, bias), targets, label_smoothing=label_smoothing)

    def sizes(self, num_scores: int, target: TargetForm, outputs: tuple[int, ...]) -> dict[str, int]:
        """Its sums are (loss, first, among the first five), and how many samples they are of the host knows."""
        return {"acc5": 0}

    def read(self, sums: Sequence[float], samples: int, sizes: Mapping[str, int]) -> Figures:
        loss, correct, correct5 = (value / max(samples, 1) for value in sums)
        return Figures(loss, 100 * correct, 100 * correct5)

    def mean_loss(self, sums: Sequence[float], samples: int) -> float:
        return sums[0] / max(samples, 1)


CLASSIFICATION = Classification()


class MultiLabel(Task):
    """Several labels: truth values [N, n] (bool, or 0 and 1 of any type) for scores [N, n].

    Binary cross-entropy of each label's score, mean over samples and labels. acc1 is the percent of single labels that
    are right at a score above 0; micro and macro F1 in percent, a label that is neither there nor found counting 0.
    """

    name = "multi-label"
    best = ("micro_f1", True)

    def num_scores(self, targets: TargetForm, outputs: tuple[int, ...]) -> int:
        if len(outputs) != 1 or targets.shape != outputs:
            raise _misfit(self, "0 or 1 for each label, [N, labels]", "(labels,)", targets, outputs)
        return outputs[0]

    def check(self, targets: Tensor, num_scores: int | None) -> None:
        if not bool(((targets == 0) | (targets == 1)).all()):
            low, high = float(targets.min()), float(targets.max())
            raise ValueError(f"labels are 0 or 1 for the task {self.name}, got values from {low:g} to {high:g}")

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(scores, targets.to(scores.dtype))

    def measure(self, scores: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        found, there = scores > 0, targets.bool()
        return {
            "right": (found == there).double().mean(1).sum(),
            "both": (found & there).sum(0),
            "found": found.sum(0),
            "there": there.sum(0),
        }

    def figures(self, sums: Mapping[str, Any], count: float) -> Mapping[str, float]:
        both, found, there = sums["both"], sums["found"], sums["there"]
        each = [_ratio(2 * b, f + t) for b, f, t in zip(both, found, there, strict=True)]
        return {
            "acc1": 100 * sums["right"] / count,
            "micro_f1": 100 * _ratio(2 * sum(both), sum(found) + sum(there)),
            "macro_f1": 100 * sum(each) / len(each),
        }


class Regression(Task):
    """Real numbers [N] or [N, ...] for outputs [N, 1] or of the targets' shape: the mean squared error; RMSE, MAE, and
    R2, the mean over the outputs of one sample (0 for one that never varies)."""

    name = "regression"

    def num_scores(self, targets: TargetForm, outputs: tuple[int, ...]) -> int:
        if targets == NO_TARGETS or (targets.shape or (1,)) != outputs:
            raise _misfit(self, "numbers [N, ...] as the outputs", "(1,) or the targets' shape", targets, outputs)
        return prod(outputs)

    def form(self, targets: TargetForm, outputs: tuple[int, ...]) -> TargetForm:
        return TargetForm(targets.shape, torch.float32)

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return outputs.flatten(1), self.targets_at(targets, ())

    def targets_at(self, targets: Tensor, shape: Sequence[int]) -> Tensor:
        return targets.reshape(len(targets), -1)

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(scores, targets)

    def measure(self, scores: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        error, wide = (scores - targets).double(), targets.double()
        return {
            "absolute": error.abs().mean(1).sum(),
            "errors": error.square().sum(0),
            "sums": wide.sum(0),
            "squares": wide.square().sum(0),
        }

    def figures(self, sums: Mapping[str, Any], count: float) -> Mapping[str, float]:
        spread = [square - total**2 / count for square, total in zip(sums["squares"], sums["sums"], strict=True)]
        shares = [1 - e / s if s > 0 else 0.0 for e, s in zip(sums["errors"], spread, strict=True)]
        mse = sum(sums["errors"]) / len(shares) / count
        return {"rmse": mse**0.5, "mae": sums["absolute"] / count, "r2": sum(shares) / len(shares)}


class _Positions(Task):
    """A class number for every position, some of which do not count."""

    dense = True

    def __init__(self, *, ignore_index: int = IGNORED) -> None:
        self.ignore_index = ignore_index

    def check(self, targets: Tensor, num_scores: int | None) -> None:
        counts = targets != self.ignore_index
        empty = counts.flatten(1).any(1).logical_not().nonzero()
        if len(empty):
            raise ValueError(
                f"sample {int(empty[0])} has no position that counts: all of its targets are ignore_index "
                f"{self.ignore_index}; leave it out"
            )
        refuse_beyond(targets[counts], num_scores, "targets")

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        total = F.cross_entropy(scores, targets, ignore_index=self.ignore_index, reduction="sum")
        return total / (targets != self.ignore_index).sum().clamp_min(1)

    def projected_loss(
        self,
        latents: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        bias: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        return linear_cross_entropy(
            latents, weight, targets, bias=bias, ignore_index=self.ignore_index, label_smoothing=label_smoothing
        )

    def count(self, targets: Tensor) -> Tensor:
        return (targets != self.ignore_index).sum().double()


class Tokens(_Positions):
    """A token int64 [N, T] for every position of scores [N, T, V]: cross-entropy, mean over the positions that count;
    token accuracy (acc1), perplexity, bits per byte.

    Args:
        ignore_index: the target of a position that does not count.
        shift: the scores at position t are of the target at t + 1, as the labels of Hugging Face's language models
            mean it; the last position does not count then. None: so if there are no targets, which are then the inputs
            where `attention_mask` is not 0, or if the targets are the inputs, all of them. False: as they are.
        bytes_per_token: of the text, for the bits per byte; 1 for bytes. None: they are not reported.
    """

    name = "tokens"
    _found_shift = False

    def __init__(
        self, *, ignore_index: int = IGNORED, shift: bool | None = None, bytes_per_token: float | None = None
    ) -> None:
        super().__init__(ignore_index=ignore_index)
        if bytes_per_token is not None and not 0 < bytes_per_token < 1e6:
            raise ValueError(f"bytes_per_token is {bytes_per_token!r}; it must be a positive number, 1 for bytes")
        self.shift, self.bytes_per_token = shift, bytes_per_token

    def num_scores(self, targets: TargetForm, outputs: tuple[int, ...]) -> int:
        fits = targets == NO_TARGETS or (targets.dtype == torch.int64 and targets.shape == outputs[:1])
        if len(outputs) != 2 or not fits:
            raise _misfit(self, "int64 [N, T], or none", "(T, vocabulary)", targets, outputs)
        return outputs[1]

    def form(self, targets: TargetForm, outputs: tuple[int, ...]) -> TargetForm:
        return TargetForm(outputs[:1], torch.int64)

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return outputs.flatten(0, 1), targets.flatten()

    def targets_at(self, targets: Tensor, shape: Sequence[int]) -> Tensor:
        return targets.flatten()

    def measure(self, scores: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        return {"right": (scores.argmax(1) == targets).sum()}  # ignore_index is no token

    def figures(self, sums: Mapping[str, Any], count: float) -> Mapping[str, float]:
        return {"acc1": 100 * sums["right"] / count}

    def read(self, sums: Sequence[float], samples: int, sizes: Mapping[str, int]) -> Figures:
        found = super().read(sums, samples, sizes)
        others = [("perplexity", exp(min(found.loss, _LARGEST_PERPLEXITY)))]
        if self.bytes_per_token is not None:
            others.append(("bits_per_byte", found.loss / log(2) / self.bytes_per_token))
        return found._replace(others=tuple(others))

    @property
    def repeats_inputs(self) -> bool:
        """Whether targets are shifted because they were found to be the inputs: others would be misread."""
        return self._found_shift

    def find_shift(self, repeats_inputs: bool) -> None:
        """Decides what was left open, by whether the targets are the inputs."""
        self.shift, self._found_shift = repeats_inputs, repeats_inputs

    def aligned(self, tokens: Tensor, targets: Tensor | None, mask: Tensor | None, shift: bool) -> Tensor:
        """The targets [B, T] as all stages get them.

        Args:
            tokens: [B, T], the inputs.
            targets: [B, T]; None: the inputs.
            mask: [B, T], 0 where an input is padding; counts where there are no targets.
        """
        if targets is None:
            targets = tokens if mask is None else tokens.masked_fill(mask == 0, self.ignore_index)
        if not shift:
            return targets
        return torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], self.ignore_index)], 1)


class Segmentation(_Positions):
    """A class number int64 [N, H, W] for every pixel of scores [N, n, H, W]: cross-entropy, mean over the pixels that
    count; pixel accuracy (acc1) and the mean over the classes of intersection over union, in percent, without the
    classes that are neither there nor found. A layer with smaller maps predicts every so many pixels.

    Args:
        ignore_index: the target of a pixel that does not count.
    """

    name = "segmentation"
    best = ("mean_iou", True)

    def num_scores(self, targets: TargetForm, outputs: tuple[int, ...]) -> int:
        fits = targets.dtype == torch.int64 and targets.shape == outputs[1:]
        if len(outputs) != 3 or not fits:
            raise _misfit(self, "int64 [N, H, W] class numbers", "(classes, H, W)", targets, outputs)
        return outputs[0]

    def rows(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return outputs.movedim(1, -1).flatten(0, 2), targets.flatten()

    def targets_at(self, targets: Tensor, shape: Sequence[int]) -> Tensor:
        """The nearest target of each position of maps (C, h, w), as nearest interpolation chooses it."""
        sides = zip(shape[1:], targets.shape[1:], strict=True)
        rows, columns = (torch.arange(n, device=targets.device) * m // n for n, m in sides)
        return targets[:, rows][:, :, columns].flatten()

    def measure(self, scores: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        found, counts, classes = scores.argmax(1), targets != self.ignore_index, scores.shape[1]
        spare = torch.full_like(targets, classes)  # what does not count
        right = targets.where(counts & (found == targets), spare)
        kinds = {"both": right, "found": found.where(counts, spare), "there": targets.where(counts, spare)}
        return {name: torch.bincount(one, minlength=classes + 1)[:classes] for name, one in kinds.items()}

    def figures(self, sums: Mapping[str, Any], count: float) -> Mapping[str, float]:
        both, found, there = sums["both"], sums["found"], sums["there"]
        each = [b / (f + t - b) for b, f, t in zip(both, found, there, strict=True) if f + t]
        return {"acc1": 100 * sum(both) / count, "mean_iou": 100 * sum(each) / max(len(each), 1)}


TASKS: Mapping[str, type[Task]] = {
    one.name: one for one in (Classification, MultiLabel, Regression, Tokens, Segmentation)
}
"""By name; any other name is of a task of one's own."""


def infer_task(targets: TargetForm, outputs: tuple[int, ...], samples: torch.dtype, two_valued: bool) -> Task:
    """The task of targets of that form, for a network with such outputs per sample.

    Args:
        samples: the type of the network's input; int64 is tokens.
        two_valued: the targets that were looked at are 0 and 1 alone.

    Raises:
        ValueError: they are of none, or of several; says what to give.
    """
    whole = targets.dtype in _INTEGERS
    if targets == CLASS_NUMBER and len(outputs) == 1:
        return Classification()
    places = (targets == NO_TARGETS and samples == torch.int64) or (whole and targets.shape == outputs[:1])
    if len(outputs) == 2 and places:
        return Tokens()
    if len(outputs) == 3 and whole and targets.shape == outputs[1:]:
        return Segmentation()
    if len(outputs) == 1 and targets.shape == outputs:
        if targets.dtype == torch.bool or (whole and two_valued):
            return MultiLabel()
        if targets.dtype.is_floating_point and two_valued and outputs != (1,):
            raise ValueError(
                f"targets are {targets}, all of them 0 or 1; say whether they are labels or numbers: task=MultiLabel() "
                "or task=Regression()"
            )
    if targets.dtype.is_floating_point and (targets.shape or (1,)) == outputs:
        return Regression()
    raise ValueError(
        f"the last layer gives {outputs} per sample and the targets are {targets}, which fits no task: classification "
        "takes int64 [N] for (classes,), multi-label 0 or 1 [N, labels] for (labels,), regression float32 [N] or [N, k]"
        " for (1,) or (k,), tokens int64 [N, T] or none for (T, vocabulary), segmentation int64 [N, H, W] for (classes,"
        " H, W); end the model so, convert the targets (.long(), .float()), or give a task of your own (task=...)"
    )


def refuse_beyond(targets: Tensor, num_scores: int | None, word: str) -> None:
    """Raises: ValueError: numbers below 0, or from `num_scores` on."""
    if not targets.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if low < 0 or (num_scores is not None and high >= num_scores):
        valid = "" if num_scores is None else f" to {num_scores - 1}"
        raise ValueError(f"{word} from {low} to {high}; valid: 0{valid or ' and above'}")


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _misfit(task: Task, takes: str, gives: str, targets: TargetForm, outputs: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"the task {task.name} takes targets {takes} and a last layer that gives {gives} per sample; got targets "
        f"{targets} and a last layer that gives {outputs}"
    )
