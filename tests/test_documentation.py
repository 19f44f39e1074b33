"""What the documents name exists: paths, modules and their names, and the targets of links."""

import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_tree import ROOMS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# What begins with one of these is a path in the checkout; other slashes are of datasets, of runs, or no paths at all.
FOLDERS = (*ROOMS, "benchmarks", "docs", "examples", "scripts", "src", "tests")
SUFFIXES = "py|md|sh|cu|cuh|cpp|toml"
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
_PATH = re.compile(rf"(?<![\w/.-])((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*|[\w-]+\.(?:{SUFFIXES}))(?![\w/])")
_MODULE = re.compile(r"(?<![\w/.])unlocked(?:\.\w+)+")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
FOREIGN = {"main.py"}  # the authors' entry point


def code(text: str) -> Iterator[str]:
    yield from _CODE.findall(text)


def missing_paths(text: str, folder: Path) -> list[str]:
    """A name without a folder is that of any file, as in a sentence about the file's neighbours."""
    names = {name.rstrip("./") for snippet in code(text) for name in _PATH.findall(snippet)}
    return sorted(name for name in names - FOREIGN if not _exists(name, folder))


def _exists(name: str, folder: Path) -> bool:
    if "/" in name:
        return any(ROOT.glob(name))
    return any(any((ROOT / room).rglob(name)) for room in FOLDERS) or (ROOT / name).exists() or (folder / name).exists()


def missing_modules(text: str) -> list[str]:
    return sorted(name for name in set(_MODULE.findall(text)) if not _importable(name))


def _importable(name: str) -> bool:
    """A module, or a name in one."""
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:  # what is before the last point is no package
        pass
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        return False


def broken_links(text: str, folder: Path) -> list[str]:
    """Links to files, relative to the document, and to headings of other documents."""
    broken = []
    for target in _LINK.findall(text):
        path, _, heading = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = folder / path
        if not file.exists() or (heading and heading not in _headings(file.read_text() if path else text)):
            broken.append(target)
    return broken


def _headings(text: str) -> set[str]:
    lines = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(path: Path) -> None:
    text = path.read_text()
    assert (missing_paths(text, path.parent), missing_modules(text), broken_links(text, path.parent)) == ([], [], [])


def test_the_readme_says_what_every_room_owns() -> None:
    table = re.findall(r"^\| (`.+?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = re.findall(r"`(\w+)/`", " ".join(table))
    assert set(named) == {*FOLDERS} - {"src"}
    assert len(named) == len(set(named))


def test_much_is_named() -> None:
    """Else the expressions above would have stopped to find anything."""
    texts = [path.read_text() for path in DOCUMENTS]
    assert len({name for text in texts for snippet in code(text) for name in _PATH.findall(snippet)}) > 40
    assert len({name for text in texts for name in _MODULE.findall(text)}) >= 5


def test_what_is_missing_is_found(tmp_path: Path) -> None:
    text = (
        "`runtime/nowhere.py`, `nothing.py` and `workers/loop.py`; `kernels/cuda/*.cu`, `kernels/*.none`\n"
        "`unlocked.runtime.nowhere`, `unlocked.nowhere.x`, `unlocked.models.split`, `unlocked.models.splat`\n"
        "[a](nowhere.md) [b](https://example.org) [c](#here) [d](#there)\n\n# Here\n"
    )
    assert missing_paths(text, tmp_path) == ["kernels/*.none", "nothing.py", "runtime/nowhere.py"]
    assert missing_modules(text) == ["unlocked.models.splat", "unlocked.nowhere.x", "unlocked.runtime.nowhere"]
    assert broken_links(text, tmp_path) == ["nowhere.md", "#there"]
