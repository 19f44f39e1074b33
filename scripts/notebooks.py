"""Executes the documents' notebooks and keeps their outputs in the files, or in another folder.

python scripts/notebooks.py [--output FOLDER] [NOTEBOOK...]
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

NOTEBOOKS = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
SECONDS = 120  # for one cell


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", nargs="*", type=Path, help="default: all of docs/notebooks")
    parser.add_argument("--output", type=Path, help="write there, and leave the notebooks as they are")
    options = parser.parse_args(arguments)
    for path in options.notebook or sorted(NOTEBOOKS.glob("*.ipynb")):
        target = path if options.output is None else options.output / path.name
        execute(path, target)
        print(f"executed {target}")
    return 0


def execute(path: Path, target: Path) -> nbformat.NotebookNode:
    """Runs all cells in a fresh kernel, in the folder of `target`, and writes the notebook there.

    Raises:
        CellExecutionError: a cell failed; with the cell and its traceback.
    """
    book = nbformat.read(path, as_version=4)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        client = NotebookClient(
            book,
            timeout=SECONDS,
            record_timing=False,  # else every run would make another file
            resources={"metadata": {"path": str(target.parent)}},
            # Sockets in a folder of this user, and no port that others could reach.
            config=Config({"AsyncKernelManager": {"transport": "ipc", "ip": f"{folder}/socket"}}),
        )
        client.execute()
    book.metadata.pop("language_info", None)  # the version of the Python that happened to execute it
    nbformat.write(book, target)
    return book


if __name__ == "__main__":
    raise SystemExit(main())
