"""How a run is executed, on any engine: the settings that belong to no engine and no dataset."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unlocked.runtime.fields import LARGEST, LARGEST_SEED, LONGEST_WAIT, check, setting
from unlocked.runtime.schedules.marks import Period

__all__ = ["Settings"]

_USUAL_PERIOD = "5m"  # little to lose, and with the writing beside the stream nothing that a run would notice
_USUALLY_KEPT = 2  # so that one is whole whatever happens to the newest


def _backends() -> Sequence[str]:
    from unlocked.kernels.dispatch import BACKENDS

    return BACKENDS


def _precisions() -> Sequence[str]:
    from unlocked.kernels.precision import PRECISIONS

    return (*PRECISIONS, "auto")


def _tried_precision(device: str) -> str:
    """The precision that `auto` stands for; rank 0 says why. A device that is not there is refused elsewhere."""
    from unlocked.kernels.trial import PAYS, bfloat16_gain

    try:
        gain = bfloat16_gain(device)
    except (RuntimeError, AssertionError):
        return "fp32"
    chosen = "bf16" if gain >= PAYS else "fp32"
    if os.environ.get("RANK", "0") == "0":
        told = (
            f"precision auto is {chosen}: a matrix product on {device} is {gain:.2f} times as fast in bf16 as in fp32"
        )
        print(told, file=sys.stderr, flush=True)
    return chosen


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to run, on any engine; nothing here changes a result, save `seed`, and `precision`, `kernels`, `device`,
    `deterministic`, `compile` and `threads` by rounding."""

    seed: int = setting(0, "keys initialisation, shuffling, augmentation and dropout", at_least=0, at_most=LARGEST_SEED)
    device: str = setting("cpu", "cpu, cuda or cuda:INDEX")
    kernels: str = setting(
        "auto", "auto, torch, cpp, cpp_winograd (CPU), triton, triton_joined, cuda (GPU)", choices=_backends
    )
    precision: str = setting(
        "fp32",
        "fp32, tf32 (GPU) or bf16, in which weights, optimizer and statistics stay float32; auto: bf16 where a trial "
        "product on the device is faster in it, else fp32",
        choices=_precisions,
    )
    deterministic: bool = setting(
        False,
        "on a GPU, cuDNN's and cuBLAS's kernels that give the same bits in every run and engine, as a CPU's do",
    )
    compile: bool | str = setting(
        False, "torch.compile for what trains through autograd (all of BP); in Python a string names its backend"
    )
    print_freq: int = setting(
        50, "training micro-batches between two readings of the losses", at_least=1, at_most=LARGEST
    )
    statistics_batches: int = setting(
        50,
        "training micro-batches that re-estimate BatchNorm's statistics before an evaluation",
        at_least=0,
        at_most=LARGEST,
    )
    snapshot_every: int | str | None = setting(
        None,
        "training micro-batches between two snapshots, or a time such as 60s, 10m or 2h (0: none); unless given: 5m "
        "where there is a folder for them. May be another one after a resume",
        at_least=0,
        at_most=LARGEST,
    )
    snapshot_dir: Path | None = setting(
        None, "folder of the snapshots; a stopped run writes one too", is_flag=False, place="new folder"
    )
    keep_snapshots: int | None = setting(
        None,
        "newest snapshots to keep; unless given: all that --snapshot-every asks for, else the newest two",
        at_least=1,
        at_most=LARGEST,
    )
    resume: Path | None = setting(
        None,
        "go on from the newest snapshot in this folder, on any engine and number of stages; rule, optimizer, seed and "
        "batch sizes must be the run's; auto: from the newest whole one of this run's own folder, or anew",
        place="folder",
    )
    trace: Path | None = setting(None, "write a Chrome trace of every action here", place="JSON file")
    timeout: float = setting(
        300.0, "seconds that a stage waits for a neighbour, or for its data", above=0, at_most=LONGEST_WAIT
    )
    prefetch: int | None = setting(
        None,
        "micro-batches that a thread assembles ahead of stage 0 on the host (0: none); unless given: a few for data "
        "that is streamed and between processes on a CPU, else none",
        at_least=0,
        at_most=1024,
    )
    threads: int | None = setting(
        None,
        "intra-op threads of each process; unless given: torch's choice. Equal results need equal counts",
        at_least=1,
        at_most=1024,
    )
    best_dir: Path | None = setting(
        None, "keep the weights of the best evaluation here, as model_best.pt", is_flag=False, place="new folder"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.deterministic and self.device.startswith("cuda"):  # before anything multiplies: cuBLAS looks at it once
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if self.snapshot_every is not None:
            Period.of(self.snapshot_every)
        if self.precision == "auto":
            object.__setattr__(self, "precision", _tried_precision(self.device))

    @contextlib.contextmanager
    def library_kernels(self) -> Iterator[None]:
        """Inside, the library computes as these settings ask for."""
        from unlocked.kernels.precision import float32_products, repeatable_kernels

        with contextlib.ExitStack() as stack:
            stack.enter_context(float32_products(self.precision))
            if self.deterministic:
                stack.enter_context(repeatable_kernels(self.device))
            yield

    @property
    def snapshot_period(self) -> Period:
        """How often the run saves itself."""
        if self.snapshot_dir is None:
            return Period()
        return Period.of(_USUAL_PERIOD if self.snapshot_every is None else self.snapshot_every)

    @property
    def kept_snapshots(self) -> int | None:
        """How many of the newest snapshots stay; None: all."""
        return _USUALLY_KEPT if self.keep_snapshots is None and self.snapshot_every is None else self.keep_snapshots

    @property
    def resumes_by_itself(self) -> bool:
        """The same settings begin a run and go on with it."""
        return self.resume == Path("auto")
