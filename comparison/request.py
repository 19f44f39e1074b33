"""What a contender's processes are told, and what each of them answers: plain data that crosses processes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from unlocked.comparison.contenders import Spec
from unlocked.comparison.leaderboard.results import Inspection
from unlocked.comparison.results import EpochFigures, TimelineSpan, Trial
from unlocked.data import ImageDataset
from unlocked.runtime.recipe import Recipe
from unlocked.runtime.saving.tensor_file import save_tensors
from unlocked.runtime.saving.whole_file import whole_file

__all__ = ["Form", "LayerCosts", "RankAnswer", "Request", "Task", "load_data", "save_data"]

Task = Literal["train", "trials", "costs", "inspect"]


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a pipeline of backpropagation is cut.

    Attributes:
        chunks: into which a micro-batch is cut.
        parts: for every stage, its first layer and the one after its last.
    """

    chunks: int
    parts: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One piece of work for the processes of one contender.

    Attributes:
        task: train; train a few steps in each of `forms`, for the best one; measure every layer's cost;
            or inspect memory, traffic and locality.
        recipe: dataset, model, optimizer, rule, seed, epochs, steps, evaluation: the settings of the training.
        data: file with both splits, as `save_data` writes it.
        form: of a pipeline of backpropagation.
        timeline: keep every action's time.
        timeout: seconds for the whole task.
    """

    spec: Spec
    task: Task
    recipe: Recipe
    data: Path
    form: Form | None = None
    forms: tuple[Form, ...] = ()
    timeline: bool = False
    timeout: float = 1800.0


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """Seconds per micro-batch of every layer, one thread."""

    backpropagation: tuple[float, ...]
    """Forward, backward and the optimizer's step."""
    local: tuple[float, ...]
    """The local step of LLS."""


@dataclass(frozen=True, kw_only=True)
class RankAnswer:
    """What one process measured; `epochs`, `stages` and `busy` are whole in rank 0's answer alone."""

    steps: int = 0
    images: int = 0
    train_seconds: float = 0.0
    setup_seconds: float = 0.0
    data_seconds: float = 0.0
    update_seconds: float = 0.0
    busy: tuple[float, ...] | None = None
    """Share of every process's time in which it worked; None where it can't be told."""
    is_split: bool = True
    """The seconds of data and updates were measured."""
    peak_memory_bytes: int = 0
    base_memory_bytes: int = 0
    energy_joules: float | None = None
    stages: tuple[tuple[str, ...], ...] = ()
    epochs: tuple[EpochFigures, ...] = ()
    weights_sha256: str | None = None
    spans: tuple[TimelineSpan, ...] = field(default=(), repr=False)
    trials: tuple[Trial, ...] = ()
    costs: LayerCosts | None = None
    inspection: Inspection | None = None


def save_data(path: Path, splits: tuple[ImageDataset, ImageDataset]) -> None:
    """Both splits in a file that every process maps into its memory instead of loading them anew."""
    with whole_file(path) as temporary:
        save_tensors(splits, temporary)


def load_data(path: Path) -> tuple[ImageDataset, ImageDataset]:
    """What `save_data` has written."""
    splits: tuple[ImageDataset, ImageDataset] = torch.load(path, mmap=True, weights_only=False)
    for split in splits:  # a byte of every page, so that the whole counts as memory that the data take
        split.images.flatten()[:: 4096 // split.images.element_size()].sum()
    return splits
