"""Every launcher of the Triton backend through Triton's real compiler, on a machine without a GPU: a script.

    python triton_without_device.py

Triton is given a driver for an H100 that isn't there. All is real up to the call that would start the kernel: what
the launchers pass, how Triton specialises it, the compiled binary. Prints one JSON object per launch: kernel, grid,
bytes of the binary and of its shared memory.
"""

import json
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from unlocked.kernels import images, reference
from unlocked.kernels import triton as fused
from unlocked.kernels.triton import optim


class _Utils:
    """What Triton asks of CUDA's driver."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[object, str, int, int, int]:
        assert binary[:4] == b"\x7fELF"
        return object(), f"{name} {len(binary)} {shared}", 0, 0, 1024

    @staticmethod
    def unload_module(module: object) -> None:
        pass


class _Launcher:
    """In the place of Triton's own, which is compiled against CUDA's driver."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._parameters = len(source.signature)

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        arguments = rest[4:]  # after two kinds of metadata and two hooks
        assert len(arguments) == self._parameters
        assert all(type(size) is int and size > 0 for size in (x, y, z))
        name, binary, shared = function.split()
        sizes = {"binary_bytes": int(binary), "shared_bytes": int(shared)}
        print(json.dumps({"kernel": name, "grid": (x, y, z), **sizes}))


class _Driver:
    utils = _Utils()
    launcher_cls = _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _heads() -> None:
    for batch, rows, classes, options in (
        (5, 6, None, {}),
        (5, 6, 0, {}),
        (2049, 6, 4, {"basis_gradient": True}),
        (5, 40, 35, {"normalize": False, "label_smoothing": 0.1}),
    ):
        latents, labels = torch.randn(batch, 24), torch.zeros(batch, dtype=torch.int64)
        modulation = None if classes is None else torch.randn((rows, classes) if classes else (rows,))
        fused.local_head(latents, labels, torch.randn(rows, 24), modulation, **options)  # type: ignore[arg-type]
    totals = torch.zeros(3, dtype=torch.float64)
    fused.local_head(torch.randn(5, 10).half(), torch.arange(5), None, normalize=False, totals=totals)


def _norm_acts() -> None:
    cases: list[tuple[tuple[int, ...], torch.dtype, int, reference.PoolKind]] = [
        ((3, 5, 8, 8), torch.float32, 2, "max"),
        ((20, 8, 8, 8), torch.bfloat16, 4, "average"),
        ((20, 8, 6, 6), torch.float16, 2, "max"),
    ]
    for shape, dtype, latent_size, pool in cases:
        conv, vectors = torch.randn(shape, dtype=dtype), torch.ones(4, shape[1]).unbind()
        result = fused.norm_act_forward(conv, *vectors, latent_size=latent_size, pool=pool, pool_size=2)
        kept = (result.mean, result.rstd, vectors[0], vectors[1])
        sums = (result.mask_sums, result.mask_xhat_sums)
        fused.norm_act_backward(result.latents, conv, *kept, *sums, latent_size=latent_size)
        fused.norm_act_backward_full(conv, conv, *kept)
        source, kernel = torch.randn(shape[0], 4, *shape[2:], dtype=dtype), torch.randn(shape[1], 4, 3, 3, dtype=dtype)
        state = (result.latents, conv, *kept, *sums, source, kernel)
        fused.norm_act_weight_grad(*state, padding=(1, 1), latent_size=latent_size)


def _inside_blocks() -> None:
    """Sizes of one too, which Triton takes for constants."""
    for shape, dtype in (
        ((3, 5, 8, 8), torch.float32),
        ((20, 64, 6, 4), torch.bfloat16),
        ((1, 1, 2, 2), torch.float16),
    ):
        image = torch.randn(shape).to(dtype, memory_format=torch.channels_last)
        for latent_size, slope in ((2, 0.0), (1, 0.2), (1, 1)):
            y, latents = fused.sum_act_forward(image, image, latent_size, slope)
            fused.sum_act_backward(latents, y, latent_size, slope)
        pooled, places = fused.max_pool_forward(image)
        fused.max_pool_backward(pooled, places, *shape[2:])
        fused.max_pool_backward(pooled, places, shape[2] + 1, shape[3] + 1)
    for shape, dtype in (((2, 65, 33), torch.float32), ((4, 16, 64), torch.bfloat16), ((1, 1, 1), torch.float16)):
        x = torch.randn(shape).to(dtype)
        fused.gelu_backward(x, fused.gelu_forward(x)[1])
        fused.gelu_backward(x[:, :1].expand(shape), fused.gelu_forward(x, in_place=True)[1])
    fused.gelu_backward(x[0, 0], x[0, 0].clone())


def _load_batches() -> None:
    data: dict[str, Tensor] = {
        "images": torch.zeros(20, 3, 8, 8, dtype=torch.uint8),
        "labels": torch.zeros(20, dtype=torch.int64),
        "order": torch.arange(20),
        "start": torch.tensor(0),
        "epoch": torch.tensor(0),
        "mean": torch.zeros(3),
        "inv_std": torch.ones(3),
    }
    fused.load_batch(**data, size=4, seed=0)
    boxes = images.make_erase_boxes(8, 8)
    fused.load_batch(**data, size=4, seed=-1, flip=True, crop_padding=1, erase_probability=0.5, erase_boxes=boxes)


def _optimizers() -> None:
    for kind in optim.KINDS:
        for count in (1, 3):
            fused_optimizer = optim.FusedOptimizer([torch.zeros(5 + 1500 * i) for i in range(count)], kind)
            fused_optimizer.train()
            fused_optimizer.step([torch.zeros(5 + 1500 * i) for i in range(count)])
            fused_optimizer.bfloat16_of(fused_optimizer.param_groups[0]["params"][0])
            types = [torch.float32 if i % 2 else torch.bfloat16 for i in range(count)]
            fused_optimizer.step([torch.zeros(5 + 1500 * i, dtype=types[i]) for i in range(count)])


if __name__ == "__main__":
    triton.runtime.driver.set_active(_Driver())
    _heads()
    _norm_acts()
    _inside_blocks()
    _load_batches()
    _optimizers()
