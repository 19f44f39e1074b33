"""Folders of images, with files written here byte by byte; and the published datasets in their layouts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dataset_files import draw, png, write_folder
from PIL import Image
from torch import Tensor

from unlocked.data import Augmentation, ImageDataset, load_dataset


def stack(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def cached(folder: Path) -> list[Path]:
    return sorted((folder / ".decoded").glob("*.npy"))


@pytest.mark.parametrize("test_folder", ["test", "val"])
def test_images_by_class(test_folder: str, tmp_path: Path) -> None:
    """Sorted by class and path, in folders of any depth; other files are left alone; statistics are the set's own."""
    train = write_folder(tmp_path / "train", {"cat": 3, "dog": 2})
    test = write_folder(tmp_path / test_folder, {"cat": 1, "dog": 2})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    one, two = load_dataset("folder", tmp_path)
    assert torch.equal(one.images, stack([train[i] for i in (0, 2, 1, 3, 4)]))  # 000, 002, deep/001; 000, deep/001
    assert torch.equal(two.images, stack(test))
    assert (one.labels.tolist(), two.labels.tolist()) == ([0, 0, 0, 1, 1], [0, 1, 1])
    assert (one.classes, one.augmentation, two.augmentation) == (
        ("cat", "dog"),
        Augmentation(flip=True),
        Augmentation(),
    )
    scaled = one.images.double() / 255
    torch.testing.assert_close(torch.tensor(one.mean).double(), scaled.mean((0, 2, 3)), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(two.std).double(), scaled.std((0, 2, 3), correction=0), rtol=0, atol=1e-6)


def test_grey_images_and_palettes_become_what_was_asked_for(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_folder(tmp_path / split, {"a": 1})
        grey = Image.fromarray(draw(5)).convert("L")
        grey.save(tmp_path / split / "a" / "1.png")
        Image.fromarray(draw(6)).quantize(4).save(tmp_path / split / "a" / "2.gif")
    train, _ = load_dataset("folder", tmp_path)
    assert torch.equal(train.images[1], torch.from_numpy(np.asarray(grey).copy()).expand(3, 9, 9))
    assert load_dataset("folder", tmp_path, channels=1)[0].image_shape == (1, 9, 9)


def test_images_of_any_size_are_scaled_and_cut(tmp_path: Path) -> None:
    """Against torch's own anti-aliased interpolation; and where nothing is to scale, against a slice."""
    sizes = [(40, 60), (64, 48), (32, 32), (33, 35), (20, 47)]
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for i, (height, width) in enumerate(sizes):
            smooth = F.interpolate(torch.rand(1, 3, 5, 5) * 255, (height, width), mode="bicubic").clamp(0, 255)
            pixels = smooth[0].permute(1, 2, 0).round().to(torch.uint8).numpy()
            (tmp_path / split / "a" / f"{i}.png").write_bytes(png(pixels))
    train, test = load_dataset("folder", tmp_path, image_size=20)
    assert train.image_shape == test.image_shape == (3, 20, 20)
    for i, (height, width) in enumerate(sizes):
        original = torch.from_numpy(np.asarray(Image.open(tmp_path / "train" / "a" / f"{i}.png")).copy()).permute(
            2, 0, 1
        )
        scale = 20 / min(height, width)
        size = (20, int(width * scale)) if height <= width else (int(height * scale), 20)
        whole = F.interpolate(original[None].float(), size, mode="bilinear", antialias=True)[0]
        top, left = round((size[0] - 20) / 2), round((size[1] - 20) / 2)
        difference = (train.images[i].float() - whole[:, top : top + 20, left : left + 20]).abs()
        assert difference.max() <= 1.01, i
        assert size != (height, width) or difference.max() == 0


def test_mixed_sizes_name_the_file_and_both_sizes(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 3})
    write_folder(tmp_path / "test", {"a": 1}, height=9, width=8)
    message = rf"test/a/000.PPM is 9 x 8 pixels, but {tmp_path}/train/a/000.PPM is 9 x 9; give image_size"
    with pytest.raises(ValueError, match=message):
        load_dataset("folder", tmp_path)
    assert load_dataset("folder", tmp_path, image_size=8)[1].image_shape == (3, 8, 8)


def _no_test(root: Path) -> None:
    (root / "test").rename(root / "tests")


def _empty_class(root: Path) -> None:
    (root / "train" / "b").mkdir()


def _empty_test_class(root: Path) -> None:
    write_folder(root / "train", {"b": 1})


def _new_test_class(root: Path) -> None:
    write_folder(root / "test", {"c": 1})


def _no_classes(root: Path) -> None:
    (root / "train" / "a").rename(root / "elsewhere")


def _cut_off(root: Path) -> None:
    (root / "train" / "a" / "deep" / "001.png").write_bytes(png(draw(0))[:150])


def _no_image(root: Path) -> None:
    (root / "train" / "a" / "deep" / "001.png").write_bytes(b"hello")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_test, "no folder test or val or validation in .*DIR/train/CLASS"),
        (_empty_class, "class 'b' has no images: looked for .bmp, .* in .*/train/b"),
        (_empty_test_class, "class 'b' has no images.* in .*/test/b"),
        (_new_test_class, "/test has folders of unknown classes: c; the 1 classes are a"),
        (_no_classes, "/train has no folders; expected one folder of images per class"),
        (_cut_off, "image .*/deep/001.png is damaged: "),
        (_no_image, "image .*/deep/001.png can't be read: "),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(change: Any, message: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 3})
    write_folder(tmp_path / "test", {"a": 1})
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_dataset("folder", tmp_path, workers=2)
    assert not cached(tmp_path), "nothing half made is left"


@pytest.mark.parametrize(("options", "message"), [({"channels": 2}, "1 .grey. or 3"), ({"image_size": 0}, "positive")])
def test_options_are_checked(options: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset("folder", tmp_path, **options)


def test_decoded_images_are_kept_and_made_anew_when_files_change(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "train", {"a": 2, "b": 1})
    write_folder(tmp_path / "test", {"a": 1, "b": 1})
    first, _ = load_dataset("folder", tmp_path)
    before = [(path.name, path.stat().st_mtime_ns) for path in cached(tmp_path)]
    load_dataset("folder", tmp_path)
    assert [(path.name, path.stat().st_mtime_ns) for path in cached(tmp_path)] == before
    changed = draw(99)
    (tmp_path / "train" / "a" / "000.PPM").write_bytes(png(changed))
    (tmp_path / ".decoded" / f".{before[1][0].rsplit('-', 1)[0]}-killed.npy").write_bytes(b"left by a killed process")
    second, _ = load_dataset("folder", tmp_path)
    assert torch.equal(second.images, stack([changed, *images[1:]]))
    assert torch.equal(first.images, stack(images)), "what is mapped stays as it was"
    names = [path.name for path in cached(tmp_path)]
    assert len(names) == 2
    assert before[0][0] in names
    assert before[1][0] not in names
    assert not list((tmp_path / ".decoded").glob("*killed*"))


def test_damaged_decoded_images_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 2})
    write_folder(tmp_path / "test", {"a": 1})
    load_dataset("folder", tmp_path)
    path = cached(tmp_path)[1]
    content = path.read_bytes()
    for damage in (content[:50], content[:-5], b""):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=rf"decoded images {path} are damaged .*remove it to have it made again"):
            load_dataset("folder", tmp_path)
    path.unlink()
    load_dataset("folder", tmp_path)


def test_several_processes_decode_the_same_bytes(tmp_path: Path) -> None:
    images = write_folder(tmp_path / "train", {"a": 40, "b": 31})
    write_folder(tmp_path / "test", {"a": 1, "b": 1})
    order = sorted(range(40), key=lambda i: ("deep/" if i % 2 else "") + f"{i:03d}")
    order += [40 + i for i in sorted(range(31), key=lambda i: ("deep/" if i % 2 else "") + f"{i:03d}")]
    train, _ = load_dataset("folder", tmp_path, workers=3)
    assert torch.equal(train.images, stack([images[i] for i in order]))


def test_processes_that_start_together_decode_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Large images, so that decoding takes longer than the second one needs to come."""
    images = write_folder(tmp_path / "train", {"a": 40}, height=400, width=400)
    write_folder(tmp_path / "test", {"a": 1}, height=400, width=400)
    code = (
        "import sys; from unlocked.data import load_dataset\n"
        "print('ready', flush=True); input(); print('begins', flush=True)\n"
        "print(int(load_dataset('folder', sys.argv[1])[0].images.sum()))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "begins\n"
        train, _ = load_dataset("folder", tmp_path)
        theirs, errors = process.communicate(timeout=300)
    total = sum(int(image.sum()) for image in images)
    assert (int(train.images.sum()), theirs) == (total, f"{total}\n"), errors
    assert (capsys.readouterr().err + errors).count("decoding folder-train") == 1
    assert len(cached(tmp_path)) == 2


def test_without_pillow_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "train", {"a": 1})
    write_folder(tmp_path / "test", {"a": 1})
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match=r"^reading images needs the package pillow; pip install pillow$"):
        load_dataset("folder", tmp_path, image_size=8)


def _numbered(data: ImageDataset) -> list[int]:
    """The grey value of each plain image."""
    return [int(image.unique()) for image in data.images]


def plain(path: Path, value: int, height: int, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(np.full((height, width, 3), value, dtype=np.uint8)))


WNIDS = (
    *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
    *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
)


@pytest.mark.parametrize(("name", "stored", "margin"), [("IMAGENETTE", 160, 16), ("IMAGENETTE_BASIC", 132, 2)])
@pytest.mark.parametrize("folder", ["imagenette2-160", "imagenette2"])
def test_imagenette(name: str, stored: int, margin: int, folder: str, tmp_path: Path) -> None:
    for i, wnid in enumerate(WNIDS):
        plain(tmp_path / folder / "train" / wnid / f"{wnid}_1.JPEG", 10 + i, 160, 213)
        plain(tmp_path / folder / "val" / wnid / f"{wnid}_2.JPEG", 20 + i, 200, 160)
    train, test = load_dataset(name, tmp_path, download=False)
    assert (_numbered(train), _numbered(test)) == (list(range(10, 20)), list(range(20, 30)))
    assert (train.images.shape, train.image_shape, train.margin) == ((10, 3, stored, stored), (3, 128, 128), margin)
    assert (train.classes[0], train.mean) == ("tench", (0.485, 0.456, 0.406))
    erase = 0.2 if name == "IMAGENETTE" else 0.0
    assert train.augmentation == Augmentation(flip=True, crop_margin=True, erase_probability=erase)


def test_tiny_imagenet(tmp_path: Path) -> None:
    home = tmp_path / "tiny-imagenet-200"
    wnids = ["n03444034", "n01443537", "n02085620"]
    for i, wnid in enumerate(wnids):
        plain(home / "train" / wnid / "images" / f"{wnid}_0.JPEG", 10 + i, 64, 64)
        plain(home / "val" / "images" / f"val_{i}.JPEG", 20 + i, 64, 64)
    plain(home / "test" / "images" / "test_0.JPEG", 30, 64, 64)
    (home / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    (home / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\nn00001740\tentity\n")
    lines = [f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in enumerate(wnids)]
    (home / "val" / "val_annotations.txt").write_text("".join(lines))
    train, test = load_dataset("TinyIMAGENET", tmp_path, download=False)
    assert train.classes == ("goldfish", "n02085620", "n03444034")
    assert (_numbered(train), train.labels.tolist()) == ([11, 12, 10], [0, 1, 2])
    assert (_numbered(test), test.labels.tolist()) == ([20, 21, 22], [2, 0, 1])
    assert train.augmentation == Augmentation(flip=True, erase_probability=0.2)
    (home / "val" / "val_annotations.txt").write_text("".join([*lines, "val_9.JPEG\tn99999999\t0\n"]))
    with pytest.raises(ValueError, match=r"val_annotations.txt is damaged: 'val_9.JPEG\\tn99999999"):
        load_dataset("TinyIMAGENET", tmp_path, download=False)
    (home / "val" / "val_annotations.txt").write_text("".join([*lines, f"val_9.JPEG\t{wnids[0]}\t0\n"]))
    with pytest.raises(ValueError, match=r"image .*val/images/val_9.JPEG can't be read: No such file"):
        load_dataset("TinyIMAGENET", tmp_path, download=False)
    (home / "val" / "val_annotations.txt").write_text(lines[0])
    with pytest.raises(ValueError, match=r"class 'n01443537' has no images in .*val_annotations.txt"):
        load_dataset("TinyIMAGENET", tmp_path, download=False)


@pytest.mark.parametrize("below", ["images", "."])
@pytest.mark.parametrize("left", ["nothing", "an empty folder", "images"])
def test_tiny_imagenet_with_sorted_validation_images(below: str, left: str, tmp_path: Path) -> None:
    """Labels are those of the folders; the annotations may be there still."""
    home = tmp_path / "tiny-imagenet-200"
    wnids = ["n03444034", "n01443537", "n02085620"]
    for i, wnid in enumerate(wnids):
        plain(home / "train" / wnid / "images" / f"{wnid}_0.JPEG", 10 + i, 64, 64)
        plain(home / "val" / wnid / below / f"val_{i}.JPEG", 20 + i, 64, 64)
    (home / "wnids.txt").write_text("\n".join(wnids))
    (home / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\n")
    (home / "val" / "val_annotations.txt").write_text(f"val_0.JPEG\t{wnids[0]}\t0\t32\t44\t62\n")
    if left != "nothing":
        (home / "val" / "images").mkdir()
        (home / "val" / "images" / ".DS_Store").touch()
    if left == "images":
        plain(home / "val" / "images" / "val_9.JPEG", 30, 64, 64)
        message = r"/val holds images both in images and sorted by class, in n01443537 for one; leave the one"
        with pytest.raises(ValueError, match=message):
            load_dataset("TinyIMAGENET", tmp_path, download=False)
        return
    train, test = load_dataset("TinyIMAGENET", tmp_path, download=False)
    assert train.classes == test.classes == ("goldfish", "n02085620", "n03444034")
    assert (_numbered(test), test.labels.tolist()) == ([21, 22, 20], [0, 1, 2])


def test_lists_are_read_from_regular_files(tmp_path: Path) -> None:
    home = tmp_path / "tiny-imagenet-200"
    home.mkdir()
    os.mkfifo(home / "wnids.txt")
    with pytest.raises(ValueError, match=r"wnids.txt is missing or damaged: it is a pipe \(FIFO\), no regular file"):
        load_dataset("TinyIMAGENET", tmp_path, download=False)


@pytest.mark.parametrize("below", ["VWW", "."])
def test_visual_wake_words(below: str, tmp_path: Path) -> None:
    home = tmp_path / below
    (home / "annotations").mkdir(parents=True)

    def annotate(word: str, people: dict[int, list[int]]) -> None:
        """Image -> the categories of its annotations; 1 is a person."""
        content = {
            "info": {"description": "Visual Wake Words"},
            "licenses": [],
            "images": [{"id": i, "file_name": f"COCO_{i}.jpg", "width": 150, "height": 140} for i in reversed(people)],
            "annotations": [
                {"id": 100 * i + k, "image_id": i, "category_id": category, "area": 9.0, "bbox": [0, 0, 3, 3]}
                for i, categories in people.items()
                for k, category in enumerate(categories)
            ],
        }
        (home / "annotations" / f"instances_{word}.json").write_text(json.dumps(content))

    for i in range(1, 7):
        plain(home / "all2014" / f"COCO_{i}.jpg", 10 * i, 140, 150)
    annotate("train", {1: [0], 2: [1, 1], 3: [], 4: [0, 1]})
    annotate("val", {5: [1], 6: [0]})
    train, test = load_dataset("VWW", tmp_path)
    assert (_numbered(train), train.labels.tolist()) == ([10, 20, 30, 40], [0, 1, 0, 1])
    assert (_numbered(test), test.labels.tolist()) == ([50, 60], [1, 0])
    assert (train.classes, train.image_shape) == (("no person", "person"), (3, 128, 128))
    assert train.images.shape == (4, 3, 132, 132)
    annotate("val", {6: [0]})
    with pytest.raises(ValueError, match=r"class 'person' has no images in .*instances_val.json"):
        load_dataset("VWW", tmp_path)
    (home / "annotations" / "instances_val.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances_val.json is missing or damaged \(JSONDecodeError"):
        load_dataset("VWW", tmp_path)
