"""Ranks that share a GPU, on a stand-in for it: threads in the place of processes, each with a stream of its own."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cuda_stand_in.device import Device
from cuda_stand_in.install import cuda_stand_in
from stand_in_runs import CLASSES, DeviceMomentum, network

from unlocked.rules import LLS
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes.device_links import may_share, pick_device
from unlocked.runtime.engines.processes.links import SharedRefusal, link_stages
from unlocked.runtime.network import Network, build_layer, build_network
from unlocked.runtime.schedules.schedule import stage_actions
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.actions import Item
from unlocked.workers.edges import SlotLayout
from unlocked.workers.loop import StageLoop
from unlocked.workers.stage import Stage
from unlocked.workers.stopwatch import Stopwatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PLAN = StreamPlan(epochs=2, train_size=20, batch_size=3, eval_size=5, eval_batch_size=3, statistics_batches=1)
RANKS = 5


class Source:
    """Data by the item alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def load(self, item: Item, out: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(item.position)
        images = torch.randn(item.size, 1, 6, 6, generator=generator).to(memory_format=torch.channels_last)
        return images.to(self._device), (torch.arange(item.size) % CLASSES).to(self._device)


def made() -> Network:
    return build_network(network(), input_shape=(1, 6, 6), num_classes=CLASSES, seed=0)


def loop_of(rank: int, net: Network, device: torch.device, inbox: Any, outbox: Any) -> StageLoop:
    layer = build_layer(net, rank, rule=LLS(), optimizer=DeviceMomentum, device=device, step=None)
    stage = Stage(rank, [layer], None if rank else Source(device))  # type: ignore[arg-type]
    nothing = partial(lambda item: None)
    return StageLoop(
        stage,
        rank=rank,
        inbox=inbox,
        outbox=outbox,
        snapshot=nothing,
        before_item=nothing,
        after_item=nothing,
        stopwatch=Stopwatch(),
    )


def run_loop(loop: StageLoop) -> Stage:
    items = list(PLAN)
    loop.run(items, stage_actions(loop.stage.index, RANKS, items))
    if loop.outbox is not None:
        loop.outbox.flush()
    return loop.stage


def run_rank(rank: int, store: dist.Store, depth: int, net: Network) -> Stage:
    shapes = net.output_shapes
    with torch.cuda.stream(torch.cuda.Stream()):
        inbox, outbox = link_stages(
            store,
            World(rank, RANKS, rank, RANKS, "127.0.0.1", 0),
            SlotLayout(PLAN.max_rows, shapes[rank - 1]) if rank else None,
            SlotLayout(PLAN.max_rows, shapes[rank]) if rank < RANKS - 1 else None,
            transport="auto",
            depth=depth,
            device=CUDA,
            timeout=60,
            names=[f"stage {k}" for k in range(RANKS)],
        )
        return run_loop(loop_of(rank, net, CUDA, inbox, outbox))


def run_all(depth: int, removed: Sequence[str] = (), *, opens: bool = True) -> tuple[list[Any], Device]:
    """The ranks' stages, or what they raise."""
    nets = [made() for _ in range(RANKS)]  # before there are threads, which share torch's generator
    with cuda_stand_in(removed) as device, ThreadPoolExecutor(RANKS) as pool:
        device.opens = opens
        store = dist.HashStore()
        ranks = [pool.submit(run_rank, rank, store, depth, nets[rank]) for rank in range(RANKS)]
        return [rank.exception() or rank.result() for rank in ranks], device


class Queue:
    """Both ends of an unbounded edge, for stages that run one after the other."""

    def __init__(self, layout: SlotLayout) -> None:
        self._layout, self._slots, self._taken = layout, [], 0  # type: ignore[var-annotated]

    def expect(self, items: Any) -> None: ...

    def receive(self, item: Item) -> Any:
        self._taken += 1
        return self._slots[self._taken - 1]

    def release(self) -> None: ...

    def reserve(self, item: Item) -> Any:
        self._slots.append(self._layout.views(self._layout.allocate(CPU), item.size))
        return self._slots[-1]

    def send(self, item: Item) -> None: ...

    def flush(self) -> None: ...


def plain_stages() -> list[Stage]:
    queues = [None, *(Queue(SlotLayout(PLAN.max_rows, shape)) for shape in made().output_shapes[:-1]), None]
    return [run_loop(loop_of(rank, made(), CPU, queues[rank], queues[rank + 1])) for rank in range(RANKS)]


@pytest.mark.alone
@pytest.mark.parametrize("depth", [1, 2])
def test_five_ranks_on_one_device_compute_what_they_would_alone_and_in_order(depth: int) -> None:
    got, device = run_all(depth)
    assert [one for one in got if not isinstance(one, Stage)] == []
    assert device.order.unordered == []
    assert device.order.checked > 1000
    for stage, expected in zip(got, plain_stages(), strict=True):
        for (name, value), (_, other) in zip(stage.layers[0].tensors(), expected.layers[0].tensors(), strict=True):
            assert bytes(value.numpy()) == bytes(other.numpy()), name

    of_edges = [wait for wait in device.waits if wait.startswith("wait_event")]
    assert {wait.split(":")[1].strip() for wait in of_edges} == {"DeviceInEdge.receive", "DeviceOutEdge.reserve"}
    for wait in of_edges:
        _, without = run_all(depth, [wait])
        assert without.order.unordered != [], wait
    assert not [wait for wait in device.host_waits if "Edge" in wait]


@pytest.mark.alone
def test_where_a_device_shows_nothing_to_other_processes_every_rank_says_so() -> None:
    got, _ = run_all(1, opens=False)
    for error in got:
        assert isinstance(error, SharedRefusal)
        assert "stage 0 can't open the memory of stage 1 (CUDA error: invalid resource handle)" in str(error)
        assert "--engine streams" in str(error)


@pytest.mark.parametrize(
    ("devices", "transport", "shares", "problem"),
    [
        ("AAA", "auto", True, None),
        ("AAA", "shared", True, None),
        ("AAA", "group", False, "'group' takes one rank per GPU (NCCL), but ranks 0, 1, 2 share GPU A; use 'shared'"),
        ("ABC", "auto", False, None),
        ("ABC", "group", False, None),
        ("ABC", "shared", False, "'shared' on CUDA needs all ranks on one GPU, but ranks 0 and 1 are on different"),
        ("AAB", "auto", False, "ranks 0, 1 share GPU A, but ranks 1 and 2 are on different ones"),
        ("ABA", "auto", False, "ranks 0, 2 share GPU A, but ranks 0 and 1 are on different ones"),
        ("A", "shared", False, "'shared' on CUDA needs all ranks on one GPU, but there is one rank"),
    ],
)
def test_the_devices_identity_decides(devices: str, transport: str, shares: bool, problem: str | None) -> None:
    for rank in range(len(devices)):
        store = dist.HashStore()
        for other, name in enumerate(devices):
            if other != rank:
                store.set(f"device-{other}", name)
                store.add("device-count", 1)
        world = World(rank, len(devices), rank, len(devices), "127.0.0.1", 0)
        with cuda_stand_in() as device:
            device.uuid = devices[rank]
            got = may_share(store, world, CUDA, transport, 5.0)
        assert got[0] == shares
        assert got[1] is None if problem is None else problem in str(got[1])


@pytest.mark.parametrize(("count", "rank", "index"), [(1, 0, 0), (1, 4, 0), (8, 4, 4)])
def test_processes_without_a_gpu_of_their_own_share_the_only_one(count: int, rank: int, index: int) -> None:
    with cuda_stand_in() as device:
        device.count = count
        assert pick_device(rank) == torch.device("cuda", index)


def test_among_several_gpus_nobody_guesses() -> None:
    match = r"process 2 .* no GPU of its own \(2 found\).*--device cuda:0"
    with cuda_stand_in(), pytest.raises(ValueError, match=match):
        pick_device(2)
