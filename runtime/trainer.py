"""The public API: one Trainer for every engine."""

import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unlocked.data import Dataset
from unlocked.kernels.precision import check_precision
from unlocked.models import plain_module
from unlocked.rules import CrossEntropy, Rule, Task
from unlocked.runtime.arguments import (
    check_clip,
    check_lr_factor,
    check_model,
    check_names,
    check_optimizer,
    check_rule,
    check_sinks,
    check_switch,
    check_task,
)
from unlocked.runtime.batch_statistics import check_batch_statistics
from unlocked.runtime.before_run import (
    by_layer,
    check_evaluation,
    check_resume,
    find_resume,
    fingerprint_of,
    refuse_engine_options,
    tried_optimizers,
    warn_of_slow_precision,
)
from unlocked.runtime.engines import as_engine
from unlocked.runtime.explaining import Explanation, explain
from unlocked.runtime.fields import values_of
from unlocked.runtime.input import Data, as_dataset, beside_of, check_drop_last, probe_sample, ready, rows_per_batch
from unlocked.runtime.job import Engine, Job, check_compile, check_device
from unlocked.runtime.keeping import KeptModel, describe_kept
from unlocked.runtime.layer_optimizers import Optimizers, check_layers
from unlocked.runtime.layer_rules import Rules
from unlocked.runtime.learned import learned_from
from unlocked.runtime.learning_rate import LearningRate, LrSchedule, ReduceLROnPlateau, constant
from unlocked.runtime.machine import freed_memory_returned, set_threads
from unlocked.runtime.metrics.best import BestWeights
from unlocked.runtime.metrics.dashboard import Dashboard
from unlocked.runtime.metrics.notebook import in_notebook
from unlocked.runtime.metrics.sinks import FanOut, MetricsSink
from unlocked.runtime.network import (
    Model,
    build_network,
    check_weights,
    kept_modes,
)
from unlocked.runtime.pixels import read_as_trained
from unlocked.runtime.prediction import Evaluation, Trained, as_samples, rows_asked
from unlocked.runtime.result import RunResult
from unlocked.runtime.rule_trial import check_rules, check_trainable
from unlocked.runtime.saving.fingerprint import describe_lr_factor, describe_optimizer, describe_rule, learning_rates
from unlocked.runtime.saving.generators import generator_states, set_generators
from unlocked.runtime.saving.identity import describe_network
from unlocked.runtime.saving.snapshots import Snapshot
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.runtime.settings import Settings
from unlocked.runtime.whole import whole_network

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
        task: what is learned and reported (`unlocked.rules.Tokens()`, or a `Task` of one's own); None: what the targets
            and the model's output tell.
        clip_grad_norm: each layer's gradients are scaled down to this norm, where theirs is larger.
        engine: `Sequential()`, `Streams(...)` or `Processes(...)` with their options, or "sequential", "streams" or
            "processes" for the defaults. All give the same numbers. Outside torchrun, `Processes` starts its own
            processes on this machine.
        redraw: draw every parameter of the model by (seed, layer). Otherwise training starts from the weights that the
            model holds, so a second `fit` goes on from the first one's (with new optimizers and rules); a network of
            `unlocked.models` that nobody has loaded, trained or changed is drawn by `seed`.
        lr_factor: epoch -> factor of the initial learning rate; or `unlocked.ReduceLROnPlateau(...)`, which needs
            the test loss: then the pipeline drains at the end of every epoch; or `WarmUp(steps, then=...)` or
            `PerStep(function)`, which change the rate with every micro-batch. May be another one after a resume.
        sinks: receive metrics (`unlocked.runtime.MetricsSink`), or a function that makes them, which is
            called in the process that reports (rank 0's) alone.
        names: how model, dataset and rule are called in logs.
        progress: show a live view of the run; None: in a notebook and on a terminal.

    Raises:
        ValueError: a setting is out of range; says what is valid.
        TypeError: an option that belongs to an engine; says where to give it.
    """

    model: Model = field(kw_only=False)
    rule: Rules | str
    optimizer: Optimizers
    output_rule: Rule = CrossEntropy
    task: Task | None = None
    clip_grad_norm: float | None = None
    engine: Engine | str = "sequential"
    redraw: bool = False
    lr_factor: LrSchedule = constant
    sinks: Sequence[MetricsSink] | Callable[[], Sequence[MetricsSink]] = ()
    names: Mapping[str, str] | None = None
    progress: bool | None = None
    _engine: Engine = field(init=False)
    _resume: Snapshot | None = field(init=False)
    _trained: Trained | None = field(init=False, default=None)

    if not TYPE_CHECKING:  # the generated signature is the one to complete and to check against

        def __new__(cls, *args: Any, **options: Any) -> "Trainer":
            refuse_engine_options(cls, options)
            return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_model(self.model)
        check_rule(self.rule)
        check_rule(self.output_rule)
        check_task(self.task)
        check_optimizer(self.optimizer)
        check_clip(self.clip_grad_norm)
        check_lr_factor(self.lr_factor)
        check_sinks(self.sinks)
        check_names(self.names)
        check_switch("redraw", self.redraw)
        check_switch("progress", self.progress, or_none=True)
        if self.snapshot_every and self.snapshot_dir is None:
            raise ValueError(f"snapshot_every is {self.snapshot_every}, but there is no snapshot_dir to write to")
        engine = as_engine(self.engine)
        engine.check(self.settings, self.rule if isinstance(self.rule, str) else None)
        check_device(self.device)
        check_compile(self.compile)
        check_precision(self.precision, torch.device(self.device))
        warn_of_slow_precision(self.precision, self.device)
        object.__setattr__(self, "_engine", engine)
        object.__setattr__(self, "_resume", find_resume(self))

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
            train: an `ImageDataset`; or (samples [N, ...], targets [N, ...]); or named tensors {"input_ids": [N, T]};
                or a PyTorch DataLoader, or any iterable of such batches [B, ...], which are the micro-batches: see
                `unlocked.data.LoaderDataset`. NumPy arrays, other number types, a TensorDataset and any indexable
                PyTorch Dataset are converted, with a warning where that changes a type.
            batch_size: rows of a micro-batch; the last of an epoch may be smaller. A loader brings its own.
            eval_data: likewise; uint8 samples without statistics of their own are normalised as those of `train`.
            eval_batch_size: rows of an evaluation micro-batch; default: `batch_size`.
            max_steps: stop after that many training micro-batches.
            steps_per_epoch: batches of a training loader that make an epoch; default: its length.
            drop_last: leave out an epoch's last training micro-batch where it would be smaller, as a DataLoader does.
                A loader is told so itself.

        Returns:
            Figures and final weights. The model that was passed in holds all trained weights as well (under torchrun in
            rank 0's process), so a second `fit` goes on from there.

        Raises:
            ValueError: data, sizes and network don't fit each other.
            StageError: a layer of this process failed, or its loss became non-finite; names stage, layer and action.
            RunFailed, TimeoutError: another process failed, or did not answer; carries its story.
        """
        began = time.perf_counter()
        set_threads(self.threads)
        train_set = as_dataset(
            train, "train", steps_per_epoch=steps_per_epoch, batch_size=batch_size, seed=self.seed, task=self.task
        )
        test_set = None
        if eval_data is not None:
            rows = rows_per_batch(train_set, batch_size) if eval_batch_size is None else eval_batch_size
            given = as_dataset(eval_data, "test", like=train_set, batch_size=rows, task=self.task)
            test_set = read_as_trained(given, train_set)
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
            snapshot_every=self.snapshot_period.steps,
            max_steps=max_steps,
            drop_last=drop_last,
        )
        job = self._job(train_set, test_set, plan)
        kept = KeptModel(self.model, job.network)
        prepared = time.perf_counter() - began
        sinks = FanOut()

        def make_sinks() -> list[MetricsSink]:
            sinks.add(own := self.sinks() if callable(self.sinks) else self.sinks)
            if self._shows_progress(own):
                sinks.add([Dashboard()])
            if self.best_dir is not None:
                sinks.add([BestWeights(self.best_dir, job.plan[job.start].epoch)])
            return [sinks]

        with freed_memory_returned(), sinks, self.library_kernels(), kept_modes(job.network):
            result = self._engine.run(job, make_sinks)
            result.setup_seconds += prepared
            sinks.on_finish(result.figures())
        kept.take(result, describe_kept(self.model, kept, job.network, job.train, describe_rule(self.rule)))
        object.__setattr__(self, "_trained", Trained(job.network, job.train, plan.eval_batch_size, result.is_complete))
        return result

    def explain(self, data: Data, *, batch_size: int | None = None) -> Explanation:
        """Which operations of each layer run in closed form, joined, or through autograd and why; what a step costs.
        Trains nothing, but takes a model to the host; arguments and errors are those of `fit`."""
        set_threads(self.threads)
        train = as_dataset(data, "train", batch_size=batch_size, seed=self.seed, task=self.task)
        rows = rows_per_batch(train, batch_size)
        plan = StreamPlan(epochs=1, train_size=len(train), batch_size=rows, eval_size=0, eval_batch_size=rows)
        job = replace(self, resume=None, lr_factor=constant)._job(train, None, plan)
        with self.library_kernels(), kept_modes(job.network):
            return explain(job, rows)

    @property
    def module(self) -> nn.Module:
        """The network as one plain module, sharing the model's weights: the module that `unlocked.models.split` has
        cut, an nn.Sequential itself, or nn.Sequential(*layers)."""
        return plain_module(self.model)

    def predict(self, samples: Any, *, batch_size: int | None = None) -> Tensor:
        """What the network gives for samples, float32 [N, ...] on the CPU, as an evaluation would compute it: class
        scores (logits) [N, classes], the scores of tokens [N, T, vocabulary], numbers [N, k].

        Args:
            samples: [N, ...], a tensor or array, named tensors, or a dataset (a PyTorch one, too), whose labels have no
                part in it. Float ones and tokens are used as they are; uint8 ones are normalised as those that `fit`
                was given.
            batch_size: rows of a micro-batch; default: as the last `fit` evaluated.

        Raises:
            ValueError: samples that don't fit the network; or this process did not train all of it (under torchrun:
                it is not rank 0).
        """
        data = as_samples(samples, batch_size, self._trained)
        return self._trained_for(data).predict(data, batch_size, self.settings)

    def evaluate(self, data: Data, *, batch_size: int | None = None) -> Evaluation:
        """Loss, accuracies, each class's accuracy and the confusion matrix; of another task its figures.

        Args:
            data: as `fit` takes it; uint8 samples without statistics of their own are normalised as those that `fit`
                was given.
            batch_size: as for `predict`.

        Raises:
            ValueError: as `predict`; or a loss that is not finite.
        """
        rows = rows_asked(batch_size, self._trained)
        test_set = as_dataset(
            data, "test", batch_size=rows, task=self._trained.network.task if self._trained else self.task
        )
        return self._trained_for(test_set).evaluate(test_set, batch_size, self.settings)

    def export(self, path: str | Path) -> None:
        """Writes the network as a graph for torch.export (.pt2) or ONNX (.onnx); see `unlocked.export`.

        Raises:
            ValueError: nothing was trained yet in this process; or as `unlocked.export`.
        """
        if self._trained is None or not self._trained.complete:
            raise ValueError("there is nothing to export before fit(); under torchrun, rank 0 exports")
        self._trained.export(self.module, path)

    def _trained_for(self, data: Dataset) -> Trained:
        """What the last `fit` has left, or the model as it was given."""
        if self._trained is not None:
            return self._trained
        shape, sample = data.image_shape, probe_sample(data)
        network = build_network(
            self.model,
            input_shape=shape,
            num_classes=None,
            seed=self.seed,
            sample=sample,
            learned=learned_from(data, self.task),
            beside=beside_of(data),
        )
        return Trained(network)

    def _shows_progress(self, sinks: Sequence[MetricsSink]) -> bool:
        if self.progress is not None:
            return self.progress
        watched = in_notebook() or bool(getattr(sys.stdout, "isatty", bool)())
        return watched and not any(isinstance(sink, Dashboard) for sink in sinks)

    def _job(self, train_set: Dataset, test_set: Dataset | None, plan: StreamPlan) -> Job:
        check_drop_last(train_set, plan)
        if test_set is None and isinstance(self.lr_factor, ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau needs the test loss, but there is no evaluation; give evaluation data")
        network = build_network(
            self.model,
            input_shape=train_set.image_shape,
            num_classes=train_set.num_classes,
            seed=self.seed,
            redraw=self.redraw,
            sample=probe_sample(train_set),
            learned=learned_from(train_set, self.task),
            beside=beside_of(train_set),
        )
        check_evaluation(train_set, test_set, network.task, network.target)
        learns = (network.task, network.target, network.infos[-1].num_classes, network.blocks[0])
        train_set = ready(train_set, *learns)
        test_set = None if test_set is None else ready(test_set, *learns)
        check_trainable(network, self.rule)
        check_weights(network)
        model = describe_network(network)
        if isinstance(self.rule, str):
            network = whole_network(self.rule, network)
        check_layers(self.optimizer, network.names, network.blocks)
        tried = tried_optimizers(self.optimizer, network)
        network = check_rules(
            network,
            [] if isinstance(self.rule, str) else self.rule,
            output_rule=self.output_rule,
            optimizer=self.optimizer,
            sample=probe_sample(train_set),
        )
        check_batch_statistics(network.batch_statistics, plan)
        fingerprint = fingerprint_of(
            network,
            {
                "rule": describe_rule(self.rule),
                "output_rule": describe_rule(self.output_rule),
                "clip_grad_norm": self.clip_grad_norm,
                "optimizer": by_layer(self.optimizer, tried, describe_optimizer),
                "seed": self.seed,
                "precision": self.precision,
                "model": model,
            },
            (train_set, test_set),
            plan,
        )
        resume = self._resume
        if resume is not None:
            check_resume(resume, fingerprint, plan)
            set_generators(resume.generators, train_set, test_set)
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
                "learning rate": by_layer(self.optimizer, tried, learning_rates),
                "learning-rate schedule": describe_lr_factor(self.lr_factor, plan.epochs),
                "snapshot_every": str(self.snapshot_period),
            },
            run=secrets.token_hex(8) if resume is None else resume.run,
            resume=resume,
            generators=generator_states(train_set, test_set),
            names=self.names or {},
        )
