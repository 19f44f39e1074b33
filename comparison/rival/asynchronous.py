"""Backpropagation without a flush: pipelines in which the next micro-batch enters before the last one has come back.

They have no bubbles either, and pay for it with several versions of the weights and with gradients of older weights
than those that they change. Stage s of S, counted from 0, has at most S - s pieces of work in flight, and alternates
between one forward and one backward pass.

PipeDream (Narayanan et al., "PipeDream: generalized pipeline parallelism for DNN training", SOSP 2019) updates after
every micro-batch. A stage computes forward with its newest weights and keeps them for that micro-batch's backward pass
(weight stashing, without vertical sync):

    w_s(m + 1) = w_s(m) - step of the gradient at (w_0(m - S + 1), ..., w_s(m - S + 1 + s), ..., w_(S-1)(m))

with w(n) = w(0) for n < 0: S - s versions at stage s. PipeDream-2BW (Narayanan et al., "Memory-efficient
pipeline-parallel DNN training", ICML 2021) adds up the gradients of a micro-batch's chunks, at least S of them, all at
weights of one update earlier, on every stage: w(m + 1) = w(m) - step of the gradient at w(m - 1). Two versions.

Where the plan evaluates, the pipeline drains, as PipeDream's own does after an epoch.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unlocked.comparison.request import Form
from unlocked.comparison.rival.pipeline import Clock, chunks_for
from unlocked.comparison.rival.scoring import mean_loss, tally
from unlocked.comparison.rival.weight_versions import WeightVersions
from unlocked.runtime.network import Network
from unlocked.workers.actions import Item
from unlocked.workers.edges import SlotLayout
from unlocked.workers.shared_edges import SharedInEdge, SharedListener, SharedOutEdge
from unlocked.workers.source import BatchSource

__all__ = ["AsynchronousPipeline"]


@dataclass(slots=True)
class _InFlight:
    """A chunk (of PipeDream: a micro-batch) between its forward and its backward pass."""

    item: Item
    """Of as many rows as the chunk has."""
    batch: int
    chunk: int
    version: int
    is_last: bool
    """Of its micro-batch."""
    x: Tensor
    y: Tensor
    """The stage's output; of the last stage its share of the micro-batch's mean loss."""


class AsynchronousPipeline:
    """This process's stage of a network that trains end to end, without a flush. On CPUs.

    The interface is `BpPipeline`'s. Activations, labels and gradients cross by slots in shared memory, as those of the
    local rules' pipeline do: a slot is given back once the backward pass has used it.

    Args:
        schedule: "PipeDream" or "PipeDream-2BW".
        timeout: seconds to wait for a neighbour.
        The others are those of `BpPipeline`.

    Raises:
        ValueError: the form does not fit the schedule; on every process alike.
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
        timeout: float = 1800.0,
    ) -> None:
        self.rank, stages = dist.get_rank(), dist.get_world_size()
        self._is_double_buffered = schedule == "PipeDream-2BW"
        _check(schedule, form, stages, source.batch_size)
        self.network, self.form, self.source, self.clock = network, form, source, clock
        self.is_first, self.is_last = self.rank == 0, self.rank == stages - 1
        self.last_owner = stages - 1
        self._most = stages - self.rank  # in flight
        start, stop = form.parts[self.rank]
        self._layers = range(start, stop)
        module = nn.Sequential(*network.blocks[start:stop])
        if any(p.dim() == 4 for p in module.parameters()):
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.versions = WeightVersions(module.train(), 2 if self._is_double_buffered else self._most)
        self._make_optimizer = optimizer
        self.optimizer = optimizer(self.versions.parameters)
        self._mode: str | None = None
        self._batches = 0
        self._in_flight: deque[_InFlight] = deque()
        self.loss = torch.zeros((), dtype=torch.float64)
        self.scores = torch.zeros(network.num_sums, dtype=torch.float64)
        self._link(timeout)

    def train(self, item: Item) -> None:
        """One micro-batch enters; as many are finished as must be before it, or make room behind it."""
        self._set_mode("train")
        chunks = self._chunks(item.size)
        rows = item.size // chunks
        while self._is_double_buffered and self.versions.newest < self._batches - 1:
            self._backward()  # the version that this micro-batch is for
        self.clock.step = self._batches
        whole = self.clock.timed("data", 0, None, self.source.load, item) if self.is_first else None
        for chunk in range(chunks):
            piece = replace(item, size=rows)
            if whole is None:
                assert self._inbox is not None
                self._inbox.expect([piece])
                x, y = self._inbox.receive(piece)
                x = x.detach().requires_grad_()
            else:
                x, y = (t[chunk * rows : (chunk + 1) * rows] for t in whole)
            self._forward(piece, chunk, chunks, x, y)
            if len(self._in_flight) == self._most:
                self._backward()
        self._batches += 1

    def finish(self) -> None:
        """Everything that is in flight comes back."""
        while self._in_flight:
            self._backward()

    def warm_up(self, items: Sequence[Item]) -> None:
        """Opens connections and chooses kernels: runs the items, then puts weights and optimizer back."""
        module = self.versions.module
        saved = {name: value.clone() for name, value in module.state_dict().items()}
        for item in items:
            self.train(item)
        self.finish()
        module.load_state_dict(saved)
        self.versions.restart()
        self.optimizer, self._mode = self._make_optimizer(self.versions.parameters), None
        self._batches = self.clock.step = 0
        self.loss.zero_()

    @torch.no_grad()
    def infer(self, items: Sequence[Item]) -> None:
        """Forward without an update, as `BpPipeline.infer`, once nothing is in flight."""
        self.finish()
        self._set_mode("eval")
        module = self.versions.module
        module.train(items[0].kind == "statistics")
        for item in items:
            if self._inbox is None:
                x, labels = self.source.load(item)
            else:
                self._inbox.expect([item])
                x, labels = self._inbox.receive(item)
            y = module(x)
            if self._outbox is not None:
                self._hand_on(self._outbox, item, y, labels)
            elif item.kind == "evaluate":
                self.scores += tally(self.network, y, labels)
            if self._inbox is not None:
                self._inbox.release()
        module.train()

    def weights(self) -> dict[str, Tensor]:
        """All stages' weights and buffers as they are evaluated, by layer, on every process."""
        self._set_mode("eval")
        blocks = ((self.network.names[i], self.network.blocks[i]) for i in self._layers)
        mine = {f"{name}.{key}": value.detach() for name, block in blocks for key, value in block.state_dict().items()}
        found: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        return {name: value for part in found for name, value in part.items()}

    def _forward(self, item: Item, chunk: int, chunks: int, x: Tensor, labels: Tensor) -> None:
        version = max(self._batches - 1, 0) if self._is_double_buffered else self.versions.newest
        y = self.clock.timed("forward", self.rank, chunk, self.versions.at(version), x)
        if self._outbox is None:
            y = self.clock.timed("forward", self.rank, chunk, mean_loss, self.network, y, labels) / chunks
            self.loss += y.detach() * item.size * chunks
        else:
            self._hand_on(self._outbox, item, y.detach(), labels)
        self._in_flight.append(_InFlight(item, self._batches, chunk, version, chunk == chunks - 1, x, y))

    def _backward(self) -> None:
        """Of the oldest chunk in flight; with the last one of a micro-batch, the update."""
        work = self._in_flight.popleft()
        self.clock.step = work.batch
        wanted = [*([] if self.is_first else [work.x]), *self.versions.weights(work.version)]
        gradient = None
        if self._grad_inbox is not None:
            self._grad_inbox.expect([work.item])
            gradient, _ = self._grad_inbox.receive(work.item)
        run = torch.autograd.backward
        self.clock.timed("backward", self.rank, work.chunk, run, work.y, gradient, inputs=wanted)
        if self._grad_inbox is not None:
            self._grad_inbox.release()
        if self._grad_outbox is not None:
            assert work.x.grad is not None
            self._hand_on(self._grad_outbox, work.item, work.x.grad, None)
        if self._inbox is not None:
            self._inbox.release()
        if work.is_last:
            self.clock.timed("update", self.rank, None, self._update, work.version)

    def _update(self, version: int) -> None:
        """Of the newest weights, by the gradients that lie at those of `version`."""
        for parameter, own in zip(self.versions.parameters, self.versions.weights(version), strict=True):
            parameter.grad, own.grad = own.grad, None if own is not parameter else own.grad
        self.versions.advance(self.optimizer.step)
        self.optimizer.zero_grad(set_to_none=True)

    def _set_mode(self, mode: str) -> None:
        """A schedule-free optimizer holds its weights at another point for training than for evaluation."""
        if mode != self._mode:
            self._mode = mode
            getattr(self.optimizer, mode, lambda: None)()

    def _chunks(self, rows: int) -> int:
        whole = rows == self.source.batch_size
        return self.form.chunks if whole else chunks_for(rows, self.form.chunks)

    @staticmethod
    def _hand_on(edge: SharedOutEdge, item: Item, values: Tensor, labels: Tensor | None) -> None:
        slot, slot_labels = edge.reserve(item)
        slot.copy_(values)
        if labels is not None:
            slot_labels.copy_(labels)
        edge.send(item)

    def _link(self, timeout: float) -> None:
        """Both edges to each neighbour. Their depths let nobody wait for room while micro-batches are in flight."""
        start, stop = self._layers.start, self._layers.stop
        shapes, rows = self.network.output_shapes, self.source.batch_size
        most_rows = max(rows, self.source.eval_batch_size)
        names = [f"stage {stage}" for stage in range(dist.get_world_size())]
        target = self.network.target
        listeners = {}
        if not self.is_first:
            layout = SlotLayout(most_rows, shapes[start - 1], target=target)
            listeners["forward"] = SharedListener(layout, depth=self._most + 1, timeout=timeout)
        if not self.is_last:
            layout = SlotLayout(rows, shapes[stop - 1])
            listeners["backward"] = SharedListener(layout, depth=self._most, timeout=timeout)
        found: list[dict[str, str]] = [{}] * len(names)
        dist.all_gather_object(found, {kind: listener.address for kind, listener in listeners.items()})

        def reach(kind: str, rank: int, layout: SlotLayout, depth: int) -> SharedOutEdge:
            return SharedOutEdge(layout, found[rank][kind], depth=depth, timeout=timeout, neighbour=names[rank])

        self._inbox: SharedInEdge | None = None
        self._outbox: SharedOutEdge | None = None
        self._grad_inbox: SharedInEdge | None = None
        self._grad_outbox: SharedOutEdge | None = None
        if not self.is_last:
            layout = SlotLayout(most_rows, shapes[stop - 1], target=target)
            self._outbox = reach("forward", self.rank + 1, layout, self._most)
        if not self.is_first:
            self._grad_outbox = reach("backward", self.rank - 1, SlotLayout(rows, shapes[start - 1]), self._most + 1)
        if "forward" in listeners:
            self._inbox = listeners["forward"].accept(names[self.rank - 1])
        if "backward" in listeners:
            self._grad_inbox = listeners["backward"].accept(names[self.rank + 1])


def _check(schedule: str, form: Form, stages: int, batch_size: int) -> None:
    if len(form.parts) != stages:
        raise ValueError(f"{schedule} has one stage per process, {stages} in all, not {len(form.parts)}")
    if schedule == "PipeDream" and form.chunks != 1:
        raise ValueError(f"PipeDream takes whole micro-batches, not {form.chunks} chunks")
    if schedule == "PipeDream-2BW" and form.chunks < stages:
        raise ValueError(f"PipeDream-2BW takes at least as many chunks as stages, {stages}, not {form.chunks}")
    if batch_size % form.chunks:
        raise ValueError(f"{batch_size} rows can't be cut into {form.chunks} equal chunks; give a divisor")
