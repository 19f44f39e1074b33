"""A part of a network: the network's own forward(), in which all modules that are not the part's are passed over.

Nothing of forward() is written again here, so what it does between its layers (masks, positions, caches that are off)
is done as its authors do it. Where the part ends, forward() is left by an exception.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MaskedPart", "Part", "Skeleton", "TokenPart", "accepted", "check_last_tokens"]


class Part(nn.Module):
    """Some of a network's layers: [B, ...] -> the hidden states after its last layer, or what the network gives.

    Args:
        whole: the network as `Skeleton.copy` has made it.
        entrance: what its skipped modules give.
        reads: the name of the argument of `whole` that takes the input.
    """

    def __init__(self, whole: nn.Module, entrance: "Entrance", reads: str) -> None:
        super().__init__()
        self.whole = whole
        self.reads = reads
        self._entrance = entrance
        self._head: str | None = None
        self._padding: int | None = None
        self.check_samples: Callable[[Tensor, Mapping[str, Tensor]], None] | None = None
        """Raises a ValueError for samples, and named tensors beside them, that the network would be given wrongly."""
        names = accepted(whole)
        self._fixed = {"use_cache": False} if "use_cache" in names else {}
        if "return_dict" in names:
            self._fixed["return_dict"] = True

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, {})

    def _run(self, x: Tensor, named: Mapping[str, Tensor | None]) -> Tensor:
        given = {name: value for name, value in named.items() if value is not None}
        self._entrance.hidden = x
        main = {self.reads: x} if self._padding is None else {"input_ids": self._made_up(x, given)}
        try:
            output = self.whole(**main, **given, **self._fixed)
        except _Left as left:
            return left.hidden
        finally:
            self._entrance.hidden = None
        return scores_of(output)

    def find_padding_by(self, token: int) -> None:
        """forward() asks the tokens themselves which of them are padding, `token`, and is told so by the mask: tokens
        are made up, which the embedding's stand-in takes no notice of."""
        self._padding = token

    def _made_up(self, x: Tensor, named: Mapping[str, Tensor]) -> Tensor:
        """Tokens [B, T] for hidden states [B, T, D]."""
        assert self._padding is not None
        tokens = torch.full(x.shape[:2], self._padding + 1, dtype=torch.int64, device=x.device)
        mask = named.get("attention_mask")
        return tokens if mask is None else tokens.masked_fill(mask == 0, self._padding)

    def use_head(self, name: str | None) -> None:
        """`name` is the linear map that ends forward(): `head` and `hidden` are offered."""
        self._head = name

    @property
    def head(self) -> nn.Module | None:
        """The linear map from hidden states to scores that ends forward(), if nothing follows it."""
        return None if self._head is None else self.whole.get_submodule(self._head)

    def hidden(self, x: Tensor, **named: Tensor | None) -> Tensor:
        """What `head` makes the scores of: [B, T, D]."""
        assert self._head is not None, "there is no head alone"
        path, _, name = self._head.rpartition(".")
        owner = self.whole.get_submodule(path)
        head = owner._modules[name]
        assert head is not None
        owner._modules[name] = _Exit(head)
        try:
            return self._run(x, named)
        finally:
            owner._modules[name] = head


class MaskedPart(Part):
    """Of a network that reads tokens: what its layers take beside the hidden states is named as there."""

    def forward(self, x: Tensor, *, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        return self._run(x, {"attention_mask": attention_mask, "position_ids": position_ids})


class TokenPart(Part):
    """The first part of such a network, with the embedding."""

    def forward(
        self,
        x: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        named = {"attention_mask": attention_mask, "position_ids": position_ids, "token_type_ids": token_type_ids}
        return self._run(x, named)


class Skeleton:
    """Where a network's layers stand, and when forward() calls the modules around them.

    Args:
        model: runs whole, once, on `example`.
        layers: the name of the nn.ModuleList of its layers.

    Raises:
        ValueError: forward() does not call every layer once and in order, or weights that a cut can't place.
    """

    def __init__(self, model: nn.Module, layers: str, example: Mapping[str, Tensor]) -> None:
        self.model, self.path = model, layers
        self.layers: list[nn.Module] = list(model.get_submodule(layers).children())
        self._around = dict(_around(model, layers))
        # By module: 0 where forward() calls it before the first layer, k after layer k - 1.
        self._phases: dict[str, set[int]] = {name: set() for name in self._around}
        self._tuples = [False] * len(self.layers)
        self._probe(example)

    def _probe(self, example: Mapping[str, Tensor]) -> None:
        order: list[int] = []
        hooks = [
            module.register_forward_pre_hook(lambda m, inputs, name=name: self._phases[name].add(len(order)))
            for name, module in self._around.items()
        ]
        for number, layer in enumerate(self.layers):

            def done(module: nn.Module, inputs: Any, output: Any, number: int = number) -> None:
                order.append(number)
                self._tuples[number] = isinstance(output, tuple)

            hooks.append(layer.register_forward_hook(done))
        try:
            with torch.no_grad():
                run_whole(self.model, example)
        finally:
            for hook in hooks:
                hook.remove()
        if order != list(range(len(self.layers))):
            raise ValueError(
                f"{type(self.model).__name__} runs its {len(self.layers)} layers {self.path} in the order "
                f"{order}; they can be cut where each is run once and in order"
            )

    def check(self) -> None:
        """Raises: ValueError: weights around the layers that belong to no one part, since forward() uses them in
        several places, or nobody knows where."""
        for name, module in self._around.items():
            sides = self._sides(name)
            if any(True for _ in module.parameters()) and sides and sides not in ({"before"}, {"after"}):
                raise ValueError(
                    f"{type(self.model).__name__} uses {name} ({type(module).__name__}) in several places of its "
                    "forward(), which can't be cut apart; give it as one block"
                )
        for prefix, module in _above(self.model, self.path):
            if direct := [key for key, _ in module.named_parameters(recurse=False)]:
                where = f"{prefix}.{direct[0]}" if prefix else direct[0]
                raise ValueError(
                    f"{type(self.model).__name__} holds the weight {where} beside its layers, and nothing tells which "
                    "of them uses it; give it as one block"
                )

    def around(self, side: str) -> list[str]:
        """The names of the modules that forward() calls "before" the layers, or "after" them."""
        return [name for name in self._around if self._sides(name) == {side}]

    def part(self, begin: int, end: int, last: bool, copies: Collection[str] = ()) -> tuple[nn.Module, "Entrance"]:
        """The network with the layers from `begin` to before `end`; the embedding is the first's, the head the last's.

        Modules of the part, and their weights, are the network's own; others are not in it.

        Args:
            copies: names of modules around the layers of which the part gets a copy of its own.
        """
        entrance = Entrance()
        first = begin == 0
        stubs: list[nn.Module] = []
        for number, layer in enumerate(self.layers):
            if begin <= number < end:
                stubs.append(layer)
            elif number < begin:
                stubs.append(_Skipped(layer, entrance, self._tuples[number]))
            else:
                stubs.append(_Exit(layer))

        def copied(module: nn.Module, prefix: str) -> nn.Module:
            if prefix == self.path:
                return _with_children(module, {str(number): stub for number, stub in enumerate(stubs)})
            if prefix in self._around:
                sides = self._sides(prefix)
                if ("before" in sides and first) or ("after" in sides and last):
                    return copy.deepcopy(module) if prefix in copies else module
                if sides == {"after"}:
                    return _Exit(module)
                return _elsewhere(module, entrance, bool(sides))
            children = {
                name: copied(child, f"{prefix}.{name}" if prefix else name)
                for name, child in module._modules.items()
                if child is not None
            }
            return _with_children(module, children)

        return copied(self.model, ""), entrance

    def _sides(self, name: str) -> set[str]:
        return {_side(phase, len(self.layers)) for phase in self._phases[name]}


class Entrance:
    """Where a part's input waits for the first of its layers."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None


class _Left(Exception):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__("the part ends here")
        self.hidden = hidden


class _Hollow(nn.Module):
    """In the place of a module of another part: has that one's plain attributes and, without values, its weights,
    since forward() may ask for a type or a device."""

    def __init__(self, instead_of: nn.Module) -> None:
        super().__init__()
        plain = (str, int, float, bool, type(None))
        for name, value in vars(instead_of).items():
            if isinstance(value, plain) and name != "training" and not name.startswith("_"):
                self.__dict__[name] = value
        for name, tensor in [*instead_of._parameters.items(), *instead_of._buffers.items()]:
            empty = None if tensor is None else torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            self.register_buffer(name, empty, persistent=False)
        for name, child in instead_of.named_children():
            self.add_module(name, _Hollow(child))


class _Skipped(_Hollow):
    """In the place of an embedding or an earlier layer: gives the part's input, whatever it gets."""

    def __init__(self, instead_of: nn.Module, entrance: Entrance, as_tuple: bool) -> None:
        super().__init__(instead_of)
        self._entrance, self._as_tuple = entrance, as_tuple

    def forward(self, *_: Any, **__: Any) -> Any:
        hidden = self._entrance.hidden
        assert hidden is not None, "a part's skipped module is called from elsewhere"
        return (hidden,) if self._as_tuple else hidden


class _Exit(_Hollow):
    """In the place of the first module after the part: what it gets is the part's output."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        raise _Left(inputs[0] if inputs else named["hidden_states"])


def check_last_tokens(padding: int, tokens: Tensor, named: Mapping[str, Tensor]) -> None:
    """Raises: ValueError: a sequence whose last token is another one by the mask than by the padding."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    mask = named.get("attention_mask")
    by_tokens = (places * (tokens != padding)).argmax(1)
    by_mask = torch.full_like(by_tokens, len(places) - 1) if mask is None else (places * (mask != 0)).argmax(1)
    if differ := (by_tokens != by_mask).nonzero()[:, 0].tolist():
        row = differ[0]
        raise ValueError(
            f"sample {row} ends at token {int(by_tokens[row])} by its padding (pad_token_id {padding}), and at "
            f"{int(by_mask[row])} by {'its attention_mask' if mask is not None else 'the lack of an attention_mask'}, "
            "by which the last block finds it; give an attention_mask that is 0 where tokens are padding, and a "
            "pad_token_id that nothing else has"
        )


def accepted(module: nn.Module) -> frozenset[str]:
    """The names of forward()'s arguments."""
    return frozenset(inspect.signature(module.forward).parameters)


def run_whole(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The scores of the whole network, its caches off."""
    names = accepted(model)
    fixed = {name: value for name, value in (("use_cache", False), ("return_dict", True)) if name in names}
    return scores_of(model(**inputs, **fixed))


def scores_of(output: Any) -> Tensor:
    """What a network's output says of the samples: its logits, or the hidden states of one without a head."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    first = output[0]
    if not isinstance(first, Tensor):
        raise ValueError(f"the network gives a {type(output).__name__}; give one with logits")
    return first


def _side(phase: int, layers: int) -> str:
    return "before" if phase == 0 else "after" if phase == layers else "between"


def _above(model: nn.Module, layers: str) -> Iterable[tuple[str, nn.Module]]:
    """The modules that hold the layers, from the outermost on."""
    parts = layers.split(".")
    for depth in range(len(parts) + 1):
        prefix = ".".join(parts[:depth])
        yield prefix, model.get_submodule(prefix)


def _around(model: nn.Module, layers: str) -> Iterable[tuple[str, nn.Module]]:
    """The outermost modules that neither hold the layers nor lie in them."""
    for prefix, module in _above(model, layers):
        if prefix == layers:
            return
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if path != layers and not layers.startswith(f"{path}."):
                yield path, child


def _with_children(module: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
    """A second module that runs the same code on other children; its buffers are its own."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(vars(module))
    for name, value in vars(module).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
            twin.__dict__[name] = value.copy()
    twin.__dict__["_parameters"] = module._parameters.copy()
    twin.__dict__["_buffers"] = {k: None if b is None else b.clone() for k, b in module._buffers.items()}
    twin.__dict__["_modules"] = {**dict.fromkeys(module._modules), **children}
    return twin


def _elsewhere(module: nn.Module, entrance: Entrance, called: bool) -> nn.Module:
    """What stands for a module around the layers in a part that does not own it."""
    if any(True for _ in module.parameters()) or isinstance(module, nn.Dropout) or not called:
        return _Skipped(module, entrance, False)
    return copy.deepcopy(module)
