"""Several machines on one: each has a network, a name and a memory of its own (Linux namespaces), and no privilege is
needed where the kernel lets users make namespaces.

A machine may hang on the others by a slow link: this module, as a program, is the relay that its frames go through.

python namespaces.py PID NAME SECONDS BITS_PER_SECOND
"""

import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

__all__ = ["Link", "Machine", "machines", "why_not"]

_NEW_NET = 0x40000000  # CLONE_NEWNET
_TUNSETIFF, _TAP, _NO_HEADER = 0x400454CA, 0x0002, 0x1000
_MTU = 9000


@dataclass(frozen=True, slots=True)
class Link:
    """A machine's way to all others."""

    seconds: float = 0.0
    """One way."""
    bits_per_second: float = 1e9


@dataclass(slots=True)
class Machine:
    """Use it while `machines` lasts."""

    name: str
    address: str
    pid: int
    _started: list[subprocess.Popen[Any]] = field(default_factory=list)

    def command(self, words: Sequence[str]) -> list[str]:
        """What runs `words` on it."""
        return [*_enter(self.pid), "-n", "-m", "-u", f"--wd={os.getcwd()}", "--", *words]

    def start(self, words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        """A process on it, with pipes for its output; it ends with the machine."""
        process = subprocess.Popen(
            self.command(words),
            env=os.environ | dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process


@cache
def why_not() -> str:
    """Why there can be no such machines here; empty: there can."""
    if sys.platform != "linux":
        return "needs Linux"
    if lacking := [name for name in ("unshare", "nsenter", "ip", "mount") if shutil.which(name) is None]:
        return f"needs the program {lacking[0]}"
    tried = subprocess.run(["unshare", "-rnmu", "ip", "link", "add", "br0", "type", "bridge"], capture_output=True)
    return "" if tried.returncode == 0 else f"no namespaces for this user: {tried.stderr.decode().strip()}"


@contextlib.contextmanager
def machines(count: int, *, ipv6: bool = False, links: Mapping[int, Link] | None = None) -> Iterator[list[Machine]]:
    """`count` of them in one network, 10.17.0.0/24 or fd17::/64, without any other; none can resolve its own name.

    Args:
        links: the slow ones, by machine.
    """
    with contextlib.ExitStack() as stack:
        middle = _hold(stack, ["unshare", "-rn"])
        _inside(middle, "ip link add br0 type bridge && ip link set br0 up mtu 9000 && ip link set lo up")
        made = []
        for number in range(count):
            name = f"machine{number}"
            pid = _hold(stack, [*_enter(middle), "-n", "--", "unshare", "-nmu"])
            link = (links or {}).get(number)
            if link is None:
                words = f"ip link add port{number} mtu {_MTU} type veth peer name eth0 mtu {_MTU} netns {pid}"
                _inside(middle, f"{words} && ip link set port{number} master br0 up")
            else:
                _relay(stack, middle, pid, f"port{number}", link)
            address = f"fd17::{number + 1}" if ipv6 else f"10.17.0.{number + 1}"
            lines = ["ip link set lo up", "ip link set eth0 up", f"hostname {name}", "mount -t tmpfs tmpfs /dev/shm"]
            lines += [f"ip -6 addr add {address}/64 dev eth0 nodad" if ipv6 else f"ip addr add {address}/24 dev eth0"]
            _inside(pid, " && ".join(lines))
            made.append(Machine(name, address, pid))
        try:
            yield made
        finally:
            for process in (one for machine in made for one in machine._started):
                if process.poll() is None:
                    process.kill()
                process.communicate()


def _enter(pid: int) -> list[str]:
    return ["nsenter", f"--target={pid}", "--user", "--preserve-credentials"]


def _hold(stack: contextlib.ExitStack, words: Sequence[str]) -> int:
    """A process that keeps new namespaces alive; its number. It is there when this returns."""
    process = subprocess.Popen([*words, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"\n")
    process.stdin.flush()
    process.stdout.read(1)
    return process.pid


def _inside(pid: int, script: str) -> None:
    done = subprocess.run(
        [*_enter(pid), "-n", "-m", "-u", "--", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (script, done.stderr)


def _relay(stack: contextlib.ExitStack, middle: int, pid: int, port: str, link: Link) -> None:
    words = [sys.executable, __file__, str(pid), port, str(link.seconds), str(link.bits_per_second)]
    process = subprocess.Popen([*_enter(middle), "-n", "--", *words], stdout=subprocess.PIPE)
    stack.callback(process.wait)
    stack.callback(process.kill)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"+", "the relay has its ports"


# --- the relay


def main(pid: int, port: str, seconds: float, bits_per_second: float) -> None:
    ends = [_tap(port)]
    subprocess.run(["ip", "link", "set", port, "master", "br0", "up", "mtu", str(_MTU)], check=True)
    library = ctypes.CDLL(None, use_errno=True)
    other = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    if library.setns(other, _NEW_NET):
        raise OSError(ctypes.get_errno(), "setns")
    ends.append(_tap("eth0"))
    subprocess.run(["ip", "link", "set", "eth0", "mtu", str(_MTU)], check=True)
    print("+", end="", flush=True)
    waiting: tuple[deque[tuple[float, bytes]], ...] = (deque(), deque())  # when due, frame; by the end that it came in
    free = [0.0, 0.0]  # when the line takes the next one
    while True:
        now = time.monotonic()
        due = [queue[0][0] for queue in waiting if queue]
        ready, _, _ = select.select(ends, [], [], max(min(due) - now, 0.0) if due else None)
        now = time.monotonic()
        for end in ready:
            number = ends.index(end)
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame = os.read(end, 65536)
                    free[number] = max(free[number], now) + 8 * len(frame) / bits_per_second
                    if free[number] - now < 0.5:  # a router's buffer: the rest is lost, and sent again
                        waiting[number].append((free[number] + seconds, frame))
        for number, queue in enumerate(waiting):
            while queue and queue[0][0] <= now:
                with contextlib.suppress(OSError):
                    os.write(ends[1 - number], queue.popleft()[1])


def _tap(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP | _NO_HEADER))
    return end


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
