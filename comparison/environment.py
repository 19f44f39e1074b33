"""What something was measured on: the one description of a machine, its software and the checkout."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from unlocked.comparison.results import Environment
from unlocked.data.cores import usable_cores

__all__ = ["environment"]

_PACKAGES = ("unlocked", "torch", "numpy", "triton", "pyzmq", "scikit-learn", "schedulefree")


def environment() -> Environment:
    """This machine, its software and the checkout, now. COMMIT, a variable of the environment, names the commit where
    there is no git."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    versions["torch"] = str(torch.__version__)  # with its build (+cpu, +cu130), which the package's version may lack
    if torch.cuda.is_available():
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return Environment(
        cpu=_cpu_name(),
        cores=usable_cores(),
        memory_bytes=_memory_bytes(),
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())),
        platform=platform.platform(),
        python=platform.python_version(),
        versions=versions,
        commit=_commit() or os.environ.get("COMMIT") or None,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _cpu_name() -> str:
    """The model's name, and which vector instructions torch uses of it."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _commit() -> str | None:
    root = Path(__file__).resolve().parent
    head = _git(root, "rev-parse", "--short", "HEAD")
    return None if head is None else head + ("+" if _git(root, "status", "--porcelain") else "")


def _git(folder: Path, *arguments: Sequence[str] | str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *map(str, arguments)], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
