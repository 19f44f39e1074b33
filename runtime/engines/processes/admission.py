"""Whom the coordinator knows: the processes that have left their public keys in the run's store."""

import torch.distributed as dist

from unlocked.runtime.control.address import KeyPair
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes.rendezvous import connect_again

__all__ = ["Admission", "new_keys"]


def new_keys(store: dist.Store) -> KeyPair:
    """This rank's keys in this run, before it speaks to the coordinator; those of all its incarnations."""
    keys = KeyPair.new()
    store.set(_name(keys.public), "")
    return keys


class Admission:
    """Whether a public key is one of the run's; called in the coordinator's thread, which has its own connection to the
    store: the main thread may wait in its one."""

    def __init__(self, world: World, timeout: float) -> None:
        self._world, self._timeout = world, timeout
        self._store: dist.Store | None = None
        self._known: set[bytes] = set()

    def __call__(self, key: bytes) -> bool:
        if key not in self._known:
            try:
                if self._store is None:
                    self._store = connect_again(self._world, self._timeout)
                if not self._store.check([_name(key)]):
                    return False
            except (ValueError, RuntimeError):  # the store is gone: whoever was not there before is not let in
                return False
            self._known.add(key)
        return True


def _name(key: bytes) -> str:
    return f"public-key-{key.decode()}"
