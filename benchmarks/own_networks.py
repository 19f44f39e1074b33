"""Networks as a user writes them, trained by LLS: a plain PyTorch loop, the same compiled, and this runtime.

    python benchmarks/own_networks.py --json own_networks.json          # three quarters of an hour, two cores
    python benchmarks/own_networks.py --only conv residual encoder --contenders plain ours --repeats 5

Images/s at batch 64, medians of turns, float32 and bfloat16. Contenders:
  plain      detach, block, pooled latents, loss, backward, torch's fused Adam; autocast for bfloat16
  compiled   the same with a torch.compile graph per layer
  whole      the same with one graph for all layers' forwards and losses
  ours       the local steps of this runtime, on the same micro-batch
  processes  this runtime in two processes of one thread each, data and all
`allowed` is what the step's products and convolutions alone take at the rate of a matrix product, measured here.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked import models
from unlocked.comparison.environment import environment
from unlocked.kernels.trial import product_rate
from unlocked.rules import LLS
from unlocked.runtime import Processes, Trainer
from unlocked.runtime.network import Network, build_layer, build_network
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain
from unlocked.workers.fused import choose_step

__all__ = ["CONTENDERS", "NETWORKS", "PlainLoop", "main"]

BATCH, CLASSES = 64, 10
CPU = torch.device("cpu")


class Residual(nn.Module):
    """The basic block of He et al. (CVPR 2016), as one writes it."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down: nn.Module | None = None
        if stride != 1 or inside != out:
            self.down = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.down is None else self.down(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        result: Tensor = self.relu(out)
        return result


class Encoder(nn.Module):
    """A pre-norm transformer layer, as one writes it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class Patches(nn.Module):
    """Images to tokens that know their place."""

    def __init__(self, width: int, patch: int, tokens: int) -> None:
        super().__init__()
        self.project, self.place = nn.Conv2d(3, width, patch, patch), nn.Parameter(0.02 * torch.randn(tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.project(x).flatten(2).transpose(1, 2) + self.place
        return result


class Mean(nn.Module):
    """Tokens to class scores."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x.mean(1))
        return result


def conv(widths: tuple[int, ...]) -> nn.Sequential:
    pairs = zip((3, *widths[:-1]), widths, strict=True)
    blocks = [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)) for a, b in pairs]
    for block in blocks[1:]:
        block.append(nn.MaxPool2d(2))
    return nn.Sequential(*blocks, _classifier(widths[-1]))


def small_conv() -> nn.Sequential:
    """The authors' SmallConv, written out."""
    pools = (nn.MaxPool2d(2), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2))
    blocks = [
        nn.Sequential(*block[:3], pool) for block, pool in zip(list(conv((32, 64, 128)))[:-1], pools, strict=True)
    ]
    linear = nn.Sequential(nn.Flatten(), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True))
    return nn.Sequential(*blocks, linear, nn.Linear(512, CLASSES))


def residual(widths: tuple[int, ...]) -> nn.Sequential:
    first = widths[0]
    stem = nn.Sequential(nn.Conv2d(3, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU(inplace=True))
    pairs = zip((first, *widths[:-1]), widths, strict=True)
    blocks = [Residual(a, b, 1 if a == b else 2) for a, b in pairs]
    return nn.Sequential(stem, *blocks, _classifier(widths[-1]))


def encoder(width: int, depth: int, heads: int) -> nn.Sequential:
    return nn.Sequential(Patches(width, 4, 64), *(Encoder(width, heads) for _ in range(depth)), Mean(width))


def group(widths: tuple[int, ...]) -> nn.Sequential:
    pairs = zip((3, *widths[:-1]), widths, strict=True)
    blocks = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU()) for a, b in pairs]
    return nn.Sequential(*blocks, _classifier(widths[-1]))


def row(widths: tuple[int, ...]) -> nn.Sequential:
    pairs = zip((3, *widths[:-1]), widths, strict=True)
    blocks = [nn.Sequential(nn.Conv1d(a, b, 5, 2, 2), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairs]
    return nn.Sequential(*blocks, nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES)))


def _classifier(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "conv": (partial(conv, (32, 64, 128, 256)), (3, 32, 32)),
    "residual": (partial(residual, (32, 64, 128, 256)), (3, 32, 32)),
    "encoder": (partial(encoder, 128, 4, 4), (3, 32, 32)),
    "SmallConv": (small_conv, (3, 32, 32)),
    "group": (partial(group, (64, 128, 256)), (3, 32, 32)),
    "row": (partial(row, (64, 128, 256)), (3, 1024)),
    "conv of other widths": (partial(conv, (48, 96, 192)), (3, 32, 32)),
    "residual of other widths": (partial(residual, (24, 24, 48, 96, 192)), (3, 32, 32)),
    "encoder of other widths": (partial(encoder, 192, 3, 3), (3, 32, 32)),
}
"""Name -> what makes it, and one sample's shape."""


class PlainLoop:
    """LLS as one writes it: no code is shared with the runtime but the model.

    Args:
        compiled: "layers", "all" or "".
    """

    def __init__(self, model: nn.Sequential, network: Network, *, bfloat16: bool, compiled: str = "") -> None:
        self.layers = list(model)
        self.bfloat16, self.temperature = bfloat16, 0.5
        self.sides = [info.latent_size for info in network.infos]
        self.tokens = [info.layout == "tokens" for info in network.infos]
        frequencies = torch.linspace(50, 512, CLASSES)[:, None]
        sizes = [info.num_latents for info in network.infos[:-1]]
        self.bases = [torch.sin(frequencies * torch.arange(size, dtype=torch.float32)) for size in sizes]
        self.optimizers = [torch.optim.Adam(layer.parameters(), lr=0.01, fused=True) for layer in self.layers]
        self.forward = self._forward
        self.all = self._all
        if compiled == "layers":
            graphs = [torch.compile(partial(self._forward, index), dynamic=False) for index in range(len(self.layers))]
            self.forward = lambda index, x, labels: graphs[index](x, labels)  # type: ignore[method-assign]
        self.whole = torch.compile(self._all, dynamic=False) if compiled == "all" else None

    def step(self, x: Tensor, labels: Tensor) -> None:
        """One micro-batch through all layers."""
        if self.whole is not None:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.whole(x, labels).backward()
            for optimizer in self.optimizers:
                optimizer.step()
            return
        for index, optimizer in enumerate(self.optimizers):
            x, loss = self.forward(index, x.detach(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def _all(self, x: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros(())
        for index in range(len(self.layers)):
            x, loss = self._forward(index, x.detach(), labels)
            total = total + loss
        return total

    def _forward(self, index: int, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            x = self.layers[index](x)
        if index == len(self.bases):
            return x, F.cross_entropy(x.float(), labels)
        side = self.sides[index]
        if x.dim() == 4:
            latents = F.adaptive_avg_pool2d(x, side).flatten(1)
        else:
            latents = F.adaptive_avg_pool1d(x.transpose(1, 2) if self.tokens[index] else x, side).flatten(1)
        scores = F.normalize(latents.float()) @ self.bases[index].T / self.temperature
        return x, F.cross_entropy(scores, labels)


def steps_of(contender: str, name: str, precision: str) -> Callable[[Tensor, Tensor], None]:
    """What trains one micro-batch."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model: Any = make()
    if contender == "ours" and name == "SmallConv":
        model = models.small_conv()  # the library's own, whose latents stand before the pools, as the authors' do
    network = build_network(model, input_shape=shape, num_classes=CLASSES, seed=0)
    if contender != "ours":
        compiled = {"plain": "", "compiled": "layers", "whole": "all"}[contender]
        model.train()
        return PlainLoop(model, network, bfloat16=precision == "bf16", compiled=compiled).step
    layers = [
        build_layer(
            network,
            index,
            rule=LLS(temperature=0.5),
            optimizer=partial(torch.optim.Adam, lr=0.01),
            device=CPU,
            step=choose_step("auto", CPU),
            precision=precision,
        )
        for index in range(len(network.blocks))
    ]

    def step(x: Tensor, labels: Tensor) -> None:
        for layer in layers:
            x = layer.forward(x)
            layer.update(labels)

    return step


def rate_of_processes(name: str, precision: str, steps: int) -> float:
    """Images/s of two processes with a thread each."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    data = torch.randn(2048, *shape), torch.randint(CLASSES, (2048,))
    trainer = Trainer(
        make(),
        rule=LLS(temperature=0.5),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        engine=Processes(stages=2),
        threads=1,
        precision=precision,
        progress=False,
    )
    result = trainer.fit(data, epochs=-(-steps // 32), batch_size=BATCH, max_steps=steps)
    return result.images_per_second


def timed(step: Callable[[Tensor, Tensor], None], shape: tuple[int, ...], steps: int) -> Iterator[float]:
    """Images/s, turn by turn; what is done once comes before the first."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(BATCH, *shape, generator=generator), torch.arange(BATCH) % CLASSES
    for _ in range(3):
        step(x, labels)
    while True:
        began = time.perf_counter()
        for _ in range(steps):
            step(x, labels)
        yield steps * BATCH / (time.perf_counter() - began)


def measured(name: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every contender's images/s, in turns, and what arithmetic allows."""
    make, shape = NETWORKS[name]
    torch._dynamo.reset()  # else the networks before count as recompilations, of which there is a limit
    turns: dict[str, Callable[[], float]] = {}
    for contender in options.contenders:
        if contender == "processes":
            turns[contender] = partial(rate_of_processes, name, precision, options.process_steps)
        else:
            turns[contender] = timed(steps_of(contender, name, precision), shape, options.steps).__next__
    rates: dict[str, list[float]] = {contender: [] for contender in turns}
    for _ in range(options.repeats):
        for contender, turn in turns.items():
            torch.set_num_threads(options.threads)  # a run leaves its own number
            rates[contender].append(turn())
    torch.manual_seed(0)
    optimizer = partial(torch.optim.Adam, lr=0.01)
    trainer = Trainer(make(), rule=LLS(), optimizer=optimizer, precision=precision, threads=options.threads)
    explained = trainer.explain((torch.zeros(BATCH, *shape), torch.arange(BATCH) % CLASSES), batch_size=BATCH)
    flops = sum(layer.flops for layer in explained.layers)
    allowed = BATCH * product_rate("cpu", torch.bfloat16 if precision == "bf16" else torch.float32) / flops
    return {"network": name, "precision": precision, "rates": rates, "flops": flops, "allowed": allowed}


CONTENDERS = ("plain", "compiled", "whole", "ours", "processes")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--precisions", nargs="*", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--process-steps", type=int, default=100, help="of a run in two processes")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # layers of one function, each with a graph of its own
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    print(f"{environment().line}, {options.threads} threads, batch {BATCH}, images/s")
    print(f"{'network':<26}{'precision':<11}" + "".join(f"{c:>11}" for c in (*options.contenders, "allowed")))
    rows = []
    for name in options.only:
        for precision in options.precisions:
            rows.append(row_ := measured(name, precision, options))
            medians = {contender: statistics.median(values) for contender, values in row_["rates"].items()}
            values = "".join(f"{value:>11.0f}" for value in (*medians.values(), row_["allowed"]))
            gain = f"   x{medians['ours'] / medians['plain']:.2f}" if {"ours", "plain"} <= medians.keys() else ""
            print(f"{name:<26}{precision:<11}{values}{gain}", flush=True)
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items()}
        write_json(options.json, {"environment": to_plain(environment()), "options": settings, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
