"""Folders with little room: a small file system in a mount namespace of its own, which goes with its last process."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["needs_mounts", "on_small_disks"]


def on_small_disks(sizes: dict[Path | str, str]) -> list[str]:
    """The command that runs the command that follows it where each of the folders is a file system in memory of that
    size ("64m")."""
    mounts = "".join(f"mount -t tmpfs -o size={size} tmpfs '{folder}' && " for folder, size in sizes.items())
    return ["unshare", "--mount", "sh", "-c", mounts + 'exec "$@"', "sh"]


def _can_mount() -> bool:
    if shutil.which("unshare") is None or os.geteuid() != 0:
        return False
    return subprocess.run([*on_small_disks({"/mnt": "64k"}), "true"], capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(not _can_mount(), reason="needs root and mount namespaces (unshare) for small disks")
