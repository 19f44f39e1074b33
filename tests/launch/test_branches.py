"""A run that is resumed from an older snapshot is a branch: the snapshots of the one it leaves are set aside."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from ranks import ENVIRONMENT, PIPELINE, ranks

from unlocked.launch.pipeline import main

FLAGS = ["--plain", "--num-epochs", "3", "--batch-size", "100", "--snapshot-every", "7", "--experiment-name", "run"]
BRANCH = [*FLAGS, "--lr", "0.001"]


def names(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("step-*/manifest.json"))


def steps(*numbers: int) -> list[str]:
    return [f"step-{number:08d}" for number in numbers]


def place(root: Path) -> list[str]:
    return ["--save-path", str(root), "--summary", str(root / "summary.json")]


def summary(root: Path) -> dict:
    return dict(json.loads((root / "summary.json").read_text()))


def train(engine: str, flags: Sequence[str]) -> str:
    """Runs it to its end, with two ranks where they are processes; what they say on standard error."""
    with ranks(2 if engine == "processes" else 1, [str(PIPELINE), *flags, "--engine", engine]) as started:
        texts = [process.communicate(timeout=120)[1] for process in started]
        assert [process.returncode for process in started] == [0] * len(started), texts
    return "".join(texts)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with snapshots after 7, 14, ... 42 of 45 steps; beside it its branch behind 14 with a lower rate, which
    nothing has cut."""
    root = tmp_path_factory.mktemp("whole")
    assert main([*FLAGS, *place(root)]) == 0
    shutil.copytree(root / "run", root / "branch" / "run")
    resume = ["--resume", str(root / "branch" / "run" / "snapshots" / "step-00000014")]
    assert main([*BRANCH, *place(root / "branch"), *resume]) == 0
    assert summary(root / "branch")["weights_sha256"] != summary(root)["weights_sha256"]
    return root


def left_run(whole: Path, root: Path) -> Path:
    shutil.copytree(whole / "run", root / "run")
    return root / "run" / "snapshots"


@pytest.mark.alone
@pytest.mark.parametrize("engine", ["sequential", "streams", "processes"])
def test_auto_goes_on_with_the_new_branch(engine: str, whole: Path, tmp_path: Path) -> None:
    """Of which the newest are kept, although the branch that was left had come further; the bits are those of one that
    nothing has cut."""
    snapshots = left_run(whole, tmp_path)
    cut = ["--resume", str(snapshots / "step-00000014"), "--max-steps", "30", "--keep-snapshots", "2"]
    text = train(engine, [*BRANCH, *place(tmp_path), *cut])
    assert names(snapshots) == steps(21, 28)
    assert names(snapshots / "set-aside-1") == steps(21, 28, 35, 42)
    told = f"({' to '.join(('4 from step-00000021', 'step-00000042'))}) are set aside in {snapshots / 'set-aside-1'}"
    assert text.count(told) == 1, text
    text = train(engine, [*BRANCH, *place(tmp_path), "--resume", "auto", "--keep-snapshots", "2"])
    assert "aside" not in text
    assert summary(tmp_path)["first_step"] == 28
    assert summary(tmp_path)["weights_sha256"] == summary(whole / "branch")["weights_sha256"]
    assert names(snapshots) == steps(35, 42)
    assert names(snapshots / "set-aside-1") == steps(21, 28, 35, 42)
    left = ["--save-path", str(tmp_path / "back"), "--resume", str(snapshots / "set-aside-1" / "step-00000035")]
    assert main([*FLAGS, *left, "--summary", str(tmp_path / "summary.json")]) == 0
    assert summary(tmp_path)["weights_sha256"] == summary(whole)["weights_sha256"], "what is set aside is whole"


@pytest.mark.alone
@pytest.mark.parametrize("size", [1, 2])
def test_a_branch_that_dies_before_its_first_snapshot_is_still_the_one_to_go_on_with(
    size: int, whole: Path, tmp_path: Path
) -> None:
    snapshots = left_run(whole, tmp_path)
    endless = [*BRANCH, *place(tmp_path), "--num-epochs", "100000", "--snapshot-every", "0"]
    with ranks(size, [str(PIPELINE), *endless, "--resume", str(snapshots / "step-00000014")]) as started:
        output = started[0].stdout
        assert output is not None
        assert any(line.startswith("epoch 1/") for line in output), "it trains"
        for process in started:
            process.kill()
    assert names(snapshots) == steps(7, 14)
    assert main([*BRANCH, *place(tmp_path), "--resume", "auto"]) == 0
    assert summary(tmp_path)["first_step"] == 14
    assert summary(tmp_path)["weights_sha256"] == summary(whole / "branch")["weights_sha256"]


def test_damaged_snapshots_that_auto_passes_over_are_out_of_the_way(whole: Path, tmp_path: Path) -> None:
    """They would count as the newest, and every new one would be removed at once."""
    snapshots = left_run(whole, tmp_path)
    for number in (28, 35, 42):
        (snapshots / f"step-{number:08d}" / "layer-004-output.pt").write_bytes(b"no weights")
    flags = ["--resume", "auto", "--keep-snapshots", "1", "--max-steps", "30"]
    assert main([*FLAGS, *place(tmp_path), *flags]) == 0
    assert names(snapshots) == steps(28)
    assert names(snapshots / "set-aside-1") == steps(28, 35, 42)
    assert main([*FLAGS, *place(tmp_path), "--resume", "auto"]) == 0
    assert summary(tmp_path)["first_step"] == 28
    assert summary(tmp_path)["weights_sha256"] == summary(whole)["weights_sha256"]


SCRIPT = """
import sys
from functools import partial
from pathlib import Path
import torch
from unlocked.data import load_dataset
from unlocked.models import small_conv
from unlocked.rules import LLS
from unlocked.runtime import Trainer

folder, resume, seed, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = small_conv(in_channels=1, num_classes=10, image_size=8)
trainer = Trainer(model, rule=LLS(), optimizer=partial(torch.optim.Adam, lr=1e-2), seed=seed, snapshot_dir=folder,
                  snapshot_every=2, keep_snapshots=2, resume=Path(resume) if resume else None)
trainer.fit(load_dataset("digits")[0], epochs=1, batch_size=100, max_steps=steps)
"""


def by_script(folder: Path, resume: Path | str, seed: int, count: int) -> str:
    command = [sys.executable, "-c", SCRIPT, str(folder), str(resume), str(seed), str(count)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_snapshots_of_others_are_no_part_of_a_run(tmp_path: Path) -> None:
    """A folder in which another run has saved itself: for a run from its start, and for one from elsewhere."""
    used, other = tmp_path / "used", tmp_path / "other"
    assert "aside" not in by_script(used, "", 0, 13) + by_script(other, "", 1, 13)
    assert names(used) == names(other) == steps(10, 12)
    (other / "step-00000012" / "manifest.json").unlink()
    text = by_script(used, other, 1, 13)
    assert f"snapshots in {used} that this run does not go on from (2 from" in text
    assert names(used) == steps(12)
    assert names(other) == steps(10), "where it has come from, nothing changes"
    assert "(step-00000012) are set aside" in by_script(used, "", 2, 5)
    assert [names(used / folder) for folder in ("", "set-aside-1", "set-aside-2")] == [
        steps(2, 4),
        steps(10, 12),
        steps(12),
    ]
