"""Who has said hello is a member of the run: a worker, or a worker's supervisor. What the coordinator keeps of them."""

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from unlocked.runtime.control.messages import Hello, Supervise, stage_name

__all__ = ["Member", "Roster"]


@dataclass(slots=True)
class Member:
    """One process of the run, from its hello on.

    Attributes:
        identity: of its connection.
        heard: when it last gave a sign of life (monotonic seconds).
        position: stream positions that it has completed.
        chunks: the parts of its final payload so far.
        finished: its final payload is here.
        gone: it is known to have ended, and its supervisor is about to start the next one; of a supervisor: its
            connection has closed, and it may make it anew.
    """

    identity: bytes
    hello: Hello | Supervise
    heard: float
    position: int
    chunks: list[bytes] = field(default_factory=list)
    finished: bool = False
    gone: bool = False

    @property
    def name(self) -> str:
        return stage_name(self.hello.stage, self.hello.rank, self.hello.layers)

    @property
    def local(self) -> bool:
        """It lives in the coordinator's own process."""
        return self.hello.pid == os.getpid() and self.hello.host == socket.gethostname()

    @property
    def has_ended(self) -> bool:
        """Its process is known to be over: it is one of this machine's (Linux), and is not there any more."""
        if self.hello.host != socket.gethostname() or not os.path.exists("/proc/self/stat"):
            return False
        try:
            with open(f"/proc/{self.hello.pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] in "ZX"  # proc(5): nobody has waited for it yet
        except OSError:
            return True

    def is_return_of(self, before: "Member") -> bool:
        """Whether this is the same supervisor, by a later connection."""
        new, old = self.hello, before.hello
        return (
            isinstance(new, Supervise)
            and isinstance(old, Supervise)
            and (new.pid, new.host) == (old.pid, old.host)
            and new.returns > old.returns
        )


class Roster:
    """Everybody who has said hello.

    Args:
        stages: the layer names of each stage.
    """

    def __init__(self, stages: Sequence[tuple[str, ...]]) -> None:
        self._stages = stages
        self.supervised = False
        """Every worker has a supervisor, which belongs to the run too."""
        self.workers: dict[int, Member] = {}
        """By stage; a later incarnation takes the place of the one before."""
        self.supervisors: dict[int, Member] = {}
        self._by_identity: dict[bytes, Member] = {}

    @property
    def is_complete(self) -> bool:
        there = [self.workers, self.supervisors] if self.supervised else [self.workers]
        return all(len(one) == len(self._stages) for one in there)

    @property
    def missing(self) -> list[str]:
        """Who has not said hello."""
        count = range(len(self._stages))
        absent = [self.name(stage) for stage in count if stage not in self.workers]
        if self.supervised:
            absent += [
                f"the supervisor of {self.name(s)}" for s in count if s in self.workers.keys() - self.supervisors
            ]
        return absent

    def find(self, identity: bytes) -> Member | None:
        return self._by_identity.get(identity)

    def everybody(self) -> Iterator[Member]:
        """Workers first."""
        yield from tuple(self.workers.values())
        yield from tuple(self.supervisors.values())

    def name(self, stage: int) -> str:
        member = self.workers.get(stage) or self.supervisors.get(stage)
        return member.name if member is not None else stage_name(stage, None, self._stages[stage])

    def problem(self, member: Member) -> str | None:
        """Why this one can't join."""
        stage, layers = member.hello.stage, member.hello.layers
        if not 0 <= stage < len(self._stages):
            return f"{member.name} joined a run of {len(self._stages)} stages; start as many workers as stages"
        if layers != self._stages[stage]:
            return f"{member.name} should run {', '.join(self._stages[stage])}; give all workers the same settings"
        other = self._kind(member).get(stage)
        if other is not None and not ((other.gone and isinstance(member.hello, Hello)) or member.is_return_of(other)):
            return (
                f"{member.name} joined twice: pid {other.hello.pid} on {other.hello.host}, pid {member.hello.pid} on "
                f"{member.hello.host}; give each worker its own rank"
            )
        return None

    def add(self, member: Member) -> None:
        """Takes a member in, in the place of the incarnation, or of the connection, before it."""
        before = self._kind(member).get(member.hello.stage)
        if before is not None:
            del self._by_identity[before.identity]
            member.position, member.finished = before.position, before.finished
        self._kind(member)[member.hello.stage] = self._by_identity[member.identity] = member

    def _kind(self, member: Member) -> dict[int, Member]:
        return self.workers if isinstance(member.hello, Hello) else self.supervisors
