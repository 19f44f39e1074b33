"""What a run learns, as far as data and user tell: the targets' form and the task; and data made ready for it."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unlocked.data import Dataset, ImageDataset
from unlocked.data.loader import is_two_valued, repeats_inputs
from unlocked.rules import CLASS_NUMBER, NO_TARGETS, TargetForm, Task, Tokens, infer_task
from unlocked.rules.task_kinds import CLASSIFICATION

__all__ = ["Learned", "check_targets", "known_classes", "learned_from", "with_task"]


@dataclass(frozen=True, slots=True)
class Learned:
    """Attributes: the targets' form as the data has them, the task that was given, and what a look at the targets says:
    they are all 0 or 1; they are the inputs, or there are none; there may be more classes than they show."""

    target: TargetForm = CLASS_NUMBER
    task: Task | None = None
    two_valued: bool = False
    repeats_inputs: bool = False
    bytes_per_token: float | None = None
    open_classes: bool = False

    @property
    def is_classification(self) -> bool:
        """By what is known before the network is."""
        named = self.task is None or self.task.name == "classification"
        return named and self.target == CLASS_NUMBER

    def settled(
        self, num_classes: int | None, outputs: tuple[int, ...], samples: torch.dtype, last: str
    ) -> tuple[Task, TargetForm, int]:
        """The task, what every stage gets of a target, and the scores of a prediction, for a network whose last layer
        gives `outputs` per sample.

        Args:
            num_classes: of a classification's data, if they are known.
            samples: the type of what the network reads.
            last: the last layer's name.

        Raises:
            ValueError: outputs that don't fit the targets.
        """
        if not self.is_classification:
            task = self.task_of(outputs, samples)
            scores = task.num_scores(self.target, outputs)
            return task, task.form(self.target, outputs), scores
        if len(outputs) == 1 and (not num_classes or (self.open_classes and num_classes < outputs[0])):
            num_classes = outputs[0]
        if not num_classes or outputs != (num_classes,):
            raise ValueError(
                f"the last layer {last} gives {outputs} per sample, but the data has {num_classes or 'some'} "
                f"classes; end the model in a layer with output ({num_classes or 'number of classes'},)"
            )
        return CLASSIFICATION, CLASS_NUMBER, num_classes

    def task_of(self, outputs: tuple[int, ...], samples: torch.dtype) -> Task:
        """The task for a network with such outputs per sample, which reads samples of that type. Raises as
        `infer_task`."""
        task = self.task or infer_task(self.target, outputs, samples, self.two_valued)
        if isinstance(task, Tokens):
            task = copy.copy(task)
            task.bytes_per_token = task.bytes_per_token or self.bytes_per_token
        if isinstance(task, Tokens) and task.shift is None:
            task.find_shift(self.repeats_inputs or self.target == NO_TARGETS)
        return task


def learned_from(data: Dataset, task: Task | None) -> Learned:
    """What the data tells."""
    if isinstance(data, ImageDataset):
        form, own = TargetForm(data.target_shape, data.target_dtype), data.num_classes == 0
        if data.bytes_per_token is not None:  # a text, which brings its targets as they are meant
            return Learned(form, task, bytes_per_token=data.bytes_per_token)
        return Learned(
            form,
            task,
            own and is_two_valued(data.labels),
            own and repeats_inputs(data.images, data.labels),
            open_classes=data.open_classes,
        )
    form = TargetForm(data.target_shape, data.target_dtype)
    return Learned(form, task, data.two_valued, data.repeats_inputs)


def known_classes(data: Dataset) -> int | None:
    """How many classes the data is known to have; None: the model tells."""
    return None if isinstance(data, ImageDataset) and data.open_classes else data.num_classes


def check_targets(data: Dataset, task: Task, target: TargetForm) -> None:
    """What the data's form tells before any of it is read: that it can be evaluated by a network of that task.

    Args:
        target: what every stage gets of a sample's target.

    Raises:
        ValueError: no targets, or of another shape or kind; says which would do.
    """
    form = TargetForm(data.target_shape, data.target_dtype)
    if task.name == "classification":
        if form == CLASS_NUMBER:
            return
        advice = (
            "give them"
            if form == NO_TARGETS
            else "convert them (.long())"
            if not form.shape
            else ("give one number for each sample (of one-hot rows, .argmax(1))")
        )
        raise ValueError(
            f"the evaluation targets are {form}; the task classification takes int64 [N], class numbers: {advice}"
        )
    if isinstance(data, ImageDataset) or (isinstance(task, Tokens) and form == NO_TARGETS):
        return  # their values are looked at before the run, too
    whole = form.dtype.is_floating_point and not target.dtype.is_floating_point and not data.two_valued
    if form.shape != target.shape or whole:
        raise ValueError(f"the evaluation targets are {form}, those of training are read as {target}; make them alike")


def with_task(data: Dataset, task: Task, target: TargetForm, num_scores: int) -> Dataset:
    """The data with targets as every stage gets them; class numbers of samples are left as they are.

    Raises:
        ValueError: targets of another form than `target`, or with values that nothing can be learnt from.
    """
    if task.name == "classification":
        return data
    if isinstance(data, ImageDataset):
        return _whole_with_task(data, task, target, num_scores)

    def aligned(samples: Tensor, targets: Tensor | None, beside: Mapping[str, Tensor]) -> Tensor:
        return _aligned(task, target, samples, targets, beside)

    def check(targets: Tensor) -> None:
        _check(task, target, targets, num_scores)

    shape, dtype = target
    return replace(data, aligned=aligned, check_targets=check, target_shape=shape, target_dtype=dtype)


def _whole_with_task(data: ImageDataset, task: Task, target: TargetForm, num_scores: int) -> ImageDataset:
    samples = data.images
    if data.labels.dtype in (torch.int16, torch.int32) and data.labels.shape[1:] == target.shape:
        return data  # stored narrow by a dataset of ours, ready as it is
    targets = None if _form(data.labels) == NO_TARGETS else data.labels
    try:
        labels = _aligned(task, target, samples, targets, data.beside)
        _check(task, target, labels, num_scores)
    except ValueError as error:
        raise ValueError(f"the {data.split} data: {error}") from None
    return replace(data, labels=labels, num_classes=0, classes=())


def _aligned(
    task: Task, target: TargetForm, samples: Tensor, targets: Tensor | None, beside: Mapping[str, Tensor]
) -> Tensor:
    if isinstance(task, Tokens):
        if task.repeats_inputs and targets is not None and not repeats_inputs(samples, targets):
            raise ValueError(
                "targets are not the inputs, as those are that were looked at first; say how they are meant: "
                "task=Tokens(shift=False), of their own positions, or Tokens(shift=True), of the ones before"
            )
        targets = task.aligned(samples, targets, beside.get("attention_mask"), bool(task.shift))
    if targets is None:
        targets = torch.zeros(len(samples), 0, dtype=torch.uint8)
    read = targets.to(target.dtype)
    if not target.dtype.is_floating_point and targets.dtype != target.dtype:
        changed = read.to(targets.dtype) != targets
        if bool(changed.any()):
            value = targets[changed][0].item()
            raise ValueError(f"targets hold {value:g}, those of training are read as {target}; make them alike")
    return read


def _check(task: Task, target: TargetForm, targets: Tensor, num_scores: int) -> None:
    if tuple(targets.shape[1:]) != target.shape:
        raise ValueError(f"targets are {_form(targets)}, those before {target}")
    if targets.numel():
        task.check(targets, num_scores)
    elif task.needs_targets:
        raise ValueError(f"there are no targets, which the task {task.name} needs")


def _form(targets: Tensor) -> TargetForm:
    return TargetForm(tuple(targets.shape[1:]), targets.dtype)
