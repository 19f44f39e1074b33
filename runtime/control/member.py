"""A worker that has said hello is a member of the run: what the coordinator keeps of it."""

import os
import socket
from dataclasses import dataclass, field

from unlocked.runtime.control.messages import Hello, stage_name

__all__ = ["Member"]


@dataclass(slots=True)
class Member:
    """One worker of the run, from its hello on.

    Attributes:
        identity: of its connection.
        heard: when it last gave a sign of life (monotonic seconds).
        position: stream positions that it has completed.
        chunks: the parts of its final payload so far.
        finished: its final payload is here.
    """

    identity: bytes
    hello: Hello
    heard: float
    position: int
    chunks: list[bytes] = field(default_factory=list)
    finished: bool = False

    @property
    def name(self) -> str:
        return stage_name(self.hello.stage, self.hello.rank, self.hello.layers)

    @property
    def local(self) -> bool:
        """It lives in the coordinator's own process."""
        return self.hello.pid == os.getpid() and self.hello.host == socket.gethostname()
