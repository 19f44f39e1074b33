"""What the engines with several stages have in common: their options."""

from dataclasses import dataclass

from unlocked.runtime.fields import check, setting

__all__ = ["AUTO", "PipelineOptions"]

AUTO = "auto"
"""Of stages: the engine finds out how many are the fastest."""


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """Options of every engine that has stages and edges between them."""

    stages: int | str | None = setting(
        None,
        'number of stages, or a list of their layers such as "0-1,2,3-4" or "conv1-conv2,conv3,conv4-linear1"; auto: '
        "as many as a trial finds fastest (processes), or one per layer; unless given: one per layer, or per process",
        at_least=1,
        at_most=1024,
    )
    queue_depth: int = setting(4, "micro-batches that a stage may run ahead of the next one", at_least=1, at_most=1024)

    def __post_init__(self) -> None:
        check(self)
