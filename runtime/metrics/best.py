"""The weights of the best evaluation. Upstream stages are epochs further when the accuracy is known, so every stage
writes its layers as they were evaluated, and who gathers the results keeps the best and deletes the others."""

import json
import shutil
from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from unlocked.runtime.metrics.records import EpochResult, RunInfo
from unlocked.runtime.metrics.sinks import MetricsSink
from unlocked.runtime.saving.tensor_file import check_weights, load_tensors, save_weights
from unlocked.runtime.saving.whole_file import write_json
from unlocked.workers.layer import Layer

__all__ = ["BestWeights", "save_candidate"]

FILE_NAME = "model_best.pt"
RECORD = "best.json"


def save_candidate(root: Path, epoch: int, layers: Iterable[Layer]) -> None:
    """Writes the layers' tensors as they were evaluated after `epoch`."""
    folder = _folder(root, epoch)
    folder.mkdir(parents=True, exist_ok=True)
    for layer in layers:
        save_weights(folder / f"{layer.info.index:03d}.pt", dict(layer.tensors()))


class BestWeights(MetricsSink):
    """A metrics sink that keeps the best epoch's weights in `root`/model_best.pt: {name: tensor} of all layers.

    Which figure is ranked, the run's task says: accuracy for classes, else its own or the loss. Among equals the
    earliest counts, and an epoch whose evaluation loss is not finite never. `best.json` beside it says which epoch it
    was, by which figure it is the best, and whether more of that is better.

    Args:
        first_epoch: of a resumed run, the epoch in which it goes on: the best of the epochs before is taken up, if the
            folder has it. 0: the run begins.

    Raises:
        ValueError: when the run begins (`on_start`): the folder's best is one by another figure.
    """

    def __init__(self, root: Path, first_epoch: int = 0) -> None:
        self._root = root
        self._figure, self._more = "acc1", True
        self._before = self._recorded(first_epoch)
        self._best = self._best_before()
        for folder in root.glob("candidate-*"):
            if self._before is None or folder != _folder(root, int(self._before["epoch"])):
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut

    def on_start(self, info: RunInfo) -> None:
        """
        Raises:
            ValueError: no epoch will have a figure.
        """
        if not info.evaluates:
            raise ValueError(
                "the best weights are told by an evaluation, and there is none; give fit(eval_data=...), or leave out "
                "best_dir (--save-best-model)"
            )
        self._figure, self._more = info.best
        before = None if self._before is None else _ranking(self._before)
        if before is not None and before != info.best:
            raise ValueError(
                f"{self._root / RECORD} has the best epoch by {_words(before)}, this run ranks by {_words(info.best)}; "
                "resume with the task of before, or give another folder for the best weights"
            )
        self._best = self._best_before()
        if self._before is not None and self._best is None:  # its weights are nobody's best
            shutil.rmtree(_folder(self._root, int(self._before["epoch"])), ignore_errors=True)

    def on_epoch(self, result: EpochResult) -> None:
        """By the time all stages have reported an epoch, all have written their candidates of it."""
        figure = result.figure(self._figure)
        if figure is None:
            return
        sound = isfinite(result.eval_loss or 0.0) and isfinite(figure)
        if sound and (self._best is None or (figure > self._best[0] if self._more else figure < self._best[0])):
            before, self._best = self._best, (figure, result.epoch)
            record: dict[str, object] = {
                "epoch": result.epoch,
                "test_acc1": result.eval_acc1,
                "test_loss": result.eval_loss,
            }
            record |= {f"test_{self._figure}": figure, "figure": self._figure, "more_is_better": self._more}
            # Only then is the older one given up: a run may be cut at any point.
            write_json(self._root / RECORD, record)
            if before is not None:
                shutil.rmtree(_folder(self._root, before[1]), ignore_errors=True)
        else:
            shutil.rmtree(_folder(self._root, result.epoch), ignore_errors=True)

    def on_finish(self, summary: Mapping[str, object]) -> None:
        if self._best is None:
            return
        folder = _folder(self._root, self._best[1])
        if not folder.is_dir():
            return  # the best is of the part before a resume, whose end has written it already
        tensors = {}
        for path in sorted(folder.glob("*.pt")):
            check_weights(path)
            tensors.update(load_tensors(path))
        save_weights(self._root / FILE_NAME, tensors)
        shutil.rmtree(folder, ignore_errors=True)

    def _recorded(self, first_epoch: int) -> dict[str, Any] | None:
        """What the folder says of the best epoch before `first_epoch`, if it has the weights."""
        record = self._root / RECORD
        if not first_epoch or not record.is_file():
            return None
        content: dict[str, Any] = json.loads(record.read_text())
        epoch = int(content["epoch"])
        there = _folder(self._root, epoch).is_dir() or (self._root / FILE_NAME).is_file()
        return content if there and epoch < first_epoch else None  # a later one will be evaluated again

    def _best_before(self) -> tuple[float, int] | None:
        """By this run's figure, which records of earlier releases have by the same name."""
        value = None if self._before is None else self._before.get(f"test_{self._figure}")
        if self._before is None or value is None or not isfinite(value):
            return None  # nothing could ever be better than what is no number
        return float(value), int(self._before["epoch"])


def _ranking(record: Mapping[str, Any]) -> tuple[str, bool] | None:
    """(figure, whether more is better); None: an earlier release wrote the record, and did not say."""
    return (record["figure"], record["more_is_better"]) if "figure" in record else None


def _words(ranking: tuple[str, bool]) -> str:
    return f"{ranking[0]} ({'more' if ranking[1] else 'less'} is better)"


def _folder(root: Path, epoch: int) -> Path:
    return root / f"candidate-{epoch:05d}"
