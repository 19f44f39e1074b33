"""Which functions that draw random numbers does somebody's code name? Read from bytecode, nothing is run.

A trial of a layer sees what it draws; what it would draw for other data (`if x.mean() > 3: x = F.dropout(x)`) only its
code tells.
"""

import dis
import random
import sys
import types
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["DRAWING_NAMES", "GENERATOR_TYPES", "is_librarys", "named_draws"]

GENERATOR_TYPES = (torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random)
# fmt: off
DRAWING_NAMES = frozenset({
    "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "alpha_dropout_",
    "feature_dropout", "feature_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_", "native_dropout",
    "rrelu", "rrelu_", "gumbel_softmax", "fractional_max_pool2d", "fractional_max_pool3d", "rand", "randn", "randint",
    "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_", "normal", "normal_", "uniform_",
    "multinomial", "poisson", "binomial", "exponential_", "geometric_", "cauchy_", "log_normal_", "random_",
    "rsample", "stochastic_depth", "drop_path",
})
# fmt: on
_BUILDS = {"__init__", "__new__", "__init_subclass__", "reset_parameters", "_reset_parameters", "extra_repr"}
_DEPTH = 8  # calls that are followed from a forward()
_LIBRARIES = {"torch", "unlocked", "numpy", "schedulefree", *sys.stdlib_module_names} - {"__main__"}


def is_librarys(thing: Any) -> bool:
    """Whether a class or function is torch's, the project's or Python's own."""
    return str(getattr(thing, "__module__", None) or "builtins").split(".")[0] in _LIBRARIES


def named_draws(thing: Any) -> frozenset[str]:
    """The sources (`unlocked.models.generators.SOURCES`) that the code of `thing` names.

    Args:
        thing: a module (without its children), a class, a function or a partial of one. What that calls by name in its
            own globals is read as well, unless it belongs to a library.

    Raises:
        ValueError: it names a generator of its own, whose state would depend on where and how often it ran.
    """
    reader = _Reader()
    for code in _code_of(thing):
        reader.read(code, thing)
    return frozenset(reader.found)


def _code_of(thing: Any) -> Iterator[Callable[..., Any]]:
    if isinstance(thing, nn.Module):
        if not is_librarys(type(thing)) or type(thing).__module__.startswith("torch.fx"):
            yield type(thing).forward
        yield from _code_of(type(thing))
        hooks = (thing._forward_hooks, thing._forward_pre_hooks, thing._backward_hooks, thing._backward_pre_hooks)
        for value in [*vars(thing).values(), *(hook for some in hooks for hook in some.values())]:
            if isinstance(value, types.FunctionType | types.MethodType | partial):
                yield value
    elif isinstance(thing, type):
        for owner in thing.__mro__:
            if not is_librarys(owner):
                for name, value in vars(owner).items():
                    value = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
                    if name not in _BUILDS and isinstance(value, types.FunctionType):
                        yield value
    elif callable(thing):
        yield thing


class _Reader:
    def __init__(self) -> None:
        self.found: set[str] = set()
        self._read: set[types.CodeType] = set()
        self._depth = 0

    def read(self, function: Any, owner: Any = None) -> None:
        """`owner`: the module that `self` stands for, if it is known."""
        self._depth += 1
        if self._depth <= _DEPTH:
            self._read_callable(function, owner)
        self._depth -= 1

    def _read_callable(self, function: Any, owner: Any) -> None:
        while isinstance(function, partial | types.MethodType):
            function = function.func if isinstance(function, partial) else function.__func__
        if isinstance(function, type):
            for one in _code_of(function):
                self.read(one)
        elif isinstance(function, types.FunctionType):
            cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            closure = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
            self._read_code(function.__code__, {**function.__globals__, **closure}, owner, function.__qualname__)

    def _read_code(self, code: types.CodeType, scope: dict[str, Any], owner: Any, where: str) -> None:
        if code in self._read:
            return
        self._read.add(code)
        of_self: Any = None  # what the last instruction has loaded is `self`
        names = set()
        for opname, last in _loads(code):
            if opname in ("LOAD_ATTR", "LOAD_METHOD"):
                if of_self and owner is not None and _has(owner, last):
                    self._refuse_generator(vars(owner).get(last), f"self.{last}", where)
                else:
                    names.add(last)
            elif opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "IMPORT_NAME", "IMPORT_FROM"):
                names.add(last)
                self._follow(scope.get(last) if not opname.startswith("IMPORT") else sys.modules.get(last), where)
            of_self = opname.startswith("LOAD_") and last == "self" and opname != "LOAD_ATTR"
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._read_code(constant, scope, owner, where)
        if names & DRAWING_NAMES:
            self.found.add("torch")
        if "random" in names and any(scope.get(name, sys.modules.get(name)) is np for name in names):
            self.found.add("numpy")

    def _follow(self, value: Any, where: str) -> None:
        """A value that the code names."""
        bound = getattr(value, "__self__", None)  # from random import gauss
        if value is random or bound is getattr(random, "_inst", random):
            self.found.add("random")
        elif value is np.random or (bound is not None and bound is getattr(np.random.mtrand, "_rand", None)):
            self.found.add("numpy")
        elif isinstance(value, types.BuiltinFunctionType) or (callable(value) and is_librarys(value)):
            if getattr(value, "__name__", "") in DRAWING_NAMES:
                self.found.add("torch")
        elif isinstance(value, types.FunctionType | type | partial | types.MethodType):
            self.read(value)
        else:
            self._refuse_generator(value, "a generator", where)

    def _refuse_generator(self, value: Any, name: str, where: str) -> None:
        if isinstance(value, GENERATOR_TYPES):
            raise ValueError(
                f"{where} draws from {name} ({type(value).__name__}), whose state would depend on where and how often "
                "the layer ran; leave the generator out: draws from the global one are keyed by (seed, layer, "
                "micro-batch)"
            )


@lru_cache(maxsize=1 << 14)
def _loads(code: types.CodeType) -> tuple[tuple[str, Any], ...]:
    """(operation, name) of every instruction: the layers of a network share their code."""
    found = []
    for step in dis.get_instructions(code):
        last = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
        found.append((step.opname, last))
    return tuple(found)


def _has(owner: Any, name: str) -> bool:
    """An attribute, a child, a parameter or a method: what the class does with it is read by itself."""
    children = (getattr(owner, part, {}) for part in ("_modules", "_parameters", "_buffers"))
    return name in vars(owner) or hasattr(type(owner), name) or any(name in part for part in children)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
