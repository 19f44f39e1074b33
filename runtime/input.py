"""Which source stage 0 gets: the data on its device, or a thread that reads ahead on the host."""

import torch

from unlocked.data import ImageDataset
from unlocked.kernels.images import load_batch as host_load_batch
from unlocked.runtime.plan import StreamPlan
from unlocked.workers.prefetch import Prefetcher
from unlocked.workers.source import BatchSource, LoadBatch, Source

__all__ = ["make_source"]

_READ_AHEAD = 2  # micro-batches, for streamed data unless the settings say otherwise
_DEVICE_SHARE = 0.5  # of a GPU's free memory that resident data may take: the rest is for layers and edges


def make_source(
    train: ImageDataset,
    test: ImageDataset | None,
    *,
    plan: StreamPlan,
    start: int,
    seed: int,
    device: torch.device,
    load_batch: LoadBatch,
    prefetch: int | None,
    timeout: float,
) -> Source:
    """The source of stage 0. Every choice gives the same bits: the input operation rounds alike on every device.

    Args:
        start: the first stream position that is asked for.
        load_batch: the input operation on `device`.
        prefetch: micro-batches to assemble ahead on the host; 0: none, each when stage 0 asks for it. None: a few
            where the data is streamed, none where it is resident.
        timeout: seconds that stage 0 waits for a micro-batch.
    """
    resident = not any(_is_streamed(data, device) for data in (train, test) if data is not None)
    home = device if resident else torch.device("cpu")
    source = BatchSource(
        train.to(home),
        None if test is None else test.to(home),
        seed=seed,
        batch_size=plan.batch_size,
        eval_batch_size=plan.eval_batch_size,
        load_batch=load_batch if home == device else host_load_batch,
    )
    depth = prefetch if prefetch is not None else 0 if resident else _READ_AHEAD
    if home == device and (depth == 0 or device.type == "cuda"):
        return source  # a GPU assembles resident micro-batches itself, faster than a host could send them
    return Prefetcher(
        source.load,
        plan.items(start),
        depth=max(depth, 1),
        rows=plan.max_rows,
        sample_shape=train.image_shape,
        device=device,
        timeout=timeout,
    )


def _is_streamed(data: ImageDataset, device: torch.device) -> bool:
    """The dataset's own choice; else whether it is too large for the device."""
    if data.streamed is not None:
        return data.streamed
    if device.type != "cuda" or data.images.is_cuda:
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return data.images.nbytes > _DEVICE_SHARE * free
