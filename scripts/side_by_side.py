"""Runs several commands of this Python at once, tells what each said when all have ended, and fails if one has failed.

    python scripts/side_by_side.py exact: benchmarks/gpu_exact.py + tests: -m pytest tests/engines

A name with a colon begins a command, a plus ends it. Exit status: 1 if one has failed; 130 after an interrupt, which
reaches all of them, as they are of one process group, and leaves each a few seconds to say where it was.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

__all__ = ["commands", "main"]

_GRACE = 8.0  # seconds after an interrupt: less than gpu_steps.py gives before it kills all


def commands(words: Sequence[str]) -> dict[str, list[str]]:
    """Name -> its command.

    Raises:
        ValueError: no command, one without a name, or of a name that was given before.
    """
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in words:
        if word == "+":
            current = None
        elif current is not None:
            current.append(word)
        elif not word.endswith(":") or word[:-1] in found:
            raise ValueError(f"a command begins with a new name and a colon, got {word!r} after {sorted(found)}")
        else:
            current = found[word[:-1]] = []
    if not found:
        raise ValueError("no command was given")
    return found


def main(words: Sequence[str]) -> int:
    with contextlib.ExitStack() as files:
        running: dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
        for name, command in commands(words).items():
            output = files.enter_context(tempfile.TemporaryFile())
            started = subprocess.Popen([sys.executable, *command], stdout=output, stderr=subprocess.STDOUT)
            running[name] = (started, output)
        interrupted = _wait([process for process, _ in running.values()])
        for name, (_, output) in running.items():
            output.seek(0)
            print(f"---- {name}\n{output.read().decode(errors='replace')}", flush=True)
        codes = {name: process.poll() for name, (process, _) in running.items()}
    print("\n".join(f"{name}: exit status {code}" for name, code in codes.items()), flush=True)
    return 130 if interrupted else 1 if any(codes.values()) else 0


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Until all have ended; or, after an interrupt, a while longer, and True."""
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        end = time.monotonic() + _GRACE
        for process in processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
