"""The steps of `scripts/gpu_check.sh`, and the driver that runs them under time limits.

    scripts/gpu_check.sh 1 [FOLDER]            # does it run, is it exact, first numbers
    scripts/gpu_check.sh 2 [FOLDER]            # kernels one by one, the contenders that matter most
    scripts/gpu_check.sh 3 [FOLDER]            # evaluated runs, compiled rivals, CUDA C++, scaling on the CPU's cores
    scripts/gpu_check.sh 1 FOLDER --dry-run    # the same steps in the form that a machine without a GPU can run

A machine may be lent for minutes and lose everything between two calls. So: the most important step comes first; every
step has a limit of its own, gets SIGINT when it is over, so that it can say where it was, and SIGKILL ten seconds
later; what is known is written after every step, never only at the end; compiled kernels are packed into
caches.tar.gz, and a later call that finds that file in .gpu_caches/ unpacks it. FOLDER gets at most eight files.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CALLS", "LONGEST_CALL", "Driver", "Step", "main"]

ROOT = Path(__file__).resolve().parent.parent
LONGEST_CALL = 280
"""Seconds that all limits of a call may add up to."""
_GRACE = 10.0  # seconds between SIGINT and SIGKILL
_LARGEST_PACK = 15 * 2**20  # bytes of caches.tar.gz; more is not brought back
_NEEDED = ("numpy", "triton", "pytest", "hypothesis", "zmq", "msgpack", "msgspec", "rich", "sklearn")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command and its limit."""

    name: str
    limit: int
    """Seconds."""
    command: tuple[str, ...]
    """For this Python, from the repository's root; `{folder}` stands for where results go."""
    dry: tuple[str, ...]
    """The same without a GPU: other arguments, the same code."""
    checks: bool = False
    """Whether a failure means that something is wrong, and not only unmeasured."""


def _together(name: str, limit: int, commands: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]) -> Step:
    """Checks that run side by side: name -> (command, the same without a GPU). Nothing of them is timed."""

    def words(which: int) -> tuple[str, ...]:
        found = ["scripts/side_by_side.py"]
        for one, pair in commands.items():
            found += [f"{one}:", *pair[which], "+"]
        return tuple(found)

    return Step(name=name, limit=limit, command=words(0), dry=words(1), checks=True)


def _tests(*paths: str, workers: int, dry: tuple[str, ...] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`dry`: what is run instead without a GPU; nothing: the tests are only found."""
    pytest = ("-m", "pytest", "-p", "no:cacheprovider")
    common = (*pytest, "-m", "gpu", "--tb=short", *paths)
    without = (*pytest, *dry) if dry else (*common, "--collect-only")
    return (*common, "-n", str(workers)), without


def _contenders(name: str, limit: int, *contenders: str, rounds: int = 1, dry_device: str = "cpu") -> Step:
    common = ("benchmarks/single_gpu.py", "--rounds", str(rounds), "--json", f"{{folder}}/{name}.json")
    small = ("--in-process", "--max-steps", "2", "--train-size", "32", "--compile-backend", "eager")
    return Step(
        name=name,
        limit=limit,
        command=(*common, "--time-limit", str(limit - 12), "--only", *contenders),
        dry=(*common, "--device", dry_device, *small, "--only", *contenders),
    )


def _placements(what: str, case: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    common = ("benchmarks/gpu_placements.py", "--json", f"{{folder}}/placements_{what}.json", "--what", what)
    return common, (*common, "--device", "cpu", "--only", case)


_EXACT = ("benchmarks/gpu_exact.py", "--json", "{folder}/gpu_exact.json")
_KERNELS = ("benchmarks/kernels.py", "--quick")
_SCALING = ("benchmarks/pipeline_scaling.py", "--repeats", "1", "--json", "{folder}/pipeline_scaling.json")

# Without a GPU the first call takes the engine's device side all the same, on the stand-in for one that its tests use:
# so do the tests, a run of each road that they take on a GPU.
_STAND_IN = ("tests/engines/test_streams_on_stand_in.py", "-k", "plateau or resumed")

# On 16 cores and an H200 all checks took 150 seconds side by side, the networks the longest; a contender 12 to 15, of
# which most are imports and compilation, one that is compiled by torch 45.
CALLS: dict[int, list[Step]] = {
    1: [
        _together(
            "checks",
            180,
            {
                "exact": (_EXACT, (*_EXACT, "--device", "stand-in", "--epochs", "1", "--max-steps", "6")),
                "rules": _placements("rules", "LLS"),
                "models": _placements("models", "MLP"),
                "options": _placements("options", "SGD"),
                "tests of Triton": _tests("tests/kernels", "--ignore-glob=*test_cuda_*", workers=5),
                "tests of CUDA C++": _tests("tests/kernels", "-k", "test_cuda_", workers=2),
                "tests of engines": _tests("tests/engines", "tests/workers", workers=2, dry=_STAND_IN),
            },
        ),
        _contenders(
            "first_numbers", 90, "LLS streams", "BP graph", "LLS streams bf16", "BP eager", dry_device="stand-in"
        ),
    ],
    2: [
        Step(
            name="kernels",
            limit=80,
            command=(*_KERNELS, "--time-limit", "65", "--json", "{folder}/kernels.json"),
            dry=("benchmarks/kernels.py", "--check", "--only", "local_head"),
        ),
        _contenders(
            "contenders",
            195,
            *("LLS streams", "BP graph", "VGG8 LLS streams", "VGG8 BP graph", "LLS sequential graph"),
            *(
                "LLS streams bf16",
                "BP graph bf16",
                "LLS streams, joined",
                "LLS streams bf16, joined",
                "LLS streams fp32",
            ),
            *("BP graph fp32", "LLS_MxM streams", "BP compiled graph"),
        ),
    ],
    3: [
        _contenders(
            "more_contenders",
            215,
            *("LLS streams, evaluated", "BP graph, evaluated", "BP compiled graph bf16", "VGG8 LLS streams bf16"),
            *("VGG8 BP graph bf16", "LLS streams, green sms", "LLS streams, green queues", "LLS streams, traced"),
            *("LLS streams, CUDA C++ kernels", "VGG8 BP compiled graph", "BP compiled"),
        ),
        Step(
            name="scaling",
            limit=60,
            command=(*_SCALING, "--models", "SmallConv:5:150"),
            dry=(*_SCALING, "--models", "SmallConv:2:2"),
        ),
    ],
}
"""Call -> its steps, the most important first."""


class Driver:
    """Runs steps one after the other and keeps what is known on disk.

    Args:
        folder: gets `call_N.log`, all output, and `call_N.json`, how each step went, besides what the steps write.
        name: of the call, for these files.
        dry: take the steps' form without a GPU.
    """

    def __init__(self, folder: Path, name: str, *, dry: bool) -> None:
        self.folder, self.name, self.dry = folder, name, dry
        self.rows: list[dict[str, Any]] = []
        self._child: subprocess.Popen[bytes] | None = None

    def run(self, steps: Sequence[Step]) -> int:
        """All steps; the exit status. An interrupt ends the running step and leaves the others out."""
        self.rows = [{"name": s.name, "state": "not begun", "limit": s.limit, "checks": s.checks} for s in steps]
        (self.folder / f"{self.name}.log").write_bytes(b"")
        self._write()
        # A shell's background job ignores SIGINT, and so would its children: here it is heard, and theirs to hear.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            for step, row in zip(steps, self.rows, strict=True):
                self._run(step, row)
                self._write()
                pack_caches(self.folder)
        except KeyboardInterrupt:
            return 130
        finally:
            self._write()
            signal.signal(signal.SIGINT, before)
        failed = [row["checks"] for row in self.rows if row["state"] != "ok"]
        return 0 if not failed else 1 if any(failed) else 2

    def _run(self, step: Step, row: dict[str, Any]) -> None:
        words = [word.format(folder=self.folder) for word in (step.dry if self.dry else step.command)]
        told = f"\n==== {step.name} (at most {step.limit} s): {' '.join(words)}\n"
        print(told, end="", flush=True)
        row |= {"state": "running", "command": words}
        self._write()
        began = time.monotonic()
        with (self.folder / f"{self.name}.log").open("ab") as log:
            log.write(told.encode())
            log.flush()
            start = log.tell()
            try:
                self._child = subprocess.Popen(
                    [sys.executable, *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
                status = self._child.wait(step.limit)
                row["state"] = "ok" if status == 0 else "no tests" if status == 5 else f"failed ({status})"
            except subprocess.TimeoutExpired:
                row["state"] = "out of time"
            except KeyboardInterrupt:
                row["state"] = "interrupted"
                raise
            finally:
                self._end()
                row["seconds"] = round(time.monotonic() - began, 1)
                row["last_lines"] = _tail(self.folder / f"{self.name}.log", start)
        print("\n".join(row["last_lines"]), flush=True)

    def _end(self) -> None:
        """What is left of the running step gets SIGINT, so that it tells where it was, and soon after SIGKILL."""
        child, self._child = self._child, None
        if child is None:
            return
        for number, patience in ((signal.SIGINT, _GRACE), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(patience)
                if number == signal.SIGKILL:
                    return

    def _write(self) -> None:
        """Whole at every moment: a new file takes the old one's place."""
        path = self.folder / f"{self.name}.json"
        path.with_suffix(".part").write_text(
            json.dumps({"dry_run": self.dry, "steps": self.rows}, indent=1, allow_nan=False) + "\n"
        )
        path.with_suffix(".part").replace(path)

    def summary(self) -> str:
        """A line per step."""
        lines = [f"{'step':<18}{'outcome':<18}{'seconds':>8}{'limit':>8}"]
        lines += [f"{r['name']:<18}{r['state']:<18}{r.get('seconds', 0):>8}{r['limit']:>8}" for r in self.rows]
        return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("call", type=int, choices=sorted(CALLS))
    default = os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "latest"
    parser.add_argument("folder", type=Path, nargs="?", default=Path(default))
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: the same steps, on the CPU")
    options = parser.parse_args(arguments)
    os.environ.update(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "4"), PYTHONUNBUFFERED="1")
    os.environ.pop("TRITON_INTERPRET", None)
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    if problem := missing(dry=options.dry_run):
        print(f"gpu_check: {problem}", file=sys.stderr)
        return 3
    options.folder.mkdir(parents=True, exist_ok=True)
    use_caches(ROOT / ".gpu_caches")
    driver = Driver(options.folder.resolve(), f"call_{options.call}", dry=options.dry_run)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    status = driver.run(CALLS[options.call])
    print(f"\n==== results in {options.folder}\n{driver.summary()}", flush=True)
    return status


def missing(*, dry: bool) -> str:
    """What this machine lacks, in one line; empty if nothing."""
    tried = f"import {', '.join(_NEEDED)}, torch, unlocked.runtime; print(torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", tried], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        return f"{done.stderr.strip().splitlines()[-1]}; put the missing package's wheel on PYTHONPATH"
    if done.stdout.strip() != "True" and not dry:
        return f"{sys.executable} finds no CUDA device; run this on a machine with an NVIDIA GPU, or try --dry-run"
    return ""


def use_caches(folder: Path) -> None:
    """Compiled kernels of all kinds go to `folder`, and what an earlier call packed comes back from there."""
    folder.mkdir(exist_ok=True)
    packed = folder / "caches.tar.gz"
    if packed.exists():
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
    for variable, name in (
        ("TRITON_CACHE_DIR", "triton"),
        ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
        ("XDG_CACHE_HOME", "compiled"),
    ):
        os.environ[variable] = str(folder / name)


def pack_caches(target: Path) -> None:
    """Writes `caches.tar.gz` into `target`: Triton's and the C++ compilers' results, while they are small enough."""
    folders = [Path(os.environ[name]) for name in ("TRITON_CACHE_DIR", "XDG_CACHE_HOME") if name in os.environ]
    part = target / "caches.part"
    with tarfile.open(part, "w:gz", compresslevel=3) as archive:
        for folder in folders:
            if folder.exists():
                archive.add(folder, arcname=folder.name)
    if part.stat().st_size > _LARGEST_PACK:
        print(f"caches of {part.stat().st_size / 2**20:.0f} MiB are not packed", flush=True)
        part.unlink()
    else:
        part.replace(target / "caches.tar.gz")


def _tail(path: Path, start: int, lines: int = 40) -> list[str]:
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - 20_000))
        return file.read().decode(errors="replace").splitlines()[-lines:]


if __name__ == "__main__":
    sys.exit(main())
