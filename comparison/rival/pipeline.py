"""Backpropagation as a pipeline: torch.distributed.pipelining on this project's networks, data order and optimizers.

The rival at its best: resident data, channels last (also across the processes, without a copy), fused optimizers,
schedules and chunk counts that a trial has chosen. Every process reads the labels by itself, so that activations and
gradients are all that crosses. Random choices are keyed as everywhere: weights start as in every other contender.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from unlocked.comparison.request import Form
from unlocked.comparison.results import SpanKind, TimelineSpan
from unlocked.comparison.rival.scoring import mean_loss, tally
from unlocked.data import epoch_order
from unlocked.runtime.network import Network
from unlocked.workers.actions import Item
from unlocked.workers.source import BatchSource

__all__ = ["BpPipeline", "Clock", "chunks_for", "owner"]

_SINGLE = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}
_MULTI = {"zero-bubble": ScheduleInterleavedZeroBubble, "ZBV": ScheduleZBVZeroBubble}


def owner(stage: int, schedule: str, processes: int) -> int:
    """The process that holds a stage: in a loop, or forth and back for ZBV."""
    if schedule == "ZBV" and stage >= processes:
        return 2 * processes - 1 - stage
    return stage % processes


def chunks_for(rows: int, chunks: int) -> int:
    """Into how many equal chunks of at least two rows a smaller micro-batch is cut: the most up to `chunks`.

    Schedules want equal chunks, and BatchNorm two rows.
    """
    return next((n for n in range(min(chunks, rows), 1, -1) if rows % n == 0 and rows // n > 1), 1)


class Clock:
    """Adds up the seconds of what a process does, by kind.

    Args:
        row: of the process in a timeline; keeps every span as well. None: keeps none.
    """

    def __init__(self, row: int | None = None) -> None:
        self.row = row
        self.step = 0
        self.seconds: dict[str, float] = {}
        self.spans: list[TimelineSpan] = []

    def restart(self) -> None:
        self.seconds.clear()
        self.spans.clear()

    def timed(
        self, kind: SpanKind, stage: int, chunk: int | None, function: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        start = time.perf_counter()
        result = function(*args, **kw)
        end = time.perf_counter()
        self.seconds[kind] = self.seconds.get(kind, 0.0) + end - start
        if self.row is not None:
            span = TimelineSpan(
                row=self.row, stage=stage, kind=kind, microbatch=self.step, chunk=chunk, start=start, end=end
            )
            self.spans.append(span)
        return result

    @property
    def busy(self) -> float:
        return sum(self.seconds.values())


class _TimedStage(PipelineStage):
    """A stage that tells a clock when it computes."""

    clock: Clock

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kw: Any) -> Any:
        run = super().forward_one_chunk
        return self.clock.timed("forward", self.stage_index, fwd_chunk_id, run, fwd_chunk_id, *args, **kw)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kw: Any) -> Any:
        run = super().backward_one_chunk
        return self.clock.timed("backward", self.stage_index, bwd_chunk_id, run, bwd_chunk_id, *args, **kw)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> Any:
        run = super().backward_weight_one_chunk
        return self.clock.timed("weight gradient", self.stage_index, bwd_chunk_id, run, bwd_chunk_id, last_backward)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Gradients in the order of the memory that they are received in: a copy only where a kernel chose another."""
        if self.has_backward and not self.is_first:
            grads = self.bwd_cache[bwd_chunk_id]
            self.bwd_cache[bwd_chunk_id] = tuple(None if g is None else g.contiguous() for g in grads)
        return super().get_bwd_send_ops(bwd_chunk_id)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Without those to this process itself, which Gloo has no connection to: the two stages at the foot of a V."""
        rank = dist.get_rank()
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != rank]

    def perform_reduce_grad(self, *args: Any, **kw: Any) -> Any:
        return self.clock.timed("update", self.stage_index, None, super().perform_reduce_grad, *args, **kw)


class _Boundary(nn.Module):
    """A stage's blocks. Between stages images travel as [B, H, W, C]: what channels-last memory is when contiguous.

    Args:
        first: the input is a micro-batch of images, not another stage's output.
        own_output: the output must own its memory: zero-bubble schedules detach it in place.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, first: bool, own_output: bool) -> None:
        super().__init__()
        self.blocks, self.first, self.own_output = nn.Sequential(*blocks), first, own_output

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and not self.first:
            x = x.permute(0, 3, 1, 2)
        y: Tensor = self.blocks(x)
        if y.dim() != 4:
            return y
        y = y.permute(0, 2, 3, 1)
        return y.clone(memory_format=torch.contiguous_format) if self.own_output else y.contiguous()


class BpPipeline:
    """This process's stages of a network that trains end to end.

    Args:
        network: the same on every process, initialised; its weights are trained in place.
        schedule: the schedule's name, see `contenders.SCHEDULES`.
        form: stages and chunks.
        optimizer: builds this process's optimizer of all its parameters.
        source: micro-batches of both splits.
        clock: of this process.

    Raises:
        ValueError: the schedule refuses the form.
    """

    def __init__(
        self,
        network: Network,
        *,
        schedule: str,
        form: Form,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        source: BatchSource,
        clock: Clock,
    ) -> None:
        self.network, self.schedule, self.form, self.source, self.clock = network, schedule, form, source, clock
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.device = source.device
        self.num_stages = len(form.parts)
        mine = [s for s in range(self.num_stages) if owner(s, schedule, self.processes) == self.rank]
        self.modules = {s: self._module(s) for s in mine}
        self.has_first, self.has_last = 0 in self.modules, self.num_stages - 1 in self.modules
        self.last_owner = owner(self.num_stages - 1, schedule, self.processes)
        self._schedules: dict[int, Any] = {}
        self._order: tuple[int, Tensor] | None = None  # of an epoch
        self.parameters = [p for module in self.modules.values() for p in module.parameters()]
        self._make_optimizer = optimizer
        self.optimizer = optimizer(self.parameters)
        self._mode: str | None = None
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.scores = torch.zeros(network.num_sums, dtype=torch.float64, device=self.device)
        self._schedule(source.batch_size)  # a form that the schedule refuses is refused here

    def train(self, item: Item) -> None:
        """One micro-batch: all chunks forward and backward by the schedule, then the optimizer's step."""
        self._set_mode("train")
        clock = self.clock
        args, target = clock.timed("data", 0, None, self._load, item)
        losses: list[Tensor] = []
        self._schedule(item.size).step(*args, target=target, losses=losses, return_outputs=False)
        clock.timed("update", min(self.modules), None, self._update)
        if self.has_last:
            self.loss += torch.stack(losses).detach().mean() * item.size
        clock.step += 1

    def finish(self) -> None:
        """Nothing is in flight between two micro-batches."""

    def warm_up(self, items: Sequence[Item]) -> None:
        """Opens connections and chooses kernels: runs the items, then puts weights and optimizer back."""
        saved = {s: {k: v.clone() for k, v in m.state_dict().items()} for s, m in self.modules.items()}
        for item in items:
            self.train(item)
        for stage, module in self.modules.items():
            module.load_state_dict(saved[stage])
        self.optimizer, self._mode = self._make_optimizer(self.parameters), None
        self.loss.zero_()
        self.clock.step = 0

    @torch.no_grad()
    def infer(self, items: Sequence[Item]) -> None:
        """Forward without an update, of consecutive items of one kind: `statistics` re-estimates BatchNorm in train
        mode, `evaluate` adds up loss and correct answers. Every stage does all items before the next stage's turn, so
        that processes work side by side."""
        self._set_mode("eval")
        train = items[0].kind == "statistics"
        kept: dict[int, list[Tensor]] = {}
        sends: list[tuple[dist.Work, Tensor]] = []
        for stage, module in sorted(self.modules.items()):
            module.train(train)
            inputs = kept.pop(stage, None)
            outputs = []
            for number, item in enumerate(items):
                if stage == 0:
                    x = self.source.load(item)[0]
                else:
                    x = inputs[number] if inputs is not None else self._receive(stage, item.size)
                y = module(x)
                if stage == self.num_stages - 1:
                    self._score(y, item)
                elif (target := owner(stage + 1, self.schedule, self.processes)) != self.rank:
                    sends.append((cast(dist.Work, dist.isend(y, target, tag=stage + 1)), y))
                else:
                    outputs.append(y)
            if outputs:
                kept[stage + 1] = outputs
            module.train()
        for work, _ in sends:
            work.wait()

    def _receive(self, stage: int, rows: int) -> Tensor:
        shape = self._travelling(self.network.output_shapes[self.form.parts[stage][0] - 1])
        x = torch.empty(rows, *shape, device=self.device)
        dist.recv(x, owner(stage - 1, self.schedule, self.processes), tag=stage)
        return x

    def _score(self, logits: Tensor, item: Item) -> None:
        if item.kind != "evaluate":
            return
        self.scores += tally(self.network, logits, self._labels(item))

    def _load(self, item: Item) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What this process's stages read: images where the first one is, labels where the last one is."""
        if self.has_first:
            images, labels = self.source.load(item)
            return (images,), labels if self.has_last else None
        return (), self._labels(item) if self.has_last else None

    def _labels(self, item: Item) -> Tensor:
        """A micro-batch's labels alone, for a process that doesn't read the images."""
        source = self.source
        if item.kind == "evaluate":
            assert source.test is not None
            return self._as_targets(source.test.labels[item.index * source.eval_batch_size :][: item.size])
        if self._order is None or self._order[0] != item.epoch:
            self._order = item.epoch, epoch_order(len(source.train), source.seed, item.epoch, self.device)
        return self._as_targets(source.train.labels[self._order[1][item.index * source.batch_size :][: item.size]])

    def _as_targets(self, labels: Tensor) -> Tensor:
        """Labels that are stored narrow, as every stage gets them."""
        return labels.to(self.network.target.dtype)

    def _set_mode(self, mode: str) -> None:
        """A schedule-free optimizer holds its weights at another point for training than for evaluation."""
        if mode != self._mode:
            self._mode = mode
            getattr(self.optimizer, mode, lambda: None)()

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _module(self, stage: int) -> _Boundary:
        start, stop = self.form.parts[stage]
        blocks = self.network.blocks[start:stop]
        module = _Boundary(blocks, first=stage == 0, own_output=self.schedule in _MULTI).to(self.device)
        if self.device.type == "cuda" or any(p.dim() == 4 for p in module.parameters()):
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module.train()

    def _schedule(self, rows: int) -> Any:
        """The schedule for micro-batches of that many rows: shapes are fixed in a schedule."""
        if rows not in self._schedules:
            self._schedules[rows] = self._make_schedule(rows)
        return self._schedules[rows]

    def _make_schedule(self, rows: int) -> Any:
        whole = rows == self.source.batch_size
        chunks = self.form.chunks if whole else chunks_for(rows, self.form.chunks)
        if rows % chunks:
            raise ValueError(f"{rows} rows can't be cut into {chunks} equal chunks; give a divisor")
        stages = [self._stage(s, rows // chunks) for s in sorted(self.modules)]
        if self.schedule in _SINGLE:
            kind: Any = _SINGLE[self.schedule]
            if not whole and chunks < self.num_stages:
                kind = ScheduleGPipe  # the last micro-batch of an epoch may be too small for 1F1B
            return kind(stages[0], chunks, loss_fn=self._loss)
        kind = _MULTI[self.schedule]
        if not whole and self.schedule != "ZBV" and chunks % max(1, chunks // self.processes):
            kind = ScheduleLoopedBFS
        return kind(stages, chunks, loss_fn=self._loss)

    def _stage(self, stage: int, rows: int) -> _TimedStage:
        start, stop = self.form.parts[stage]
        shapes = [self.network.input_shape, *self.network.output_shapes]
        shape = self._travelling(shapes[start]) if stage else shapes[start]
        dtype = torch.float32 if stage else self.network.input_dtype
        # Strides, too, as they will come, which some releases compare: of a single channel `contiguous` leaves others.
        layout = torch.channels_last if stage == 0 and len(shape) == 3 else torch.contiguous_format
        inputs = torch.empty(rows, *shape, dtype=dtype, device=self.device, memory_format=layout)
        outputs = torch.empty(rows, *self._travelling(shapes[stop]), device=self.device)
        made = _TimedStage(
            self.modules[stage],
            stage,
            self.num_stages,
            self.device,
            input_args=inputs.requires_grad_(stage > 0),
            output_args=outputs.requires_grad_(),
        )
        made.clock = self.clock
        return made

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        last = self.num_stages - 1
        loss: Tensor = self.clock.timed("forward", last, None, mean_loss, self.network, logits, labels)
        return loss

    @staticmethod
    def _travelling(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[1:], shape[0]) if len(shape) == 3 else shape
