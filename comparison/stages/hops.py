"""What a hop between two processes costs: an edge whose stages do nothing, seconds per micro-batch."""

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from unlocked.runtime.control.world import World
from unlocked.runtime.engines.processes.links import link_stages
from unlocked.runtime.saving.whole_file import write_json
from unlocked.workers.actions import Item
from unlocked.workers.edges import SlotLayout

__all__ = ["measure_hops"]


def measure_hops(
    shapes: Mapping[str, tuple[int, ...]], *, batch_size: int, transport: str, batches: int
) -> dict[str, tuple[int, float]]:
    """Bytes and seconds per micro-batch of each edge, sent and received in a row between two new processes.

    Args:
        shapes: name -> one sample's activations.
        transport: "shared" or "group", as for the processes engine.
        batches: micro-batches per shape.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(folder, dict(shapes), batch_size, transport, batches), nprocs=2)
        content: dict[str, tuple[int, float]] = json.loads((Path(folder) / "hops.json").read_text())
        return content


def _worker(
    rank: int, folder: str, shapes: dict[str, tuple[int, ...]], batch_size: int, transport: str, batches: int
) -> None:
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    results: dict[str, tuple[int, float]] = {}
    for name, shape in shapes.items():
        layout = SlotLayout(batch_size, shape)
        store = dist.FileStore(str(Path(folder) / f"store-{len(results)}"), 2)
        inbox, outbox = link_stages(
            store,
            World(rank, 2, rank, 2, "127.0.0.1", 0),
            layout if rank else None,
            None if rank else layout,
            transport=transport,
            depth=4,
            device=cpu,
            timeout=60,
            names=["stage 0", "stage 1"],
        )
        items = [Item(i, "train", 0, i, batch_size, False) for i in range(batches)]
        x, labels = layout.views(layout.allocate(cpu), batch_size)
        x.normal_()
        labels.zero_()
        began = time.perf_counter()
        if inbox is not None:
            inbox.expect(items)
            for item in items:
                inbox.receive(item)
                inbox.release()
        if outbox is not None:
            for item in items:
                out, out_labels = outbox.reserve(item)
                out.copy_(x)  # as a layer would write it: the bytes are new to the neighbour's core
                out_labels.copy_(labels)
                outbox.send(item)
            outbox.flush()
        results[name] = (layout.nbytes(batch_size), (time.perf_counter() - began) / batches)
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank == 1:
        write_json(Path(folder) / "hops.json", results)
