"""Trains and measures the cells that are not there yet, each in processes of its own, and keeps each as a file."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from unlocked.comparison.cells import claimed, machine_held, read_cell
from unlocked.comparison.contenders import Spec
from unlocked.comparison.environment import environment
from unlocked.comparison.leaderboard.options import Key, LeaderboardOptions
from unlocked.comparison.leaderboard.results import Inspection, Measures, Training
from unlocked.comparison.measure import make_run
from unlocked.comparison.pool import ContenderFailed, Pool
from unlocked.comparison.request import RankAnswer, Request, Task, save_data
from unlocked.comparison.results import Run
from unlocked.rules import GLOBAL_RULES
from unlocked.runtime.engines.processes.engine import Processes
from unlocked.runtime.engines.sequential import Sequential
from unlocked.runtime.job import Engine
from unlocked.runtime.recipe import Recipe
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

__all__ = ["Session"]

_MANY = 10_000  # epochs: `max_steps` ends the run


class Session:
    """One process's share of a leaderboard. A context manager.

    Args:
        announce: told a line about every cell as it ends.
    """

    def __init__(self, options: LeaderboardOptions, announce: Callable[[str], object]) -> None:
        self.options, self.announce = options, announce
        self._stack = ExitStack()
        self._pool = Pool()
        self._sizes: dict[str, int] = {}  # training images of the datasets that have been loaded
        self._machine = environment()

    def __enter__(self) -> "Session":
        (self.options.output / "cells").mkdir(parents=True, exist_ok=True)
        self._stack.enter_context(self._pool)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def forget_failed(self) -> None:
        """Removes the cells that have failed, and that nobody is at, so that they are made again."""
        for key, part in itertools.product(self.options.keys, (*map(str, self.options.seeds), "measures")):
            path = self.options.path_of(key, part)
            with claimed(path) as mine:
                cell = read_cell(path, self.options.settings_of(key), remedy="--output") if mine else None
                if cell is not None and "failed" in cell:
                    path.unlink()

    def train(self) -> None:
        """Trains the cells that nobody has and nobody is at, one after the other."""
        for key, seed in self.options.cells():
            self._make(key, seed, partial(self._trained, key, seed), alone=False)

    def measure(self) -> None:
        """Measures every row that has not been, while no other process of this leaderboard is at work."""
        for key in self.options.keys:
            self._make(key, "measures", partial(self._measured, key), alone=True)

    def _make(self, key: Key, part: int | str, make: Callable[[], dict[str, Any]], *, alone: bool) -> None:
        """Keeps what `make` gives, or why it failed."""
        path, settings = self.options.path_of(key, part), self.options.settings_of(key)
        timing = to_plain(self.options.timing) if part == "measures" else None
        if self._is_there(path, settings, timing):
            return
        with claimed(path) as mine:
            if not mine or self._is_there(path, settings, timing):
                return
            with machine_held(path.parent, alone=alone):
                try:
                    found = make()
                except ContenderFailed as error:
                    found = {"failed": str(error)}
            machine = self._machine
            told = found.pop("told", None) or f"failed: {found['failed']}"
            where = {"machine": machine.cpu, "versions": machine.versions, "commit": machine.commit}
            how = {"settings": settings} if timing is None else {"settings": settings, "timing": timing}
            write_json(path, {"key": list(key), "part": part, **how, **where, **found})
        self.announce(f"{key.title} {part if part == 'measures' else f'seed {part}'}: {told}")

    def _is_there(self, path: Path, settings: dict[str, Any], timing: Any) -> bool:
        """As it would be made now: what is timed otherwise is measured again."""
        cell = read_cell(path, settings, remedy="--output")
        return cell is not None and cell.get("timing") == timing

    def _trained(self, key: Key, seed: int) -> dict[str, Any]:
        recipe = self.options.recipe_of(key, seed)
        if self.options.minutes is not None:
            recipe = self._within_minutes(recipe, key)
        run, _ = self._run(key, recipe)
        accuracies = tuple(epoch.test_acc1 for epoch in run.epochs if epoch.test_acc1 is not None)
        if not accuracies or run.weights_sha256 is None:
            raise ContenderFailed("the run ended without an evaluation")
        training = Training(
            test_acc1=accuracies[-1],
            epochs=accuracies,
            steps=run.steps,
            train_seconds=run.train_seconds,
            weights_sha256=run.weights_sha256,
            layer_acc1=run.epochs[-1].layer_acc1,
        )
        told = f"{training.test_acc1:.2f} % after {run.train_seconds:.1f} s"
        return {"training": to_plain(training), "told": told}

    def _within_minutes(self, recipe: Recipe, key: Key) -> Recipe:
        """As many steps as a trial says that the minutes hold."""
        assert self.options.minutes is not None
        trial, _ = self._run(key, self._timed(recipe))
        steps = max(1, int(60 * self.options.minutes * trial.images_per_second / recipe.batch_size))
        batches = self._sizes[key.dataset] / recipe.batch_size
        per_epoch = max(1, math.floor(batches) if recipe.drop_last else math.ceil(batches))
        return replace(recipe, max_steps=steps, num_epochs=math.ceil(steps / per_epoch))

    def _timed(self, recipe: Recipe) -> Recipe:
        return replace(recipe, num_epochs=_MANY, max_steps=self.options.speed_steps, no_eval=True)

    def _measured(self, key: Key) -> dict[str, Any]:
        recipe = self._timed(self.options.recipe_of(key, self.options.seeds[0]))
        notes: list[str] = []
        inspection = self._inspected(key, recipe, notes)
        pipeline: Engine | None = None
        if key.rule not in GLOBAL_RULES and inspection is not None and len(inspection.layers) > 1:
            pipeline = Processes(stages=min(self.options.processes, len(inspection.layers)))
        alone: list[tuple[Run, list[RankAnswer]]] = []
        piped: list[tuple[Run, list[RankAnswer]]] = []
        for _ in range(self.options.repeats):
            alone.append(self._run(key, recipe))
            if pipeline is not None:
                try:
                    piped.append(self._run(key, recipe, pipeline))
                except ContenderFailed as error:
                    notes.append(f"pipeline: {error}")
                    pipeline = None
        joules = [answers[0].energy_joules / answers[0].images for _, answers in alone if answers[0].energy_joules]
        digests = {run.weights_sha256 for run, _ in (*alone, *piped)}
        measures = Measures(
            images_per_second=_median_rate(alone),
            pipeline_images_per_second=_median_rate(piped),
            processes=len(piped[0][1]) if piped else 1,
            is_exact=len(digests) == 1 if piped else None,
            pipeline_edge_bytes=_bytes_between(piped[0][1], inspection) if piped and inspection else None,
            joules_per_image=statistics.median(joules) if joules else None,
            inspection=inspection,
            notes=tuple(notes),
        )
        return {"measures": to_plain(measures), "told": _told(measures)}

    def _inspected(self, key: Key, recipe: Recipe, notes: list[str]) -> Inspection | None:
        try:
            answers = self._pool.run(self._request(key, recipe, Sequential(), task="inspect"))
        except ContenderFailed as error:
            notes.append(f"inspection: {error}")
            return None
        return answers[0].inspection

    def _run(self, key: Key, recipe: Recipe, engine: Engine | None = None) -> tuple[Run, list[RankAnswer]]:
        """
        Raises:
            ContenderFailed: says why, in one line.
        """
        answers = self._pool.run(self._request(key, recipe, engine or Sequential()))
        return make_run("speed" if recipe.no_eval else "accuracy", recipe.seed, answers), answers

    def _request(self, key: Key, recipe: Recipe, engine: Engine, task: Task = "train") -> Request:
        count = engine.stages if isinstance(engine, Processes) else 1
        assert isinstance(count, int)
        return Request(
            spec=Spec(name=key.title, family=key.rule, engine=engine, processes=count),
            task=task,
            recipe=replace(recipe, engine=engine),
            data=self._data(recipe),
            timeout=self.options.timeout,
        )

    def _data(self, recipe: Recipe) -> Path:
        """The file of the recipe's dataset, for all processes of this run."""
        path = self._pool.folder / f"data-{recipe.dataset}.pt"
        if recipe.dataset not in self._sizes:
            train, test = recipe.load_data()
            save_data(path, (train, test))
            self._sizes[recipe.dataset] = len(train)
        return path


def _median_rate(runs: Sequence[tuple[Run, list[RankAnswer]]]) -> float | None:
    return statistics.median(run.images_per_second for run, _ in runs) if runs else None


def _bytes_between(answers: Sequence[RankAnswer], inspection: Inspection) -> float | None:
    """Per image, over all edges of the pipeline that ran."""
    if not inspection.edge_bytes:
        return None
    return sum(inspection.edge_bytes[inspection.layers.index(stage[-1])] for stage in answers[0].stages[:-1])


def _told(measures: Measures) -> str:
    parts = []
    if measures.images_per_second is not None:
        parts.append(f"{measures.images_per_second:,.0f} images/s")
    if measures.pipeline_images_per_second is not None:
        parts.append(f"{measures.pipeline_images_per_second:,.0f} as a pipeline")
    if (found := measures.inspection) is not None and found.leaks is not None:
        parts.append("local" if found.is_local else f"not local: {', '.join(found.leaks)}")
    return ", ".join([*parts, *measures.notes, *(found.notes if found else ())])
