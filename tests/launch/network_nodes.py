"""Two nodes for the tests: network namespaces of this machine with one link between them, which can be cut."""

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["Node", "two_nodes"]


@dataclass(frozen=True, slots=True)
class Node:
    """One of the two."""

    name: str
    address: str
    device: str
    folder: Path
    """For temporary files of its own."""

    @property
    def prefix(self) -> list[str]:
        """Runs the command that follows it there."""
        return ["ip", "netns", "exec", self.name]

    @property
    def environment(self) -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": self.device, "TMPDIR": str(self.folder)}

    def cut(self) -> None:
        """The link goes down for good: what is sent is lost, and nobody is told."""
        _ip("-n", self.name, "link", "set", self.device, "down")

    def processes(self) -> list[int]:
        """All that run there."""
        told = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True).stdout
        return [int(pid) for pid in told.split()]


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Node, Node]]:
    """Skips the test where network namespaces can't be made."""
    if os.name != "posix" or shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command ip")
    key = secrets.token_hex(3)
    nodes = []
    for number in range(2):
        (folder / f"node-{number}").mkdir()
        nodes.append(Node(f"node{number}-{key}", f"10.77.0.{number + 1}", f"to{1 - number}", folder / f"node-{number}"))
    first, second = nodes
    try:
        try:
            for node in nodes:
                _ip("netns", "add", node.name)
            ends = [first.device, "netns", first.name, "type", "veth", "peer", "name", second.device]
            _ip("link", "add", *ends, "netns", second.name)
            for node in nodes:
                _ip("-n", node.name, "address", "add", f"{node.address}/24", "dev", node.device)
                for device in ("lo", node.device):
                    _ip("-n", node.name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces can't be made here: {error.stderr.strip()}")
        yield first, second
    finally:
        for node in nodes:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", node.name)


def _ip(*arguments: str) -> Sequence[str]:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
