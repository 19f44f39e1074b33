"""What a process of backpropagation's pipeline does with a request: trains, or tries forms; and what layers cost."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from math import isfinite
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from unlocked.comparison.contenders import ASYNCHRONOUS
from unlocked.comparison.meter import Meter, reset_peak_memory
from unlocked.comparison.networks import network_of
from unlocked.comparison.request import Form, RankAnswer, Request, load_data
from unlocked.comparison.results import EpochFigures, Trial
from unlocked.comparison.rival.asynchronous import AsynchronousPipeline
from unlocked.comparison.rival.pipeline import BpPipeline, Clock
from unlocked.data import ImageDataset
from unlocked.kernels.images import load_batch
from unlocked.kernels.precision import float32_products
from unlocked.runtime.job import prepare_process
from unlocked.runtime.machine import peak_memory_bytes
from unlocked.runtime.network import Network
from unlocked.runtime.recipe import make_optimizer
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.runtime.tensors import weights_digest
from unlocked.workers.actions import Item
from unlocked.workers.source import BatchSource

__all__ = ["backpropagation_costs", "train_pipeline", "try_forms"]

_TURNS = 2  # of every form that is tried
_INFER_ITEMS = 8  # that a stage infers before the next stage's turn


def train_pipeline(request: Request) -> RankAnswer:
    """Trains as the recipe says; the counterpart of an engine's run."""
    with _process_group(request) as device:
        train, test = load_data(request.data)
        base_memory = reset_peak_memory(device)
        began = time.perf_counter()
        prepare_process()
        assert request.form is not None
        plan = request.recipe.plan(train, test)
        clock = Clock(dist.get_rank() if request.timeline else None)
        network = network_of(request.recipe, train)
        pipeline = _pipeline(request, request.form, network, _source(request, train, test, device), clock)
        pipeline.warm_up(_one_of_each_size(plan))
        meter = Meter(device)
        dist.barrier()
        setup = time.perf_counter() - began
        clock.restart()
        meter.begin()
        began = time.perf_counter()
        epochs, images = _follow(plan, pipeline, network, began)
        pipeline.finish()
        _synchronize(device)
        seconds = time.perf_counter() - began
        busy: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(busy, clock.busy / seconds)
        weights = pipeline.weights() if isinstance(pipeline, AsynchronousPipeline) else None
        names = network.names
        return RankAnswer(
            steps=plan.train_steps,
            images=images,
            train_seconds=seconds,
            setup_seconds=setup,
            data_seconds=clock.seconds.get("data", 0.0),
            update_seconds=clock.seconds.get("update", 0.0),
            busy=tuple(busy) if device.type == "cpu" else None,
            is_split=device.type == "cpu",
            peak_memory_bytes=peak_memory_bytes(device),
            base_memory_bytes=base_memory,
            energy_joules=meter.energy_joules(),
            weights_sha256=None if weights is None else weights_digest(weights.items()),
            stages=tuple(tuple(names[start:stop]) for start, stop in request.form.parts),
            epochs=tuple(epochs),
            spans=tuple(clock.spans),
        )


def try_forms(request: Request) -> RankAnswer:
    """Trains `max_steps` micro-batches in every form, in turns, of which the fastest counts. A form that is refused
    says why."""
    with _process_group(request) as device:
        train, test = load_data(request.data)
        prepare_process()
        source = _source(request, train, test, device)
        plan = request.recipe.plan(train, test)
        steps = [item for item in plan if item.kind == "train" and item.size == plan.batch_size]
        pipelines: dict[Form, BpPipeline | AsynchronousPipeline] = {}
        reasons: dict[Form, str] = {}
        for form in request.forms:
            try:
                pipelines[form] = _pipeline(request, form, network_of(request.recipe, train), source, Clock())
            except ValueError as error:  # raised alike on every process, before anything was sent
                reasons[form] = " ".join(str(error).split())
            else:
                pipelines[form].warm_up(steps[:1] * 2)
        rates: dict[Form, float] = {}
        for _ in range(_TURNS):
            for form, pipeline in pipelines.items():
                dist.barrier()
                began = time.perf_counter()
                for item in steps:
                    pipeline.train(item)
                pipeline.finish()
                dist.barrier()
                rate = sum(item.size for item in steps) / (time.perf_counter() - began)
                rates[form] = max(rate, rates.get(form, 0.0))
        names = network_of(request.recipe, train).names
        return RankAnswer(
            trials=tuple(
                Trial(
                    chunks=form.chunks,
                    stages=tuple(tuple(names[start:stop]) for start, stop in form.parts),
                    images_per_second=rates.get(form),
                    reason=reasons.get(form),
                )
                for form in request.forms
            )
        )


def backpropagation_costs(
    network: Network, optimizer: Callable[[Any], Any], batch_size: int, device: torch.device, repeats: int = 5
) -> tuple[float, ...]:
    """Seconds of every layer's forward, backward (with the input's gradient, save the first's) and update: medians."""
    x = torch.randn(batch_size, *network.input_shape, device=device)
    if not network.input_dtype.is_floating_point:
        x = torch.zeros_like(x, dtype=network.input_dtype)  # a token that every vocabulary has
    costs = []
    for index, block in enumerate(network.blocks):
        block.to(device).train()
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
            block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        parameters = list(block.parameters())
        own = optimizer(parameters) if parameters else None
        x = x.detach().requires_grad_(index > 0)  # tokens have no gradient, nor does the first layer's input
        times = []
        for _ in range(repeats + 2):
            _synchronize(device)
            began = time.perf_counter()
            y = block(x)
            y.backward(torch.ones_like(y))
            if own is not None:
                own.step()
                own.zero_grad(set_to_none=True)
            x.grad = None
            _synchronize(device)
            times.append(time.perf_counter() - began)
        costs.append(median(times[2:]))
        x = y.detach()
    return tuple(costs)


@contextmanager
def _process_group(request: Request) -> Iterator[torch.device]:
    """Joins the contender's processes; the device of this one."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = request.recipe.device.startswith("cuda")
    if os.path.exists("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all processes run on this machine
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=request.timeout),
    )
    with float32_products(request.recipe.precision):
        yield device
    dist.destroy_process_group()  # not after a failure: the others would be waited for


def _source(request: Request, train: ImageDataset, test: ImageDataset, device: torch.device) -> BatchSource:
    """Resident micro-batches, as every other contender reads them."""
    return BatchSource(
        train.to(device),
        test.to(device),
        seed=request.recipe.seed,
        batch_size=request.recipe.batch_size,
        eval_batch_size=request.recipe.test_batch_size,
        load_batch=load_batch,
    )


def _pipeline(
    request: Request, form: Form, network: Network, source: BatchSource, clock: Clock
) -> BpPipeline | AsynchronousPipeline:
    optimizer = make_optimizer(request.recipe)
    schedule = request.spec.engine_name
    if schedule in ASYNCHRONOUS:
        return AsynchronousPipeline(
            network,
            schedule=schedule,
            form=form,
            optimizer=optimizer,
            source=source,
            clock=clock,
            timeout=request.timeout,
        )
    return BpPipeline(network, schedule=schedule, form=form, optimizer=optimizer, source=source, clock=clock)


def _one_of_each_size(plan: StreamPlan) -> list[Item]:
    """A training micro-batch of every number of rows that occurs, twice: the second is an ordinary one."""
    sizes: dict[int, Item] = {}
    for item in plan.items(0, min(len(plan), plan.steps_per_epoch)):
        if item.kind == "train":
            sizes.setdefault(item.size, item)
    return [item for item in sizes.values() for _ in range(2)]


def _follow(
    plan: StreamPlan, pipeline: BpPipeline | AsynchronousPipeline, network: Network, began: float
) -> tuple[list[EpochFigures], int]:
    """Runs the whole stream; the evaluated epochs (without evaluation the last one), and the training images."""
    epochs: list[EpochFigures] = []
    images = 0
    for (kind, epoch), group in groupby(plan, key=lambda item: (item.kind, item.epoch)):
        items = list(group)
        if kind == "train":
            pipeline.loss.zero_()
            for item in items:
                pipeline.train(item)
            trained = sum(item.size for item in items)
            images += trained
        else:
            for start in range(0, len(items), _INFER_ITEMS):
                pipeline.infer(items[start : start + _INFER_ITEMS])
        if kind == "evaluate" or (not plan.eval_size and epoch == plan.num_epochs - 1):
            loss, *sums = _sums_of_last_stage(pipeline)
            for what, found in (("loss", loss), ("test loss", sums[0])):
                if not isfinite(found):
                    raise ValueError(f"the {what} of epoch {epoch} is {found}; lower --lr, and check the input data")
            figures = network.task.read(sums, plan.eval_size, network.sums)
            epochs.append(
                EpochFigures(
                    epoch=epoch,
                    seconds=time.perf_counter() - began,
                    train_loss=loss / trained,
                    test_loss=figures.loss if plan.eval_size else None,
                    test_acc1=figures.acc1 if plan.eval_size else None,
                )
            )
            pipeline.scores.zero_()
    return epochs, images


def _sums_of_last_stage(pipeline: BpPipeline | AsynchronousPipeline) -> list[float]:
    """Training loss, summed over samples, and an evaluation's sums: known to the last stage's process, told to all."""
    sums = torch.cat([pipeline.loss[None], pipeline.scores])
    dist.broadcast(sums, pipeline.last_owner)
    values: list[float] = sums.tolist()
    return values


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
