"""The networks in figures: parameters, multiply-adds, how evenly layers make stages, and whether every layer learns.

    python benchmarks/models.py sizes                                     # every model at 32 x 32 x 3, without a clock
    python benchmarks/models.py cost --json cost.json
    python benchmarks/models.py losses --model VGG8 --dataset CIFAR10 --dataset-dir datasets --max-steps 300

`sizes` counts parameters, the forward pass's operations (by torch's counter, two per multiply-add, attention included)
and what passes between layers, on tensors without memory. `cost` times one local step of every layer alone (LLS, Adam,
one thread; median of `--repeats`), as the pipeline does before it cuts stages, and cuts them for 2, 4 and 8. `losses`
trains and reads each layer's local loss in intervals. All print Markdown; multiply-adds are counted from the layers'
shapes (convolutions, linear maps and the local head).
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unlocked.comparison.environment import environment
from unlocked.data import load_dataset
from unlocked.models import MODELS, Block, get_model
from unlocked.rules import LLS, LayerInfo
from unlocked.runtime import MetricsSink, Trainer
from unlocked.runtime.costs import measure_costs
from unlocked.runtime.metrics.records import StageProgress
from unlocked.runtime.network import Network, build_layer, build_network
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.schedules.partition import partition
from unlocked.runtime.typed import to_plain
from unlocked.workers.fused import choose_step
from unlocked.workers.layer import Layer

STAGES = (2, 4, 8)
CPU = torch.device("cpu")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    kept = {k: v for k, v in vars(options).items() if k not in ("json", "dataset_dir")}
    report: dict[str, Any] = {"environment": to_plain(environment()), "options": kept}
    print(f"{environment().line}, one thread\n")
    if options.what == "sizes":
        report["sizes"] = [sizes(name, options) for name in options.models]
        print("\n".join(size_table(report["sizes"])))
    elif options.what == "cost":
        report["models"] = [cost(name, options) for name in options.models]
        print("\n".join(cost_table(report["models"])))
    else:
        report["losses"] = losses(options)
        print("\n".join(loss_table(report["losses"])))
    if options.json:
        write_json(options.json, report)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    first = commands.add_parser("sizes", help="layers, parameters, operations, bytes of activations")
    one = commands.add_parser("cost", help="parameters, multiply-adds, stage balance")
    for command in (first, one):
        command.add_argument("--models", nargs="*", default=list(MODELS))
        command.add_argument("--image-size", type=int, default=32)
        command.add_argument("--num-classes", type=int, default=10)
    one.add_argument("--batch-size", type=int, default=64)
    one.add_argument("--repeats", type=int, default=3)
    other = commands.add_parser("losses", help="each layer's local loss over a run")
    other.add_argument("--model", default="VGG8")
    other.add_argument("--dataset", default="CIFAR10")
    other.add_argument("--dataset-dir", default="datasets")
    other.add_argument("--max-steps", type=int, default=300)
    other.add_argument("--batch-size", type=int, default=64)
    other.add_argument("--lr", type=float, default=1e-3)
    other.add_argument("--intervals", type=int, default=5)
    for command in (first, one, other):
        command.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def sizes(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model's row: what can be counted from shapes, per image, in float32."""
    with torch.device("meta"):
        blocks = get_model(name, num_classes=options.num_classes, image_size=options.image_size)
        x = torch.zeros(1, 3, options.image_size, options.image_size)
        seen, handed_on = [], []
        with FlopCounterMode(display=False) as counter:
            for block in blocks:
                activations = block.eval().body(x)
                x = block.tail(activations)
                seen.append(activations.numel() * 4)
                handed_on.append(x.numel() * 4)
    return {
        "model": name,
        "layers": len(blocks),
        "parameters": sum(p.numel() for block in blocks for p in block.parameters()),
        "operations": counter.get_total_flops(),
        "largest_activation_bytes": max(seen),
        "all_activation_bytes": sum(seen),
        "handed_on_bytes": sum(handed_on[:-1]),
    }


def size_table(models: list[dict[str, Any]]) -> list[str]:
    heads = ["model", "layers", "parameters", "forward, MFLOP", "largest activations, KiB", "all activations, KiB"]
    heads += ["handed on by all layers, KiB"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for m in models:
        kib = [m[f"{what}_bytes"] / 1024 for what in ("largest_activation", "all_activation", "handed_on")]
        cells = [m["model"], str(m["layers"]), f"{m['parameters']:,}", f"{m['operations'] / 1e6:,.1f}"]
        lines.append(f"| {' | '.join([*cells, *(f'{k:,.1f}' for k in kib)])} |")
    return lines


def cost(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model's row; `layers` holds (name, parameters, forward and local-step multiply-adds per image, seconds)."""
    blocks = get_model(name, num_classes=options.num_classes, image_size=options.image_size)
    shape = (3, options.image_size, options.image_size)
    network = build_network(blocks, input_shape=shape, num_classes=options.num_classes, seed=0)
    forward, local = zip(*multiply_adds(network), strict=True)
    seconds = measure_costs(
        partial(_layer, network), network, batch_size=options.batch_size, device=CPU, repeats=options.repeats
    )
    parameters = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return {
        "model": name,
        "layers": list(zip(network.names, parameters, forward, local, seconds, strict=True)),
        "parameters": sum(parameters),
        "forward_multiply_adds": sum(forward),
        "local_step_multiply_adds": sum(local),
        "seconds": sum(seconds),
        "stages": {count: balance(seconds, network.names, count) for count in STAGES if count <= len(blocks)},
    }


def multiply_adds(network: Network) -> list[tuple[int, int]]:
    """(forward, local step) of each layer for one image.

    The step's convolutions and linear maps run once forward and once for their weights' gradient; those after the
    first of a layer once more for their input's. The head's scores run forward and back to the latents.
    """
    counts = []
    x = torch.zeros(2, *network.input_shape)
    for block, info in zip(network.blocks, network.infos, strict=True):
        maps, x = _count_maps(block, x)
        head = 0 if block.is_output else _head(info)
        counts.append((sum(maps), 2 * sum(maps) + sum(maps[1:]) + 2 * head))
    return counts


def _count_maps(block: Block, x: Tensor) -> tuple[list[int], Tensor]:
    counts: list[int] = []

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        counts.append(output.numel() // len(output) * weight[0].numel())

    handles = [m.register_forward_hook(count) for m in block.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    block.eval()
    with torch.no_grad():
        result: Tensor = block(x)
    block.train()
    for handle in handles:
        handle.remove()
    return counts, result


def _head(info: LayerInfo) -> int:
    return info.num_latents * info.num_classes


def _layer(network: Network, index: int) -> Layer:
    optimizer = partial(torch.optim.Adam, lr=1e-3)
    return build_layer(network, index, rule=LLS(), optimizer=optimizer, device=CPU, step=choose_step("auto", CPU))


def balance(seconds: list[float], names: list[str], count: int) -> dict[str, Any]:
    """The best contiguous stages for these costs: the largest one's share bounds the gain of a pipeline."""
    parts = partition(seconds, count)
    largest = max(sum(seconds[i] for i in part) for part in parts)
    return {
        "stages": [[names[i] for i in part] for part in parts],
        "largest_share": largest / sum(seconds),
        "ideal_speedup": sum(seconds) / largest,
    }


def cost_table(models: list[dict[str, Any]]) -> list[str]:
    heads = ["model", "layers", "parameters", "forward, M MAC", "local step, M MAC", "step, ms"]
    heads += [f"{count} stages: largest share, gain" for count in STAGES]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for m in models:
        cells = [m["model"], str(len(m["layers"])), f"{m['parameters']:,}", f"{m['forward_multiply_adds'] / 1e6:.1f}"]
        cells += [f"{m['local_step_multiply_adds'] / 1e6:.1f}", f"{1e3 * m['seconds']:.0f}"]
        for count in STAGES:
            found = m["stages"].get(count)
            cells.append("-" if found is None else f"{found['largest_share']:.2f}, {found['ideal_speedup']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


class LossCurve(MetricsSink):
    """A metrics sink that keeps every reading of the layers' mean losses: what the first n images came to."""

    def __init__(self, images_per_reading: int) -> None:
        self._step = images_per_reading
        self.readings: dict[int, dict[str, float]] = {}

    def on_progress(self, progress: StageProgress) -> None:
        images = progress.images // self._step * self._step  # of the last reading before this record
        if images and progress.local_losses:
            self.readings.setdefault(images, dict(progress.local_losses))

    def intervals(self) -> list[dict[str, Any]]:
        """The mean loss of each layer between two readings; records come a few times a second, so some are left out."""
        result, before, images = [], dict[str, float](), 0
        for now, means in sorted(self.readings.items()):
            sums = {layer: now * mean - images * before.get(layer, 0.0) for layer, mean in means.items()}
            result.append({"from": images, "to": now, "losses": {k: v / (now - images) for k, v in sums.items()}})
            before, images = means, now
        return result


def losses(options: argparse.Namespace) -> dict[str, Any]:
    """Trains one epoch, or `--max-steps` of it, by LLS with Adam."""
    train, _ = load_dataset(options.dataset, options.dataset_dir)
    channels, *sides = train.image_shape
    freq = max(options.max_steps // options.intervals, 1)
    curve = LossCurve(freq * options.batch_size)
    trainer = Trainer(
        get_model(options.model, in_channels=channels, num_classes=train.num_classes, image_size=sides),
        rule=LLS(),
        optimizer=partial(torch.optim.Adam, lr=options.lr),
        print_freq=freq,
        sinks=[curve],
    )
    result = trainer.fit(train, epochs=1, batch_size=options.batch_size, max_steps=options.max_steps)
    curve.readings[min(result.steps * options.batch_size, len(train))] = result.local_losses
    return {
        "model": options.model,
        "batch_size": options.batch_size,
        "intervals": curve.intervals(),
        "means": result.local_losses,
        "steps": result.steps,
        "seconds": result.train_seconds,
        "weights_sha256": result.weights_sha256,
    }


def loss_table(found: dict[str, Any]) -> list[str]:
    intervals = found["intervals"]
    heads = ["layer", *(f"images {i['from']:,} to {i['to']:,}" for i in intervals)]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    columns = [interval["losses"] for interval in intervals]
    lines += [f"| {layer} | {' | '.join(f'{column[layer]:.3f}' for column in columns)} |" for layer in columns[0]]
    falls = all(columns[-1][layer] < columns[0][layer] for layer in columns[0])
    verdict = "every layer's loss falls" if falls else "NOT every layer's loss falls"
    return [*lines, "", f"{found['model']}, {found['steps']} steps of {found['batch_size']}: {verdict}"]


if __name__ == "__main__":
    sys.exit(main())
