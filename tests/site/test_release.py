"""The release script: fit or not, and why; it builds the commit and uploads nothing."""

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("build")
pytest.importorskip("twine")

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]  # type: ignore[index]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of one commit that is ready for a release: this working tree, with its changelog closed."""
    folder = tmp_path / "checkout"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    changelog = folder / "CHANGELOG.md"
    text = changelog.read_text()
    changelog.write_text(text.replace("## Unreleased", f"## Unreleased\n\n## {VERSION} - 2026-01-01", 1))
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "release")


def release(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/release.py", "--no-isolation"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_release_that_is_fit(checkout: Path) -> None:
    done = release(checkout)
    assert done.returncode == 0, done.stderr
    assert f"unlocked {VERSION}, commit " in done.stdout
    assert "nothing was uploaded and nothing tagged" in done.stdout
    built = {path.name for path in (checkout / "dist").iterdir()}
    assert built == {f"unlocked-{VERSION}-py3-none-any.whl", f"unlocked-{VERSION}.tar.gz"}
    for name in built:
        assert re.search(rf"{re.escape(name)} +[\d,]+ bytes +sha256 [0-9a-f]{{64}}", done.stdout)
    assert subprocess.run(["git", "tag"], cwd=checkout, capture_output=True, text=True, check=True).stdout == ""


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))
        commit(folder)

    return change


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder: (folder / "stray.txt").write_text(""), "the working tree is not clean (stray.txt)"),
        (replace("CITATION.cff", f"version: {VERSION}", "version: 9.9.9"), "CITATION.cff says version 9.9.9"),
        (replace("CHANGELOG.md", f"## {VERSION} - 2026-01-01", "## older"), f"no section of {VERSION}"),
        (replace("CHANGELOG.md", " - 2026-01-01", ""), "has no date"),
        (replace("CHANGELOG.md", "## Unreleased", "## Unreleased\n- more\n"), "entries under Unreleased"),
        (lambda folder: git(folder, "tag", f"v{VERSION}"), f"the tag v{VERSION} exists"),
    ],
    ids=["stray file", "other version", "no section", "no date", "unreleased", "tag"],
)
def test_what_is_not_fit_is_told_before_anything_is_built(
    checkout: Path, spoil: Callable[[Path], object], told: str
) -> None:
    spoil(checkout)
    done = release(checkout)
    assert done.returncode == 1
    assert told in done.stderr
    assert "nothing was uploaded" in done.stderr
    assert not (checkout / "dist").exists()


def test_a_distribution_without_a_file_is_told(checkout: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("release", ROOT / "scripts" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    wheel = tmp_path / "unlocked-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("unlocked/__init__.py", "")
        archive.writestr("tests/test_x.py", "")
    problems = list(script.content_problems(checkout, [wheel]))
    assert any("lacks" in problem and "unlocked/__main__.py" in problem for problem in problems)
    assert any("not the library's, among them tests/test_x.py" in problem for problem in problems)
    assert any("no LICENSE" in problem for problem in problems)
