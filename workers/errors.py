"""What a failing worker says: rank, stage, layer and action, first cause on top."""

from collections.abc import Sequence

__all__ = [
    "CalledExitError",
    "LinkLostError",
    "MissingActionError",
    "NonFiniteLossError",
    "NonFiniteWeightsError",
    "StageError",
    "StopRun",
]


class NonFiniteLossError(ValueError):
    """A local loss became NaN or infinite."""

    def __init__(self, layer: str, value: float, where: str = "") -> None:
        self.layer = layer
        super().__init__(
            f"the loss of layer {layer} is {value}{where}; lower --lr or raise --temperature, and check the input data"
        )


class NonFiniteWeightsError(ValueError):
    """What a layer has learned holds NaN or infinity."""

    def __init__(self, layer: str, names: Sequence[str]) -> None:
        self.layer = layer
        super().__init__(
            f"layer {layer} holds values that are not finite in {', '.join(names)}; lower --lr or raise --temperature, "
            "and check the input data"
        )


class LinkLostError(RuntimeError):
    """A neighbour's end of an edge is gone, or did not answer within the time limit."""


class CalledExitError(RuntimeError):
    """User code asked for the interpreter's end: in a worker that is a failure like any other."""

    def __init__(self, code: object) -> None:
        super().__init__(f"it called sys.exit({'' if code is None else repr(code)})")


class MissingActionError(RuntimeError):
    """An item of the stream was not worked off to its end: the schedule lacks an action."""

    def __init__(self, action: str) -> None:
        self.action = action
        super().__init__(f"the schedule lacks {action}; every stage must do all that its items need")


class StageError(RuntimeError):
    """A worker's failure with its place in the run. The cause is chained (`raise ... from`)."""

    def __init__(self, *, rank: int, stage: int, layers: str, action: str, cause: BaseException) -> None:
        self.cause, self.action = cause, action
        where = f"stage {stage} (rank {rank}: {layers})"
        if isinstance(cause, LinkLostError):  # the neighbour is the news, not who noticed
            super().__init__(f"{cause}; noticed by {where} in {action}")
        else:
            super().__init__(f"{where} failed in {action}: {cause}")


class StopRun(Exception):
    """An orderly stop was asked for."""
