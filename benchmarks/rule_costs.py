"""Counts the kernels and the bytes of a training step of every rule whose layers train through autograd.

    python benchmarks/rule_costs.py            # the table of docs/feasibility.md, in a minute on a CPU

Every operation of torch that a step calls is one kernel on a device (views and allocations are none), and moves what it
reads and writes once: caches are left out, as in the cost model. Convolutions and matrix products are kernels like any
other, optimizers one each, as their fused forms are.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unlocked.kernels.dispatch import get_backend
from unlocked.models import get_model
from unlocked.rules import OTHER_RULES
from unlocked.runtime.network import build_layer, build_network
from unlocked.runtime.rule_trial import check_rules
from unlocked.workers.fused import FusedStep, fused_step
from unlocked.workers.pass_layer import PassLayer

_BATCH, _SIDE, _CLASSES = 64, 32, 10
_NO_KERNEL = frozenset(
    (
        *("empty", "empty_like", "empty_strided", "new_empty", "view", "_unsafe_view", "reshape", "flatten", "detach"),
        *(
            "expand",
            "permute",
            "transpose",
            "t",
            "as_strided",
            "alias",
            "slice",
            "select",
            "split",
            "chunk",
            "diagonal",
        ),
        *(
            "unsqueeze",
            "squeeze",
            "split_with_sizes",
            "unfold",
            "lift_fresh",
            "numpy_T",
            "diagonal",
            "_local_scalar_dense",
        ),
    )
)


class Counter(TorchDispatchMode):
    """Kernels and bytes of what is called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1]
        if name not in _NO_KERNEL:
            self.kernels += 1
            self.moved += sum(t.numel() * t.element_size() for t in _tensors((args, kwargs, result)))
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in values for tensor in _tensors(one)]


def count(name: str) -> tuple[list[int], list[float], int]:
    """Kernels and MiB of every layer of SmallConv, and how many of the local ones train in closed form."""
    rule = OTHER_RULES[name]
    network = build_network(
        get_model("SmallConv", num_classes=_CLASSES), input_shape=(3, _SIDE, _SIDE), num_classes=_CLASSES, seed=0
    )
    network = check_rules(network, rule, sample=torch.zeros(3, _SIDE, _SIDE))
    kernels, moved, fused = [], [], 0
    labels = torch.arange(_BATCH) % _CLASSES
    carried: dict[str, Tensor] = {}
    shapes = [network.input_shape, *network.output_shapes]
    last = len(network.blocks) - 1  # which trains on its own loss, fused, whatever the rule
    for index in range(last + 1):
        optimizer = partial(torch.optim.Adam, fused=True)
        common: dict[str, Any] = {"rule": rule, "optimizer": optimizer, "device": torch.device("cpu")}
        chosen = build_layer(network, index, step=fused_step(get_backend("auto", "cpu")), **common)
        fused += index < last and isinstance(chosen.step, FusedStep)
        layer = build_layer(network, index, step=None, **common)
        rows = network.side_channel.rows(index, _BATCH)
        x = torch.randn(rows, *shapes[index]).contiguous()
        for counted in (False, True):  # the first step makes the optimizer's states
            with Counter() as counter:
                if isinstance(layer, PassLayer):
                    layer.begin(0, labels, {n: carried[n] for n in network.side_channel.arriving(index)})
                layer.forward(x)
                if isinstance(layer, PassLayer):
                    sent = layer.carry()
                layer.update(labels)
            if counted:
                kernels.append(counter.kernels)
                moved.append(counter.moved / 2**20)
        if isinstance(layer, PassLayer):
            carried |= sent
    return kernels, moved, fused


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(OTHER_RULES), choices=list(OTHER_RULES))
    print("| rule | layers in closed form | kernels per layer | MiB per layer |")
    print("| --- | ---: | --- | --- |")
    for name in parser.parse_args(arguments).only:
        kernels, moved, fused = count(name)
        shown = "/".join(f"{one:.0f}" for one in moved[:-1])
        print(f"| {name} | {fused} of {len(moved) - 1} | {'/'.join(map(str, kernels[:-1]))} | {shown} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
