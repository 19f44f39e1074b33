"""The public API: one Trainer for every engine."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from unlocked.data import Dataset
from unlocked.kernels.dispatch import BACKENDS
from unlocked.kernels.precision import check_precision, float32_products
from unlocked.rules import GLOBAL_RULES
from unlocked.runtime.engines import get_engine
from unlocked.runtime.engines.streams.green import GREEN_CONTEXTS
from unlocked.runtime.input import Data, as_dataset, probe_sample, rows_per_batch, with_classes
from unlocked.runtime.job import Job, Settings, check_device
from unlocked.runtime.learning_rate import LearningRate, LrSchedule, ReduceLROnPlateau, constant
from unlocked.runtime.machine import set_threads
from unlocked.runtime.metrics.best import BestWeights
from unlocked.runtime.metrics.sinks import FanOut, MetricsSink
from unlocked.runtime.network import Model, Rules, backpropagation_network, build_network, check_rules
from unlocked.runtime.result import RunResult
from unlocked.runtime.saving.fingerprint import describe_lr_factor, describe_optimizer, describe_rule, learning_rates
from unlocked.runtime.saving.snapshots import find_snapshot
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.runtime.whole import feedback_alignment_network
from unlocked.workers.layer import OptimizerFactory

__all__ = ["Trainer"]


class Trainer:
    """Trains a network whose layers learn by local rules.

    Args:
        model: blocks of `unlocked.models`, an nn.Sequential, or a list of modules; the last one gives the logits. A
            network in one module becomes such a list by `unlocked.models.split`.
        rule: builds each layer's local rule (`LLS(temperature=0.5)`, or a `LocalRule` class), one for all layers, one
            per local layer in order, or a mapping by their names. For comparison, with the sequential engine only:
            "BP" trains end to end by backpropagation, "DFA" by direct feedback alignment.
        optimizer: builds a layer's optimizer from its parameters, e.g. partial(torch.optim.Adam, lr=1e-2).
        engine: "sequential", "streams" or "processes" (under torchrun). All give the same numbers.
        seed: keys initialisation, shuffling, augmentation and dropout.
        stages: number of stages, or an explicit list such as "0-1,2,3-4"; default: one per layer (`streams`) or per
            process (`processes`).
        queue_depth: micro-batches that a stage may run ahead of the next one.
        device: "cpu" or "cuda[:index]".
        kernels: "auto", "torch", "cpp" (CPU), "triton" or "cuda" (GPU).
        precision: "fp32", "tf32" (GPU) or "bf16", with weights, optimizer and statistics in float32 in any case:
            `unlocked.kernels.precision` says what is computed in what.
        graphs: capture CUDA graphs where the engine can.
        graph_ticks: micro-batches of every stage in one CUDA graph; 0: a graph per stage and micro-batch.
        green_contexts: "off", or for the streams engine on a GPU "sms" (each stage is held to its share of the
            multiprocessors) or "queues" (each has work queues of its own).
        compile: run the blocks that train through autograd (all of "BP") by torch.compile; a string names its backend.
        keep_weights: start from the model's weights instead of drawing them by (seed, layer).
        lr_factor: epoch -> factor of the initial learning rate; or `unlocked.ReduceLROnPlateau(...)`, which needs
            the test loss: then the pipeline drains at the end of every epoch.
        statistics_batches: training micro-batches that re-estimate BatchNorm's statistics before each evaluation.
        snapshot_every, snapshot_dir: save a snapshot every so many training micro-batches, below that folder.
        resume: a snapshot folder to go on from; any engine and any number of stages. Rule, optimizer, seed and batch
            sizes must be the run's; the learning rate and `lr_factor` may be others, from there on.
        print_freq: training micro-batches between two readings of the losses.
        trace: file for a Chrome trace of every action.
        transport: how the processes engine moves activations: "auto", "shared" (memory of one machine) or "group"
            (Gloo, NCCL).
        timeout: seconds that a stage waits for a neighbour.
        prefetch: micro-batches that a thread assembles ahead of stage 0 on the host (0: none); by default a few for
            data that is streamed and between processes on a CPU, else none. Numbers never depend on it.
        threads: intra-op threads of each process; default: torch's choice. Equal results need equal counts.
        pin: keep each of a machine's processes on cores of its own (`processes` on a CPU, Linux).
        coordinator_port: where rank 0's coordinator listens; 0: any free port.
        best_dir: keep the weights of the best evaluation here, as `model_best.pt`.
        sinks: receive metrics (`unlocked.runtime.MetricsSink`), or a function that makes them, which is
            called in the process that reports (rank 0's) alone.
        names: how model, dataset and rule are called in logs.

    Raises:
        ValueError: a setting is out of range; says what is valid.
    """

    def __init__(
        self,
        model: Model,
        *,
        rule: Rules | str,
        optimizer: OptimizerFactory,
        engine: str = "sequential",
        seed: int = 0,
        stages: int | str | None = None,
        queue_depth: int = 4,
        device: str = "cpu",
        kernels: str = "auto",
        precision: str = "fp32",
        graphs: bool = True,
        graph_ticks: int = 32,
        green_contexts: str = "off",
        compile: bool | str = False,
        keep_weights: bool = False,
        lr_factor: LrSchedule = constant,
        statistics_batches: int = 50,
        snapshot_every: int = 0,
        snapshot_dir: str | Path | None = None,
        resume: str | Path | None = None,
        print_freq: int = 50,
        trace: str | Path | None = None,
        transport: str = "auto",
        timeout: float = 300.0,
        prefetch: int | None = None,
        threads: int | None = None,
        pin: bool = True,
        coordinator_port: int = 0,
        best_dir: str | Path | None = None,
        sinks: Sequence[MetricsSink] | Callable[[], Sequence[MetricsSink]] = (),
        names: dict[str, str] | None = None,
    ) -> None:
        if isinstance(rule, str) and rule not in GLOBAL_RULES:
            valid = " or ".join(map(repr, GLOBAL_RULES))
            raise ValueError(f"rule {rule!r}: give a rule such as LLS(), or {valid}; names: unlocked.rules.get_rule")
        if isinstance(rule, str) and engine != "sequential":
            raise ValueError(
                f"{rule} is not local: every layer waits for the output's error, so it can't run as a pipeline with "
                f"engine {engine!r}; use engine sequential in one process"
            )
        if kernels not in BACKENDS:
            raise ValueError(f"kernels {kernels!r} is not known; valid: {', '.join(BACKENDS)}")
        if snapshot_every and snapshot_dir is None:
            raise ValueError(f"snapshot_every is {snapshot_every}, but there is no snapshot_dir to write to")
        check_device(device)
        check_precision(precision, torch.device(device))
        _check_green_contexts(green_contexts, engine, torch.device(device))
        get_engine(engine)
        self._model, self._rule, self._optimizer = model, rule, optimizer
        self._keep_weights, self._lr_factor = keep_weights, lr_factor
        self._statistics_batches, self._snapshot_every = statistics_batches, snapshot_every
        self._sinks = sinks if callable(sinks) else partial(tuple, sinks)
        self.settings = Settings(
            engine=engine,
            seed=seed,
            stages=stages,
            queue_depth=queue_depth,
            device=device,
            kernels=kernels,
            precision=precision,
            graphs=graphs,
            graph_ticks=graph_ticks,
            green_contexts=green_contexts,
            compile=compile,
            print_freq=print_freq,
            snapshot_dir=None if snapshot_dir is None else Path(snapshot_dir),
            resume=None if resume is None else find_snapshot(Path(resume)),
            trace=None if trace is None else Path(trace),
            transport=transport,
            timeout=timeout,
            prefetch=prefetch,
            threads=threads,
            pin=pin,
            coordinator_port=coordinator_port,
            best_dir=None if best_dir is None else Path(best_dir),
            names=names or {},
        )

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
    ) -> RunResult:
        """Trains for `epochs`, evaluating after each where there is `eval_data`.

        Args:
            train: an `ImageDataset`; or (samples [N, ...], labels [N] int64); or a PyTorch DataLoader, or any iterable
                of batches (samples [B, ...] float or uint8, labels [B]), whose batches are the micro-batches: see
                `unlocked.data.LoaderDataset`.
            batch_size: rows of a micro-batch; the last of an epoch may be smaller. A loader brings its own.
            eval_batch_size: rows of an evaluation micro-batch; default: `batch_size`.
            max_steps: stop after that many training micro-batches.
            steps_per_epoch: batches of a training loader that make an epoch; default: its length.

        Returns:
            Figures and final weights. The model that was passed in holds the trained weights as well, on the engines
            that run in this process.

        Raises:
            ValueError: data, sizes and network don't fit each other.
            StageError: a layer of this process failed, or its loss became non-finite; names stage, layer and action.
            RunFailed, TimeoutError: another process failed, or did not answer; carries its story.
        """
        began = time.perf_counter()
        set_threads(self.settings.threads)
        train_set = as_dataset(train, "train", steps_per_epoch=steps_per_epoch)
        test_set = None if eval_data is None else as_dataset(eval_data, "test", num_classes=train_set.num_classes)
        job = self._job(train_set, epochs, batch_size, test_set, eval_batch_size, max_steps)
        prepared = time.perf_counter() - began
        sinks = FanOut()

        def make_sinks() -> list[MetricsSink]:
            sinks.add(self._sinks())
            if self.settings.best_dir is not None:
                sinks.add([BestWeights(self.settings.best_dir, job.plan[job.start].epoch)])
            return [sinks]

        with sinks, float32_products(self.settings.precision):
            result = get_engine(self.settings.engine).run(job, make_sinks)
            result.setup_seconds += prepared
            sinks.on_finish(result.figures())
        return result

    def _job(
        self,
        train_set: Dataset,
        epochs: int,
        batch_size: int | None,
        test_set: Dataset | None,
        eval_batch_size: int | None,
        max_steps: int | None,
    ) -> Job:
        batch_size = rows_per_batch(train_set, batch_size)
        if test_set is not None:
            eval_batch_size = rows_per_batch(test_set, eval_batch_size, batch_size)
        if test_set is not None and test_set.image_shape != train_set.image_shape:
            raise ValueError(
                f"evaluation samples have shape {test_set.image_shape}, training samples {train_set.image_shape}; "
                "they must be equal"
            )
        if test_set is None and isinstance(self._lr_factor, ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau needs the test loss, but there is no evaluation; give evaluation data")
        plan = StreamPlan(
            epochs=epochs,
            train_size=len(train_set),
            batch_size=batch_size,
            eval_size=0 if test_set is None else len(test_set),
            eval_batch_size=eval_batch_size or batch_size,
            statistics_batches=self._statistics_batches,
            snapshot_every=self._snapshot_every,
            max_steps=max_steps,
        )
        network = build_network(
            self._model,
            input_shape=train_set.image_shape,
            num_classes=train_set.num_classes,
            seed=self.settings.seed,
            keep_weights=self._keep_weights,
            sample=probe_sample(train_set),
        )
        train_set = with_classes(train_set, network.infos[-1].num_classes)
        test_set = None if test_set is None else with_classes(test_set, network.infos[-1].num_classes)
        parameters = list(network.blocks[-1].parameters())
        if isinstance(self._rule, str):
            whole = {"BP": backpropagation_network, "DFA": feedback_alignment_network}[self._rule]
            network = whole(network)
        else:
            check_rules(network, self._rule)
        fingerprint = {
            "layers": network.names,
            "rule": describe_rule(self._rule),
            "optimizer": describe_optimizer(self._optimizer, parameters),
            "seed": self.settings.seed,
            "precision": self.settings.precision,
            **plan.settings(),
        }
        resume = self.settings.resume
        if resume is not None:
            resume.check(fingerprint)
            if resume.position >= len(plan):
                raise ValueError(
                    f"the snapshot {resume.folder} is at step {resume.steps}, where this run of {epochs} epochs has "
                    "nothing left to do; give more epochs"
                )
        return Job(
            network=network,
            rule=[] if isinstance(self._rule, str) else self._rule,
            optimizer=self._optimizer,
            lr_factor=LearningRate(self._lr_factor, dict(resume.test_losses) if resume else None),
            train=train_set,
            test=test_set,
            plan=plan,
            settings=self.settings,
            fingerprint=fingerprint,
            rates={
                "learning rate": learning_rates(self._optimizer, parameters),
                "learning-rate schedule": describe_lr_factor(self._lr_factor, epochs),
            },
        )


def _check_green_contexts(kind: str, engine: str, device: torch.device) -> None:
    if kind not in GREEN_CONTEXTS:
        raise ValueError(f"green contexts {kind!r} are not known; valid: {', '.join(GREEN_CONTEXTS)}")
    if kind != "off" and (engine != "streams" or device.type != "cuda"):
        raise ValueError(
            f"green contexts {kind!r} are for the streams engine on a CUDA device, not for {engine} on {device}; "
            "leave them off"
        )
