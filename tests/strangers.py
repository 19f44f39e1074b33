"""Who comes to a port of a run's without belonging to it: raw bytes, ZeroMQ without keys or with other ones, replays,
connections that say nothing."""

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import msgpack
import zmq

from unlocked.runtime.control import messages as m
from unlocked.runtime.control.address import Address, KeyPair, dial

__all__ = ["KINDS", "Strangers", "recorded"]

KINDS = ("raw", "greeting", "large", "null", "unfinished", "plain", "other-keys", "half-open", "replay")
_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01"  # ZMTP 3.1 (RFC 37), before the mechanism's name


class Strangers:
    """They speak to `host`:`port` one after the other, as `chance` has it.

    Args:
        replay: bytes that one of a run's processes has sent to its coordinator.
    """

    def __init__(self, host: str, port: int, chance: random.Random, replay: bytes = b"") -> None:
        self._place, self._chance, self._recorded = (host, port), chance, replay
        self._open: list[socket.socket] = []
        self._context = zmq.Context()
        self._context.setsockopt(zmq.MAX_SOCKETS, 4096)

    def speak(self, kind: str) -> None:
        """One message, or as much of one as it comes to; who is not let in has spoken too."""
        with contextlib.suppress(OSError):
            getattr(self, f"_{kind.replace('-', '_')}")()

    def close(self) -> None:
        for one in self._open:
            one.close()
        self._context.destroy(linger=0)

    def _connect(self) -> socket.socket:
        one = socket.create_connection(self._place, timeout=0.5)
        self._open.append(one)
        if len(self._open) > 40:
            self._open.pop(0).close()
        return one

    def _raw(self) -> None:
        self._connect().sendall(self._chance.randbytes(self._chance.randrange(2000)))

    def _greeting(self) -> None:
        """Knows the protocol's first words, and then says something else."""
        mechanism = self._chance.choice([b"NULL", b"CURVE", b"PLAIN", b"X"]).ljust(20, b"\0")
        self._connect().sendall(_GREETING + mechanism + bytes(32) + self._chance.randbytes(300))

    def _large(self) -> None:
        """Announces a command of a gigabyte, or one that just may be, and sends what is taken of it."""
        size, sent = self._chance.choice([(1 << 30, 4 << 20), (m.MAX_FRAME_BYTES, 200_000)])
        command = b"\x06" + struct.pack(">Q", size)
        self._connect().sendall(_GREETING + b"CURVE".ljust(20, b"\0") + bytes(32) + command + bytes(sent))

    def _half_open(self) -> None:
        self._connect()

    def _replay(self) -> None:
        self._connect().sendall(self._recorded)

    def _null(self) -> None:
        with self._dealer() as dealer:
            hello = m.Hello(stage=0, rank=0, pid=1, host="elsewhere", layers=("conv1",))
            dealer.send_multipart([b"token", m.pack(self._chance.choice([hello, m.StopRequest(signal=2)]))])
            dealer.poll(5)

    def _unfinished(self) -> None:
        """A message whose last part never comes."""
        with self._dealer() as dealer:
            for _ in range(20):
                dealer.send(bytes(m.MAX_FRAME_BYTES // 2), zmq.SNDMORE)
            dealer.poll(5)

    def _plain(self) -> None:
        with self._dealer(plain=True) as dealer:
            dealer.send(msgpack.packb({"v": m.PROTOCOL_VERSION, "kind": "Hello"}))
            dealer.poll(5)

    def _other_keys(self) -> None:
        address = Address("tcp://{}:{}".format(*self._place), KeyPair.new().public)
        dealer, monitor = dial(self._context, address, KeyPair.new())
        dealer.send(m.pack(m.StopRequest(signal=2)))
        dealer.poll(5)
        dealer.disable_monitor()
        monitor.close(linger=0)
        dealer.close(linger=0)

    @contextlib.contextmanager
    def _dealer(self, plain: bool = False) -> Iterator["zmq.Socket[Any]"]:
        dealer = self._context.socket(zmq.DEALER)
        try:
            if plain:
                dealer.setsockopt(zmq.PLAIN_USERNAME, b"root")
                dealer.setsockopt(zmq.PLAIN_PASSWORD, b"root")
            dealer.setsockopt(zmq.SNDTIMEO, 20)
            dealer.connect("tcp://{}:{}".format(*self._place))
            with contextlib.suppress(zmq.Again):
                yield dealer
        finally:
            dealer.close(linger=0)


@contextlib.contextmanager
def recorded(host: str, port: int) -> Iterator[tuple[int, bytearray]]:
    """A relay to a port, and what its first client sends there."""
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def relay() -> None:
            with contextlib.suppress(OSError):
                client, _ = listener.accept()
                server = socket.create_connection((host, port))
                back = threading.Thread(target=_pump, args=(server, client, None), daemon=True)
                back.start()
                _pump(client, server, heard)

        threading.Thread(target=relay, daemon=True).start()
        yield listener.getsockname()[1], heard


def _pump(source: socket.socket, target: socket.socket, heard: bytearray | None) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            if heard is not None:
                heard += data
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
