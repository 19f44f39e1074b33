"""The weights of the best evaluation. Upstream stages are epochs further when the accuracy is known, so every stage
writes its layers as they were evaluated, and who gathers the results keeps the best and deletes the others."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from unlocked.runtime.metrics import EpochResult, RunInfo, StageProgress, StepResult
from unlocked.workers.layer import Layer

__all__ = ["BestWeights", "save_candidate"]

FILE_NAME = "model_best.pt"


def save_candidate(root: Path, epoch: int, layers: Iterable[Layer]) -> None:
    """Writes the layers' tensors as they were evaluated after `epoch`."""
    folder = _folder(root, epoch)
    folder.mkdir(parents=True, exist_ok=True)
    for layer in layers:
        torch.save(dict(layer.tensors()), folder / f"{layer.info.index:03d}.pt")


class BestWeights:
    """A metrics sink that keeps the best epoch's weights in `root`/model_best.pt: {name: tensor} of all layers."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._best: tuple[float, int] | None = None

    def on_epoch(self, result: EpochResult) -> None:
        """By the time all stages have reported an epoch, all have written their candidates of it."""
        if result.eval_acc1 is None:
            return
        if self._best is None or result.eval_acc1 > self._best[0]:
            if self._best is not None:
                shutil.rmtree(_folder(self._root, self._best[1]), ignore_errors=True)
            self._best = (result.eval_acc1, result.epoch)
        else:
            shutil.rmtree(_folder(self._root, result.epoch), ignore_errors=True)

    def on_finish(self, summary: Mapping[str, object]) -> None:
        if self._best is None:
            return
        folder = _folder(self._root, self._best[1])
        tensors = {}
        for path in sorted(folder.glob("*.pt")):
            tensors.update(torch.load(path, map_location="cpu", weights_only=True))
        torch.save(tensors, self._root / FILE_NAME)
        shutil.rmtree(folder, ignore_errors=True)

    def on_start(self, info: RunInfo) -> None: ...

    def on_progress(self, progress: StageProgress) -> None: ...

    def on_step(self, step: StepResult) -> None: ...

    def on_message(self, text: str) -> None: ...


def _folder(root: Path, epoch: int) -> Path:
    return root / f"candidate-{epoch:05d}"
