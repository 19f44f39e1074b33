"""`unlocked compare-runs`: saved runs beside each other, in a table, a page and a picture."""

import csv
import json
import re
from pathlib import Path

import pytest

from unlocked.launch.compare_runs import main
from unlocked.launch.pipeline import main as train

HEAD = "epoch,train_loss,train_acc1,eval_loss,eval_acc1"


def save(folder: Path, *, settings: dict[str, object], accuracies: list[float | None], ended: bool = True) -> None:
    folder.mkdir(parents=True)
    told = {"lr": 0.1, "training_mode": "LLS", "seed": 0, "save_path": str(folder.parent), "plain": True, **settings}
    (folder / "config.json").write_text(json.dumps({"settings": told, "run": {}, "versions": {}}))
    rows = [
        f"{n},{1 / (n + 1)},50,{'' if a is None else 0.5},{'' if a is None else a}" for n, a in enumerate(accuracies)
    ]
    (folder / "metrics.csv").write_text("\n".join([HEAD, *rows]) + "\n")
    last = f"Finished: {json.dumps({'images_per_second': 1234.5})}\n" if ended else ""
    (folder / "train.log").write_text(f"Epoch: [0]\n{last}")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    save(tmp_path / "Table1", settings={}, accuracies=[60.0, 70.5, 70.0])
    save(tmp_path / "Table1-2", settings={"lr": 0.2, "milestone": [3, 4]}, accuracies=[61.0, 62.0])
    save(tmp_path / "Table1-10", settings={"training_mode": "BP"}, accuracies=[None], ended=False)
    return tmp_path


def test_the_table_has_what_tells_the_runs_apart(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([str(runs)]) == 0
    head, _, *rows = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert head == [
        *("run", "lr", "training mode", "milestone"),
        *("epochs", "best, %", "in epoch", "last, %", "test loss", "images/s"),
    ]
    assert rows == [
        ["Table1", "0.1", "LLS", "-", "3", "70.50", "2", "70.00", "0.5000", "1,234"],
        ["Table1-2", "0.2", "LLS", "3 4", "2", "62.00", "2", "62.00", "0.5000", "1,234"],
        ["Table1-10", "0.1", "BP", "-", "1, not ended", "-", "-", "-", "-", "-"],
    ]
    for columns in (50, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main([str(runs / "Table1"), str(runs / "Table1-2")]) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= columns
        assert {"70.50", "62.00", "0.2", "1,234", "test"} <= set(shown.split())
        assert "…" not in shown


def test_page_picture_and_table_are_written(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for name in ("page.html", "deep/page.png", "page.csv"):
        assert main([str(runs), "--output", str(tmp_path / name)]) == 0
        assert f"written: {tmp_path / name}\n" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert "Table1 came to 70.50 % test accuracy in epoch 2, Table1-2 to 62.00 %." in page
    assert page.count("<svg") == 2 * 3  # accuracy and two losses, wide and narrow
    assert not re.findall(r"https?://", page)
    assert (tmp_path / "deep" / "page.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "page.csv").open() as file:
        assert [row["best, %"] for row in csv.DictReader(file)] == ["70.50", "62.00", "-"]


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """A dollar begins no formula, and a run is in the legend whatever its name begins with."""
    pytest.importorskip("matplotlib")
    names = ("_x", r"a$\foo$b", "c$d")
    for name in names:
        save(tmp_path / "runs" / name, settings={"lr": len(name)}, accuracies=[60.0, 70.0])
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "page.html")]) == 0
    drawn = "".join(re.findall(r"<svg.*?</svg>", (tmp_path / "page.html").read_text(), re.DOTALL))
    texts = [text.replace("\u200b", "").strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", drawn)]
    assert set(names) <= set(texts)


def test_which_layer_has_learned_what(tmp_path: Path) -> None:
    """Runs with the same layers share a picture; one whose layers predict nothing is in none."""
    pytest.importorskip("matplotlib")
    for name, layers in (("a", "conv1 output"), ("b", "conv1 output"), ("c", "block0 block1 output"), ("d", "")):
        save(tmp_path / "runs" / name, settings={"lr": len(name)}, accuracies=[60.0, 70.0])
        names = layers.split()
        rows = [["epoch", "eval_acc1", *(f"eval_acc1/{layer}" for layer in names)]]
        rows += [[str(n), "50", *(str(10 * n + place) for place in range(len(names)))] for n in (1, 2)]
        (tmp_path / "runs" / name / "metrics.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    told = set(re.findall(r'aria-label="Which layer has learned what: ([^"]*)"', page))
    assert told == {
        "a: conv1 20.0 %, output 21.0 %; b: conv1 20.0 %, output 21.0 %",
        "c: block0 20.0 %, block1 21.0 %, output 22.0 %",
    }


def test_runs_as_they_are_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--plain",
        "--max-steps",
        "2",
        "--batch-size",
        "32",
        "--save-path",
        str(tmp_path),
        "--experiment-name",
        "x",
    ]
    assert train(flags) == 0
    assert train([*flags, "--seed", "5"]) == 0
    capsys.readouterr()
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out.split()
    assert {"x", "x-2", "seed", "5"} <= set(shown)


def test_what_is_no_run_is_told_and_the_others_are_shown(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "Table1-2" / "config.json").write_text("{")
    (runs / "Table1-10" / "metrics.csv").write_text("epoch,eval_acc1\n0,many\n")
    assert main([str(runs)]) == 0
    shown = capsys.readouterr()
    assert "Table1 " in shown.out
    assert [line.split(" is no run")[0] for line in shown.err.splitlines()] == [
        f"warning: {runs / 'Table1-2'}",
        f"warning: {runs / 'Table1-10'}",
    ]
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([str(tmp_path / "empty")], "holds no runs"),
        ([str(tmp_path / "nowhere")], "is no folder"),
        ([str(runs / "Table1-2")], "is no run, or is damaged"),
        (
            [str(runs), "--output", str(tmp_path / "page.pdf")],
            "ends in .pdf; give a file that ends in .html, .png, .csv",
        ),
        ([], "required: DIR"),
    ):
        assert main(arguments) == 2
        shown = capsys.readouterr()
        assert words in shown.err
        assert shown.err.startswith("error: ") or "warning: " in shown.err
