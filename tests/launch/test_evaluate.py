"""Saved weights score what their run reported, bit for bit; what is not theirs is refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unlocked.launch import evaluate, pipeline
from unlocked.runtime.saving.snapshots import write_manifest

RUNS = {
    "LLS_M": ["--optimizer", "Adam", "--engine", "streams", "--stages", "2"],
    "DRTP": ["--optimizer", "AdamWSF", "--lr-scheduler", "ReduceLROnPlateau", "--patience", "0"],
    "BP": ["--optimizer", "SGDSF", "--lr", "1.0"],
    "DFA": ["--optimizer", "AdamWSF"],
    "LLS": ["--classes-per-batch", "3"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of each, the last one cut, with a snapshot at the end of the first and in the second."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--plain", "--num-epochs", "3", "--max-steps", "30", "--batch-size", "128", "--test-batch-size", "100"]
    flags += ["--save-path", str(folder), "--save-best-model", "--snapshot-every", "12"]
    flags += ["--dropout", "0.1", "--statistics-batches", "3"]
    for mode, own in RUNS.items():
        named = ["--training-mode", mode, "--experiment-name", mode, "--summary", str(folder / f"{mode}.json")]
        assert pipeline.main([*flags, *named, *own]) == 0
    return folder


def _score(path: Path, *flags: str) -> dict[str, Any]:
    file = path.parent / "score.json"
    assert evaluate.main([str(path), "--summary", str(file), *flags]) == 0
    return dict(json.loads(file.read_text()))


@pytest.mark.parametrize("mode", RUNS)
def test_saved_weights_score_what_the_run_reported(mode: str, runs: Path) -> None:
    """The last epoch's, the best one's, and a snapshot's: BatchNorm's statistics and averaged weights included."""
    epochs = json.loads((runs / f"{mode}.json").read_text())["epoch_results"]
    assert len({epoch["test_loss"] for epoch in epochs}) == 3
    folder = runs / mode
    best = max(epochs, key=lambda epoch: epoch["test_acc1"])
    expected = {
        folder / "model_final.pt": epochs[-1],
        folder / "best" / "model_best.pt": best,
        folder / "snapshots" / "step-00000012": epochs[0],
        folder / "snapshots": epochs[1],
    }
    for path, epoch in expected.items():
        found = _score(path)
        assert {key: found[key] for key in ("test_loss", "test_acc1")} == {
            key: epoch[key] for key in ("test_loss", "test_acc1")
        }, path
        assert found["images"] == 359
    record = json.loads((folder / "best" / "best.json").read_text())
    assert epochs[record["epoch"]] == best


def test_flags_go_before_the_runs_config(runs: Path, tmp_path: Path) -> None:
    alone = tmp_path / "weights.pt"
    shutil.copy(runs / "LLS_M" / "model_final.pt", alone)
    expected = _score(runs / "LLS_M" / "model_final.pt")
    assert _score(alone, "--model", "LLS_SmallConv", "--test-batch-size", "100")["test_loss"] == expected["test_loss"]


def _other_run(runs: Path, folder: Path) -> Path:
    return runs / "LLS_M" / "model_final.pt"


def _renamed(runs: Path, folder: Path) -> Path:
    weights = torch.load(runs / "LLS_M" / "model_final.pt", weights_only=True)
    weights["conv9.block.body.conv.weight"] = weights.pop("conv1.block.body.conv.weight")
    torch.save(weights, folder / "renamed.pt")
    return folder / "renamed.pt"


def _text(runs: Path, folder: Path) -> Path:
    (folder / "text.pt").write_text("no weights")
    return folder / "text.pt"


def _list(runs: Path, folder: Path) -> Path:
    torch.save([1, 2], folder / "list.pt")
    return folder / "list.pt"


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("hostile"), "was here"))


def _hostile(runs: Path, folder: Path) -> Path:
    torch.save({"a": Hostile()}, folder / "hostile.pt")
    return folder / "hostile.pt"


def _damaged_snapshot(runs: Path, folder: Path) -> Path:
    shutil.copytree(runs / "LLS_M" / "snapshots" / "step-00000024", folder / "step-00000024")
    path = folder / "step-00000024" / "layer-001-conv2.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # a bit in a tensor, where no format notices it
    path.write_bytes(content)
    return folder


def _changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path, Path], Path]:
    """The run's weights with another kind of tensor in the place of the first layer's."""

    def make(runs: Path, folder: Path) -> Path:
        weights = torch.load(runs / "LLS_M" / "model_final.pt", weights_only=True)
        name = "conv1.block.body.conv.weight"
        torch.save({**weights, name: change(weights[name])}, folder / "changed.pt")
        return folder / "changed.pt"

    return make


def _configured(text: str) -> Callable[[Path, Path], Path]:
    """The run's weights beside another config.json."""

    def make(runs: Path, folder: Path) -> Path:
        shutil.copy(runs / "LLS_M" / "model_final.pt", folder / "weights.pt")
        (folder / "config.json").write_text(text)
        return folder / "weights.pt"

    return make


def _with_manifest(text: str) -> Callable[[Path, Path], Path]:
    """A snapshot with another manifest."""

    def make(runs: Path, folder: Path) -> Path:
        shutil.copytree(runs / "LLS_M" / "snapshots" / "step-00000024", folder / "step-00000024")
        (folder / "step-00000024" / "manifest.json").write_text(text)
        return folder

    return make


def _with_settings(settings: dict[str, object]) -> Callable[[Path, Path], Path]:
    """A snapshot whose manifest is whole and has other settings."""

    def make(runs: Path, folder: Path) -> Path:
        snapshot = Path(shutil.copytree(runs / "LLS_M" / "snapshots" / "step-00000024", folder / "step-00000024"))
        write_manifest(snapshot, run="other", position=26, steps=24, settings=settings, files={})
        return folder

    return make


def _cut_old_format(runs: Path, folder: Path) -> Path:
    """What torch wrote before 2020 and still reads, cut in its middle."""
    path = folder / "old.pt"
    torch.save({"a": torch.ones(9)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-20])
    return path


@pytest.mark.parametrize(
    ("make", "flags", "words"),
    [
        (lambda runs, folder: Path("/etc/passwd"), [], ["/etc/passwd is not a file of weights"]),
        (lambda runs, folder: Path("~nosuchuser"), [], ["weights is ~nosuchuser", "no such user"]),
        (_cut_old_format, [], ["old.pt is not a file of weights"]),
        (_changed(lambda w: w.to_sparse()), [], ["conv1.block.body.conv.weight", "dense"]),
        (_changed(lambda w: w.to("meta")), [], ["conv1.block.body.conv.weight", "dense"]),
        (_changed(lambda w: w.to(torch.complex64)), [], ["conv1.block.body.conv.weight", "real numbers"]),
        (_changed(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)), [], ["changed.pt", "weights"]),
        (_changed(lambda w: w.double()), [], ["conv1.block.body.conv.weight is torch.float64"]),
        (_changed(lambda w: w * torch.inf), [], ["finite"]),
        (_configured("[]"), [], ["config.json is not a run's"]),
        (_configured("[" * 100_000), [], ["config.json is not a run's"]),
        (_configured('{"settings": {"test_batch_size": 1e400}}'), [], ["config.json", "test_batch_size is inf"]),
        (_configured('{"settings": {"model": ["x"]}}'), [], ["config.json", "model is ['x']"]),
        (_configured('{"settings": {"dropout": 1}}'), [], ["config.json", "dropout is 1; it must be"]),
        (_with_manifest('{"position": 1e400}'), ["--dataset", "digits"], ["manifest.json is damaged"]),
        (_with_manifest('{"format": 3, "position": 1, "steps": 1, "settings": 3}'), [], ["manifest.json is damaged"]),
        (
            _with_settings({"train_size": 1438}),
            ["--dataset", "digits"],
            ["can't be scored as SmallConv on digits", "KeyError"],
        ),
        (_other_run, ["--training-mode", "abc"], ["training_mode 'abc' is not known"]),
        (_other_run, ["--summary", "/"], ["summary / is a folder"]),
        (lambda runs, folder: folder / "nowhere.pt", [], ["nowhere.pt", "model_final.pt"]),
        (lambda runs, folder: folder, [], ["no complete snapshot below"]),
        (_other_run, ["--model", "SmallConvL"], ["other shapes: conv1.block.body.conv.weight has shape (32, 1, 3, 3)"]),
        (_other_run, ["--model", "VGG8"], ["missing: conv4", "more", "--model"]),
        (_renamed, [], ["missing: conv1.block.body.conv.weight", "unexpected: conv9.block.body.conv.weight"]),
        (_text, [], ["text.pt is not a file of weights"]),
        (_list, [], ["list.pt holds list data where tensors by name are due"]),
        (_hostile, [], ["hostile.pt is not a file of weights"]),
        (_damaged_snapshot, ["--dataset", "digits"], ["layer-001-conv2.pt is damaged", "checksum"]),
        (lambda runs, folder: runs / "BP" / "snapshots", ["--dataset", "synthetic"], ["1438 training samples"]),
        (_other_run, ["--dataset", "nothing"], ["'nothing'", "digits"]),
        (_other_run, ["--no-such-flag"], ["--no-such-flag"]),
        (_other_run, ["--device", "tpu"], ["'tpu'", "cpu"]),
    ],
)
def test_what_does_not_fit_is_one_line(
    make: Callable[[Path, Path], Path],
    flags: list[str],
    words: list[str],
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([str(make(runs, tmp_path)), *flags]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert len(text.splitlines()) == 1
    for word in words:
        assert word in text, text
    assert not (tmp_path / "hostile").exists()


def test_a_resumed_run_keeps_the_best_of_its_earlier_part(tmp_path: Path) -> None:
    """The whole run's best, whether it lies before the cut or after it."""
    flags = ["--plain", "--optimizer", "SGD", "--lr", "0.002", "--snapshot-every", "12", "--save-path", str(tmp_path)]
    flags += ["--save-best-model", "--training-mode", "LLS", "--batch-size", "128"]
    assert pipeline.main([*flags, "--num-epochs", "3", "--experiment-name", "whole"]) == 0
    whole = torch.load(tmp_path / "whole" / "best" / "model_best.pt", weights_only=True)
    assert pipeline.main([*flags, "--num-epochs", "2", "--experiment-name", "cut"]) == 0
    record = tmp_path / "cut" / "best" / "best.json"
    for steps, better in ((12, False), (24, True)):
        if better:  # make the earlier part's best unbeatable
            kept = json.loads(record.read_text())
            record.write_text(json.dumps({**kept, "epoch": 0, "test_acc1": 100.1}))
            torch.save({"mark": torch.ones(1)}, record.with_name("model_best.pt"))
        resume = ["--resume", str(tmp_path / "cut" / "snapshots" / f"step-{steps:08d}")]
        assert pipeline.main([*flags, "--num-epochs", "3", "--experiment-name", "cut", *resume]) == 0
        found = torch.load(record.with_name("model_best.pt"), weights_only=True)
        assert found.keys() == ({"mark"} if better else whole.keys())
        assert better or all(torch.equal(found[name], value) for name, value in whole.items())
    assert not list(record.parent.glob("candidate-*"))


def test_rules_whose_prediction_is_another_are_refused() -> None:
    from unlocked.launch.evaluate import _check_rule

    with pytest.raises(ValueError, match="made of all layers' scores"):
        _check_rule("ForwardForward", is_snapshot=False)
    with pytest.raises(ValueError, match="belong to its two views"):
        _check_rule("BarlowTwins", is_snapshot=True)
    _check_rule("BarlowTwins", is_snapshot=False)
    _check_rule("LLS", is_snapshot=True)
