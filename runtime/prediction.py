"""What a trained network says of samples: its scores, and how many of each class it gets right."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from unlocked.data import Dataset, ImageDataset, LoaderDataset
from unlocked.models.dropout import kept_dropout_keys
from unlocked.rules import CLASS_NUMBER, NO_TARGETS, TargetForm
from unlocked.runtime.exporting import export
from unlocked.runtime.input import as_dataset, ready, rows_per_batch
from unlocked.runtime.learned import check_targets
from unlocked.runtime.machine import set_threads
from unlocked.runtime.metrics.html import card, grid
from unlocked.runtime.named_inputs import rows_of
from unlocked.runtime.network import Network, RoutedBlocks
from unlocked.runtime.pixels import read_as_trained
from unlocked.runtime.saving.scoring import evaluation_plan, make_stage, scores_of
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.runtime.settings import Settings
from unlocked.runtime.tensors import give_strides
from unlocked.workers.stage import Stage

__all__ = ["Evaluation", "Trained", "as_samples", "rows_asked"]

_ROWS = 256  # of a micro-batch where no run has said

_MOST_SHOWN = 25  # classes whose confusion matrix is shown as a table


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class Evaluation:
    """How good a network is on some data."""

    loss: float
    acc1: float | None
    """Percent of the samples whose label has the highest score; of positions where the task is of these; None: the task
    has no accuracy."""
    acc5: float | None
    """Percent of the samples whose label is among the five highest scores."""
    confusion: Tensor
    """int64 [classes, classes]: how many samples of the row's class were taken for the column's; [0, 0] where the task
    is not classification."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What else the task tells, by name."""
    size: int = 0
    """Samples, where there is no confusion."""
    classes: tuple[str, ...] = ()
    """The classes' names."""

    @property
    def samples(self) -> int:
        return self.size or int(self.confusion.sum())

    @property
    def class_accuracy(self) -> dict[str, float | None]:
        """Percent of each class's samples that were taken for it; None for a class without any."""
        hits, counts = self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist()
        pairs = zip(self.classes, hits, counts, strict=True)
        return {name: 100 * hit / count if count else None for name, hit, count in pairs}

    def __repr__(self) -> str:
        known = {name: value for name, value in self.class_accuracy.items() if value is not None}
        others = "".join(f", {name} {value:.4g}" for name, value in self.figures.items())
        if self.acc1 is None:
            return f"Evaluation({self.samples} samples, loss {self.loss:.4f}{others})"
        text = f"Evaluation(accuracy {self.acc1:.2f} % of {self.samples} samples, loss {self.loss:.4f}{others}"
        if len(known) > 1:
            worst = min(known, key=lambda name: known[name])
            text += f", worst class {worst} {known[worst]:.2f} %"
        return text + ")"

    def _repr_html_(self) -> str:
        lines = [
            ("samples", f"{self.samples:,}"),
            ("loss", f"{self.loss:.4f}"),
            *((name, f"{value:.4g}") for name, value in self.figures.items()),
        ]
        if self.acc1 is not None:
            among = "" if self.acc5 is None else f" first, {self.acc5:.2f} % among five"
            lines.insert(1, ("accuracy", f"{self.acc1:.2f} %{among}"))
        if not self.confusion.numel():
            return card("Evaluation", lines)
        shown = [
            (f"class {name}", "no samples" if value is None else f"{value:.2f} %")
            for name, value in self.class_accuracy.items()
        ]
        if len(self.classes) > _MOST_SHOWN:
            return card("Evaluation", [*lines, *shown[:_MOST_SHOWN], ("...", f"{len(shown)} classes")])
        return card("Evaluation", lines + shown, [grid("label \\ taken for", self.classes, self.confusion.tolist())])


@dataclass(frozen=True, slots=True)
class Trained:
    """A network with its weights, and what is known of the samples that it reads."""

    network: Network
    train: Dataset | None = None
    """What it was trained on."""
    batch_size: int = _ROWS
    """Rows of a micro-batch of its last evaluation."""
    complete: bool = True
    """This process has all of its weights."""

    def predict(self, data: Dataset, batch_size: int | None, settings: Settings) -> Tensor:
        """What the network gives for every sample, in order: float32 [N, ...], on the CPU; see `Trainer.predict`."""
        found = []
        with self._evaluating(data, batch_size, settings) as (stage, plan):
            for item in plan.items(1):
                x, _ = stage.load(item)
                found.append(stage.infer(x).float().cpu())
        return torch.cat(found)

    def evaluate(self, data: Dataset, batch_size: int | None, settings: Settings) -> Evaluation:
        """The figures are those of a run's own evaluation, bit for bit with its batch size and threads; see
        `Trainer.evaluate`."""
        network = self.network
        check_targets(data, network.task, network.target)
        if network.task.name != "classification":
            return self._evaluate_task(data, batch_size, settings)
        classes = network.infos[-1].num_classes
        confusion = torch.zeros(classes * classes, dtype=torch.int64)
        with self._evaluating(data, batch_size, settings) as (stage, plan):
            for item in plan.items(1):
                x, labels = stage.load(item)
                taken_for = stage.evaluate(item, x, labels).argmax(1)
                confusion += torch.bincount((labels * classes + taken_for).cpu(), minlength=classes * classes)
            scores = scores_of(stage, plan.eval_size)
        names = tuple(getattr(data, "classes", ()))
        return Evaluation(
            loss=scores.loss,
            acc1=scores.acc1,
            acc5=scores.acc5,
            confusion=confusion.view(classes, classes),
            classes=names if len(names) == classes else tuple(map(str, range(classes))),
        )

    def _evaluate_task(self, data: Dataset, batch_size: int | None, settings: Settings) -> Evaluation:
        network = self.network
        data = ready(data, network.task, network.target, network.infos[-1].num_classes)
        with self._evaluating(data, batch_size, settings) as (stage, plan):
            for item in plan.items(1):
                stage.evaluate(item, *stage.load(item))
            scores = scores_of(stage, plan.eval_size, network.sums)
        return Evaluation(
            loss=scores.loss,
            acc1=scores.acc1,
            acc5=scores.acc5,
            confusion=torch.zeros(0, 0, dtype=torch.int64),
            figures=dict(scores.figures),
            size=plan.eval_size,
        )

    def export(self, module: nn.Module, path: str | Path) -> None:
        """Writes the network, which `module` is as one plain module, as `unlocked.export` does. With named tensors that
        its layers read it is the chain of its layers, which takes them by their names."""
        network = self.network
        samples = torch.zeros(2, *network.input_shape, dtype=network.input_dtype)
        names = sorted(set().union(*network.needs))
        if not names:
            export(module, path, samples)
            return
        blocks: OrderedDict[str, nn.Module] = OrderedDict((block.name, block) for block in network.blocks)
        export(RoutedBlocks(blocks, network.needs), path, samples, rows_of(network.beside, names, 2))

    @contextlib.contextmanager
    def _evaluating(
        self, data: Dataset, batch_size: int | None, settings: Settings
    ) -> Iterator[tuple[Stage, StreamPlan]]:
        """All layers with the data; afterwards every module has the mode, and its weights the strides, of before."""
        if not self.complete:
            raise ValueError("this process trained its own stage; under torchrun, predict and evaluate in rank 0 alone")
        network = self.network
        if network.predicts_otherwise:
            raise ValueError(
                "the run's prediction is made of the layers' scores and not by the output layer alone, which is all "
                "that is asked here; fit(eval_data=...) has its figures"
            )
        if data.image_shape != network.input_shape:
            raise ValueError(
                f"samples have the shape {data.image_shape} each, the network reads {network.input_shape}; a single "
                "sample is given as samples[None]"
            )
        if data.sample_dtype != network.input_dtype:
            read, given = (str(one).removeprefix("torch.") for one in (network.input_dtype, data.sample_dtype))
            raise ValueError(
                f"samples are read as {given}, the network reads {read}; convert them (.float() of numbers, .long() of "
                "tokens)"
            )
        used = network.beside if any(network.needs) else {}
        if missing := [name for name in used if name not in data.beside]:
            raise ValueError(f"samples come without {', '.join(missing)}, which the network reads; give named tensors")
        if network.task.name == "classification":
            data = ready(data, network.task, network.target, network.infos[-1].num_classes, network.blocks[0])
        data = read_as_trained(data, self.train)
        set_threads(settings.threads)
        plan = evaluation_plan(data, rows_per_batch(data, batch_size, self.batch_size))
        modes = [(module, module.training) for block in network.blocks for module in block.modules()]
        strides = [(value, value.stride()) for block in network.blocks for value in block.parameters()]
        try:
            with kept_dropout_keys(network.blocks):
                stage = make_stage(network, data, data, plan, 1, settings.device, settings.precision)
                with settings.library_kernels(), closing(stage), torch.no_grad():
                    yield stage, plan
        finally:
            for module, training in modes:
                module.training = training
            for value, before in strides:  # convolutions evaluate with channels last
                give_strides(value, before)


def rows_asked(batch_size: int | None, trained: Trained | None) -> int:
    """Rows of a micro-batch, by default those of the last evaluation.

    Raises:
        ValueError: no number of rows.
    """
    if batch_size is None:
        return _ROWS if trained is None else trained.batch_size
    if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1")
    return batch_size


def as_samples(given: Any, batch_size: int | None, trained: Trained | None) -> Dataset:
    """What `predict` was given, as a dataset whose labels say nothing.

    Args:
        batch_size: rows of a micro-batch, where an indexable PyTorch Dataset is read; see `rows_asked`.
        trained: what the last `fit` has left; without, the form of targets of positions or several numbers is kept:
            it tells what the network is for.

    Raises:
        ValueError: no samples, or no number of rows.
    """
    rows = rows_asked(batch_size, trained)
    if type(given) is TensorDataset:
        given = given.tensors[0]
    if isinstance(given, torch.utils.data.Dataset | Mapping):
        foreign: Any = given
        given = as_dataset(foreign, "test", batch_size=rows)
    if isinstance(given, ImageDataset | LoaderDataset):
        return _unlabelled(given, trained is not None)
    try:
        values = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"samples are a {type(given).__name__}; give a tensor or an array [N, ...]") from error
    if values.dim() < 2 or not len(values):
        raise ValueError(
            f"samples have the shape {list(values.shape)}; give [N, ...] with N of at least 1, a single one as "
            "samples[None]"
        )
    return as_dataset((values, torch.zeros(len(values), dtype=torch.int64)), "test")


def _unlabelled(data: Dataset, task_is_known: bool) -> Dataset:
    """With class numbers that are all 0."""
    form = TargetForm(data.target_shape, data.target_dtype)
    if isinstance(data, LoaderDataset):
        bare = form == NO_TARGETS and data.sample_dtype.is_floating_point
        if not (task_is_known or bare or not form.shape):
            return data

        def zeros(samples: Tensor, targets: Tensor | None, beside: Mapping[str, Tensor]) -> Tensor:
            return torch.zeros(len(samples), dtype=torch.int64)

        return replace(data, num_classes=None, aligned=zeros, target_shape=(), target_dtype=torch.int64)
    if form != CLASS_NUMBER:
        return data
    labels = torch.zeros_like(data.labels)
    return replace(data, labels=labels, num_classes=min(data.num_classes, 1), classes=(), classes_per_batch=None)
