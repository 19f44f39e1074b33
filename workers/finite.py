"""What of a layer must stay finite, and a look whether it has."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from unlocked.workers.errors import NonFiniteWeightsError

__all__ = ["FiniteState"]


class FiniteState:
    """What is trained, and the buffers that were finite when this was made: a rule's running means and BatchNorm's, but
    not a mask of -inf.

    Args:
        modules: of one layer, by the prefix of their tensors' names.
    """

    def __init__(self, layer: str, modules: Mapping[str, nn.Module]) -> None:
        self._layer, self._modules = layer, modules
        self._exempt = {name for name, value in self._buffers() if not value.is_meta and not _is_finite(value)}

    def check(self, state: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Looks at the modules themselves, or at a copy of their `state_dict`s by prefix. Waits for the device.

        Raises:
            NonFiniteWeightsError: a tensor holds NaN or infinity.
        """
        found = [*self._trained(), *(one for one in self._buffers() if one[0] not in self._exempt)]
        if state is not None:
            split = [(name, *name.split(".", 1)) for name, _ in found]
            found = [(name, state[prefix][own]) for name, prefix, own in split if own in state[prefix]]
        if broken := [name for name, value in found if not _is_finite(value)]:
            raise NonFiniteWeightsError(self._layer, broken)

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in self._modules.items():
            yield from ((f"{prefix}.{name}", p) for name, p in module.named_parameters() if p.requires_grad)

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in self._modules.items():
            yield from ((f"{prefix}.{name}", b) for name, b in module.named_buffers())


def _is_finite(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex()) or bool(value.isfinite().all())
