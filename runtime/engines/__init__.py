"""The engines: three placements of the same stages, one result. Each is an object that holds its options."""

import importlib
from typing import Any

from unlocked.runtime.job import Engine

__all__ = ["ENGINES", "as_engine", "engine_class"]

ENGINES = {
    "sequential": ("unlocked.runtime.engines.sequential", "Sequential"),
    "streams": ("unlocked.runtime.engines.streams.engine", "Streams"),
    "processes": ("unlocked.runtime.engines.processes.engine", "Processes"),
}
"""Name -> where its class is: nobody loads an engine that isn't used."""


def engine_class(name: str) -> Any:
    """The dataclass of that engine.

    Raises:
        ValueError: lists the valid names.
    """
    if name not in ENGINES:
        raise ValueError(f"engine {name!r} is not known; valid: {', '.join(ENGINES)}")
    module, attribute = ENGINES[name]
    return getattr(importlib.import_module(module), attribute)


def as_engine(engine: Engine | str) -> Engine:
    """The engine itself, or the one of that name with its defaults.

    Raises:
        ValueError: lists the valid names.
    """
    if isinstance(engine, str):
        made: Engine = engine_class(engine)()
        return made
    if isinstance(engine, type) or not (hasattr(engine, "run") and hasattr(engine, "check")):
        valid = ", ".join(f"{attribute}(...)" for _, attribute in ENGINES.values())
        raise ValueError(f"engine is {engine!r}; give one of {valid}, or a name: {', '.join(ENGINES)}")
    return engine
