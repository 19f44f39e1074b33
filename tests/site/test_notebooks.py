"""The notebooks run from the first cell to the last, in a folder that holds nothing; what they assert holds."""

import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def execute(path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "notebooks.py"), str(path), "--output", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.alone  # they measure, and one starts processes
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    done = execute(path, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    kept, book = nbformat.read(path, as_version=4), nbformat.read(tmp_path / path.name, as_version=4)
    assert len(book.cells) == len(kept.cells) > 5
    for cell, before in zip(book.cells, kept.cells, strict=True):
        assert cell.source == before.source
        if cell.cell_type == "code":
            # The kept file shows what the code gives: as many results, of the same kinds.
            assert shape_of(cell) == shape_of(before), cell.source
    nbformat.validate(book)


def shape_of(cell: "nbformat.NotebookNode") -> set[str]:
    """The kinds of a cell's outputs; a stream may come in one piece or in several."""
    return {output.get("name", "") or ",".join(sorted(output.data)) for output in cell.outputs}


def test_a_cell_that_fails_is_told(tmp_path: Path) -> None:
    """The check of the check."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 + 1 == 3, 'no sum'")])
    nbformat.write(book, tmp_path / "wrong.ipynb")
    done = execute(tmp_path / "wrong.ipynb", tmp_path / "out")
    assert done.returncode != 0
    assert "no sum" in done.stderr
    assert not (tmp_path / "out" / "wrong.ipynb").exists()
