"""The files a run leaves in its save path: `train.log`, `metrics.csv` and `config.json`.

`train.log` has the form of the LLS authors' logs, so that scripts that read those read ours. `metrics.csv` has one
row per epoch with the columns `CSV_COLUMNS`, one `local_loss/LAYER` per layer, and where layers make predictions of
their own one `eval_acc1/LAYER` in percent for each of them; other figures of a task have columns of their own.
`config.json` holds all settings and the versions of what computed with them.
"""

import csv
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from io import StringIO
from pathlib import Path

from unlocked.runtime.metrics.csv_file import CSV_COLUMNS
from unlocked.runtime.metrics.records import EpochResult, Meters, Metric, RunInfo, StepResult
from unlocked.runtime.metrics.sinks import MetricsSink
from unlocked.runtime.saving.run_folder import RUN_FILES
from unlocked.runtime.saving.whole_file import append_line, json_text, write_json, write_whole

__all__ = ["CSV_COLUMNS", "RunLog", "format_step"]

_SECRET = re.compile(r"token|secret|passw|credential|api_?key", re.IGNORECASE)


class RunLog(MetricsSink):
    """A metrics sink that writes the files of one run.

    Args:
        path: the folder; made if it does not exist.
        config: all settings, JSON values or anything with a `str`. Values of keys that name secrets are left out.
        resume: append to the run that is there. Rows of epochs that are run again are replaced.

    Raises:
        ValueError: `path` holds a run already and `resume` is False, or is not a folder.
    """

    def __init__(self, path: str | Path, config: Mapping[str, object] | None = None, *, resume: bool = False) -> None:
        self.path = Path(path)
        self._config = dict(config or {})
        self._layers: tuple[str, ...] = ()
        self._scored: tuple[str, ...] = ()
        self._figures: tuple[str, ...] = ()
        self._begun = False
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"save path {self.path} is a file; give a folder")
        present = [name for name in RUN_FILES if (self.path / name).exists()]
        if present and not resume:
            raise ValueError(
                f"{self.path} holds a run already ({', '.join(present)}); choose another --experiment-name, or go on "
                "with that run by --resume"
            )

    def on_start(self, info: RunInfo) -> None:
        """Writes `config.json` and the head of the other files.

        Raises:
            ValueError: the run to be resumed has other layers; or the log is that of an earlier `fit`.
        """
        if self._begun:
            raise ValueError(f"{self.path} holds the run of an earlier fit; give every fit a RunLog of its own")
        self._begun = True
        self._layers = info.layers
        self._scored = info.scored if len(info.scored) > 1 else ()
        self._figures = info.figures
        self._check_columns()
        self.path.mkdir(parents=True, exist_ok=True)
        run = {
            "model": info.model,
            "dataset": info.dataset,
            "engine": info.engine,
            "rule": info.rule,
            "stages": info.stages,
            "device": info.device,
            "first_position": info.start,
        }
        document = {"settings": _without_secrets(self._config), "run": run, "versions": _versions()}
        write_json(self._free_config(), document, indent=2, default=str)
        if info.start:
            self._line(f"Resumed at position {info.start} of {info.total}")
        stages = " | ".join(", ".join(layers) for layers in info.stages)
        self._line(
            f"{info.model} on {info.dataset}{info.task_told}, {info.rule}, engine {info.engine} on {info.device}: "
            f"{stages}"
        )

    def on_step(self, step: StepResult) -> None:
        self._line(format_step(step))

    def on_epoch(self, result: EpochResult) -> None:
        self._line(
            f" @Training *{_told(result.train_loss, result.train_acc1, result.train_acc5, result.train_figures)}"
        )
        if result.eval_loss is not None:
            told = _told(result.eval_loss, result.eval_acc1, result.eval_acc5, result.eval_figures)
            self._line(f" @Testing *{told}")
        losses = " - ".join(f"L{i}: {value:.4f}" for i, (_, value) in enumerate(result.local_losses, start=1))
        self._line(f"Losses - {losses}")
        if len(result.layer_acc1) > 1:  # the output layer's alone is the line above
            layers = " - ".join(f"{layer}: {value:.3f}" for layer, value in result.layer_acc1)
            self._line(f" @Layers Acc@1 {layers}")
        self._row(result)

    def on_metric(self, metric: Metric) -> None:
        self._line(f"Metric {metric.name} {metric.value:.6g} (epoch {metric.epoch})")

    def on_message(self, text: str) -> None:
        self._line(text)

    def on_finish(self, summary: Mapping[str, object]) -> None:
        self._line("Finished: " + json_text(_without_secrets(summary), default=str))

    def _line(self, text: str) -> None:
        append_line(self.path / "train.log", text)

    def _columns(self) -> list[str]:
        losses = (f"local_loss/{layer}" for layer in self._layers)
        figures = [f"{part}_{name}" for part in ("train", "eval") for name in self._figures]
        return [*CSV_COLUMNS, *losses, *(f"eval_acc1/{layer}" for layer in self._scored), *figures]

    def _rows(self) -> list[list[str]]:
        """What `metrics.csv` holds, header included."""
        try:
            with open(self.path / "metrics.csv", newline="", encoding="utf-8") as file:
                return [row for row in csv.reader(file) if row]
        except FileNotFoundError:
            return []

    def _check_columns(self) -> None:
        rows, columns = self._rows(), self._columns()
        if rows and rows[0] != columns[: len(rows[0])]:  # an earlier release had no columns of layers' accuracies
            raise ValueError(
                f"{self.path / 'metrics.csv'} has the columns {', '.join(rows[0])}, this run {', '.join(columns)}; "
                "resume with the same model, or choose another --experiment-name"
            )

    def _row(self, result: EpochResult) -> None:
        losses = dict(result.local_losses)
        values = [getattr(result, name) for name in CSV_COLUMNS] + [losses.get(layer) for layer in self._layers]
        accuracies = dict(result.layer_acc1)
        values += [accuracies.get(layer) for layer in self._scored]
        for figures in (dict(result.train_figures), dict(result.eval_figures)):
            values += [figures.get(name) for name in self._figures]
        row = ["" if value is None else repr(value) for value in values]
        kept = [old + [""] * (len(row) - len(old)) for old in self._rows()[1:] if int(old[0]) < result.epoch]
        write_whole(self.path / "metrics.csv", _csv_text([self._columns(), *kept, row]))

    def _free_config(self) -> Path:
        """A resumed run keeps the first run's settings and writes its own beside them."""
        path, number = self.path / "config.json", 1
        while path.exists():
            path, number = self.path / f"config.resume-{number}.json", number + 1
        return path


def format_step(step: StepResult) -> str:
    """One training line: the recent value of each meter, in brackets its mean over the epoch so far.

    Seconds per step, of which waiting for data; loss; percent.
    """
    width = len(str(step.steps))
    recent, mean = step.recent, step.mean
    return "\t".join(
        (
            f"Epoch: [{step.epoch}] [{step.step:{width}d}/{step.steps}]",
            _meter("Time", "6.3f", "time", recent, mean),
            _meter("Data", "6.3f", "data", recent, mean),
            _meter("Loss", ".4e", "loss", recent, mean),
            *(
                _meter(title, "6.2f", name, recent, mean)
                for title, name in (("Acc@1", "acc1"), ("Acc@5", "acc5"))
                if getattr(mean, name) is not None
            ),
        )
    )


def _told(loss: float, first: float | None, fifth: float | None, others: Sequence[tuple[str, float]]) -> str:
    """An epoch's figures; the authors' logs have the accuracies alone."""
    if fifth is not None and not others:
        return f" Acc@1 {first:.3f} Acc@5 {fifth:.3f}"
    accuracy = "" if first is None else f" Acc@1 {first:.3f}"
    return f" Loss {loss:.4f}{accuracy}" + "".join(f" {name} {value:.4f}" for name, value in others)


def _meter(title: str, form: str, name: str, recent: Meters, mean: Meters) -> str:
    return f"{title} {getattr(recent, name):{form}} ({getattr(mean, name):{form}})"


def _csv_text(rows: Sequence[Sequence[str]]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _without_secrets(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(k): _without_secrets(v) for k, v in value.items() if not _SECRET.search(str(k))}
    if isinstance(value, list | tuple):
        return [_without_secrets(item) for item in value]
    return value


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("unlocked", "torch", "triton", "numpy", "pyzmq"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
