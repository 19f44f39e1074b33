"""A link through a process group of two, formed anew: by what the coordinator says, never by what has broken."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from coordination import LAYERS, TIMEOUT, make_client, until

from unlocked.runtime.control.client import CoordinatorClient
from unlocked.runtime.control.coordinator import Coordinator
from unlocked.runtime.engines.processes.pairs import PairLink
from unlocked.workers.errors import LinkLostError

pytestmark = pytest.mark.alone


@contextlib.contextmanager
def both_ends(timeout: float) -> Iterator[tuple[dist.Store, list[CoordinatorClient], list[PairLink]]]:
    store = dist.HashStore()
    with Coordinator(LAYERS[:2], 50) as coordinator, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(make_client(coordinator.address, stage)) for stage in range(2)]
        for client in clients:
            client.wait_started()
        links = [
            PairLink(store, client, edge=1, side=side, timeout=timeout, neighbour=f"stage {1 - side}")
            for side, client in enumerate(clients)
        ]
        yield store, clients, links


def test_what_has_broken_is_not_tried_again() -> None:
    """The dead process's address is still in the store; to connect to it would take five seconds."""
    with both_ends(timeout=0.5) as (store, _, links), ThreadPoolExecutor(2) as threads:
        list(threads.map(PairLink.form, links))
        here = "edge-1/generation-0/here-0"
        assert store.delete_key(here)
        with pytest.raises(LinkLostError, match="the link to stage 1 could not be formed"):
            links[0].form()
        assert not store.check([here])


def test_the_next_generation_is_formed_by_both() -> None:
    with both_ends(timeout=TIMEOUT) as (_, clients, links), ThreadPoolExecutor(2) as threads:
        list(threads.map(PairLink.form, links))
        links[1].broke()
        until(lambda: all(client.generations.get(1) == 1 for client in clients))
        assert all(link.is_stale for link in links)
        list(threads.map(PairLink.form, links))
        assert not any(link.is_stale for link in links)
