"""The coordinator's wire format: typed messages, a frame each, which is a msgpack map
`{"v": version, "kind": name, **fields}`.

Who speaks is settled before anything is parsed, by CurveZMQ's handshake: see `address`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from unlocked.runtime.control.world import stage_name
from unlocked.runtime.metrics.records import EpochPart, StageProgress, StepResult
from unlocked.runtime.typed import from_plain, to_plain

__all__ = [
    "CHUNK_BYTES",
    "MAX_FRAME_BYTES",
    "PROTOCOL_VERSION",
    "Abort",
    "AbortSeen",
    "Beat",
    "Bye",
    "Chunk",
    "ChunkSeen",
    "Died",
    "EdgeBroken",
    "Epoch",
    "EpochSeen",
    "Failure",
    "Files",
    "Grant",
    "Hello",
    "Kept",
    "MessageError",
    "Need",
    "Progress",
    "Rejoin",
    "Replayed",
    "Revive",
    "RunFailed",
    "SnapshotDone",
    "SnapshotSeen",
    "Start",
    "Step",
    "Stop",
    "StopRequest",
    "Supervise",
    "VersionError",
    "pack",
    "stage_name",
    "unpack",
]

PROTOCOL_VERSION = 8
CHUNK_BYTES = 128 << 10
MAX_FRAME_BYTES = 2 * CHUNK_BYTES
"""A peer that sends a larger frame is disconnected, a stranger during the handshake too: nobody can make the
coordinator swallow gigabytes."""


class MessageError(ValueError):
    """Bytes that are not a message of this run."""


class VersionError(MessageError):
    """A peer of this run that speaks another protocol version."""


class RunFailed(RuntimeError):
    """The run was aborted; the text is the first cause."""


Files = dict[str, tuple[int, str]]
"""Layer -> size in bytes and checksum of its file in a snapshot."""


# --- from a worker to the coordinator


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    stage: int
    rank: int
    pid: int
    host: str
    layers: tuple[str, ...]
    incarnation: int = 0
    """Which of the stage's workers it is; 0 is the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Supervise:
    """The hello of the process that starts a stage's workers, one after the other as they die."""

    stage: int
    rank: int
    pid: int
    host: str
    layers: tuple[str, ...]
    returns: int = 0
    """How often it has lost its connection and made it anew."""
    incarnation: int = 0
    """The latest worker that it was told to start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Died:
    """From a supervisor: its worker has ended without a word, after the items before `position`. `again`: the next one
    would not come to the same end."""

    incarnation: int
    position: int
    how: str
    again: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """A later incarnation has come to where the dead one was: it began at `position`, and did so many items again."""

    incarnation: int
    position: int
    replayed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """A stage has saved itself: it will never ask for the first `count` micro-batches of its incoming edge again. Also
    from the coordinator to the stage that has sent them."""

    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgeBroken:
    """The link into stage `edge` broke, in the state of that `generation`."""

    edge: int
    generation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """The worker lives; `position` is what its main thread completed."""

    position: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """The worker has run out of granted positions and waits at `position`."""

    position: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    progress: StageProgress


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    step: StepResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    part: EpochPart


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotDone:
    """A stage's part of a snapshot is on the disk; `files`: each of its layers' size and checksum."""

    position: int
    files: Files


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A worker's own failure. `echo`: seen while talking to a neighbour, so likely another worker's fault."""

    stage: int
    rank: int
    layer: str
    action: str
    message: str
    echo: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AbortSeen:
    """The worker knows that the run is over and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRequest:
    signal: int | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Part `index` of `count` of the worker's final payload."""

    index: int
    count: int
    data: bytes


# --- from the coordinator to a worker


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """All stages are there; the run covers the stream positions `first` to `total` - 1. `saved`: the position of the
    latest snapshot that the stage has its part in, by a worker before this one."""

    first: int
    total: int
    saved: int = 0
    clock: float = 0.0
    """Of the coordinator's machine, in seconds, when it sent this."""

    def clock_ahead(self, now: float) -> float:
        """Seconds by which a clock that says `now` on arrival is ahead of it; 0 where that may be the way's delay:
        clocks that are kept by a time server differ by less than a second."""
        ahead = now - self.clock
        return ahead if abs(ahead) > 1.0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochSeen:
    """The stage's parts of this epoch and of those before it have been counted."""

    epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotSeen:
    position: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Grant:
    """Every stage may run positions < `stop`; `lr_factor` multiplies its learning rate where the coordinator sets it
    (see `windows.EpochGate`); `mark`: the micro-batch behind which every stage saves itself, see `marks.TimedMarks`."""

    stop: int
    lr_factor: float = 1.0
    mark: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """No further grants: every stage completes the positions < `position` and finishes."""

    position: int
    signal: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Revive:
    """To a supervisor: end whatever worker there is, and start number `incarnation`."""

    incarnation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejoin:
    """The two workers of the link into stage `edge` form it anew, as that `generation`."""

    edge: int
    generation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkSeen:
    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Abort:
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Bye:
    """All payloads have arrived; the worker may go."""


_KINDS: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        *(Hello, Supervise, Died, Replayed, Revive, Kept, EdgeBroken, Rejoin),
        *(Beat, Need, Progress, Step, Epoch, SnapshotDone, Failure, AbortSeen, StopRequest, Chunk),
        *(Start, EpochSeen, SnapshotSeen, Grant, Stop, ChunkSeen, Abort, Bye),
    )
}


def pack(message: Any) -> bytes:
    """The one frame of a message."""
    return msgpack.packb({"v": PROTOCOL_VERSION, "kind": type(message).__name__, **to_plain(message)})


def unpack(frames: Sequence[bytes | memoryview]) -> Any:
    """The message in the one frame.

    Raises:
        VersionError: a message of another protocol version.
        MessageError: anything else that is not a well-formed message.
    """
    if len(frames) != 1:
        raise MessageError(f"{len(frames)} frames where a message has one")
    try:
        body = msgpack.unpackb(frames[0], strict_map_key=True)
    except Exception as error:  # msgpack documents a family of unrelated exceptions for malformed input
        raise MessageError(f"not msgpack: {error}") from error
    if not isinstance(body, dict):
        raise MessageError("not a map")
    version, kind = body.pop("v", None), body.pop("kind", None)
    if version != PROTOCOL_VERSION:
        raise VersionError(f"protocol version {version!r} where {PROTOCOL_VERSION} is spoken; install one release")
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise MessageError(f"unknown kind {kind!r:.80}")
    try:
        return from_plain(cls, body, kind)
    except ValueError as error:
        raise MessageError(str(error)) from error
