"""All ranks begin with the same weights, though each has built the model by itself and trains a part of it."""

import json
import weakref
from collections.abc import Mapping
from datetime import timedelta

import msgpack
import torch
import torch.distributed as dist
from torch import nn

from unlocked.models import Block
from unlocked.runtime.control.messages import RunFailed
from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes.rendezvous import exchange
from unlocked.runtime.job import Job
from unlocked.runtime.tensors import pack_tensors, unpack_tensors, weights_digest

__all__ = ["adopt_weights", "agree_on_start_weights", "remember_owners"]

_CHUNK_BYTES = 4 << 20  # the store takes at most 8 MiB in one piece

# What this process has trained, and what another rank has: there the weights here are behind. By a layer's body, since
# modules of one's own are wrapped into a new block for every run.
_trained_here: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_trained_elsewhere: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def agree_on_start_weights(job: Job, store: dist.Store, world: World, timeout: float) -> None:
    """Brings what other ranks have trained in a run before to this one, then compares all weights with rank 0's.

    A resumed run takes its weights from the snapshot instead.

    Raises:
        ValueError: a layer starts from other weights here than in rank 0; names it.
        RunFailed: the rank that holds a layer's weights did not send them within `timeout` seconds.
    """
    if job.resume is not None:
        return
    blocks = job.network.blocks
    for index, block in enumerate(blocks):
        if block.body in _trained_here:
            _send(block, f"weights-{index}", store)
    for index, block in enumerate(blocks):
        if block.body in _trained_elsewhere:
            _receive(block, f"weights-{index}", store, world, timeout)

    def digests() -> dict[str, str]:
        return {block.name: weights_digest(block.state_dict().items()) for block in blocks}

    theirs = exchange(store, world, "start-weights", digests if world.rank == 0 else None, timeout)
    mine = theirs if world.rank == 0 else digests()
    if wrong := [name for name, digest in mine.items() if digest != theirs.get(name)]:
        raise ValueError(
            f"the start values of layer {', '.join(wrong)} are other ones in rank {world.rank} than in rank 0; build "
            "the model in the same way on all ranks, after torch.manual_seed(...), load the same weights, or give "
            "Trainer(redraw=True)"
        )


def remember_owners(job: Job, own: range) -> None:
    """This rank trains the layers `own` now, the others train the rest."""
    for index, block in enumerate(job.network.blocks):
        trained, other = (_trained_here, _trained_elsewhere)[:: 1 if index in own else -1]
        trained.add(block.body)
        other.discard(block.body)


def adopt_weights(job: Job, own: range, weights: Mapping[str, torch.Tensor]) -> None:
    """Brings what a worker has trained into the modules of this process, which has only watched.

    Args:
        own: the layers that it has trained.
        weights: by the names that `Layer.tensors` gives them.
    """
    with torch.no_grad():
        for index in own:
            block = job.network.blocks[index]
            for name, value in block.state_dict().items():
                value.copy_(weights[f"{job.network.names[index]}.block.{name}"])


def _send(block: Block, key: str, store: dist.Store) -> None:
    data = msgpack.packb(pack_tensors(block.state_dict().items()))
    chunks = [data[start : start + _CHUNK_BYTES] for start in range(0, len(data), _CHUNK_BYTES)]
    for number, chunk in enumerate(chunks):
        store.set(f"{key}-{number}", chunk)
    store.set(key, json.dumps(len(chunks), allow_nan=False))


def _receive(block: Block, key: str, store: dist.Store, world: World, timeout: float) -> None:
    try:
        store.wait([key], timedelta(seconds=timeout))
    except RuntimeError as error:
        raise RunFailed(
            f"layer {block.name}: the rank that trained it in the run before did not send its weights within "
            f"{timeout:g} s; give all ranks the same model"
        ) from error
    names = [f"{key}-{number}" for number in range(json.loads(store.get(key)))]
    weights = unpack_tensors(msgpack.unpackb(b"".join(store.get(name) for name in names)))
    with torch.no_grad():
        for name, value in block.state_dict().items():
            value.copy_(weights[name])
    if store.add(f"{key}-read", 1) == world.size - 1:
        for name in names:
            store.delete_key(name)
