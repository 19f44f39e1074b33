"""What it costs a run to read data that is not in memory, and what reading ahead gives back.

    python benchmarks/data_input.py
    python benchmarks/data_input.py --image-size 32 --max-steps 200 --json data_input.json

Runs take turns, `--repeats` times, in one process of one thread: SmallConv by LLS for `--max-steps` micro-batches, each
with and without a thread that reads ahead, from

- images held in memory, augmented (mirrored, cropped, erased);
- the same images mapped from a file that the system was asked to forget, so that every one comes from the disk;
- a PyTorch DataLoader without workers that decodes and scales a JPEG of twice the size for every sample.

What should not change the numbers (where the images lie, reading ahead) is checked not to.
"""

import argparse
import io
import os
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from unlocked.comparison.environment import environment
from unlocked.data import Augmentation, ImageDataset, load_dataset
from unlocked.models import small_conv
from unlocked.rules import LLS
from unlocked.runtime import RunResult, Trainer
from unlocked.runtime.saving.whole_file import write_json
from unlocked.runtime.typed import to_plain

SOURCES = ("in memory", "file, cold", "DataLoader")
AHEAD = (0, 2)


class Photos(Dataset):
    """JPEG files in memory, decoded and scaled when they are read."""

    def __init__(self, data: ImageDataset) -> None:
        self.labels, self.size = data.labels[:2000].tolist(), data.image_shape[-1]
        self.files = []
        for image in data.images[:2000]:
            file = io.BytesIO()
            whole = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((2 * self.size, 2 * self.size))
            whole.save(file, "JPEG")
            self.files.append(file.getvalue())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.open(io.BytesIO(self.files[index])).resize((self.size, self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), self.labels[index]


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {f"{name}, {ahead} ahead": [] for name in SOURCES for ahead in AHEAD}
    hashes: dict[bool, set[str]] = {False: set(), True: set()}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        data, path = make_data(options, Path(folder))
        photos = Photos(data)
        for _ in range(options.repeats):
            for source in SOURCES:
                for ahead in AHEAD:
                    result = run(source, data, path, photos, ahead, options)
                    rates[f"{source}, {ahead} ahead"].append(result.images_per_second)
                    hashes[source == "DataLoader"].add(result.weights_sha256)
    assert [len(found) for found in hashes.values()] == [1, 1], "the numbers depend on how the images are read"
    print(f"SmallConv, LLS, {len(data)} images of {list(data.image_shape)}, batch {options.batch_size}")
    print(f"{environment().line}, one thread; {options.repeats} repeats of {options.max_steps} micro-batches\n")
    print(f"{'images':<24}{'images/s':>10}{'min':>8}{'max':>8}{'x in memory':>13}")
    base = statistics.median(rates["in memory, 0 ahead"])
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:<24}{median:>10.0f}{min(values):>8.0f}{max(values):>8.0f}{median / base:>13.2f}")
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if not isinstance(value, Path | None)}
        content = {"environment": to_plain(environment()), "settings": settings, "images_per_second": rates}
        write_json(options.json, content)
    return 0


def make_data(options: argparse.Namespace, folder: Path) -> tuple[ImageDataset, Path]:
    """The images in memory, and a file with the same bytes."""
    train, _ = load_dataset("synthetic", num_train=options.num_images, num_test=1, image_size=options.image_size)
    path = folder / "images.npy"
    np.save(path, train.images.numpy())
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)  # what is not on the disk yet can't be forgotten
    os.close(descriptor)
    return replace(train, augmentation=Augmentation(flip=True, crop_padding=4, erase_probability=0.2)), path


def run(
    source: str, data: ImageDataset, path: Path, photos: Photos, ahead: int, options: argparse.Namespace
) -> RunResult:
    trainer = Trainer(
        small_conv(3, data.num_classes, options.image_size),
        rule=LLS(),
        optimizer=partial(torch.optim.Adam, lr=1e-3, fused=True),
        prefetch=ahead,
    )
    if source == "DataLoader":
        order = torch.Generator().manual_seed(0)
        loader = DataLoader(photos, options.batch_size, shuffle=True, generator=order)
        return trainer.fit(loader, epochs=100, max_steps=options.max_steps)
    if source == "file, cold":
        data = map_images(data, path)
    return trainer.fit(data, epochs=100, batch_size=options.batch_size, max_steps=options.max_steps)


def map_images(data: ImageDataset, path: Path) -> ImageDataset:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return replace(data, images=torch.from_numpy(np.load(path, mmap_mode="c")), streamed=True)


def parse() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--num-images", type=int, default=20_000)
    add("--image-size", type=int, default=64, help="side in pixels (64: Tiny ImageNet's)")
    add("--batch-size", type=int, default=64)
    add("--max-steps", type=int, default=40, help="micro-batches of a run")
    add("--repeats", type=int, default=3)
    add("--folder", type=Path, default=None, help="where the file is written; default: the system's temporary folder")
    add("--json", type=Path, default=None, help="write all figures here")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
