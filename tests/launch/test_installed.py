"""Installed from a wheel, in a folder that holds nothing: what needs no checkout must not look for one."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from unlocked.kernels.cpp.bindings import find_compiler

pytest.importorskip("build")

ROOT = Path(__file__).resolve().parent.parent.parent
LIBRARIES = ("comparison", "data", "kernels", "launch", "models", "rules", "runtime", "workers")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it and nothing else."""
    folder = tmp_path_factory.mktemp("dist")
    # The build writes below src/: in a copy, so that it can't meet what an earlier one has left there.
    copy = folder / "checkout"
    for name in files_of_the_project():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "out"), str(copy)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    (source,), (wheel,) = (folder / "out").glob("*.tar.gz"), (folder / "out").glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def unlocked(distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command `unlocked` of a fresh environment, whose other packages are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    wheel = str(distributions[1])
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--disable-pip-version-check", wheel], check=True, env=clean_environment())
    # Files of that folder that would put a checkout on the path are not read there.
    own = next(folder.glob("lib/python*/site-packages"))
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "unlocked"


def files_of_the_project(*folders: str) -> list[str]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in filter(None, listed.split("\0")) if os.path.lexists(ROOT / name)]


def clean_environment() -> dict[str, str]:
    """Without a path to a checkout."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def call(command: list[str | Path], folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = clean_environment() | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_both_distributions_carry_every_file_of_the_libraries(distributions: tuple[Path, Path]) -> None:
    expected = set(files_of_the_project(*LIBRARIES))
    assert len(expected) > 100
    source, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        packed = {name.removeprefix("unlocked/") for name in archive.namelist()}
    assert expected - packed == set()
    with tarfile.open(source) as archive:
        packed = {name.split("/src/unlocked/", 1)[-1] for name in archive.getnames()}
    assert expected - packed == set()


def test_the_readme_leads_nowhere_that_an_index_has_not(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = archive.read(name).decode()
    head, _, text = told.partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head
    assert "unlocked train --dataset digits" in text
    assert [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target] == []
    for classifier in ("3.11", "3.12", "3.13"):
        assert f"Classifier: Programming Language :: Python :: {classifier}" in head


def test_the_readmes_links_become_absolute() -> None:
    make = runpy.run_path(str(ROOT / "setup.py"))["for_an_index"]
    text = "See [a page](docs/a.md), [a site](https://b.c) and [here](#d).\n\n![seen](docs/e.webp)\n\nEnd."
    base = "https://host/owner/name/blob/v1"
    assert make(text, base) == (
        f"See [a page]({base}/docs/a.md), [a site](https://b.c) and [here](#d).\n\n"
        "![seen](https://host/owner/name/raw/v1/docs/e.webp)\n\nEnd."
    )
    assert make(text, None) == "See a page, [a site](https://b.c) and [here](#d).\n\nEnd."


@pytest.mark.alone
def test_an_installed_wheel_trains_compares_and_evaluates_in_an_empty_folder(unlocked: Path, tmp_path: Path) -> None:
    here, cache = tmp_path / "here", tmp_path / "cache"
    here.mkdir()
    python = unlocked.parent / "python"
    where = call([python, "-c", "import unlocked; print(unlocked.__file__)"], here, cache).stdout
    assert Path(where.strip()).is_relative_to(unlocked.parent.parent), where

    told = call([python, "-m", "unlocked", "--version"], here, cache)
    assert re.fullmatch(r"unlocked \d+\.\d+\.\d+\n", told.stdout), told

    short = ["--num-epochs", "1", "--lr", "0.01", "--plain"]
    summaries = {}
    for name, flags in {"one": ["--engine", "sequential"], "two": ["--stages", "2"]}.items():
        files = ["--summary", f"{name}.json", "--save-path", "runs", "--experiment-name", name]
        run = call([unlocked, "train", "--dataset", "digits", *flags, *short, *files], here, cache)
        assert run.returncode == 0, run.stderr
        assert not run.stderr, run.stderr
        summaries[name] = json.loads((here / f"{name}.json").read_text())
    assert summaries["two"]["engine"] == "processes"
    assert len(summaries["two"]["stages"]) == 2
    assert summaries["one"]["weights_sha256"] == summaries["two"]["weights_sha256"]

    score = call([unlocked, "evaluate", here / "runs" / "two" / "model_final.pt"], here, cache)
    assert score.returncode == 0, score.stderr
    assert f"{summaries['two']['test_acc1']:.2f} %" in score.stdout

    compared = call([unlocked, "compare", "--quick", "--only", "BP, 1", "LLS, 1", "--output", "page"], here, cache)
    assert compared.returncode == 0, compared.stderr
    assert (here / "page" / "report.json").exists()
    if find_compiler() is not None:
        assert list(cache.rglob("*.so")), "the C++ kernels were not compiled from the installed sources"
