"""Measures all contenders: first the forms of backpropagation's pipelines, then speed in turns, then accuracy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from unlocked.comparison.command_line import CompareOptions
from unlocked.comparison.contenders import Spec, all_contenders, choose
from unlocked.comparison.environment import environment
from unlocked.comparison.excerpts import cut_excerpts
from unlocked.comparison.logged import LoggedRun
from unlocked.comparison.networks import network_of
from unlocked.comparison.pool import ContenderFailed, Pool
from unlocked.comparison.request import Form, LayerCosts, RankAnswer, Request, Task, save_data
from unlocked.comparison.results import (
    ComparisonSettings,
    Contender,
    Report,
    Run,
    RunKind,
    StepSplit,
    TimelineExcerpt,
    Trial,
)
from unlocked.comparison.rival.forms import forms_to_try
from unlocked.kernels.precision import check_precision
from unlocked.runtime.batch_statistics import check_batch_statistics
from unlocked.runtime.recipe import Recipe, make_optimizer, make_rule

__all__ = ["make_run", "measure"]

_TIMELINE_STEPS = 40
_MANY = 10_000  # epochs: `max_steps` ends the run


def measure(options: CompareOptions, announce: Callable[[str], None]) -> Report:
    """Runs the comparison.

    Args:
        announce: told a line about every run as it ends.

    Raises:
        ValueError: a setting is wrong; found before the first run.
    """
    recipe = options.recipe
    machine = environment()
    device = "cuda" if recipe.device.startswith("cuda") else "cpu"
    check_precision(recipe.precision, torch.device(device))
    specs = all_contenders(device, cores=machine.cores, processes=options.processes, queue_depth=options.queue_depth)
    specs = choose(specs, list(options.only))
    if recipe.precision == "bf16":
        specs = [replace(s, not_run="in fp32 and tf32 only") if s.is_bp_pipeline else s for s in specs]
    make_optimizer(recipe)
    make_rule(recipe)
    train, test = recipe.load_data()
    network = network_of(recipe, train)
    layers = tuple(network.names)
    kinds: list[RunKind] = ["speed"] * bool(options.repeats)
    kinds += ["accuracy"] * bool(options.epochs and options.seeds)
    for kind in kinds:
        check_batch_statistics(network.batch_statistics, _recipe(options, kind).plan(train, test))
    del network
    settings = ComparisonSettings(
        command=options.command,
        dataset=recipe.dataset,
        model=recipe.model,
        layers=layers,
        train_images=len(train),
        test_images=len(test),
        image_shape=train.image_shape,
        device=device,
        batch_size=recipe.batch_size,
        test_batch_size=recipe.test_batch_size,
        optimizer=recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        temperature=recipe.temperature,
        label_smoothing=recipe.label_smoothing,
        waveform=recipe.waveform,
        epochs=options.epochs,
        speed_steps=options.speed_steps,
        repeats=options.repeats,
        seeds=tuple(range(recipe.seed, recipe.seed + options.seeds)) if options.epochs else (),
        processes=options.processes,
        precision=recipe.precision,
    )
    with Pool() as pool:
        data = pool.folder / "data.pt"
        save_data(data, (train, test))
        del train, test
        session = _Session(options, pool, [_Entry(spec) for spec in specs], announce)
        session.choose_forms()
        for repeat in range(options.repeats):
            session.run_all("speed", recipe.seed, f"speed {repeat + 1}/{options.repeats}")
        for seed in settings.seeds:
            session.run_all("accuracy", seed, f"seed {seed}")
        timelines = session.timelines()
    return Report(
        environment=machine,
        settings=settings,
        contenders=tuple(entry.contender() for entry in session.entries),
        timelines=tuple(timelines),
        logged=LoggedRun.load(),
    )


@dataclass
class _Entry:
    """A contender and what is known of it so far."""

    spec: Spec
    form: Form | None = None
    reason: str | None = None
    stages: tuple[tuple[str, ...], ...] = ()
    runs: list[Run] = field(default_factory=list)
    trials: tuple[Trial, ...] = ()

    @property
    def is_running(self) -> bool:
        return self.spec.not_run is None and self.reason is None

    def contender(self) -> Contender:
        spec = self.spec
        return Contender(
            name=spec.name,
            family=spec.family,
            engine=spec.engine_name,
            processes=spec.processes,
            threads=spec.threads,
            status="not run" if spec.not_run else "failed" if self.reason else "measured",
            reason=spec.not_run or self.reason,
            stages=self.stages,
            chunks=self.form.chunks if self.form else None,
            note=spec.note,
            runs=tuple(self.runs),
            trials=self.trials,
        )


class _Session:
    """The runs of one comparison."""

    def __init__(
        self, options: CompareOptions, pool: Pool, entries: list[_Entry], announce: Callable[[str], None]
    ) -> None:
        self.options, self.pool, self.entries, self.announce = options, pool, entries, announce

    def choose_forms(self) -> None:
        """Tries the forms of every pipeline of backpropagation; the fastest one is kept."""
        pipelines = [entry for entry in self.entries if entry.spec.is_bp_pipeline and entry.is_running]
        if not pipelines:
            return
        costs = self._costs(pipelines)
        for entry in pipelines:
            if not entry.is_running or costs is None:
                continue
            try:
                self._choose_form(entry, costs)
            except (ContenderFailed, ValueError) as error:
                self._fail(entry, error)

    def run_all(self, kind: RunKind, seed: int, title: str) -> None:
        """One run of every contender that has not failed so far, in turn."""
        for entry in self.entries:
            if not entry.is_running:
                continue
            try:
                answers = self.pool.run(self._request(entry, kind, seed))
            except ContenderFailed as error:
                self._fail(entry, error)
                continue
            run = make_run(kind, seed, answers)
            entry.runs.append(run)
            entry.stages = answers[0].stages
            found = f"{run.images_per_second:,.0f} images/s"
            if run.test_acc1 is not None:
                found += f", test accuracy {run.test_acc1:.2f} %"
            self.announce(f"{title} | {entry.spec.name}: {found}")

    def timelines(self) -> list[TimelineExcerpt]:
        """Of LLS by processes and of backpropagation by 1F1B, where both run."""
        chosen = [e for e in self.entries if e.is_running and (e.spec.family, e.spec.engine_name) in _WITH_TIMELINE]
        if len(chosen) < len(_WITH_TIMELINE):
            return []
        found = []
        for entry in chosen:
            request = self._request(entry, "speed", self.options.recipe.seed)
            steps = replace(request.recipe, max_steps=_TIMELINE_STEPS)
            try:
                answers = self.pool.run(replace(request, recipe=steps, timeline=True))
            except ContenderFailed as error:  # its figures stand; only the picture is missing
                self.announce(f"no timelines | {entry.spec.name}: {error}")
                return []
            found.append((entry.spec.name, answers))
        return cut_excerpts(found)

    def _costs(self, pipelines: Sequence[_Entry]) -> LayerCosts | None:
        spec = replace(pipelines[0].spec, processes=1, threads=1, name="costs of the layers")
        try:
            answers = self.pool.run(self._message(spec, "costs", self.options.recipe))
        except ContenderFailed as error:
            for entry in pipelines:
                self._fail(entry, error)
            return None
        return answers[0].costs

    def _choose_form(self, entry: _Entry, costs: LayerCosts) -> None:
        options = self.options
        forms = forms_to_try(
            entry.spec.engine_name,
            costs,
            processes=options.processes,
            batch_size=options.recipe.batch_size,
            chunks=options.chunks,
        )
        recipe = replace(options.recipe, max_steps=options.trial_steps, num_epochs=_MANY, no_eval=True)
        request = replace(self._message(entry.spec, "trials", recipe), forms=tuple(forms))
        entry.trials = self.pool.run(request)[0].trials
        rates = [trial.images_per_second or 0.0 for trial in entry.trials]
        best = max(range(len(rates)), key=rates.__getitem__)
        if not rates[best]:
            raise ContenderFailed(next((t.reason for t in entry.trials if t.reason), "no form to try"))
        entry.form = forms[best]
        stages = " | ".join(", ".join(stage) for stage in entry.trials[best].stages)
        chunks = f"{entry.form.chunks} chunk{'s' if entry.form.chunks > 1 else ''}"
        self.announce(f"forms | {entry.spec.name}: {chunks}, {stages}: {rates[best]:,.0f} images/s")

    def _request(self, entry: _Entry, kind: RunKind, seed: int) -> Request:
        recipe = replace(_recipe(self.options, kind), seed=seed)
        return replace(self._message(entry.spec, "train", recipe), form=entry.form)

    def _message(self, spec: Spec, task: Task, recipe: Recipe) -> Request:
        return Request(
            spec=spec,
            task=task,
            recipe=replace(
                recipe,
                training_mode=spec.family,
                engine=spec.engine,
                kernels=spec.kernels,
                compile=spec.compiled,
            ),
            data=self.pool.folder / "data.pt",
            timeout=self.options.timeout,
        )

    def _fail(self, entry: _Entry, error: Exception) -> None:
        entry.reason = str(error)
        self.announce(f"failed | {entry.spec.name}: {error}")


def _recipe(options: CompareOptions, kind: RunKind) -> Recipe:
    """What all contenders train in a run of this kind."""
    if kind == "speed":
        return replace(options.recipe, num_epochs=_MANY, max_steps=options.speed_steps, no_eval=True)
    return replace(options.recipe, num_epochs=options.epochs, no_eval=False)


_WITH_TIMELINE = {("LLS", "processes"), ("BP", "1F1B")}


def make_run(kind: RunKind, seed: int, answers: Sequence[RankAnswer]) -> Run:
    """One run's figures from what its processes measured."""
    first = answers[0]
    seconds = max(answer.train_seconds for answer in answers)
    busy = first.busy
    split = []
    for rank, answer in enumerate(answers):
        wait = answer.train_seconds * max(0.0, 1 - busy[rank]) if busy else 0.0
        compute = answer.train_seconds - answer.data_seconds - answer.update_seconds - wait
        parts = (answer.data_seconds, compute, wait, answer.update_seconds)
        data, compute, wait, update = (part / max(first.steps, 1) for part in parts)
        split.append(StepSplit(data=data, compute=compute, wait=wait, update=update))
    return Run(
        kind=kind,
        seed=seed,
        steps=first.steps,
        train_seconds=seconds,
        setup_seconds=first.setup_seconds,
        images_per_second=first.images / seconds,
        split=tuple(split) if first.is_split else (),
        peak_memory_bytes=tuple(answer.peak_memory_bytes for answer in answers),
        base_memory_bytes=tuple(answer.base_memory_bytes for answer in answers),
        bubble_share=max(0.0, 1 - sum(busy) / len(busy)) if busy else 0.0 if first.is_split else None,
        energy_joules=first.energy_joules,
        epochs=first.epochs if kind == "accuracy" else (),
        weights_sha256=first.weights_sha256,
    )
