"""What a step would take on one GPU, from its kernels and a few stated numbers. A prediction, not a measurement."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from step_trace import Node, StepTrace
from traced_backend import JOINED

from unlocked.runtime.schedules.schedule import build_schedule
from unlocked.runtime.schedules.simulate import Costs, simulate
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.actions import ActionKind

__all__ = ["CASES", "H200", "Machine", "Prediction", "floor_us", "node_us", "predict"]

QUEUE_DEPTH = 4  # the Trainer's default
BLOCK_TICKS = 32  # micro-batches in a captured graph of the streams engine
STEPS_PER_EPOCH = 782  # 50 000 images in micro-batches of 64, the last of 16
EPOCHS = 25
_SIMULATED = 300  # micro-batches


@dataclass(frozen=True)
class Machine:
    """The numbers that go into a prediction. Rates in 1/s, times in microseconds."""

    name: str
    bandwidth: float  # bytes/s
    tf32: float  # flop/s
    fp32: float  # flop/s
    multiprocessors: int
    efficiency_tf32: float  # of a convolution or matrix product, of its multiprocessors' rate
    efficiency_fp32: float
    efficiency_few: float  # of the library's convolution of fewer than eight channels, of the fp32 rate
    efficiency_joined: float  # of our weight gradient with BatchNorm's way back inside
    ramp: float  # what a convolution takes besides, however small
    weight_ramp: float  # a weight gradient of the library's
    joined_ramp: float  # ours
    node: float  # from the end of one graph node to the start of the work of the next
    trip: float  # one load that others wait for
    block_gap: float  # between two captured graphs
    tick: float  # a micro-batch that is issued stage by stage, per stage, on the host
    overlap: float  # how many times as much the stages get done side by side as one after the other


# Rates: the vendor's datasheet of the H200 SXM (dense tf32 494 TFLOP/s, fp32 67 TFLOP/s, 132 multiprocessors). Copy,
# the fp32 share, few channels, the joined product, ramps and overlap: fitted to SmallConv's layers on an H200
# (benchmarks/results/kernels_h200_2026-11-29.json, single_gpu_h200_2026-11-29.json). All else is assumed.
H200 = Machine(
    name="H200",
    bandwidth=4.1e12,
    tf32=494e12,
    fp32=67e12,
    multiprocessors=132,
    efficiency_tf32=0.4,
    efficiency_fp32=0.33,
    efficiency_few=0.12,
    efficiency_joined=0.1,
    ramp=3.0,
    weight_ramp=18.0,
    joined_ramp=6.0,
    node=2.0,
    trip=0.6,
    block_gap=8.0,
    tick=15.0,
    overlap=1.6,
)
CASES = {
    "low": replace(
        H200, efficiency_tf32=0.6, efficiency_fp32=0.45, efficiency_few=0.2, efficiency_joined=0.15, ramp=1.5,
        weight_ramp=12.0, joined_ramp=4.0, node=1.5, trip=0.4, block_gap=5.0, tick=10.0, overlap=2.0,
    ),
    "middle": H200,
    "high": replace(
        H200, efficiency_tf32=0.2, efficiency_fp32=0.25, efficiency_few=0.08, efficiency_joined=0.07, ramp=5.0,
        weight_ramp=25.0, joined_ramp=9.0, node=2.5, trip=0.9, block_gap=15.0, tick=25.0, overlap=1.4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """Microseconds per micro-batch and seconds of a whole run."""

    serial: float
    """All nodes one after the other."""
    stages: list[float]
    """Each stage alone."""
    streamed: float
    """The steady state of the pipeline: the simulator's, but not less than `device`, nor than `serial` by what the
    stages gain side by side."""
    device: float
    """The work of all stages at full rates: what no overlap can beat."""
    nodes: int

    def run_seconds(self, machine: Machine, *, streamed: bool) -> float:
        """25 epochs of training, no evaluation: captured blocks, and the micro-batches at each epoch's seam."""
        step, lanes = (self.streamed, len(self.stages)) if streamed else (self.serial, 1)
        blocks = (STEPS_PER_EPOCH - 1 - lanes) // BLOCK_TICKS
        single = STEPS_PER_EPOCH - blocks * BLOCK_TICKS
        seam = single * max(machine.tick * lanes, step)
        return 1e-6 * EPOCHS * (blocks * (BLOCK_TICKS * step + machine.block_gap) + seam)


def floor_us(node: Node, machine: Machine, *, tf32: bool = True) -> float:
    """Bytes at the copy's bandwidth or operations at the datasheet's rate, whichever is longer."""
    return 1e6 * max(node.bytes / machine.bandwidth, node.flops / _rate(node, machine, tf32))


def node_us(node: Node, machine: Machine, *, tf32: bool = True) -> float:
    """Latency, dependent loads, and the longer of bytes and operations on the multiprocessors that the grid fills."""
    share = min(1.0, node.programs / machine.multiprocessors)
    work = node.flops / (_rate(node, machine, tf32) * _efficiency(node, machine, tf32) * share)
    # A multiprocessor alone draws about twice its share of the bandwidth.
    moved = node.bytes / (machine.bandwidth * min(1.0, 2 * share))
    return machine.node + node.trips * machine.trip + _ramp(node, machine) + 1e6 * max(moved, work)


def predict(trace: StepTrace, machine: Machine, *, tf32: bool = True) -> Prediction:
    """See `Prediction`."""
    stages = [sum(node_us(n, machine, tf32=tf32) for n in stage) for stage in trace.stages]
    device = sum(
        1e6 * max(n.bytes / machine.bandwidth, n.flops / (_rate(n, machine, tf32) * _efficiency(n, machine, tf32)))
        for n in trace.nodes
    )
    streamed = sum(stages)
    if len(stages) > 1:
        streamed = max(_steady_state(trace.stages, machine, tf32), device, streamed / machine.overlap)
    return Prediction(sum(stages), stages, streamed, device, len(trace.nodes))


def _steady_state(stages: Sequence[Sequence[Node]], machine: Machine, tf32: bool) -> float:
    """Microseconds per micro-batch of the local schedule, from the simulator."""
    costs = []
    for stage in stages:
        times = {
            kind: sum(node_us(n, machine, tf32=tf32) for n in stage if n.phase == kind.value)
            for kind in (ActionKind.F, ActionKind.U)
        }
        costs.append(times)
    plan = StreamPlan(epochs=1, train_size=_SIMULATED, batch_size=1)
    schedule = build_schedule(len(stages), plan)
    timeline = simulate(schedule, Costs(costs, [0.0] * (len(stages) - 1)), QUEUE_DEPTH, fill_in_place=True)
    return 1 / timeline.throughput


def _rate(node: Node, machine: Machine, tf32: bool) -> float:
    on_tensor_cores = node.kind in ("conv", "matmul") and "depthwise" not in node.name and not node.few_channels
    return machine.tf32 if tf32 and on_tensor_cores else machine.fp32


def _efficiency(node: Node, machine: Machine, tf32: bool) -> float:
    if node.kind not in ("conv", "matmul"):
        return 1.0
    if node.few_channels:
        return machine.efficiency_few
    if node.name == JOINED:
        return machine.efficiency_joined
    return machine.efficiency_tf32 if tf32 else machine.efficiency_fp32


def _ramp(node: Node, machine: Machine) -> float:
    ramps = {
        "convolution forward": machine.ramp,
        "convolution input gradient": machine.ramp,
        "convolution weight gradient": machine.weight_ramp,
        JOINED: machine.joined_ramp,
    }
    return ramps.get(node.name.removeprefix("depthwise "), 0.0)
