"""What fusing further would bring: the trace of a step with kernels replaced by others, most of them not written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from step_trace import Node, StepTrace
from traced_backend import JOINED

__all__ = ["PLANS", "Plan"]

_LOAD, _FORWARD, _MOMENTS = "load_batch", "convolution forward", "norm_act_forward: reduction"
_BACKWARD, _WEIGHT = "norm_act_backward: pass", "convolution weight gradient"


@dataclass(frozen=True)
class Plan:
    """A change of a step's kernels.

    Attributes:
        name: for the table.
        change: of one stage's nodes.
        bf16: activations in bfloat16.
        joined: of the step with `triton_joined`, whose joined kernels are there.
    """

    name: str
    change: Callable[[Sequence[Node]], list[Node]] = list
    bf16: bool = False
    joined: bool = False

    def apply(self, trace: StepTrace) -> StepTrace:
        return replace(trace, stages=[self.change(stage) for stage in trace.stages])


def with_moments(stage: Sequence[Node]) -> list[Node]:
    """A convolution and the statistics of its output as one product, which adds up what it writes."""
    return _joined(stage, (_FORWARD, _MOMENTS), "convolution with moments", saved=lambda nodes: nodes[1].bytes)


def loaded_product(stage: Sequence[Node]) -> list[Node]:
    """The same of the first layer, which also assembles its input, from which K = 27 values make a pixel. The input is
    written, for the weight gradient, and not read."""
    joined = _joined(
        stage,
        (_LOAD, _FORWARD, _MOMENTS),
        "load, convolution, moments",
        saved=lambda nodes: nodes[2].bytes + _input_bytes(nodes),
    )
    # Products of 27 terms take 32 on tensor cores.
    return [replace(n, flops=n.flops * 32 // 27) if n.name.startswith("load, ") else n for n in joined]


def without_gradient(stage: Sequence[Node]) -> list[Node]:
    """BatchNorm's way back inside of the weight gradient: the gradient at the convolution's output, which is as large,
    is neither written nor read."""
    return _joined(
        stage,
        (_BACKWARD, _WEIGHT),
        JOINED,
        # Written once and read once; the backward pass reads the output once, as the joined kernel does.
        saved=lambda nodes: 2 * (nodes[0].bytes // 2),
    )


def _first(stage: Sequence[Node]) -> list[Node]:
    return loaded_product(stage) if stage[0].name == _LOAD else list(stage)


def _both(stage: Sequence[Node]) -> list[Node]:
    return without_gradient(_first(stage))


def _all(stage: Sequence[Node]) -> list[Node]:
    return without_gradient(loaded_product(stage) if stage[0].name == _LOAD else with_moments(stage))


PLANS = [
    Plan("as it is"),
    Plan("A: load, conv1 and moments as one product", _first),
    Plan("B: BatchNorm backward in the weight gradients", without_gradient),
    Plan("B as built: `triton_joined`", joined=True),
    Plan("A and B", _both),
    Plan("A, and B as built", _first, joined=True),
    Plan("A and B, moments in every convolution", _all),
    Plan("bf16, as it is", bf16=True),
    Plan("bf16, B as built", bf16=True, joined=True),
    Plan("bf16, A and B", _both, bf16=True),
]


def _joined(
    stage: Sequence[Node], names: tuple[str, ...], name: str, saved: Callable[[Sequence[Node]], int]
) -> list[Node]:
    """`stage` with these kernels as one, at the last one's place: `saved` bytes less, all of their operations at the
    rate of the product among them, and as many dependent loads as the one with the most of them, and one."""
    parts = [node for node in stage if node.name in names]
    if [node.name for node in parts] != list(names):
        return list(stage)  # a layer without a convolution
    product = next(node for node in parts if node.kind == "conv")
    node = replace(
        product,
        name=name,
        bytes=sum(n.bytes for n in parts) - saved(parts),
        flops=product.flops,  # all else is done by other units, at the same time
        trips=max(n.trips for n in parts) + 1,
        few_channels=False,
    )
    return [node if n is parts[-1] else n for n in stage if n not in parts[:-1]]


def _input_bytes(nodes: Sequence[Node]) -> int:
    """Of the first layer's assembled input: what the convolution reads beside its output and its few weights."""
    load, convolution, moments = nodes
    return min(convolution.bytes - moments.bytes, load.bytes)
