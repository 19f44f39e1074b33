"""The public API: one Trainer for every engine."""

import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unlocked.data import Dataset
from unlocked.kernels.precision import check_precision, float32_products
from unlocked.kernels.trial import bfloat16_gain
from unlocked.rules import CrossEntropy, Rule
from unlocked.runtime.arguments import (
    check_clip,
    check_lr_factor,
    check_model,
    check_names,
    check_optimizer,
    check_rule,
    check_sinks,
    try_optimizer,
)
from unlocked.runtime.batch_statistics import check_batch_statistics
from unlocked.runtime.engines import ENGINES, as_engine, engine_class
from unlocked.runtime.fields import values_of
from unlocked.runtime.input import Data, as_dataset, check_drop_last, probe_sample, rows_per_batch, with_classes
from unlocked.runtime.job import Engine, Job, check_compile, check_device
from unlocked.runtime.layer_optimizers import Optimizers, check_layers, optimizer_for
from unlocked.runtime.layer_rules import Rules
from unlocked.runtime.learning_rate import LearningRate, LrSchedule, ReduceLROnPlateau, constant
from unlocked.runtime.machine import set_threads
from unlocked.runtime.metrics.best import BestWeights
from unlocked.runtime.metrics.sinks import FanOut, MetricsSink
from unlocked.runtime.network import (
    Model,
    Network,
    backpropagation_network,
    build_network,
    check_weights,
    kept_modes,
)
from unlocked.runtime.result import RunResult
from unlocked.runtime.rule_trial import check_rules, check_trainable
from unlocked.runtime.saving.fingerprint import describe_lr_factor, describe_optimizer, describe_rule, learning_rates
from unlocked.runtime.saving.snapshots import Snapshot, find_snapshot, newest_whole
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.runtime.settings import Settings
from unlocked.runtime.whole import feedback_alignment_network
from unlocked.workers.layer import OptimizerFactory

__all__ = ["Trainer"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Trainer(Settings):
    """Trains a network whose layers learn by local rules. Takes every setting of `Settings` by its name as well.

    Args:
        model: blocks of `unlocked.models`, an nn.Sequential, or a list of modules; the last one gives the logits. A
            network in one module becomes such a list by `unlocked.models.split`.
        rule: builds each layer's local rule (`LLS(temperature=0.5)`, or a `LocalRule` class), one for all layers, one
            per local layer in order, or a mapping by their names. For comparison, in one stage only: "BP" trains end to
            end by backpropagation, "DFA" by direct feedback alignment.
        optimizer: builds a layer's optimizer from its parameters, e.g. partial(torch.optim.Adam, lr=1e-2); one for all
            layers, or a mapping by the layers' names (the output layer's too), each with a rate of its own.
        output_rule: builds what the output layer trains on; `unlocked.rules.SquaredError`, `Margin`, or one's own.
        clip_grad_norm: each layer's gradients are scaled down to this norm, where theirs is larger.
        engine: `Sequential()`, `Streams(...)` or `Processes(...)` (under torchrun) with their options, or "sequential",
            "streams" or "processes" for the defaults. All give the same numbers.
        redraw: draw every parameter of the model by (seed, layer). Otherwise training starts from the weights that the
            model holds, so a second `fit` goes on from the first one's (with new optimizers and rules); a network of
            `unlocked.models` that nobody has loaded, trained or changed is drawn by `seed`.
        lr_factor: epoch -> factor of the initial learning rate; or `unlocked.ReduceLROnPlateau(...)`, which needs
            the test loss: then the pipeline drains at the end of every epoch; or `WarmUp(steps, then=...)` or
            `PerStep(function)`, which change the rate with every micro-batch. May be another one after a resume.
        sinks: receive metrics (`unlocked.runtime.MetricsSink`), or a function that makes them, which is
            called in the process that reports (rank 0's) alone.
        names: how model, dataset and rule are called in logs.

    Raises:
        ValueError: a setting is out of range; says what is valid.
        TypeError: an option that belongs to an engine; says where to give it.
    """

    model: Model = field(kw_only=False)
    rule: Rules | str
    optimizer: Optimizers
    output_rule: Rule = CrossEntropy
    clip_grad_norm: float | None = None
    engine: Engine | str = "sequential"
    redraw: bool = False
    lr_factor: LrSchedule = constant
    sinks: Sequence[MetricsSink] | Callable[[], Sequence[MetricsSink]] = ()
    names: Mapping[str, str] | None = None
    _engine: Engine = field(init=False)
    _resume: Snapshot | None = field(init=False)

    if not TYPE_CHECKING:  # the generated signature is the one to complete and to check against

        def __new__(cls, *args: Any, **options: Any) -> "Trainer":
            _refuse_engine_options(cls, options)
            return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_model(self.model)
        check_rule(self.rule)
        check_rule(self.output_rule)
        check_optimizer(self.optimizer)
        check_clip(self.clip_grad_norm)
        check_lr_factor(self.lr_factor)
        check_sinks(self.sinks)
        check_names(self.names)
        if not isinstance(self.redraw, bool):
            raise ValueError(f"redraw is {self.redraw!r}; it must be True or False")
        if self.snapshot_every and self.snapshot_dir is None:
            raise ValueError(f"snapshot_every is {self.snapshot_every}, but there is no snapshot_dir to write to")
        engine = as_engine(self.engine)
        engine.check(self.settings, self.rule if isinstance(self.rule, str) else None)
        check_device(self.device)
        check_compile(self.compile)
        check_precision(self.precision, torch.device(self.device))
        _warn_of_slow_precision(self.precision, self.device)
        object.__setattr__(self, "_engine", engine)
        object.__setattr__(self, "_resume", self._find_resume())

    def _find_resume(self) -> Snapshot | None:
        if not self.resumes_by_itself:
            return None if self.resume is None else find_snapshot(self.resume)
        if self.snapshot_dir is None:
            raise ValueError("resume is 'auto', but there is no folder of snapshots to look in; give --save-path")
        snapshot, problems = newest_whole(self.snapshot_dir)
        if snapshot is not None and problems and os.environ.get("RANK", "0") == "0":
            print(f"resuming from {snapshot.folder}, since {problems[0]}", file=sys.stderr)
        return snapshot

    @property
    def settings(self) -> Settings:
        """Those that belong to no engine."""
        return Settings(**values_of(self, Settings))

    def fit(
        self,
        train: Data,
        *,
        epochs: int,
        batch_size: int | None = None,
        eval_data: Data | None = None,
        eval_batch_size: int | None = None,
        max_steps: int | None = None,
        steps_per_epoch: int | None = None,
        drop_last: bool = False,
    ) -> RunResult:
        """Trains for `epochs`, evaluating after each where there is `eval_data`.

        Args:
            train: an `ImageDataset`; or (samples [N, ...], labels [N] int64); or a PyTorch DataLoader, or any iterable
                of batches (samples [B, ...] float or uint8, labels [B]), whose batches are the micro-batches: see
                `unlocked.data.LoaderDataset`. NumPy arrays, other number types, a TensorDataset and any indexable
                PyTorch Dataset are converted, with a warning where that changes a type.
            batch_size: rows of a micro-batch; the last of an epoch may be smaller. A loader brings its own.
            eval_batch_size: rows of an evaluation micro-batch; default: `batch_size`.
            max_steps: stop after that many training micro-batches.
            steps_per_epoch: batches of a training loader that make an epoch; default: its length.
            drop_last: leave out an epoch's last training micro-batch where it would be smaller, as a DataLoader does.
                A loader is told so itself.

        Returns:
            Figures and final weights. The model that was passed in holds the trained weights as well, on the engines
            that run in this process.

        Raises:
            ValueError: data, sizes and network don't fit each other.
            StageError: a layer of this process failed, or its loss became non-finite; names stage, layer and action.
            RunFailed, TimeoutError: another process failed, or did not answer; carries its story.
        """
        began = time.perf_counter()
        set_threads(self.threads)
        train_set = as_dataset(train, "train", steps_per_epoch=steps_per_epoch, batch_size=batch_size, seed=self.seed)
        test_set = None
        if eval_data is not None:
            rows = rows_per_batch(train_set, batch_size) if eval_batch_size is None else eval_batch_size
            test_set = as_dataset(eval_data, "test", num_classes=train_set.num_classes, batch_size=rows)
        batch_size = rows_per_batch(train_set, batch_size)
        if test_set is not None:
            eval_batch_size = rows_per_batch(test_set, eval_batch_size, batch_size)
        plan = StreamPlan(
            epochs=epochs,
            train_size=len(train_set),
            batch_size=batch_size,
            eval_size=0 if test_set is None else len(test_set),
            eval_batch_size=batch_size if eval_batch_size is None else eval_batch_size,
            statistics_batches=self.statistics_batches,
            snapshot_every=self.snapshot_every,
            max_steps=max_steps,
            drop_last=drop_last,
        )
        job = self._job(train_set, test_set, plan)
        prepared = time.perf_counter() - began
        sinks = FanOut()

        def make_sinks() -> list[MetricsSink]:
            sinks.add(self.sinks() if callable(self.sinks) else self.sinks)
            if self.best_dir is not None:
                sinks.add([BestWeights(self.best_dir, job.plan[job.start].epoch)])
            return [sinks]

        with sinks, float32_products(self.precision), kept_modes(job.network):
            result = self._engine.run(job, make_sinks)
            result.setup_seconds += prepared
            sinks.on_finish(result.figures())
        return result

    def _job(self, train_set: Dataset, test_set: Dataset | None, plan: StreamPlan) -> Job:
        check_drop_last(train_set, plan)
        if test_set is not None and test_set.image_shape != train_set.image_shape:
            raise ValueError(
                f"evaluation samples have shape {test_set.image_shape}, training samples {train_set.image_shape}; "
                "they must be equal"
            )
        if test_set is None and isinstance(self.lr_factor, ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau needs the test loss, but there is no evaluation; give evaluation data")
        network = build_network(
            self.model,
            input_shape=train_set.image_shape,
            num_classes=train_set.num_classes,
            seed=self.seed,
            redraw=self.redraw,
            sample=probe_sample(train_set),
        )
        check_batch_statistics(network.batch_statistics, plan)
        train_set = with_classes(train_set, network.infos[-1].num_classes)
        test_set = None if test_set is None else with_classes(test_set, network.infos[-1].num_classes)
        check_trainable(network, self.rule)
        check_weights(network)
        if isinstance(self.rule, str):
            whole = {"BP": backpropagation_network, "DFA": feedback_alignment_network}[self.rule]
            network = whole(network)
        check_layers(self.optimizer, network.names)
        tried = _tried_optimizers(self.optimizer, network)
        network = check_rules(
            network,
            [] if isinstance(self.rule, str) else self.rule,
            output_rule=self.output_rule,
            optimizer=self.optimizer,
            sample=probe_sample(train_set),
        )
        fingerprint = {
            "layers": network.names,
            "rule": describe_rule(self.rule),
            "output_rule": describe_rule(self.output_rule),
            "clip_grad_norm": self.clip_grad_norm,
            "optimizer": _by_layer(self.optimizer, tried, describe_optimizer),
            "seed": self.seed,
            "precision": self.precision,
            **plan.settings(),
        }
        resume = self._resume
        if resume is not None:
            _check_resume(resume, fingerprint, plan)
        return Job(
            network=network,
            rule=[] if isinstance(self.rule, str) else self.rule,
            optimizer=self.optimizer,
            output_rule=self.output_rule,
            clip_grad_norm=self.clip_grad_norm,
            lr_factor=LearningRate(self.lr_factor, dict(resume.test_losses) if resume else None),
            train=train_set,
            test=test_set,
            plan=plan,
            settings=self.settings,
            engine=self._engine.name,
            fingerprint=fingerprint,
            rates={
                "learning rate": _by_layer(self.optimizer, tried, learning_rates),
                "learning-rate schedule": describe_lr_factor(self.lr_factor, plan.epochs),
            },
            resume=resume,
            names=self.names or {},
        )


def _tried_optimizers(optimizers: Optimizers, network: Network) -> dict[str, list[nn.Parameter]]:
    """The parameters that each layer's optimizer was tried with; of one for all layers, the last layer's that has some.

    Raises:
        ValueError: an optimizer can't be built (`try_optimizer`).
    """
    of_layers = {name: list(block.parameters()) for name, block in zip(network.names, network.blocks, strict=True)}
    if not isinstance(optimizers, Mapping):
        last = next((name for name in reversed(of_layers) if of_layers[name]), network.names[-1])
        of_layers = {last: of_layers[last]}
    for name, parameters in of_layers.items():
        try_optimizer(optimizer_for(optimizers, name), parameters)
    return of_layers


def _by_layer(
    optimizers: Optimizers, tried: Mapping[str, list[nn.Parameter]], tell: Callable[[OptimizerFactory, Any], Any]
) -> Any:
    """What `tell` says of the optimizer, or of each layer's by name."""
    if not isinstance(optimizers, Mapping):
        return tell(optimizers, *tried.values())
    return {name: tell(optimizers[name], parameters) for name, parameters in tried.items()}


def _warn_of_slow_precision(precision: str, device: str) -> None:
    if precision == "bf16" and torch.device(device).type == "cpu" and (gain := bfloat16_gain(device)) < 1:
        warnings.warn(
            f"precision bf16 is slower than fp32 on this processor, which has no unit for it: a matrix product takes "
            f"{1 / gain:.1f} times as long; take fp32, or auto",
            stacklevel=2,
        )


def _check_resume(resume: Snapshot, fingerprint: Mapping[str, Any], plan: StreamPlan) -> None:
    """Raises a ValueError if the snapshot is another run's, or lies beyond this run's end."""
    resume.check(fingerprint)
    if resume.position >= len(plan):
        raise ValueError(
            f"the snapshot {resume.folder} is at step {resume.steps}, where this run of {plan.epochs} epochs has "
            "nothing left to do; give more epochs"
        )


def _refuse_engine_options(owner: type[Trainer], options: Mapping[str, Any]) -> None:
    """Raises a TypeError that says which engine takes an option that `owner` doesn't."""
    unknown = options.keys() - {one.name for one in fields(owner)}
    for name in sorted(unknown):
        engines = [engine_class(engine) for engine in ENGINES]
        owners = [engine for engine in engines if name in {one.name for one in fields(engine)}]
        if owners:
            told = options.get("engine")
            chosen = next((one for one in owners if one.name == told), owners[0])
            raise TypeError(
                f"{name} is an option of an engine; give it to the engine: "
                f"engine={chosen.__name__}({name}={options[name]!r})"
            )
