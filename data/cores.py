"""How many cores this process may use: counted here alone, because every room that counts may import the data."""

import os

__all__ = ["usable_cores"]


def usable_cores() -> int:
    """Cores that this process may use (all of the machine's where the system can't tell, as on macOS); at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
