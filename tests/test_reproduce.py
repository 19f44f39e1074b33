"""benchmarks/reproduce.py: its tests of significance by hand-made figures, and cells that are trained once each."""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats

LAYERS = ("conv1", "conv2", "conv3", "linear1")


@pytest.fixture(scope="module")
def reproduce() -> Iterator[Any]:
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module("reproduce")
    sys.path.remove(folder)


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """Made-up figures of two seeds and one epoch."""
    settings = {"model": "SmallConv", "lr": 5e-3, "batch_size": 64, "temperature": 0.5, "waveform": "cosine"}
    rows = [
        {"rule": "LLS", "seed": s, "epoch": 1, "test_acc1": 50.0 + s, "train_acc1": 40.0 + s}
        | {"local_losses": dict.fromkeys(LAYERS, 2.0 + 0.1 * s)}
        for s in range(2)
    ]
    path = tmp_path / "reference.json"
    path.write_text(json.dumps({"settings": settings, "rows": rows}))
    return path


def test_holm_multiplies_by_what_is_left_and_never_falls(reproduce: Any) -> None:
    corrected = reproduce.holm([0.04, 0.01, math.nan, 0.03, 0.5])
    assert corrected[:2] == pytest.approx([0.09, 0.04])
    assert math.isnan(corrected[2])
    assert corrected[3:] == pytest.approx([0.09, 0.5])
    assert reproduce.holm([]) == []


def test_welch(reproduce: Any) -> None:
    a, b = [70.1, 70.9, 71.3], [71.0, 71.9, 72.4, 71.2, 71.8]
    assert reproduce.welch(a, b) == stats.ttest_ind(a, b, equal_var=False).pvalue
    # One value against five: as far off as a sixth one of theirs would seldom be.
    distance = (70.0 - sum(b) / 5) / (stats.tstd(b) * math.sqrt(1 + 1 / 5))
    assert reproduce.welch([70.0], b) == pytest.approx(2 * stats.t.sf(abs(distance), 4))
    assert math.isnan(reproduce.welch([1.0], [2.0]))
    assert reproduce.welch([1.0, 1.0], [1.0, 1.0]) == 1.0
    assert math.isnan(reproduce.welch([1.0, 1.0], [2.0, 2.0]))


def test_a_difference_is_found_and_none_is_made_up(reproduce: Any) -> None:
    def rows(shift: float) -> list[dict[str, Any]]:
        spread = (-0.2, 0.1, 0.0, 0.2, -0.1)
        return [
            {"rule": "LLS", "epoch": 1, "test_acc1": 70 + x, "train_acc1": 60 + x}
            | {"local_losses": {"conv1": 2 + x, "conv2": 1 + x + shift}}
            for x in spread
        ]

    same = reproduce.compare(rows(0), [{"rule": "LLS", "epochs": rows(0)}], 4)
    assert [c.figure for c in same] == ["test_acc1", "train_acc1", "conv1", "conv2"]
    assert all(c.corrected == 1.0 for c in same)
    assert not any(c.apart for c in same)
    shifted = reproduce.compare(rows(0), [{"rule": "LLS", "epochs": rows(0.7)}], 4)
    assert [c.figure for c in shifted if c.corrected < 0.05] == ["conv2"]
    assert [c.apart for c in shifted] == ["", "", "", ">"]
    assert shifted[3].chance == pytest.approx(2 / 252)


def test_cells_are_trained_once_and_compared(
    reproduce: Any, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells, report = tmp_path / "cells", tmp_path / "report.json"
    flags = ["--reference", str(reference), "--cells", str(cells), "--dataset", "digits"]
    flags += ["--seeds", "0", "1", "--epochs", "1"]
    flags += ["--max-steps", "2"]
    assert reproduce.main([*flags, "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    names = [f"LLS_{optimizer}_{seed}.json" for optimizer in ("AdamWSF", "AdamWScheduleFree") for seed in (0, 1)]
    assert sorted(path.name for path in cells.iterdir()) == sorted(names)
    assert "AdamWSF: 6 comparisons, p corrected (Holm) for 6" in printed
    written = json.loads(report.read_text())
    assert [c["figure"] for c in written["comparisons"]["AdamWSF"]] == ["test_acc1", "train_acc1", *LAYERS]
    assert len(written["cells"]) == 4
    assert {"machine", "versions", "commit", "weights_sha256"} <= written["cells"][0].keys()

    before = {path: path.stat().st_mtime_ns for path in cells.iterdir()}
    (cells / names[0]).unlink()
    with reproduce.claimed(cells / names[0]) as mine:  # another process is at it
        assert mine
        assert reproduce.main(flags) == 0
    assert "1 of 4 cells are not there yet" in capsys.readouterr().out
    assert reproduce.main(flags) == 0
    trained = {path for path in cells.iterdir() if path.stat().st_mtime_ns != before[path]}
    assert [path.name for path in trained] == [names[0]]

    assert reproduce.main([*flags, "--max-steps", "3"]) == 2
    assert "max_steps 2 instead of 3" in capsys.readouterr().err


def test_missing_figures_are_one_line(reproduce: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(["--reference", str(tmp_path / "nowhere.json")]) == 2
    assert "the authors' figures are not at" in capsys.readouterr().err


def test_seeds_of_the_plain_loop_are_added_to_the_reference(
    reproduce: Any, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    losses = dict.fromkeys((*LAYERS, "output"), 2.3)
    epoch = {"epoch": 1, "test_acc1": 55.0, "train_acc1": 45.0, "local_losses": losses}
    for seed in (1, 2, 3):
        (plain / f"LLS_{seed}.json").write_text(json.dumps({"rule": "LLS", "seed": seed, "epochs": [epoch]}))
    rows = json.loads(reference.read_text())["rows"]
    more = reproduce.plain_rows(plain, rows)
    assert [(row["rule"], row["seed"], row["test_acc1"]) for row in more] == [("LLS", 2, 55.0), ("LLS", 3, 55.0)]
    assert all(set(row["local_losses"]) == set(LAYERS) for row in more)
    command = ["--reference", str(reference), "--cells", str(tmp_path / "none"), "--report-only", "--rules", "LLS"]
    assert reproduce.main([*command, "--plain", str(plain), "--json", str(tmp_path / "report.json")]) == 0
    assert len(json.loads((tmp_path / "report.json").read_text())["reference"]["rows"]) == 4
    assert reproduce.main([*command, "--plain", str(tmp_path / "empty")]) == 2
    assert "plain_reproduce.py" in capsys.readouterr().err


def test_the_plain_loop_takes_its_chances_from_one_generator(reproduce: Any) -> None:
    loop = importlib.import_module("plain_reproduce")
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (70, 3, 32, 32), generator=generator, dtype=torch.uint8)
    data = SimpleNamespace(
        images=images, labels=torch.arange(70) % 10, num_classes=10, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)
    )
    run = loop.PlainRun(data, data, settings={"temperature": 0.5, "lr": 5e-3, "batch_size": 32})
    first = run.train(3, 2)
    assert [epoch["epoch"] for epoch in first] == [1, 2]
    assert first == run.train(3, 2)
    assert first != run.train(4, 2)
    # In an epoch of two whole micro-batches and one of 6: a permutation and 70 numbers, and the same again before the
    # evaluation, which shuffles anew.
    torch.manual_seed(3)
    loop.PlainLLS(10)
    for _ in range(4):
        torch.randperm(70)
        torch.rand(70)
    expected = torch.get_rng_state()
    run.train(3, 2)
    assert torch.equal(torch.get_rng_state(), expected)
