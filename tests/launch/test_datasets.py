"""Training from files in the official layouts, from the command line."""

import json
from pathlib import Path

import pytest
from dataset_files import draw, png, write_folder, write_mnist

from unlocked.launch.evaluate import main as evaluate
from unlocked.launch.pipeline import main


def train(tmp_path: Path, *flags: str) -> dict:
    summary = tmp_path / "summary.json"
    plan = ["--plain", "--num-epochs", "1", "--batch-size", "8", "--test-batch-size", "5", "--statistics-batches", "1"]
    assert main([*plan, "--summary", str(summary), *flags]) == 0
    return json.loads(summary.read_text())


def test_fashion_mnist(tmp_path: Path) -> None:
    write_mnist(tmp_path / "FashionMNIST" / "raw", zipped=True, sizes=(20, 10))
    flags = ("--dataset", "FashionMNIST", "--dataset-dir", str(tmp_path))
    sequential, streams = (train(tmp_path, *flags, "--engine", engine) for engine in ("sequential", "streams"))
    assert (sequential["dataset"], sequential["steps"]) == ("FashionMNIST", 3)
    assert all(loss > 0 for loss in sequential["local_losses"].values())
    assert streams["weights_sha256"] == sequential["weights_sha256"]


def test_an_image_folder(tmp_path: Path) -> None:
    """Of one size; scaled; and read ahead: all engines alike."""
    write_folder(tmp_path / "images" / "train", {"cat": 9, "dog": 9}, height=16, width=16)
    write_folder(tmp_path / "images" / "test", {"cat": 3, "dog": 4}, height=16, width=16)
    flags = ("--dataset", "folder", "--dataset-dir", str(tmp_path / "images"))
    expected = train(tmp_path, *flags)
    assert (expected["dataset"], expected["steps"]) == ("folder", 3)
    for more in (("--prefetch", "2"), ("--engine", "streams", "--stages", "2", "--prefetch", "1")):
        assert train(tmp_path, *flags, *more)["weights_sha256"] == expected["weights_sha256"]
    scaled = train(tmp_path, *flags, "--image-size", "12", "--save-path", str(tmp_path), "--experiment-name", "scaled")
    assert scaled["weights_sha256"] != expected["weights_sha256"]
    scores = tmp_path / "scores.json"
    assert evaluate([str(tmp_path / "scaled" / "model_final.pt"), "--summary", str(scores)]) == 0
    assert json.loads(scores.read_text())["test_loss"] == pytest.approx(scaled["test_loss"])


def test_images_that_are_no_squares(tmp_path: Path) -> None:
    """As they are, and scaled to height and width; the weights score without being told either."""
    write_folder(tmp_path / "images" / "train", {"cat": 9, "dog": 9}, height=12, width=20)
    write_folder(tmp_path / "images" / "test", {"cat": 3, "dog": 4}, height=12, width=20)
    flags = ("--dataset", "folder", "--dataset-dir", str(tmp_path / "images"), "--model", "MobileNetV1_small")
    found = [train(tmp_path, *flags, "--engine", engine)["weights_sha256"] for engine in ("sequential", "streams")]
    assert found[0] == found[1]
    saved = ("--save-path", str(tmp_path), "--experiment-name", "wide")
    wide = train(tmp_path, *flags, "--image-size", "8", "19", *saved)
    assert wide["weights_sha256"] != found[0]
    scores = tmp_path / "scores.json"
    assert evaluate([str(tmp_path / "wide" / "model_final.pt"), "--summary", str(scores)]) == 0
    assert json.loads(scores.read_text())["test_loss"] == pytest.approx(wide["test_loss"])


def test_a_mixed_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "train", {"cat": 2})
    write_folder(tmp_path / "test", {"cat": 1})
    (tmp_path / "train" / "cat" / "odd.png").write_bytes(png(draw(0, 5, 6)))
    assert main(["--plain", "--dataset", "folder", "--dataset-dir", str(tmp_path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: image ")
    for word in ("odd.png", "5 x 6", "9 x 9", "--image-size"):
        assert word in line
