"""Nothing of one snapshot stands in for a part of another: every exchange is refused, before it costs memory."""

import json
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unlocked.data import ImageDataset
from unlocked.data.synthetic import load_synthetic
from unlocked.models import small_conv
from unlocked.rules import LLS
from unlocked.runtime import RunResult, Trainer
from unlocked.runtime.saving.layer_files import read_layer, state_digest, write_layer
from unlocked.runtime.saving.scoring import load_weights
from unlocked.runtime.saving.snapshots import find_snapshot, newest_whole
from unlocked.runtime.saving.tensor_file import save_weights

TRAIN, TEST = load_synthetic(num_train=26, num_test=9, num_classes=4, image_size=8, seed=2)
FILE = "layer-002-conv3.pt"
CPU = torch.device("cpu")


def fit(
    folder: Path, *, lr: float = 1e-2, dropout: float = 0.3, train: Any = TRAIN, model: Any = None, **options: Any
) -> RunResult:
    torch.manual_seed(0)
    trainer = Trainer(
        model or small_conv(3, 4, 8, dropout=dropout),
        rule=LLS(),
        optimizer=partial(torch.optim.Adam, lr=lr),
        snapshot_dir=folder,
        **{"snapshot_every": 4, **options},
    )
    return trainer.fit(train, epochs=2, batch_size=8, eval_data=TEST)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of eight steps, with snapshots after four and after eight."""
    root = tmp_path_factory.mktemp("runs")
    fit(root / "one")
    fit(root / "again")
    fit(root / "other seed", seed=1)
    fit(root / "other rate", lr=1e-3)
    return root


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ("one/step-00000008", "it is of position "),
        ("other seed/step-00000004", "it is of run "),
        ("other rate/step-00000004", "it is of run "),
        ("again/step-00000004", "it is of run "),  # with the same numbers
    ],
)
def test_a_layer_of_another_snapshot_is_refused(other: str, why: str, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "one", tmp_path, dirs_exist_ok=True)
    shutil.copy(runs / other / FILE, tmp_path / "step-00000004" / FILE)
    with pytest.raises(ValueError, match=f"{FILE} is damaged or of another network: {why}") as caught:
        fit(tmp_path / "new", resume=tmp_path / "step-00000004")
    assert "\n" not in str(caught.value)
    snapshot, problems = newest_whole(tmp_path)
    assert snapshot is not None
    assert (snapshot.steps, problems) == (8, [])


def test_a_layer_of_the_same_run_and_position_with_other_numbers_is_refused(runs: Path, tmp_path: Path) -> None:
    """As two resumed runs with different learning rates would write it, each with a checksum of its own."""
    shutil.copytree(runs / "one", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "step-00000008" / FILE
    state = read_layer(path, CPU)
    snapshot = find_snapshot(tmp_path)
    state["totals"] += 1
    write_layer(path, state, run=snapshot.run, position=snapshot.position, layer="conv3")
    with pytest.raises(ValueError, match="not the one that the snapshot was completed with"):
        fit(tmp_path / "new", resume=tmp_path)


def test_a_layer_of_another_name_is_refused(runs: Path, tmp_path: Path) -> None:
    """The two have the same size."""
    blocks = nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.Linear(192, 192), nn.Linear(192, 4))
    fit(tmp_path, model=blocks)
    folder = tmp_path / "step-00000008"
    first, second = sorted(folder.glob("*.pt"))[1:3]
    size, other = first.stat().st_size, second.stat().st_size
    assert size == other
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="it is of layer linear2, not linear3"):
        fit(tmp_path / "new", model=blocks, resume=tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.update(position=content["position"] - 1),
        lambda content: content.update(steps=content["steps"] - 1),
        lambda content: content["settings"].update(seed=1),
        lambda content: content["files"]["conv3"].update(size=1),
        lambda content: content.pop("sha256"),
    ],
    ids=["position", "steps", "settings", "file", "checksum"],
)
def test_an_edited_manifest_is_refused(edit: Callable[[dict], object], runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "one", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "step-00000008" / "manifest.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: .*; the newest whole snapshot before it is"):
        fit(tmp_path / "new", resume=tmp_path)


def _relabelled() -> ImageDataset:
    data = load_synthetic(num_train=26, num_test=9, num_classes=4, image_size=8, seed=2)[0]
    return replace(data, labels=(data.labels + 1) % 4)


def _tanh(block: Any) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), block, nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dropout": 0.25}, r"model\.\w+ is '[^;]*p=0\.25\S*' but was '[^;]*p=0\.3"),
        ({"train": load_synthetic(num_train=26, num_classes=4, image_size=8, seed=3)[0]}, r"data\.digest is '\w+' but"),
        ({"train": _relabelled()}, r"data\.digest is '\w+' but was '\w+'"),
        ({"seed": 1}, "seed is 1 but was 0"),
    ],
    ids=["dropout", "images", "labels", "seed"],
)
def test_another_run_is_refused(options: dict[str, Any], why: str, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        fit(tmp_path, **options, resume=runs / "one")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_setting_of_a_users_own_module_is_one_of_the_models(tmp_path: Path) -> None:
    fit(tmp_path, model=_tanh(nn.LeakyReLU(0.1)))
    for other in (nn.LeakyReLU(0.2), nn.ELU()):
        with pytest.raises(ValueError, match=r"model\.\S+ is"):
            fit(tmp_path / "new", model=_tanh(other), resume=tmp_path)
    assert fit(tmp_path / "same", model=_tanh(nn.LeakyReLU(0.1)), resume=tmp_path, snapshot_every=3).steps == 8


def test_the_rate_and_the_period_of_snapshots_may_change(runs: Path, tmp_path: Path) -> None:
    """A run keeps its name on a resume."""
    fit(tmp_path, lr=1e-3, snapshot_every=3, resume=runs / "one" / "step-00000004")
    assert find_snapshot(tmp_path).run == find_snapshot(runs / "one").run != find_snapshot(runs / "again").run
    assert find_snapshot(tmp_path).steps == 6


def _most_memory() -> int:
    """In kilobytes, as the kernel counts it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("how", ["expanded", "deflated"])
def test_a_small_file_takes_no_memory_by_its_claims(how: str, tmp_path: Path) -> None:
    """Alone, and below a manifest that was made for it."""
    huge = 3 << 30  # numbers: 12 GB
    held: list[Any] = []  # what is given back would serve a second time, and not be counted
    path = tmp_path / FILE
    state = {"rule": {}, "run": "r", "position": 3, "layer": "conv3", "sha256": "0" * 64}
    if how == "expanded":
        torch.save({**state, "block": {"weight": torch.zeros(1).expand(huge)}}, path)
    else:
        held.append(torch.zeros(4 << 20))
        torch.save({**state, "block": {"weight": held[0]}}, tmp_path / "plain.pt")
        with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
            for entry in plain.infolist():
                held.append(plain.read(entry))
                small.writestr(entry.filename, held[-1])
    assert path.stat().st_size < 20_000
    Path("/proc/self/clear_refs").write_text("5")  # the most memory counts from here on
    before = _most_memory()
    with pytest.raises(ValueError, match="claim"):
        read_layer(path, CPU)
    assert _most_memory() - before < 8 << 10  # kilobytes


def test_a_digest_covers_the_owner(tmp_path: Path) -> None:
    path = tmp_path / FILE
    state = {"block": {"weight": torch.arange(3.0)}}
    written = write_layer(path, state, run="r", position=3, layer="conv3")
    assert written.size == path.stat().st_size
    assert written.sha256 == state_digest({**state, "run": "r", "position": 3, "layer": "conv3"})
    content = torch.load(path, weights_only=True)
    torch.save({**content, "position": 4}, path)
    with pytest.raises(ValueError, match="checksum"):
        read_layer(path, CPU)


def test_weights_have_their_checksum_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "model_final.pt"
    for value in (1.0, 2.0):
        save_weights(path, {"w": torch.full((50,), value)})
        subprocess.run(["sha256sum", "--check", "--strict", f"{path.name}.sha256"], cwd=tmp_path, check=True)
        assert load_weights(path)["w"][0] == value
    content = path.read_bytes()
    at = content.index(torch.full((50,), 2.0).numpy().tobytes())
    path.write_bytes(content[:at] + b"\1" + content[at + 1 :])
    with pytest.raises(ValueError, match=r"model_final\.pt is damaged or was exchanged: .*model_final\.pt\.sha256"):
        load_weights(path)
    path.with_name("model_final.pt.sha256").unlink()
    assert load_weights(path)["w"][0] != 2.0


def test_files_have_the_mode_of_the_umask(runs: Path) -> None:
    for path in (runs / "one").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path
