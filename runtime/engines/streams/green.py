"""Streams for the stages of one GPU: plain ones, or those of a green context per stage.

A green context is a CUDA context that is given a part of the device. `sms` asks for an equal share of the
multiprocessors for each stage, so that a large kernel of one stage leaves room for the others; `queues` leaves all
multiprocessors to everybody and gives each stage work queues of its own. torch makes every context by a split of its
own (its interface has no way to ask for disjoint ones, pytorch#195378), so the shares of `sms` bound how much a stage
takes and may overlap.
"""

from typing import Any, Literal, get_args

import torch

from unlocked.models.errors import first_line

__all__ = ["GREEN_CONTEXTS", "GreenContexts", "make_streams", "share"]

GreenContexts = Literal["off", "sms", "queues"]
GREEN_CONTEXTS: tuple[str, ...] = get_args(GreenContexts)

_ALIGNMENT = 8  # multiprocessors: contexts are made of so many, and have at least so many (compute capability 9.0)


def make_streams(kind: str, device: torch.device, count: int) -> tuple[list[torch.cuda.Stream | None], list[Any]]:
    """A stream for each of `count` stages (None on a CPU), and what must live as long as they are used.

    Raises:
        ValueError: green contexts were asked for and the device, its driver or torch has none; says which.
    """
    if device.type != "cuda":
        if kind != "off":
            raise ValueError(f"green contexts {kind!r} need a CUDA device, the run is on {device}; leave them off")
        return [None] * count, []
    if kind == "off":
        return [torch.cuda.Stream(device) for _ in range(count)], []
    contexts = [_create(kind, device, count) for _ in range(count)]
    return [context.Stream() for context in contexts], contexts


def share(multiprocessors: int, stages: int) -> int:
    """An equal share of the multiprocessors, as contexts can have it."""
    return max(_ALIGNMENT, multiprocessors // stages // _ALIGNMENT * _ALIGNMENT)


def _create(kind: str, device: torch.device, stages: int) -> Any:
    green: Any = getattr(torch.cuda, "GreenContext", None)
    if green is None or not hasattr(green, "Stream"):
        raise ValueError(
            f"green contexts need a torch that has torch.cuda.GreenContext with streams (2.13 does), this is "
            f"{torch.__version__}; leave them off"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    options: dict[str, Any] = {"workqueue_scope": "balanced"}
    if kind == "sms":
        options = {"num_sms": share(torch.cuda.get_device_properties(device).multi_processor_count, stages)}
    try:
        return green.create(**options, device_id=index)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"torch {torch.__version__}, the driver or the device offers no green contexts {kind!r} "
            f"({first_line(error)}); leave them off"
        ) from error
