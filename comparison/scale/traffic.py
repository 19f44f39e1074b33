"""What the coordinator hears and says in a second, counted in this release's own messages.

Each worker tells of its progress and that it lives, each supervisor that it lives (`control.client`,
`control.supervisor`); the coordinator pings everybody (`control.pulse`) and grants windows to the workers
(`control.windows`, which is asked itself). Bytes are those of the packed messages and of what CurveZMQ (RFC 26) and
ZMTP (RFC 37) put around each.
"""

from dataclasses import dataclass

from unlocked.runtime.control import messages as m
from unlocked.runtime.control.client import PROGRESS_SECONDS
from unlocked.runtime.control.pulse import MOST_PINGS, PING_SECONDS
from unlocked.runtime.control.windows import WindowPolicy
from unlocked.runtime.metrics.records import EpochPart, StageProgress

__all__ = ["Traffic", "coordinator_traffic"]

BEAT_SECONDS = 1.0  # of a worker and of a supervisor
_CURVE_BYTES = 8 + 8 + 16 + 1  # a MESSAGE command: its name, a short nonce, the box's authenticator, the frame's flags
_SHORT_FRAME = 255
_LOSSES = (("conv11", 0.123456789),)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Of one coordinator, per second; an epoch's reports per epoch."""

    heard: float
    """Messages from workers and supervisors."""
    said: float
    """Messages to them."""
    heard_bytes: float
    said_bytes: float
    epoch_messages: int
    """Once an epoch, in about the time that the pipeline takes to drain: one of each stage."""
    epoch_bytes: int

    @property
    def bytes_per_second(self) -> float:
        return self.heard_bytes + self.said_bytes


def coordinator_traffic(num_stages: int, rate: float, *, queue_depth: int = 2, layers: int = 1) -> Traffic:
    """Of a run of `num_stages` stages of `layers` layers each, which do `rate` micro-batches a second.

    Raises:
        ValueError: a number that is not positive.
    """
    if num_stages < 1 or not rate > 0 or layers < 1:
        raise ValueError(f"{num_stages} stages of {layers} layers at {rate} micro-batches/s; give positive numbers")
    progress_rate = min(1 / PROGRESS_SECONDS, rate)  # after a micro-batch, and no more often than that
    beat = wire_bytes(m.Beat(position=10**6))
    pings = 2 * num_stages / max(PING_SECONDS, 2 * num_stages / MOST_PINGS)
    grants = num_stages * _grants_per_second(num_stages, rate, queue_depth)
    part = EpochPart(stage=0, epoch=100, local_losses=_LOSSES * layers, seconds=12.3456789)
    return Traffic(
        heard=num_stages * (progress_rate + 2 / BEAT_SECONDS),
        said=pings + grants,
        heard_bytes=num_stages * (progress_rate * wire_bytes(_progress(layers)) + 2 / BEAT_SECONDS * beat),
        said_bytes=pings * beat + grants * wire_bytes(m.Grant(stop=10**6)),
        epoch_messages=num_stages,
        epoch_bytes=num_stages * wire_bytes(m.Epoch(part=part)),
    )


def wire_bytes(message: object) -> int:
    """Of one message on a connection, without TCP's and IP's own."""
    size = len(m.pack(message)) + _CURVE_BYTES
    return size + (2 if size <= _SHORT_FRAME else 9)


def _progress(layers: int) -> m.Progress:
    return m.Progress(
        progress=StageProgress(
            stage=100,
            position=10**6,
            epoch=100,
            images=10**8,
            busy_seconds=1234.56789,
            wait_seconds=1234.56789,
            seconds=2469.13578,
            queue_fill=0.123456789,
            local_losses=_LOSSES * layers,
        )
    )


def _grants_per_second(num_stages: int, rate: float, queue_depth: int) -> float:
    """How often the coordinator's own policy grants more to a stream of this rate, of which it hears from some stage at
    every moment."""
    policy = WindowPolicy(0, 1 << 60, minimum=2 * (num_stages + queue_depth))
    looks, seconds = 0.01, 60.0
    grants, before = 0, int(30.0 / looks)  # by then the policy knows the rate
    for look in range(int((30.0 + seconds) / looks)):
        policy.observe(int(rate * look * looks), look * looks)
        grants += policy.extend() and look >= before
    return grants / seconds
