"""What an engine is given: the network, the data, the plan of the stream and the settings; and how a stage is built."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from unlocked.data import Dataset, ImageDataset
from unlocked.kernels.dispatch import get_backend
from unlocked.kernels.images import load_batch as torch_load_batch
from unlocked.kernels.optim import kind_of
from unlocked.kernels.precision import storage_dtype
from unlocked.rules import CrossEntropy, Rule, Views
from unlocked.runtime.costs import measure_costs, measure_layers
from unlocked.runtime.input import make_source
from unlocked.runtime.layer_optimizers import Optimizers, clipped, optimizer_for
from unlocked.runtime.layer_rules import Rules
from unlocked.runtime.learning_rate import LearningRate
from unlocked.runtime.machine import keep_freed_memory
from unlocked.runtime.metrics.records import RunInfo
from unlocked.runtime.metrics.sinks import MetricsSink
from unlocked.runtime.network import Network, build_layer, build_stage
from unlocked.runtime.result import RunResult
from unlocked.runtime.saving.snapshots import Snapshot
from unlocked.runtime.schedules.partition import check_ownership, parse_stages, partition
from unlocked.runtime.schedules.placement import LayerCost
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.runtime.settings import Settings
from unlocked.workers.cargo import make_layout
from unlocked.workers.edges import SlotLayout
from unlocked.workers.fused import choose_step
from unlocked.workers.layer import AutogradStep, Layer
from unlocked.workers.optimizers import build_optimizer
from unlocked.workers.stage import Stage
from unlocked.workers.views import ViewMaker

__all__ = ["Engine", "Job", "SinkMaker", "check_compile", "check_device", "needs_compiler", "prepare_process"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run, the same on every rank."""

    network: Network
    rule: Rules
    optimizer: Optimizers
    lr_factor: LearningRate
    train: Dataset
    test: Dataset | None
    plan: StreamPlan
    settings: Settings
    engine: str
    """What the engine is called in logs and results."""
    fingerprint: Mapping[str, Any]
    """What must not differ when a run is resumed."""
    rates: Mapping[str, Any]
    """The learning rate, its schedule and the period of snapshots: they may be others after a resume, but not on other
    ranks."""
    run: str
    """The run's id, which its snapshots carry; a resumed run keeps it."""
    output_rule: Rule = CrossEntropy
    clip_grad_norm: float | None = None
    """Of each layer's gradients; None: they are taken as they are."""
    resume: Snapshot | None = None
    """Where the run goes on from."""
    generators: Mapping[str, Any] = field(default_factory=dict)
    """Where those stood that loaders may draw from, as the run began; its snapshots carry them."""
    names: Mapping[str, str] = field(default_factory=dict)
    """How the model, the data and the rule are called in logs: keys model, dataset, rule."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.settings.device)

    @property
    def start(self) -> int:
        """The first stream position to run."""
        return self.resume.position if self.resume else 0

    @property
    def storage(self) -> torch.dtype:
        """What activations are stored in between two layers."""
        return storage_dtype(self.settings.precision)

    def segments(self, waits: bool = False) -> Iterator[tuple[int, int]]:
        """The parts of the stream, as (first, stop) positions, between which the pipeline must drain: the whole of it,
        or its epochs where the learning rate of one depends on the test loss of the one before.

        Args:
            waits: a sink is to hear of every epoch before the next one begins.
        """
        if not (waits or self.lr_factor.needs_losses):
            yield self.start, len(self.plan)
            return
        first = self.start
        for epoch in range(self.plan[first].epoch, self.plan.num_epochs):
            end = self.plan.end_of_epoch(epoch)
            yield first, end
            first = end

    def layer(self, index: int, device: torch.device | None = None) -> Layer:
        device = device or self.device
        layer = build_layer(
            self.network,
            index,
            rule=self.rule,
            optimizer=clipped(optimizer_for(self.optimizer, self.network.names[index]), self.clip_grad_norm),
            output_rule=self.output_rule,
            device=device,
            step=choose_step(self.settings.kernels, device),
            precision=self.settings.precision,
        )
        if self.settings.compile and isinstance(layer.step, AutogradStep):
            backend = self.settings.compile if isinstance(self.settings.compile, str) else "inductor"
            layer.block.body.compile(backend=backend, dynamic=False)
        return layer

    def stage(
        self,
        index: int,
        layers: range,
        device: torch.device | None = None,
        *,
        prefetch: int | None = None,
        start: int | None = None,
    ) -> Stage:
        """Stage `index` with its layers on `device`; stage 0 gets the data as well, read ahead by `prefetch` where the
        settings leave that open, from position `start` on (default: the run's first)."""
        device = device or self.device
        one = [self.layer(i, device) for i in layers]
        saved = self.settings.snapshot_dir is not None or self.resume is not None
        if saved or any(isinstance(layer.optimizer, torch.optim.Optimizer) for layer in one):
            prepare_process()
        keep_freed_memory()
        source = None
        if index == 0:
            backend = None if device.type == "cpu" else get_backend(self.settings.kernels, device)
            source = make_source(
                self.train,
                self.test,
                plan=self.plan,
                start=self.start if start is None else start,
                seed=self.settings.seed,
                device=device,
                load_batch=torch_load_batch if backend is None else backend.load_batch,
                prefetch=prefetch if self.settings.prefetch is None else self.settings.prefetch,
                timeout=self.settings.timeout,
            )
        views = self._view_maker(self.network.side_channel.views)
        return build_stage(self.network, index, layers, one, source, views)

    def _view_maker(self, views: Views | None) -> ViewMaker | None:
        if views is None:
            return None
        in_order = isinstance(self.train, ImageDataset) and self.train.classes_per_batch is None
        return ViewMaker(
            views,
            seed=self.settings.seed,
            num_classes=self.network.infos[-1].num_classes,
            train_size=len(self.train) if in_order else None,
            batch_size=self.plan.batch_size,
        )

    def costs(self, device: torch.device | None = None) -> list[float]:
        """Measured seconds per layer and micro-batch."""
        device = device or self.device
        return measure_costs(
            lambda index: self.layer(index, device), self.network, batch_size=self.plan.batch_size, device=device
        )

    def layer_costs(self, device: torch.device | None = None) -> list[LayerCost]:
        """Measured seconds per layer and training micro-batch, and the bytes of what leaves the layer for another
        stage."""
        device = device or self.device
        measured = measure_layers(
            lambda index: self.layer(index, device), self.network, batch_size=self.plan.batch_size, device=device
        )
        sizes = [self.slot_layout(i).nbytes(self.plan.batch_size) for i in range(len(measured) - 1)] + [0]
        pairs = zip(self.network.names, measured, sizes, strict=True)
        return [LayerCost(name, *seconds, size) for name, seconds, size in pairs]

    def slot_layout(self, layer: int) -> SlotLayout:
        """How a micro-batch lies in a slot of the edge that leaves `layer`."""
        traffic = self.network.side_channel.traffic(layer)
        shape = self.network.output_shapes[layer]
        return make_layout(self.plan.max_rows, shape, self.storage, traffic, self.network.target)

    def partition(self, costs: Sequence[float], stages: int | str) -> list[range]:
        """Which layers each stage owns: `stages` of them, balanced by `costs`, or as "0-1,2,3-4" says, whatever they
        cost."""
        parts = parse_stages(stages, self.network.names) if isinstance(stages, str) else partition(list(costs), stages)
        check_ownership(parts, len(self.network.blocks))
        return parts

    def run_info(self, parts: Sequence[range]) -> RunInfo:
        return RunInfo(
            model=self.names.get("model", "custom"),
            dataset=self.names.get("dataset", self.train.name),
            engine=self.engine,
            rule=self.names.get("rule", "custom"),
            stages=tuple(tuple(self.network.names[i] for i in part) for part in parts),
            total=len(self.plan),
            epochs=self.plan.epochs,
            steps_per_epoch=self.plan.steps_per_epoch,
            batch_size=self.plan.batch_size,
            start=self.start,
            device=self.settings.device,
            scored=self.network.scored if self.plan.eval_size else (),
            task=self.network.task.name,
            best=self.network.task.best,
            figures=self.network.figure_names,
            evaluates=self.plan.eval_size > 0,
        )


SinkMaker = Callable[[], Sequence[MetricsSink]]
"""Makes the sinks; called once, in the process that reports."""


class Engine(Protocol):
    """Where the stages run; owns its options."""

    @property
    def name(self) -> str:
        """What logs and results call it."""
        ...

    def check(self, settings: Settings, global_rule: str | None) -> None:
        """Says before anything is built what can't run here.

        Args:
            global_rule: the name of a rule whose layers all wait for the output's error; None: layers learn locally.

        Raises:
            ValueError: the engine, as it is set, can't run that.
        """
        ...

    def run(self, job: Job, make_sinks: SinkMaker) -> RunResult:
        """Runs a job to its end, or to an orderly stop."""
        ...


def check_device(name: str) -> None:
    """Raises a ValueError if there is no such device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is not known; valid: cpu, cuda, cuda:INDEX") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; valid: cpu, cuda, cuda:INDEX")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; use cpu")


def check_compile(backend: bool | str) -> None:
    """Raises a ValueError if torch.compile has no backend of that name."""
    if not isinstance(backend, str):
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"compile {backend!r} is no backend of torch.compile; valid: {', '.join(known)}")


def needs_compiler(job: Job) -> bool:
    """Whether workers are going to import torch's compiler, as far as can be told before any layer is built: for
    snapshots, gradient clipping, or an optimizer that nothing stands in for."""
    if job.settings.snapshot_dir is not None or job.resume is not None or job.clip_grad_norm is not None:
        return True
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    given = job.optimizer
    factories = given.values() if isinstance(given, Mapping) else (given,)
    made = (build_optimizer(factory, parameters) for factory in factories)
    return any(kind_of(optimizer) is None for optimizer in made)


def prepare_process() -> None:
    """What a process does once before it trains with torch's own optimizers; it costs seconds the first time."""
    _warm_up_optimizers()
    keep_freed_memory()


def _warm_up_optimizers() -> None:
    """The first step of any torch optimizer, or its first state, imports torch's compiler: that is set-up."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.SGD([parameter], lr=0.0).step()
