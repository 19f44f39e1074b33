"""What the stages have reported, each thing once: a worker that does a dead one's work again reports again."""

from typing import Any

import msgpack

from unlocked.runtime.control.member import Member
from unlocked.runtime.control.messages import Chunk, Files, MessageError
from unlocked.runtime.metrics.records import EpochAggregator, EpochPart, EpochResult, StepResult

__all__ = ["Ledger"]


class Ledger:
    """Of one run of `num_stages` stages."""

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages
        self._aggregator = EpochAggregator(num_stages)
        self._latest_step = (-1, -1)
        # Position -> the parts of the stages that have saved theirs, until all have: a thousand stages that save
        # themselves for weeks would fill the memory with them.
        self._snapshots: dict[int, dict[int, Files]] = {}
        self._complete: set[int] = set()
        self._saved: dict[int, int] = {}  # stage -> position of its latest part
        self.epochs: list[EpochResult] = []
        """That all stages have reported, in order."""
        self.results: dict[int, Any] = {}
        """Stage -> its final payload."""

    @property
    def is_finished(self) -> bool:
        """All payloads are here."""
        return len(self.results) == self._num_stages

    @property
    def unfinished(self) -> list[int]:
        """Stages whose payload is not here."""
        return [stage for stage in range(self._num_stages) if stage not in self.results]

    def is_new(self, step: StepResult) -> bool:
        """Takes a reading of the training meters."""
        place, latest = (step.epoch, step.step), self._latest_step
        self._latest_step = max(place, latest)
        return place > latest

    def epoch(self, part: EpochPart) -> tuple[bool, list[EpochResult]]:
        """Takes a stage's part of an epoch: whether it is new, and the epochs that are complete with it.

        Raises:
            MessageError: it is no part of this run.
        """
        try:
            is_new = self._aggregator.is_new(part)
            done = self._aggregator.add(part)
        except ValueError as error:
            raise MessageError(str(error)) from error
        self.epochs += done
        return is_new, done

    def snapshot(self, stage: int, position: int, files: Files) -> Files | None:
        """Takes a stage's word that it has saved itself; once per position, when all stages have, the files of all."""
        self._saved[stage] = max(position, self._saved.get(stage, 0))
        if position in self._complete:
            return None
        done = self._snapshots.setdefault(position, {})
        if stage in done:
            return None
        done[stage] = files
        if len(done) < self._num_stages:
            return None
        self._complete.add(position)
        del self._snapshots[position]
        return {name: file for part in done.values() for name, file in part.items()}

    def saved(self, stage: int) -> int:
        """The position of the latest snapshot that the stage has said to have saved its part of."""
        return self._saved.get(stage, 0)

    def chunk(self, member: Member, chunk: Chunk) -> None:
        """Takes a part of a stage's final payload; `member.finished` with the last one.

        Raises:
            MessageError: another part is due.
            ValueError: the payload can't be read.
        """
        if member.finished:
            return  # by the worker before this one
        if chunk.index != len(member.chunks):
            raise MessageError(f"chunk {chunk.index} where {len(member.chunks)} is due")
        member.chunks.append(chunk.data)
        if len(member.chunks) < chunk.count:
            return
        try:
            payload = msgpack.unpackb(b"".join(member.chunks), strict_map_key=False)
        except Exception as error:  # see messages.unpack
            raise ValueError(f"{member.name} sent a final payload that can't be read: {error}") from error
        member.finished, member.chunks = True, []
        self.results[member.hello.stage] = payload
