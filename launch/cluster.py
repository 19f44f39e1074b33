"""`unlocked launch TORCHRUN_FLAGS -- TRAIN_FLAGS`: torchrun around `unlocked train`, which ends in lines of ours.

torchrun itself prints a traceback of its own for every signal and every worker that fails, and leaves with 1. Here the
workers' words are the last ones, and this process leaves with their code.
"""

import contextlib
import io
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence

from unlocked.launch.output import lasting_output

__all__ = ["main"]

_HELP = """usage: unlocked launch [TORCHRUN FLAGS] -- [TRAIN FLAGS]

Runs torchrun on this machine: a process per stage of `unlocked train TRAIN FLAGS`.
On several machines run the same line on each.

  unlocked launch --nproc-per-node=2 -- --dataset digits
  unlocked launch --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d \\
      --rdzv-endpoint=HOST:29500 -- --dataset CIFAR10

TORCHRUN FLAGS are those of `torchrun --help`; without --nnodes, --rdzv-endpoint and
--master-addr nothing listens beyond the loopback address. TRAIN FLAGS are those
of `unlocked train --help`.

Exit code: of the process that failed first, else 0; 130 and 143 after Ctrl-C and
SIGTERM, where torchrun would leave with 1."""
_ELSEWHERE = ("--standalone", "--nnodes", "--rdzv", "--master", "--node")
_SET_ELSEWHERE = ("PET_STANDALONE", "PET_NNODES", "PET_RDZV", "PET_MASTER", "PET_NODE")
"""How the variables begin by which torchrun's flags can be set as well; Kubeflow does."""


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs until all workers have ended. 2: a mistake in torchrun's flags, in one line; else see the help."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    own, training = given[:cut], given[cut + 1 :]
    if "-h" in own or "--help" in own or not given:
        print(_HELP)
        return 0
    try:
        return _run(own, training)
    except ValueError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted during set-up", file=sys.stderr, flush=True)
        return 130


def _run(own: Sequence[str], training: Sequence[str]) -> int:
    with contextlib.ExitStack() as stack:
        told = any(flag.replace("_", "-").startswith(_ELSEWHERE) for flag in own)
        if not told and not any(name.startswith(_SET_ELSEWHERE) for name in os.environ):
            own = [*stack.enter_context(_one_machine()), *own]
        return _launch(own, training)


@contextlib.contextmanager
def _one_machine() -> Iterator[list[str]]:
    """The flags by which torchrun has no other machine in mind, and listens nowhere.

    With --standalone it serves two stores on every interface, to which anyone may write. Here its processes meet in a
    file, and rank 0 serves the run's store on the loopback address.
    """
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with tempfile.TemporaryDirectory(prefix="unlocked-") as folder:  # mode 0700
        yield [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={folder}/rendezvous",
            "--rdzv-conf=store_type=file",
            f"--rdzv-id={uuid.uuid4().hex}",
            "--local-addr=127.0.0.1",
        ]


def _launch(own: Sequence[str], training: Sequence[str]) -> int:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = torchrun.parse_args([*own, "-m", "unlocked.launch.pipeline", *training])
    except SystemExit as error:
        why = said.getvalue().rstrip().rpartition("error: ")[2] or "torchrun can't read its flags"
        raise ValueError(f"{why}; see unlocked launch --help, and torchrun --help") from error
    if options.module is not True or options.training_script != "unlocked.launch.pipeline":
        raise ValueError(f"torchrun takes {options.training_script!r} for its script; write flags of train after --")
    # The workers say themselves what went wrong.
    logging.disable(logging.CRITICAL)
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return _exit_code(failure.exitcode)
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except (RendezvousError, RuntimeError, OSError) as error:
        print(f"error: torchrun: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 1
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _exit_code(status: int) -> int:
    """A process's status as a shell tells it: one that a signal ended is 128 + signal."""
    if status < 0:
        print(f"error: a worker was ended by {signal.Signals(-status).name}", file=sys.stderr, flush=True)
        return 128 - status
    return status


if __name__ == "__main__":
    sys.exit(main())
