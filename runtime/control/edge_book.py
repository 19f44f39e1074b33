"""What the coordinator knows of the links between workers: how often each was formed, and what may be forgotten."""

from collections.abc import Callable
from typing import Any

from unlocked.runtime.control import messages as m
from unlocked.runtime.control.member import Member, Roster

__all__ = ["EdgeBook"]


class EdgeBook:
    """Of one run; its methods are called in the coordinator's thread. A link is named by the stage that it leads into.

    Args:
        send: takes a connection's identity and a message.
    """

    def __init__(self, roster: Roster, send: Callable[[bytes, Any], bool]) -> None:
        self._roster, self._send = roster, send
        self._generations: dict[int, int] = {}
        self._kept: dict[int, int] = {}

    def kept(self, worker: Member, message: m.Kept) -> None:
        """A stage has saved itself: its sender's log may go on."""
        stage = worker.hello.stage
        self._kept[stage] = max(message.count, self._kept.get(stage, 0))
        self._tell(stage - 1, m.Kept(count=self._kept[stage]))

    def broken(self, worker: Member, message: m.EdgeBroken) -> None:
        """One end has seen the link break; the first word counts."""
        if message.generation == self._generations.get(message.edge, 0):
            self._form(message.edge)

    def came_back(self, worker: Member) -> None:
        """A stage has a new worker, whose links are all to be formed anew; a supervisor has none."""
        if isinstance(worker.hello, m.Supervise):
            return
        stage = worker.hello.stage
        if stage + 1 in self._kept:
            self._tell(stage, m.Kept(count=self._kept[stage + 1]))
        for edge in (stage, stage + 1):
            self._form(edge)

    def _form(self, edge: int) -> None:
        self._generations[edge] = generation = self._generations.get(edge, 0) + 1
        for stage in (edge - 1, edge):
            self._tell(stage, m.Rejoin(edge=edge, generation=generation))

    def _tell(self, stage: int, message: Any) -> None:
        worker = self._roster.workers.get(stage)
        if worker is not None and not worker.gone:
            self._send(worker.identity, message)
