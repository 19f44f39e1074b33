"""benchmarks/language.py: a file that is added to and gone on with, sequences that come once, and tables by hand."""

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
SMALL = ["--length", "16", "--width", "16", "--depth", "3", "--batch", "4", "--test-samples", "4"]


@pytest.fixture(scope="module")
def language() -> Iterator[Any]:
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    yield import_module("language")
    sys.path.remove(folder)


def test_what_is_there_is_not_run_again(language: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "figures.json"
    given = [*SMALL, "--json", str(file), "--train-only", "--tokens", "256", "--points", "2"]
    assert language.main([*given, "--seeds", "0", "--only", "BP", "TaskAndConsistency/3"]) == 0
    first = json.loads(file.read_text())["runs"]
    assert [(run["contender"], run["seed"], run["tokens"]) for run in first] == [
        ("BP", 0, 256),
        ("TaskAndConsistency/3", 0, 256),
    ]
    assert [point["tokens"] for point in first[0]["curve"]] == [128, 256]
    assert language.main([*given, "--seeds", "0", "1", "--only", "BP"]) == 0
    runs = json.loads(file.read_text())["runs"]
    assert runs[:2] == first
    assert [(run["contender"], run["seed"]) for run in runs[2:]] == [("BP", 1)]
    assert "| BP | 2 | 0.001 |" in capsys.readouterr().out
    other = ["--json", str(file), "--report-only", *SMALL]
    assert language.main(other) == 0
    assert language.main([*given, *("--batch", "2")]) == 2
    assert "holds figures of --batch 4" in capsys.readouterr().err
    file.write_text("[]")
    assert language.main(other) == 2
    assert "holds no figures of language.py" in capsys.readouterr().err


def test_sequences_come_once(language: Any) -> None:
    class Data:
        images = torch.arange(40)[:, None]
        labels = torch.arange(40)[:, None] + 1

        def __len__(self) -> int:
            return 40

    loader = language.OnceThrough(Data(), seed=3, batch=4, steps=5)
    found = []
    for epoch in (1, 0):  # by its number alone
        loader.set_epoch(epoch)
        batches = list(loader)
        assert all(torch.equal(a + 1, b) for a, b in batches)
        assert len(batches) == len(loader) == 5
        found += [int(row) for a, _ in batches for row in a]
    assert sorted(found) == list(range(40)) != found


def test_the_parts_are_the_same_network(language: Any) -> None:
    options = language.parse([*SMALL, "--json", "x"])
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    outputs = []
    for in_parts, blocks in ((False, 5), (True, 3)):
        network = language.network(4, options, in_parts=in_parts)
        assert len(network) == blocks
        x = tokens
        for block in network:
            x = block(x)
        outputs.append(x)
    assert torch.equal(*outputs)


def test_the_page_shows_the_figures_that_are_kept(language: Any) -> None:
    page = (ROOT / "docs" / "language_models.md").read_text()
    module = sys.modules["language_tables"]
    shown = page.partition(module.BEGIN)[2].partition(module.END)[0].strip()
    kept = sorted((ROOT / "benchmarks" / "results").glob("language_*.json"))
    expected = "\n\n".join(module.tables(module.read_figures(kept[-1]))) if kept else "Not measured yet."
    assert shown == expected, "python benchmarks/language.py --json FILE --report-only --page docs/language_models.md"


def test_tables_are_written_between_the_marks(language: Any, tmp_path: Path) -> None:
    module, page = sys.modules["language_tables"], tmp_path / "page.md"
    page.write_text(f"before\n\n{module.BEGIN}\n\nold\n\n{module.END}\n\nafter\n")
    run = {
        "contender": "BP",
        "seed": 0,
        "lr": 0.1,
        "tokens": 1,
        "curve": [{"tokens": 1, "bits_per_byte": 2, "acc1": 3}],
    }
    figures = {"runs": [run], "speed": []}
    module.write_tables(figures, page)
    (table,) = module.tables(figures)
    assert page.read_text() == f"before\n\n{module.BEGIN}\n\n{table}\n\n{module.END}\n\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="has no marks"):
        module.write_tables(figures, page)


def test_tables(language: Any) -> None:
    def run(contender: str, seed: int, lr: float, *bits: float) -> dict[str, Any]:
        curve = [{"tokens": 100 * (k + 1), "bits_per_byte": b, "acc1": 10.0 * b} for k, b in enumerate(bits)]
        return {"contender": contender, "seed": seed, "lr": lr, "tokens": 100 * len(bits), "curve": curve}

    def speed(name: str, trains: str, *rates: float) -> list[dict[str, Any]]:
        memory = {"own_memory_bytes": [2**20, 3 << 20], "peak_memory_bytes": [5 << 20, 6 << 20]}
        return [{"contender": name, "trains": trains, "tokens_per_second": rate} | memory for rate in rates]

    runs = [run("BP", s, 0.1, 5.0, 3.0 + s, 2.0 + s) for s in (0, 2)]
    runs += [run("BP", s, 0.2, 9.0, 9.0, 9.0) for s in (0, 2)] + [run("BP", 0, 0.3, 1.0, 1.0, 1.0)]  # one seed
    runs += [run("X/3", s, 0.1, 6.0, 5.0, 4.0) for s in (0, 2)]
    figures = {"runs": runs, "speed": speed("BP, 1 thread", "BP", 1.0, 2.0, 9.0) + speed("X/3, fast", "X/3", 3.0)}
    tables = sys.modules["language_tables"]
    accuracy, speeds, equal = (text.splitlines() for text in tables.tables(figures))
    assert accuracy[2] == "| BP | 2 | 0.1 | 5.000 ± 0.000 | 4.000 ± 1.414 | 3.000 ± 1.414 | 30.0 ± 14.1 |"
    assert speeds[2:] == [
        "| BP, 1 thread | 3 | 2 (1 to 9) | 1 / 3 | 5 / 6 |",
        "| X/3, fast | 1 | 3 (3 to 3) | 1 / 3 | 5 / 6 |",
    ]
    # The faster one has read its 300 tokens after 100 s, the other 200 of them: 4.0 on average.
    assert equal[0] == "| contender | tokens in 100 s | bits per byte by then |"
    assert equal[2:] == [
        "| BP, 1 thread | 200 | 4.000 ± 1.414 |",
        "| X/3, fast | 300 | 4.000 ± 0.000 |",
    ]
