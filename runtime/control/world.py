"""A process's place among all those of a run, as launchers tell it by the environment.

A process comes here in its first line, so nothing is imported that takes long.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from unlocked.runtime.fields import from_environment, setting

__all__ = ["World", "attempt", "launched_by_torchrun", "stage_name"]

_MOST_PROCESSES = 2**20
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among all of them."""

    rank: int = setting(help="of this process, from 0", variable="RANK", at_least=0, at_most=_MOST_PROCESSES - 1)
    size: int = setting(help="number of all processes", variable="WORLD_SIZE", at_least=1, at_most=_MOST_PROCESSES)
    local_rank: int = setting(
        help="among the processes of this machine", variable="LOCAL_RANK", at_least=0, at_most=_MOST_PROCESSES - 1
    )
    local_size: int = setting(
        help="number of this machine's processes", variable="LOCAL_WORLD_SIZE", at_least=1, at_most=_MOST_PROCESSES
    )
    master_address: str = setting(help="the machine of rank 0", variable="MASTER_ADDR")
    master_port: int = setting(help="of rank 0's store", variable="MASTER_PORT", at_least=1, at_most=65535)

    @property
    def is_local(self) -> bool:
        """All processes run on this machine."""
        return self.local_size == self.size

    @classmethod
    def from_environment(cls) -> "World":
        """Reads what torchrun (or another launcher) has set.

        Raises:
            ValueError: a variable is missing, no number, or out of its range.
        """
        set_ = os.environ
        default_size = set_.get("WORLD_SIZE", "") if set_.get("MASTER_ADDR") in _LOOPBACK else "1"
        default = {"LOCAL_RANK": set_.get("RANK", ""), "LOCAL_WORLD_SIZE": default_size}
        try:
            world = from_environment(cls, {**default, **set_})
        except KeyError as error:
            raise ValueError(
                f"the processes engine needs a launcher, but {error.args[0]} is not set; start it with "
                "'torchrun --standalone --nproc-per-node=N launch/pipeline.py ...', or use --engine sequential"
            ) from None
        pairs = [("RANK", world.rank, "WORLD_SIZE", world.size)]
        if default.keys() <= set_.keys():
            pairs.append(("LOCAL_RANK", world.local_rank, "LOCAL_WORLD_SIZE", world.local_size))
        for name, rank, total, size in pairs:
            if rank >= size:
                raise ValueError(f"{name} is {rank}, but {total} is {size}; ranks run from 0 to {size - 1}")
        return world


def launched_by_torchrun() -> bool:
    """Its agent is this process's parent then, and serves the store."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def attempt() -> str:
    """Which of the launcher's attempts at this run it is; "0" is the first."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def stage_name(stage: int, rank: int | None = None, layers: Sequence[str] = ()) -> str:
    """How errors name a stage: `stage 1 (rank 1: conv3, linear1)`."""
    return f"stage {stage} (rank {stage if rank is None else rank}: {', '.join(layers) or 'layers unknown'})"
