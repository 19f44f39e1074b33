"""What a layer draws from: found before training, by its modules' classes, by the names in its code, and by a trial."""

import warnings
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.models.blocks import Block
from unlocked.models.dropout import KeyedDropout, set_dropout_keys
from unlocked.models.generators import SOURCES, GlobalGenerators
from unlocked.models.named_draws import is_librarys, named_draws

__all__ = ["find_draws", "is_known"]

_KEY = 0x5EED  # of a trial's draws; any
_CPU = torch.device("cpu")


def find_draws(
    block: Block, make_input: Callable[[], Tensor], beside: Mapping[str, Tensor] = MappingProxyType({})
) -> frozenset[str]:
    """The global generators (`unlocked.models.generators.SOURCES`) that the block draws from, or may draw from.

    Blocks of torch's and the project's own modules are known by their classes. Any other is run twice, on copies, in
    training and eval mode, with seeded generators: what moves is drawn from, and what differs nevertheless is refused.

    Args:
        make_input: a micro-batch to try it with, on the CPU.
        beside: the tensors that the block reads beside it, by name.

    Raises:
        ValueError: chance that no key reaches: a generator of the module's own, or one that is seeded by the system.
            Names the layer and the module.
    """
    found: set[str] = set()
    unknown = False
    for name, module in block.named_modules():
        if _draws_by_class(module):
            found.add("torch")
        unknown = unknown or not is_known(module)
        try:
            found |= named_draws(module)
        except ValueError as error:
            raise ValueError(f"layer {block.name}, module {_shown(name, module)}: {error}") from None
    if unknown:
        found |= _try(block, make_input(), beside)
    return frozenset(found)


def is_known(module: nn.Module) -> bool:
    """It is torch's or the project's own, with nothing of the user's in it."""
    plain = is_librarys(type(module)) and not type(module).__module__.startswith(("torch.fx", "torch.jit"))
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return plain and not hooked and "forward" not in vars(module)


def _draws_by_class(module: nn.Module) -> bool:
    """torch's modules that draw in training. Plain dropout is not among them where it was replaced by a keyed one."""
    if isinstance(module, KeyedDropout):
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    return isinstance(module, nn.RReLU | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d)


def _try(block: Block, x: Tensor, beside: Mapping[str, Tensor]) -> frozenset[str]:
    generators = GlobalGenerators(SOURCES, _CPU)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            moved, outputs = _run(block.copy().to(_CPU), x, beside, generators)
            again, others = _run(block.copy().to(_CPU), x, beside, generators)
    except Exception:
        return frozenset({"torch"})  # made-up input need not suit it; if that was not the cause, training will tell
    for (name, module, output), (*_, other) in zip(outputs, others, strict=False):
        if not _equal(output, other):
            raise ValueError(
                f"layer {block.name}, module {_shown(name, module)}: gives other values when it runs a second time "
                "from the same state, on the same input and with equally seeded global generators, so no seed would "
                "make a run repeatable; it draws from a generator of its own or from the system's, or reads "
                "uninitialised memory: draw from torch's global generator"
            )
    return moved | again


def _run(
    block: Block, x: Tensor, beside: Mapping[str, Tensor], generators: GlobalGenerators
) -> tuple[frozenset[str], list[tuple[str, Any, Any]]]:
    """What was drawn from, and what every module gave: (name, module, output), inner ones first."""
    given: list[tuple[str, nn.Module, Any]] = []
    keep = _Keeper()
    for name, module in block.named_modules():
        module.register_forward_hook(lambda m, _, output, name=name: given.append((name, m, keep(output))))
    set_dropout_keys(block, 0, 0, 0)
    training = [(module, module.training) for module in block.modules()]

    def forward() -> Tensor:  # on copies: a block may write into what it is given
        output: Tensor = block(x.clone(), **{name: value.clone() for name, value in beside.items()})
        return output

    with generators.keyed(_KEY):
        before = generators.states()
        with torch.enable_grad():
            output = forward()
            if output.requires_grad:
                output.float().sum().backward()
        block.eval()
        with torch.no_grad():
            forward()
        moved = generators.moved(before)
    for module, mode in training:
        module.training = mode
    return moved, given


class _Keeper:
    """Copies outputs; one that a module hands on from inside as it is shares its copy: of a vocabulary's scores there
    would be one for every module around the head."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def __call__(self, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return [self(value) for value in output] if isinstance(output, tuple | list) else None
        if self._last is not None:
            last, version, copy = self._last
            if last() is output and output._version == version:
                return copy
        kept = output.detach().clone()
        self._last = (weakref.ref(output), output._version, kept)
        return kept


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and ((a == b) | ((a != a) & (b != b))).all()
        return bool(same)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a is None and b is None


def _shown(name: str, module: nn.Module) -> str:
    return f"{name.removeprefix('body.') or 'itself'} ({type(module).__name__})"
