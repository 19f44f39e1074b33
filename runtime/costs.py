"""What a step of each layer costs, measured: the stages are cut by it."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor

from unlocked.models.errors import first_line
from unlocked.models.generators import SOURCES, GlobalGenerators
from unlocked.runtime.network import Network, made_up_targets
from unlocked.workers.errors import CalledExitError
from unlocked.workers.layer import Layer
from unlocked.workers.passing import PassLayer

__all__ = ["measure_costs"]


def measure_costs(
    make_layer: Callable[[int], Layer], network: Network, *, batch_size: int, device: torch.device, repeats: int = 5
) -> list[float]:
    """Seconds of one local step of every layer, the median of `repeats` after two warm-ups.

    `make_layer` builds throw-away layers; the network's own weights are put back afterwards.

    Raises:
        RuntimeError: a layer or its rule fails; names the layer.
    """
    generator = torch.Generator().manual_seed(0)
    channel = network.side_channel
    x = torch.randn(channel.rows(0, batch_size), *network.input_shape, generator=generator).to(device)
    if not network.input_dtype.is_floating_point:
        x = torch.zeros_like(x, dtype=network.input_dtype)  # a token that every vocabulary has
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    labels = made_up_targets(network, batch_size, generator).to(device)
    costs = []
    carried: dict[str, Tensor] = {}
    with GlobalGenerators(SOURCES, device).keyed(0):  # what an update draws here counts for nothing
        for index, block in enumerate(network.blocks):
            saved = {name: value.clone() for name, value in block.state_dict().items()}
            try:
                x = x[: channel.rows(index, batch_size)]
                arriving = {name: carried[name] for name in channel.arriving(index)}
                layer = make_layer(index)
                layer.beside = {n: one.to(device) for n, one in network.beside_of(index, batch_size).items()}
                seconds, x, left = _measure(layer, x, labels, arriving, repeats)
                carried |= left
            except (Exception, SystemExit) as error:
                cause = CalledExitError(error.code) if isinstance(error, SystemExit) else error
                name = network.infos[index].name
                raise RuntimeError(f"layer {name} failed while its cost was measured: {first_line(cause)}") from error
            costs.append(seconds)
            block.load_state_dict(saved)
    return costs


def _measure(
    layer: Layer, x: Tensor, labels: Tensor, arriving: Mapping[str, Tensor], repeats: int
) -> tuple[float, Tensor, dict[str, Tensor]]:
    """The median of the seconds that a step takes, the layer's output, and what leaves on the side channel."""
    times = []
    left: dict[str, Tensor] = {}
    for _ in range(repeats + 2):
        start = _now(x.device)
        if isinstance(layer, PassLayer):
            layer.begin(0, labels, arriving)
        out = layer.forward(x)
        if isinstance(layer, PassLayer):
            left = {name: value.clone() for name, value in layer.carry().items()}
        layer.step.update(labels)  # not `update`, which minds the loss: only the time counts here
        times.append(_now(x.device) - start)
    return median(times[2:]), out.clone(), left


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
