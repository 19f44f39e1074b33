"""More seeds of LLS as the authors' code trains it: a plain PyTorch loop that draws all from torch's one generator.

    python benchmarks/plain_reproduce.py --dataset-dir datasets --processes 2

The reference of benchmarks/reproduce.py has three seeds, too few to tell a fault of ours from three seeds that lie
close together. This loop (`PlainLLS`, autograd, nothing of the runtime but the optimizer and the reader of the data)
takes its chances in the order in which theirs does: start values, then in every epoch a permutation and one uniform
number per image of a micro-batch for mirroring, then the same for the 50 micro-batches that re-estimate BatchNorm's
statistics. For their seeds it gives their figures, to the last digit or nearly (`--check` prints both); for any other
seed it stands for a run of theirs. `reproduce.py --plain DIR` adds those to the reference.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from plain_lls import LATENT_SIDES, PlainLLS
from torch import Tensor

from unlocked import AdamWSF, load_dataset
from unlocked.comparison.environment import environment
from unlocked.runtime.saving.whole_file import write_json

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("conv1", "conv2", "conv3", "linear1")
STATISTICS_BATCHES, TEST_BATCH = 50, 500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = ROOT.parent / "shared" / "baseline" / "authors_accuracy.json"
    parser.add_argument("--reference", type=Path, default=beside, help="the authors' figures, a JSON file")
    parser.add_argument("--cells", type=Path, default=ROOT / "benchmarks" / "results" / "reproduce_plain")
    parser.add_argument("--dataset-dir", type=Path, default=Path("datasets"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="train nothing; print the cells beside the reference")
    options = parser.parse_args()
    reference = json.loads(options.reference.read_text())
    if options.check:
        return check(reference, options.cells)
    if options.processes > 1:
        shares = [options.seeds[i :: options.processes] for i in range(options.processes)]
        command = [sys.executable, __file__, "--reference", options.reference, "--cells", options.cells]
        command += ["--dataset-dir", options.dataset_dir, "--epochs", str(options.epochs), "--seeds"]
        running = [subprocess.Popen([*map(str, command), *map(str, share)]) for share in shares if share]
        return max(process.wait() for process in running)
    torch.set_num_threads(1)
    run = PlainRun(*load_dataset("CIFAR10", options.dataset_dir), settings=reference["settings"])
    options.cells.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        path = options.cells / f"LLS_{seed}.json"
        if not path.exists():
            began = time.perf_counter()
            epochs = run.train(seed, options.epochs)
            machine = environment()
            cell = {"rule": "LLS", "seed": seed, "epochs": epochs, "seconds": time.perf_counter() - began}
            write_json(path, cell | {"machine": machine.cpu, "versions": machine.versions, "commit": machine.commit})
            print(f"{path.stem}: {epochs[-1]['test_acc1']:.2f} %", flush=True)
    return 0


def check(reference: dict[str, Any], cells: Path) -> int:
    """Prints both sides' figures of the seeds that both have; 1 if a first epoch's loss is not theirs to 0.001."""
    wrong = 0
    for row in reference["rows"]:
        path = cells / f"LLS_{row['seed']}.json"
        if row["rule"] != "LLS" or not path.exists():
            continue
        ours = json.loads(path.read_text())["epochs"][row["epoch"] - 1]
        pairs = [(row["local_losses"][name], ours["local_losses"][name]) for name in LAYERS]
        wrong |= row["epoch"] == 1 and any(abs(theirs - loss) > 0.001 for theirs, loss in pairs)
        told = "  ".join(f"{theirs:.3f} {loss:.4f}" for theirs, loss in pairs)
        accuracy = f"{row['test_acc1']:.2f} {ours['test_acc1']:.2f}"
        print(f"seed {row['seed']} epoch {row['epoch']}: theirs and the loop's losses {told}; test {accuracy} %")
    return int(wrong)


@dataclass
class PlainRun:
    """Runs with equal settings.

    Args:
        data, test: images [N, 3, H, W] uint8 with labels, and what to normalise them by.
        settings: the reference's.
    """

    data: Any
    test: Any
    settings: dict[str, Any]

    def train(self, seed: int, epochs: int) -> list[dict[str, Any]]:
        torch.manual_seed(seed)
        model = PlainLLS(self.data.num_classes, temperature=self.settings["temperature"])
        layers = [*model.blocks, model.output]
        model.optimizers = [AdamWSF(layer.parameters(), lr=self.settings["lr"]) for layer in layers]
        return [self._epoch(model, epoch) for epoch in range(1, epochs + 1)]

    def _epoch(self, model: PlainLLS, epoch: int) -> dict[str, Any]:
        for optimizer in model.optimizers:
            optimizer.train()
        losses = torch.zeros(len(LAYERS) + 1, dtype=torch.float64)
        hits = 0
        for images, labels in self._batches():
            losses += torch.stack(model.step(images, labels)).double() * len(labels)
            hits += int((model.logits.argmax(1) == labels).sum())
        count = len(self.data.labels)
        return {
            "epoch": epoch,
            "test_acc1": self._evaluate(model),
            "train_acc1": 100 * hits / count,
            "local_losses": dict(zip((*LAYERS, "output"), (losses / count).tolist(), strict=True)),
        }

    def _batches(self, limit: int | None = None) -> Any:
        """Micro-batches ([B, 3, H, W] float32, [B]) in a new order, each image mirrored by chance."""
        size = self.settings["batch_size"]
        order = torch.randperm(len(self.data.labels))
        for start in range(0, len(order), size)[:limit]:
            index = order[start : start + size]
            images, mirrored = self._normalised(self.data.images[index]), torch.rand(len(index)) < 0.5
            yield torch.where(mirrored[:, None, None, None], images.flip(3), images), self.data.labels[index]

    def _normalised(self, images: Tensor) -> Tensor:
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (self.data.mean, self.data.std))
        return (images.float() / 255 - mean) / deviation

    @torch.no_grad()
    def _evaluate(self, model: PlainLLS) -> float:
        """Test accuracy in percent, with the averaged weights and statistics that were re-estimated with them."""
        for optimizer in model.optimizers:
            optimizer.eval()
        for images, _ in self._batches(STATISTICS_BATCHES):
            predict(model, images)
        for block in model.blocks:
            block.eval()
        hits = 0
        for start in range(0, len(self.test.labels), TEST_BATCH):
            part = slice(start, start + TEST_BATCH)
            logits = predict(model, self._normalised(self.test.images[part]))
            hits += int((logits.argmax(1) == self.test.labels[part]).sum())
        for block in model.blocks:
            block.train()
        return 100 * hits / len(self.test.labels)


def predict(model: PlainLLS, x: Tensor) -> Tensor:
    """Logits [B, N] of images [B, 3, H, W], by the blocks in the mode that they are in."""
    for index, block in enumerate(model.blocks):
        if index == len(LATENT_SIDES):
            x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        x = F.leaky_relu(block(x), 0.01)
        if index < 2:
            x = F.max_pool2d(x, 2)
    return model.output(x)


if __name__ == "__main__":
    sys.exit(main())
