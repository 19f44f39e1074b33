"""The engines: three placements of the same stages, one result."""

from collections.abc import Callable

from unlocked.runtime.job import Engine

__all__ = ["ENGINES", "get_engine"]


def _sequential() -> Engine:
    from unlocked.runtime.engines.sequential import SequentialEngine

    return SequentialEngine()


def _processes() -> Engine:
    from unlocked.runtime.engines.processes.engine import ProcessesEngine

    return ProcessesEngine()


def _streams() -> Engine:
    from unlocked.runtime.engines.streams.engine import StreamsEngine

    return StreamsEngine()


ENGINES: dict[str, Callable[[], Engine]] = {
    "sequential": _sequential,
    "streams": _streams,
    "processes": _processes,
}


def get_engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        ValueError: lists the valid names.
    """
    if name not in ENGINES:
        raise ValueError(f"engine {name!r} is not known; valid: {', '.join(ENGINES)}")
    return ENGINES[name]()
