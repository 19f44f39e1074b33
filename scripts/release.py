"""Builds a release, checks it, and says what would be uploaded. Uploads nothing, tags nothing.

    python scripts/release.py [--no-isolation]

Needs the packages `build` and `twine`. What is built is the commit, not the working tree: what git does not know can't
get in. Exit code 1, and every problem in a line of its own, where the release is not fit; 0 with the files in dist/,
their sums, and the commands that a person would type.
"""

import argparse
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("comparison", "data", "kernels", "launch", "models", "rules", "runtime", "workers")


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-isolation", action="store_true", help="build with the packages of this environment")
    options = parser.parse_args(arguments)
    problems = [*tree_problems(root), *version_problems(root)]
    if problems:  # a build would only take time
        return _refuse(problems)
    version = version_of(root)
    dist = root / "dist"
    for old in [*dist.glob("*.tar.gz"), *dist.glob("*.whl")]:
        old.unlink()
    built = build(root, dist, isolated=not options.no_isolation)
    problems = [*content_problems(root, built), *_twine_problems(built), *_install_problems(built, version)]
    if problems:
        return _refuse(problems)
    _announce(root, built, version)
    return 0


def tree_problems(root: Path) -> Iterator[str]:
    """What the working tree has that the commit has not."""
    if changed := _git(root, "status", "--porcelain").splitlines():
        shown = ", ".join(line[3:] for line in changed[:5]) + (", ..." if len(changed) > 5 else "")
        yield f"the working tree is not clean ({shown}); commit, or remove what does not belong"


def version_of(root: Path) -> str:
    version: str = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    return version


def version_problems(root: Path) -> Iterator[str]:
    """Places that say another version, a changelog that does not know it, a tag that is taken."""
    version = version_of(root)
    for name, pattern in (
        ("src/unlocked/__init__.py", r'^__version__ = "(.+)"$'),
        ("CITATION.cff", r"^version: (.+)$"),
    ):
        found = re.search(pattern, (root / name).read_text(), re.MULTILINE)
        if found is None or found[1] != version:
            said = "none" if found is None else found[1]
            yield f"{name} says version {said}, pyproject.toml {version}; make them equal"
    sections = re.split(r"^## ", (root / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1:]
    titles = {section.split(None, 1)[0].strip("[]"): section for section in sections}
    if version not in titles:
        yield f"CHANGELOG.md has no section of {version}; call what stands under Unreleased so, with the date"
    elif not re.match(rf"\[?{re.escape(version)}\]? - \d{{4}}-\d{{2}}-\d{{2}}$", titles[version].splitlines()[0]):
        yield f"CHANGELOG.md's section of {version} has no date; write '## {version} - YYYY-MM-DD'"
    if re.search(r"^- ", titles.get("Unreleased", ""), re.MULTILINE):
        yield f"CHANGELOG.md has entries under Unreleased; they belong to {version}, or to no release yet"
    if _git(root, "tag", "--list", f"v{version}").strip():
        yield f"the tag v{version} exists; a version is released once"


def build(root: Path, dist: Path, *, isolated: bool) -> list[Path]:
    """The source distribution of the commit, and the wheel that is made from it.

    Raises:
        RuntimeError: the build failed; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=root, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            packed.extractall(folder, filter="tar")
        command = [
            sys.executable,
            "-m",
            "build",
            *([] if isolated else ["--no-isolation"]),
            "--outdir",
            str(dist),
            folder,
        ]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise RuntimeError(f"the build failed:\n{(made.stdout + made.stderr)[-3000:]}")
    return sorted([*dist.glob("*.tar.gz"), *dist.glob("*.whl")])


def content_problems(root: Path, built: Sequence[Path]) -> Iterator[str]:
    """Files of the libraries that are missing from a distribution, and files of a wheel that are none of theirs."""
    expected = {f"unlocked/{name}" for name in _git(root, "ls-files", *LIBRARIES).splitlines()}
    expected |= {"unlocked/__init__.py", "unlocked/__main__.py", "unlocked/py.typed"}
    for path in built:
        names = _names(path)
        if missing := sorted(expected - names):
            yield f"{path.name} lacks {len(missing)} files, among them {missing[0]}"
        if path.suffix == ".whl":
            foreign = sorted(name for name in names - expected if ".dist-info/" not in name)
            if foreign:
                yield f"{path.name} has {len(foreign)} files that are not the library's, among them {foreign[0]}"
        if not any(name.endswith("LICENSE") for name in names):
            yield f"{path.name} has no LICENSE"


def _names(path: Path) -> set[str]:
    """The files of a distribution, as the wheel calls them."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name for name in wheel.namelist() if not name.endswith("/")}
    with tarfile.open(path) as source:
        names = {member.name.partition("/")[2] for member in source.getmembers() if not member.isdir()}
    return {name.removeprefix("src/") for name in names}


def _twine_problems(built: Sequence[Path]) -> Iterator[str]:
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    if checked.returncode:
        yield f"twine check: {' '.join((checked.stdout + checked.stderr).split())[-500:]}"


def _install_problems(built: Sequence[Path], version: str) -> Iterator[str]:
    """The wheel, in an environment of its own and without its dependencies, says its version."""
    wheel = next(path for path in built if path.suffix == ".whl")
    # A checkout on PYTHONPATH would count as an installation, and the wheel would not be installed.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        python = Path(folder, "bin", "python")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*pip, str(wheel)], check=True, env=clean)
        command = [str(python), "-I", "-c", "import unlocked; print(unlocked.__version__)"]
        told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if told.stdout.strip() != version:
        yield f"installed, the wheel says {(told.stdout or told.stderr).strip()[-200:]!r} instead of {version}"


def _announce(root: Path, built: Sequence[Path], version: str) -> None:
    print(f"unlocked {version}, commit {_git(root, 'rev-parse', '--short', 'HEAD').strip()}, is fit. It would upload:")
    for path in built:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"  {path.name}  {path.stat().st_size:,} bytes  sha256 {digest}")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)", (root / "README.md").read_text())
    if links:
        print(
            f"note: {len(links)} links of the README are relative; a package index can't follow them: {links[0]}, ..."
        )
    print("nothing was uploaded and nothing tagged. To release it:")
    print(f"  git tag -a v{version} -m 'unlocked {version}' && git push origin v{version}")
    print(f"  {Path(sys.executable).name} -m twine upload {' '.join(f'dist/{path.name}' for path in built)}")


def _refuse(problems: Sequence[str]) -> int:
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    print("not fit for a release; nothing was uploaded", file=sys.stderr)
    return 1


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    raise SystemExit(main())
