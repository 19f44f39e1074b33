"""A run's epochs in a file of comma-separated values: a metrics sink that needs no package."""

import csv
from io import StringIO
from pathlib import Path

from unlocked.runtime.metrics.records import EpochResult, Metric, RunInfo
from unlocked.runtime.metrics.sinks import MetricsSink
from unlocked.runtime.saving.whole_file import write_whole

__all__ = ["CSV_COLUMNS", "CsvFile"]

CSV_COLUMNS = (
    "epoch",  # from 0
    "train_loss",  # mean cross-entropy of the output layer over the epoch's training samples
    "train_acc1",  # percent
    "train_acc5",
    "eval_loss",  # after the epoch; empty without evaluation
    "eval_acc1",
    "eval_acc5",
    "seconds",  # wall clock of the epoch, evaluation included
)


class CsvFile(MetricsSink):
    """Writes a row per epoch: `CSV_COLUMNS`, a `local_loss/LAYER` per layer, and what other sinks tell.

    The file is whole at any time. What a run finds there is written over.

    Args:
        path: of the file; its folder is made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_start(self, info: RunInfo) -> None:
        self._rows: dict[int, dict[str, float | int | None]] = {}
        figures = [f"{part}_{name}" for part in ("train", "eval") for name in info.figures]
        self._columns = [*CSV_COLUMNS, *(f"local_loss/{layer}" for layer in info.layers), *figures]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def on_epoch(self, result: EpochResult) -> None:
        losses = {f"local_loss/{layer}": loss for layer, loss in result.local_losses}
        figures = {f"train_{name}": value for name, value in result.train_figures}
        figures |= {f"eval_{name}": value for name, value in result.eval_figures}
        self._row(result.epoch).update({name: getattr(result, name) for name in CSV_COLUMNS} | losses | figures)
        self._write()

    def on_metric(self, metric: Metric) -> None:
        if metric.name not in self._columns:
            self._columns.append(metric.name)
        self._row(metric.epoch)[metric.name] = metric.value
        self._write()

    def _row(self, epoch: int) -> dict[str, float | int | None]:
        return self._rows.setdefault(epoch, {"epoch": epoch})

    def _write(self) -> None:
        text = StringIO()
        table = csv.DictWriter(text, self._columns, lineterminator="\n")
        table.writeheader()
        for epoch in sorted(self._rows):
            row = self._rows[epoch]
            table.writerow({name: "" if row.get(name) is None else repr(row[name]) for name in self._columns})
        write_whole(self.path, text.getvalue())
