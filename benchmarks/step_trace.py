"""Every kernel of a training step, in order, from the real workers run on meta tensors: no device, no arithmetic.

Layers, stages and lanes are the ones that train. Under them stand a backend that answers with empty tensors and notes
the Triton launches that the launch geometries name, an optimizer that notes its launch, and a dispatch mode that notes
every other operation of torch. So a change to the workers changes the count.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from operations import copies_itself, is_free, tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from traced_backend import TracedBackend, TracedOptimizer

from unlocked.kernels.precision import storage_dtype
from unlocked.models import get_model
from unlocked.rules import get_rule
from unlocked.runtime.network import Network, backpropagation_network, build_layer, build_network
from unlocked.runtime.schedules.schedule import stage_actions
from unlocked.workers.actions import Item
from unlocked.workers.fused import FusedStep, fused_step
from unlocked.workers.lane import Lane
from unlocked.workers.ring import Ring
from unlocked.workers.source import BatchSource
from unlocked.workers.stage import Stage
from unlocked.workers.stopwatch import Stopwatch

__all__ = ["Node", "StepTrace", "trace_backpropagation", "trace_local"]

META = torch.device("meta")
IMAGE = (3, 32, 32)
CLASSES = 10


@dataclass(frozen=True)
class Node:
    """One kernel of a step.

    Attributes:
        layer: the layer's name ("network" for backpropagation).
        phase: "F" or "U".
        name: the kernel or the library's operation.
        kind: "fused" (ours), "conv" or "matmul" (cuDNN, cuBLAS), "torch" (any other kernel of PyTorch).
        bytes: each input read once and each output written once.
        flops: multiply and add count as two.
        programs: independent blocks of work, so how many multiprocessors it can use.
        trips: loads that depend on each other, plus the reductions across programs.
        few_channels: a library's convolution whose input has fewer than eight channels: not on tensor cores. (Of four
            it took an H200 as long as of three.)
    """

    layer: str
    phase: str
    name: str
    kind: str
    bytes: int
    flops: int
    programs: int
    trips: int = 1
    few_channels: bool = False


@dataclass(frozen=True)
class StepTrace:
    """The nodes of one training step, per stage in the order of its stream."""

    model: str
    rule: str
    batch: int
    stages: list[list[Node]]
    fused: list[bool]
    """Per stage: whether the closed form runs (False: autograd)."""

    @property
    def nodes(self) -> list[Node]:
        return [node for stage in self.stages for node in stage]


def trace_local(
    model: str,
    batch: int,
    rule: str = "LLS",
    *,
    one_stage: bool = False,
    precision: str = "fp32",
    joined: bool = False,
    **model_options: Any,
) -> StepTrace:
    """One step of every layer, each in a stage of its own as the streams engine has it, or all in one stage.

    `precision` "bf16" counts bytes of bfloat16 activations; "fp32" is also what tf32 moves. `joined`: by the backend
    `triton_joined`.
    """
    network = _network(model, model_options)
    groups = [range(len(network.blocks))] if one_stage else [range(i, i + 1) for i in range(len(network.blocks))]
    return _trace(model, rule, _rule(rule), network, batch, groups, precision, joined=joined)


def trace_backpropagation(model: str, batch: int, **model_options: Any) -> StepTrace:
    """One step of end-to-end backpropagation, as the "BP graph" of single_gpu.py runs it."""
    network = backpropagation_network(_network(model, model_options))
    return _trace(model, "BP", _rule("LLS"), network, batch, [range(1)])


def _network(model: str, options: dict[str, Any]) -> Network:
    channels, *sides = IMAGE
    channels = options.pop("in_channels", channels)
    blocks = get_model(model, in_channels=channels, num_classes=CLASSES, image_size=sides[0], **options)
    return build_network(blocks, input_shape=(channels, *sides), num_classes=CLASSES, seed=0)


def _rule(name: str) -> Any:
    return get_rule(name, temperature=0.5, label_smoothing=0.0, waveform="cosine")


def _trace(
    model: str, rule: str, built: Any, network: Network, batch: int, groups: Sequence[range], precision: str = "fp32",
    *, joined: bool = False,
) -> StepTrace:  # fmt: skip
    recorder = _Recorder()
    layers = [
        build_layer(
            network,
            index,
            rule=built,
            optimizer=lambda owned: TracedOptimizer(owned, recorder),  # type: ignore[arg-type,return-value]
            device=META,
            step=fused_step(TracedBackend(recorder, joined=joined)),  # type: ignore[arg-type]
            precision=precision,
        )
        for index in range(len(network.blocks))
    ]
    rings = [_ring(network, group, batch, storage_dtype(precision)) for group in groups]
    stages, item = [], Item(0, "train", 0, 0, batch, False)
    for k, group in enumerate(groups):
        source = _Source(recorder) if k == 0 else None
        stage = Stage(k, [layers[i] for i in group], source)
        lane = Lane(
            stage,
            rings[k],
            rings[k + 1] if k + 1 < len(rings) else None,
            None,
            snapshot=_nothing,
            before_item=_nothing,
            after_item=_nothing,
            stopwatch=Stopwatch(),
            find_item=lambda _: item,
        )
        lane.cursor_stays = True
        lane.stamp = lambda _, what, __: recorder.mark(what)
        recorder.begin(network.names[group.start] if len(group) == 1 else "network")
        with recorder:
            lane.work(item, stage_actions(k, len(groups), [item]))
        stages.append(recorder.nodes)
    fused = [isinstance(layer.step, FusedStep) for layer in layers]
    return StepTrace(model, rule, batch, stages, fused)


def _nothing(item: Item) -> None:
    pass


def _ring(network: Network, group: range, batch: int, dtype: torch.dtype) -> Ring:
    shape = network.output_shapes[group.start - 1] if group.start else network.input_shape
    flat = len(network.infos[group.start].activation_shape) == 1
    return Ring(2, batch, shape, META, flat_consumer=flat and group.start > 0, dtype=dtype)


class _Recorder(TorchDispatchMode):
    """Notes the operations that launch kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self._layer, self._phase, self._silent = "", "F", False

    def begin(self, layer: str) -> None:
        self.nodes, self._layer, self._phase = [], layer, "F"

    def mark(self, what: str) -> None:
        self._phase = "U" if what in ("U", "end") else "F"

    def add(
        self,
        name: str,
        kind: str,
        num_bytes: int,
        flops: int,
        programs: int,
        trips: int = 1,
        few_channels: bool = False,
    ) -> None:
        self.nodes.append(Node(self._layer, self._phase, name, kind, num_bytes, flops, programs, trips, few_channels))

    @contextmanager
    def silence(self) -> Iterator[None]:
        self._silent = True
        yield
        self._silent = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten.convolution.default and args[0].is_contiguous(memory_format=torch.channels_last):
            out = out.contiguous(memory_format=torch.channels_last)  # as on a device; on meta it loses the layout
        if not self._silent and not is_free(func) and not copies_itself(func, args):
            self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        inputs, outputs = list(tensors((args, kwargs))), list(tensors(out))
        moved = sum(t.numel() * t.element_size() for t in inputs + outputs)
        values = max((t.numel() for t in inputs + outputs), default=1)
        packet = func._overloadpacket
        if name == "convolution":
            self._convolution(packet, args, kwargs, out, moved)
        elif name == "convolution_backward":
            self._convolution_backward(args)
        elif packet in flop_registry:
            flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
            rows, columns = outputs[0].shape[-2:]
            self.add(name, "matmul", moved, flops, _divide_up(rows, 64) * _divide_up(columns, 64), 2)
        elif name.startswith("native_batch_norm"):
            # Statistics (or sums), then one pass: two kernels that both read the large tensor.
            self.add(f"{name} 1", "torch", moved // 2, 4 * values, 132, 2)
            self.add(f"{name} 2", "torch", moved, 6 * values, _divide_up(values, 1024), 1)
        else:
            self.add(name, "torch", moved, values, _divide_up(values, 1024), 1)

    def _convolution(self, packet: Any, args: Any, kwargs: Any, out: Tensor, moved: int) -> None:
        bias = args[2]
        flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
        pixels = out.numel() // out.shape[1]
        programs = _divide_up(pixels, 64) * _divide_up(out.shape[1], 64)
        self.add(_conv_name("forward", args[8]), "conv", moved, flops, programs, 2, _few_channels(args[0], args[8]))
        if bias is not None:
            self.add("convolution's bias", "torch", 8 * out.numel(), out.numel(), _divide_up(out.numel(), 1024), 1)

    def _convolution_backward(self, args: Any) -> None:
        grad, x, weight = args[:3]
        groups, mask = args[9], args[10]
        sizes = [t.numel() * t.element_size() for t in (grad, x, weight)]
        flops = 2 * grad.numel() * weight[0].numel()
        if mask[0]:
            pixels = x.numel() // x.shape[1]
            programs = _divide_up(pixels, 64) * _divide_up(x.shape[1], 64)
            self.add(_conv_name("input gradient", groups), "conv", sum(sizes), flops, programs, 2)
        if mask[1]:
            # The sum over pixels is long: split over the chip, then added up by a second kernel.
            self.add(_conv_name("weight gradient", groups), "conv", sum(sizes), flops, 132, 2, _few_channels(x, groups))
            self.add(_conv_name("weight gradient's sum", groups), "conv", 8 * sizes[2], 8 * weight.numel(), 64, 1)
        if mask[2]:
            self.add("convolution's bias gradient", "torch", sizes[0], grad.numel(), 132, 2)


class _Source(BatchSource):
    """The dataset of stage 0."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def load_at_cursor(
        self, item: Item, out: tuple[Tensor, Tensor] | None = None, ahead: int = 0
    ) -> tuple[Tensor, Tensor]:
        assert out is not None
        values = out[0].numel()
        moved = (1 + out[0].element_size()) * values + 24 * item.size
        self._recorder.add("load_batch", "fused", moved, 60 * values, _divide_up(values, 1024), 4)
        return out


def _conv_name(what: str, groups: int) -> str:
    return f"{'depthwise ' if groups > 1 else ''}convolution {what}"


def _few_channels(x: Tensor, groups: int) -> bool:
    return groups == 1 and x.shape[1] < 8


def _divide_up(number: int, divisor: int) -> int:
    return -(-number // divisor)
