"""What a step of each layer costs, measured: the stages are cut by it."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from unlocked.models.errors import first_line
from unlocked.models.generators import SOURCES, GlobalGenerators
from unlocked.runtime.network import Network, made_up_targets
from unlocked.workers.errors import CalledExitError
from unlocked.workers.layer import Layer
from unlocked.workers.pass_layer import PassLayer

__all__ = ["Trial", "measure_costs", "measure_layers", "trials"]

Found = TypeVar("Found")


class Trial:
    """A throw-away layer with a made-up micro-batch before it."""

    def __init__(self, layer: Layer, x: Tensor, labels: Tensor, arriving: dict[str, Tensor]) -> None:
        self.layer, self.x, self.labels, self._arriving = layer, x, labels, arriving
        self.output, self.left = x, dict[str, Tensor]()

    def forward(self) -> None:
        """As in training; what leaves the layer is kept for the next one's trial."""
        if isinstance(self.layer, PassLayer):
            self.layer.begin(0, self.labels, self._arriving)
        self.output = self.layer.forward(self.x)
        if isinstance(self.layer, PassLayer):
            self.left = {name: value.clone() for name, value in self.layer.carry().items()}

    def update(self) -> None:
        """Without a look at the loss: only the time counts here."""
        self.layer.step.update(self.labels)

    def seconds(self, repeats: int = 5) -> float:
        """Of one local step, the median of `repeats` after two warm-ups."""
        times = []
        for _ in range(repeats + 2):
            start = self._now()
            self.forward()
            self.update()
            times.append(self._now() - start)
        return median(times[2:])

    def split_seconds(self, repeats: int = 5) -> tuple[float, float]:
        """Of forward and of update, in the step that took the median time of `repeats` after two warm-ups."""
        times = []
        for _ in range(repeats + 2):
            start = self._now()
            self.forward()
            passed = self._now()
            self.update()
            times.append((passed - start, self._now() - passed))
        return sorted(times[2:], key=sum)[repeats // 2]

    def _now(self) -> float:
        if self.x.device.type == "cuda":
            torch.cuda.synchronize(self.x.device)
        return time.perf_counter()


def measure_costs(
    make_layer: Callable[[int], Layer], network: Network, *, batch_size: int, device: torch.device, repeats: int = 5
) -> list[float]:
    """Seconds of one local step of every layer, the median of `repeats`. Other arguments and errors: see `trials`."""
    timed = partial(Trial.seconds, repeats=repeats)
    return list(trials(timed, make_layer, network, batch_size=batch_size, device=device))


def measure_layers(
    make_layer: Callable[[int], Layer], network: Network, *, batch_size: int, device: torch.device, repeats: int = 5
) -> list[tuple[float, float]]:
    """As `measure_costs`, but the seconds of forward and of update apart."""
    timed = partial(Trial.split_seconds, repeats=repeats)
    return list(trials(timed, make_layer, network, batch_size=batch_size, device=device))


def trials(
    look: Callable[[Trial], Found],
    make_layer: Callable[[int], Layer],
    network: Network,
    *,
    batch_size: int,
    device: torch.device,
) -> Iterator[Found]:
    """What `look` sees in every layer, which it runs forward at least once.

    Args:
        make_layer: builds throw-away layers; the network's own weights are put back afterwards.

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
    carried: dict[str, Tensor] = {}
    for index, block in enumerate(network.blocks):
        saved = {name: value.clone() for name, value in block.state_dict().items()}
        try:
            with GlobalGenerators(SOURCES, device).keyed(0):  # what an update draws here counts for nothing
                arriving = {name: carried[name] for name in channel.arriving(index)}
                layer = make_layer(index)
                layer.beside = {n: one.to(device) for n, one in network.beside_of(index, batch_size).items()}
                trial = Trial(layer, x[: channel.rows(index, batch_size)], labels, arriving)
                found = look(trial)
                x = trial.output.clone()
                carried |= trial.left
        except (Exception, SystemExit) as error:
            cause = CalledExitError(error.code) if isinstance(error, SystemExit) else error
            name = network.infos[index].name
            raise RuntimeError(f"layer {name} failed while its cost was measured: {first_line(cause)}") from error
        block.load_state_dict(saved)
        yield found
