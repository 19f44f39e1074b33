"""Starting the workers of a pipeline on this machine, where no launcher has: what torchrun does."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

__all__ = ["start_workers"]


def start_workers(count: int, module: str, arguments: Sequence[str], *, threads: int) -> int:
    """Runs `python -m module arguments` in `count` processes of torch's elastic agent.

    Workers meet at the loopback address; the agent's two stores listen on every interface, as torchrun's do.

    Args:
        threads: intra-op threads of each worker, where OMP_NUM_THREADS says nothing else.

    Returns:
        The exit code: of the worker that failed first, else 0; 128 + signal where this process was told to stop.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # The workers say themselves what went wrong; the agent, all that is left of this process, would log it again.
    logging.disable(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.05,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _exit_code(rank, failure.exitcode)
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _exit_code(rank: int, status: int) -> int:
    """A process's status as a shell tells it: one that a signal ended is 128 + signal."""
    from unlocked.runtime.control.world import stage_name

    if status < 0:
        told = signal.Signals(-status).name
        print(f"error: {stage_name(rank)} was ended by {told}", file=sys.stderr, flush=True)
        return 128 - status
    return status
