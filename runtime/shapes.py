"""How a model's blocks follow each other: one sample's shape through all of them, and what each layer has to itself."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from unlocked.kernels.reference import Layout
from unlocked.models import Block, KeyedDropout, keyed_generator
from unlocked.models.errors import first_line
from unlocked.runtime.batch_statistics import PROBE_ROWS, BatchStatistics, find_batch_statistics
from unlocked.runtime.layouts import LayoutWatch
from unlocked.runtime.named_inputs import rows_of
from unlocked.workers.layer import frozen_modules

__all__ = ["ChainShapes", "check_ownership_of_weights", "follow_shapes"]


_Call = tuple[str, nn.Module, tuple[int, ...]]  # a module of a block that was entered, and its input's shape


class ChainShapes(NamedTuple):
    """One sample's shapes of every layer."""

    activations: list[tuple[int, ...]]  # what the layer's rule sees
    outputs: list[tuple[int, ...]]  # what the next layer reads
    layouts: list[Layout | None]  # of the activations, where they have two dimensions and it is known
    batch_statistics: list[BatchStatistics]  # every normalisation by the micro-batch, of all layers


@torch.no_grad()
def follow_shapes(
    blocks: Sequence[Block],
    sample: Tensor,
    seed: int = 0,
    *,
    beside: Mapping[str, Tensor] = MappingProxyType({}),
    needs: Sequence[Sequence[str]] = (),
) -> ChainShapes:
    """Sends micro-batches of copies of `sample` through all blocks, in eval mode.

    Args:
        sample: one sample's input, without the batch dimension.
        seed: keys, layer by layer, what modules draw that learn their shapes at their first call. The global generator
            is left as it was.
        beside: one row [1, ...] of each named tensor of the data.
        needs: of each block, the names of those that it reads.

    Raises:
        ValueError: shapes that don't chain (names both blocks and both shapes), a block that gives anything but one
            float32 tensor [B, ...], or a shape that depends on the batch size.
    """
    modes = [(module, module.training) for block in blocks for module in block.modules()]
    shapes = ChainShapes([], [], [], [])
    inputs = [sample.expand(rows, *sample.shape).clone() for rows in PROBE_ROWS]
    before = "the data"
    layouts = LayoutWatch()
    try:
        for layer, block in enumerate(blocks):
            frozen = frozen_modules(block)
            block.eval()
            with keyed_generator(seed, layer):
                named = [rows_of(beside, needs[layer] if needs else (), len(x)) for x in inputs]
                activations, inputs, calls = _follow(block, inputs, named, before, layouts)
            shapes.activations.append(tuple(activations.shape[1:]))
            shapes.outputs.append(tuple(inputs[0].shape[1:]))
            shapes.layouts.append(layouts.layout_of(activations))
            block.train()
            for module in frozen:
                module.training = False
            shapes.batch_statistics.extend(find_batch_statistics(block.name, calls))
            before = f"layer {block.name}"
    finally:
        for module, training in modes:
            module.training = training
    return shapes


def check_ownership_of_weights(blocks: Sequence[Block]) -> None:
    """Every parameter and buffer belongs to one layer, which updates it alone.

    Raises:
        ValueError: two layers share one; names both, and what is shared.
    """
    owners: dict[object, tuple[Block, str]] = {}
    for block in blocks:
        for key, name in _belongings(block):
            owner, first = owners.setdefault(key, (block, name))
            if owner is not block:
                raise ValueError(
                    f"layers {owner.name} and {block.name} share {first!r} (there called {name!r}); every layer trains "
                    "its weights alone, so give each a module of its own, or put both uses into one layer"
                )


def _belongings(block: Block) -> Iterator[tuple[object, str]]:
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if tensor.numel():
            yield tensor.untyped_storage().data_ptr(), name
    for name, module in block.named_modules():
        if isinstance(module, KeyedDropout):  # it holds its layer's key
            yield id(module), name


def _follow(
    block: Block,
    inputs: Sequence[Tensor],
    named: Sequence[Mapping[str, Tensor]],
    before: str,
    layouts: LayoutWatch,
) -> tuple[Tensor, list[Tensor], list[list[_Call]]]:
    """The activations of the first input, the outputs of all, and which modules each of them entered."""
    activations, outputs, calls = [], [], []
    for x, beside in zip(inputs, named, strict=True):
        with _Watch(block) as watch:
            try:
                with layouts:
                    activations.append(_checked(block.body(x, **beside), block, "activations", len(x)))
                    if block.layout is not None and activations[-1].dim() == 3:
                        layouts.declare(activations[-1], block.layout)
                    outputs.append(_checked(block.tail(activations[-1]), block, "output", len(x)))
            except _Unfit as error:
                raise ValueError(str(error)) from None
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
                watch.explain(error, before, tuple(x.shape[1:]))
            calls.append(watch.calls())
    for what, values in (("activations", activations), ("output", outputs)):
        shapes = [tuple(value.shape[1:]) for value in values]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"layer {block.name} gives {what} of {shapes[0]} per sample in a micro-batch of {PROBE_ROWS[0]} but "
                f"{shapes[1]} in one of {PROBE_ROWS[1]}; a sample's shape must not depend on the batch, since edges "
                "have fixed sizes"
            )
    return activations[0], outputs, calls


class _Unfit(Exception):
    """What a block gives is no output of a layer."""


def _checked(value: Any, block: Block, what: str, rows: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise _Unfit(
            f"layer {block.name} gives a {type(value).__name__} as its {what}; a layer hands one tensor on, so return "
            "the tensor alone (a wrapping module can pick it out)"
        )
    if value.dtype != torch.float32:
        raise _Unfit(f"layer {block.name} gives {value.dtype} as its {what}; it must be torch.float32: use .float()")
    if value.dim() < 2 or len(value) != rows:
        raise _Unfit(
            f"layer {block.name} gives {what} of shape {tuple(value.shape)} for a micro-batch of {rows}; the first "
            "dimension must be the batch and at least one must follow, such as [B, D], [B, C, L], [B, T, D] or "
            "[B, C, H, W]"
        )
    return value


class _Watch:
    """Remembers which module of a block was entered last, and with what: where a failure comes from."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._entered: list[tuple[str, nn.Module, tuple[Any, ...]]] = []
        self._hooks = ExitStack()

    def __enter__(self) -> "_Watch":
        for name, module in self._block.named_modules():
            if name not in ("", "body", "tail") or not list(module.children()):
                handle = module.register_forward_pre_hook(
                    lambda m, inputs, name=name: self._entered.append((name, m, inputs))
                )
                self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def calls(self) -> list[_Call]:
        """The modules with an input tensor, in order, and its shape."""
        return [
            (name, module, tuple(inputs[0].shape))
            for name, module, inputs in self._entered
            if inputs and isinstance(inputs[0], Tensor)
        ]

    def explain(self, error: Exception, before: str, given: tuple[int, ...]) -> NoReturn:
        inner = ""
        if self._entered:
            name, module, inputs = self._entered[-1]
            got = ", ".join(str(tuple(x.shape[1:])) if isinstance(x, Tensor) else type(x).__name__ for x in inputs)
            kind = str(module) if not list(module.children()) else type(module).__name__
            inner = f": its {name.removeprefix('body.')} = {kind} got {got}"
        problem = "a value is out of range" if isinstance(error, IndexError) else "the shapes don't chain"
        raise ValueError(
            f"{problem}: {before} gives {given} per sample, which layer {self._block.name} can't take{inner} "
            f"({first_line(error)})"
        ) from error
