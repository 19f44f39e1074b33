"""Start values that depend on (seed, layer) alone, not on what was made before or on the caller's generator."""

import contextlib
import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn

from unlocked.kernels.philox import Purpose, philox_int
from unlocked.models.blocks import Block, Origin
from unlocked.models.generators import SOURCES, GlobalGenerators

__all__ = ["draw_by_layer", "initialise", "key_start_values", "keyed_generator"]


def draw_by_layer(makers: Iterable[Callable[[], Block]], seed: int, origin: Origin) -> list[Block]:
    """The blocks of `origin` that `makers` make, in order, each with its start values drawn by (seed, place)."""
    blocks = []
    for layer, make in enumerate(makers):
        with keyed_generator(seed, layer):
            block = make()
        block.start_key = (seed, layer)
        block.origin = origin
        blocks.append(block)
    return blocks


def initialise(block: nn.Module, seed: int, layer: int) -> None:
    """Draws every parameter anew, in place, by `reset_parameters` of its module or a module around it.

    The name is torch's; some of its modules (nn.MultiheadAttention, nn.Transformer) call it `_reset_parameters`. As in
    their constructors, a module's own comes after those of its children. The draws are made on the CPU, in logical
    order, under a generator of their own: the same weights on every device and in every memory format, and the global
    random states are left as they were.

    Raises:
        ValueError: parameters that no such method sets (names them and their module). Nothing is changed then.
    """
    # A copy, because reset_parameters fills a tensor in the order of its memory, from its device's generator.
    fresh = copy.deepcopy(block).to("cpu")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.data = parameter.data.contiguous()
            parameter.fill_(float("nan"))  # what is still so afterwards was not drawn
        with keyed_generator(seed, layer):
            _reset(fresh, set())
        _refuse_what_is_left(fresh)
        block.load_state_dict(fresh.state_dict())


def key_start_values(block: Block, seed: int, layer: int) -> None:
    """Draws a block of the project's own networks by (seed, layer), if nobody has set its weights since it was made.

    What the network drew them by is the block's `start_key`. Any other block, and one that was loaded, trained or
    changed, keeps its weights.
    """
    key = block.start_key
    if key is None or key == (seed, layer):
        return
    first = copy.deepcopy(block)
    try:
        initialise(first, *key)
    except ValueError:
        return  # somebody put other modules into it
    pairs = zip(block.state_dict().values(), first.state_dict().values(), strict=True)
    if all(torch.equal(now, then) for now, then in pairs):
        initialise(block, seed, layer)
        block.start_key = (seed, layer)


def keyed_generator(seed: int, layer: int) -> contextlib.AbstractContextManager[None]:
    """Inside, the process's global generators draw start values by (seed, layer); they are put back afterwards.

    On the CPU alone: torch.manual_seed would seed every accelerator too.
    """
    return GlobalGenerators(SOURCES, torch.device("cpu")).keyed(philox_int(seed, Purpose.INIT, layer))


def _reset(module: nn.Module, done: set[nn.Module]) -> None:
    for child in module.children():
        if child not in done:
            _reset(child, done)
    done.add(module)
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset):
        reset()


def _refuse_what_is_left(block: nn.Module) -> None:
    for prefix, module in block.named_modules():
        left = [name for name, value in module.named_parameters(recurse=False) if value.isnan().any()]
        if left:
            name, where = getattr(block, "name", type(block).__name__), prefix.removeprefix("body.") or "itself"
            raise ValueError(
                f"layer {name} can't be drawn anew: no reset_parameters() sets {', '.join(left)} of its "
                f"{type(module).__name__} ({where}); give that module one, or keep the weights that the model was given"
            )
