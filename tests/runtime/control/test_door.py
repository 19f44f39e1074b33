"""A closed door keeps strangers out and lets nobody go who is in."""

import socket
import sys

import pytest
from coordination import LAYERS, TIMEOUT, in_threads, make_client

from unlocked.runtime.control.address import Address
from unlocked.runtime.control.coordinator import Coordinator


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can drop packets to a listening socket")
def test_who_comes_after_the_start_takes_no_descriptor() -> None:
    with Coordinator(LAYERS, 100) as coordinator:
        host, port = Address.parse(coordinator.address).endpoint.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), timeout=TIMEOUT):
            pass  # before the start anybody may knock

        def work(stage: int) -> int:
            with make_client(coordinator.address, stage) as client:
                client.wait_started()
                with pytest.raises(OSError, match="timed out"):
                    socket.create_connection((host, int(port)), timeout=0.2)
                count = sum(len(window) for window in client.windows(TIMEOUT))
                client.finish({})
                return count

        assert in_threads(work) == [100] * 3
