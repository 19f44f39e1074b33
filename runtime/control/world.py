"""A process's place among all those of a run, as launchers tell it by the environment.

A process comes here in its first line, so nothing is imported that takes time.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["World", "attempt", "launched_by_torchrun", "stage_name"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among all of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    master_address: str
    master_port: int

    @property
    def is_local(self) -> bool:
        """All processes run on this machine."""
        return self.local_size == self.size

    @classmethod
    def from_environment(cls) -> "World":
        """Reads what torchrun (or another launcher) has set.

        Raises:
            ValueError: a variable is missing or no number.
        """
        env = os.environ
        try:
            rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
            address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
            local_rank = int(env.get("LOCAL_RANK", rank))
            local_size = int(env.get("LOCAL_WORLD_SIZE", size if address in _LOOPBACK else 1))
        except KeyError as error:
            raise ValueError(
                f"the processes engine needs a launcher, but {error.args[0]} is not set; start it with "
                "'torchrun --standalone --nproc-per-node=N launch/pipeline.py ...', or use --engine sequential"
            ) from None
        except ValueError as error:
            raise ValueError(f"RANK, WORLD_SIZE and MASTER_PORT must be numbers: {error}") from None
        if not 0 <= rank < size:
            raise ValueError(f"RANK is {rank}, but WORLD_SIZE is {size}; ranks run from 0 to {size - 1}")
        return cls(rank, size, local_rank, local_size, address, port)


def launched_by_torchrun() -> bool:
    """Its agent is this process's parent then, and serves the store."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def attempt() -> str:
    """Which of the launcher's attempts at this run it is; "0" is the first."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def stage_name(stage: int, rank: int | None = None, layers: Sequence[str] = ()) -> str:
    """How errors name a stage: `stage 1 (rank 1: conv3, linear1)`."""
    return f"stage {stage} (rank {stage if rank is None else rank}: {', '.join(layers) or 'layers unknown'})"
