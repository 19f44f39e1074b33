"""Where the C++ library can't be built or loaded, the library's own operations run, and the user hears why, once."""

import fcntl
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unlocked.kernels import cpp, dispatch, native, reference
from unlocked.kernels.cpp import bindings
from unlocked.kernels.dispatch import get_backend

VERSION = 'case "$*" in *--version*) echo "c++ 1.0"; exit 0;; esac\n'
# Compilers that are there, as shell scripts, and a word of what is said of them.
BROKEN = {
    "fails at once": ("exit 1", "exit status 1"),
    "fails to compile": (VERSION + "echo 'no such instruction'; exit 3", "no such instruction"),
    "says no version in time": ("sleep 1000", "did not end within"),
    "never ends": (VERSION + "sleep 1000 & wait", "did not end within"),
    "reads from the terminal": ("read answer; exit 4", "exit status 4"),
    "writes nothing": (VERSION + "exit 0", "wrote no library"),
    "writes nonsense": (VERSION + 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"', "can't be used"),
    "says what is no text": (r"printf '\377\376'; exit 1", "exit status 1"),
    "is killed": ("kill -9 $$", "exit status -9"),
}


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and no memory of what this process has built or said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "_warned", set())
    forgotten = [bindings.load_kernels, bindings.unavailable, native._compiler_version]
    for function in forgotten:
        function.cache_clear()
    yield tmp_path / "cache" / "unlocked"
    for function in forgotten:
        function.cache_clear()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a shell script $CXX."""

    def make(script: str) -> Path:
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return path

    return make


@pytest.fixture
def quick(compiler: Callable[[str], Path]) -> Path:
    """The system's compiler, without the optimisation that takes its time."""
    found = bindings.find_compiler()
    if found is None:
        pytest.skip("no compiler")
    return compiler(f'exec {found} "$@" -O0')


def falls_back() -> str:
    """What the one warning says."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert get_backend("auto", "cpu") is reference
        assert get_backend("auto", "cpu") is reference
    (warning,) = said
    with pytest.raises(ValueError, match="kernels 'cpp' can't run on cpu"):
        get_backend("cpp", "cpu")
    return str(warning.message)


def test_a_missing_compiler_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "install g++ or clang" in falls_back()


@pytest.mark.parametrize("how", BROKEN)
def test_a_compiler_that_fails_is_none(
    how: str, cache: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, words = BROKEN[how]
    compiler(script)
    if "sleep" in script:
        monkeypatch.setattr(native, "_VERSION_SECONDS", 0.5)
        monkeypatch.setattr(bindings, "_BUILD_SECONDS", 0.5)
    assert words in falls_back()
    assert not list(cache.glob("build-*"))


def test_a_compiler_that_is_no_program_is_none(cache: Path, compiler: Callable[[str], Path]) -> None:
    compiler("").write_bytes(b"\x7fELF")
    assert "can't be started" in falls_back()


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "without checksum"])
def test_a_damaged_library_in_the_cache_is_built_anew(damage: str, cache: Path, quick: Path, tmp_path: Path) -> None:
    """In a process of its own: where a damaged one is loaded, that process dies."""
    library = bindings.build_library()
    whole = library.read_bytes()
    if damage == "empty":
        library.write_bytes(b"")
    elif damage == "cut":
        library.write_bytes(whole[: len(whole) // 2])
    elif damage == "foreign":  # a good library, but not this one
        (tmp_path / "foreign.cpp").write_text('extern "C" int other() { return 1; }\n')
        subprocess.run([quick, "-shared", "-fPIC", "-o", library, tmp_path / "foreign.cpp"], check=True)
    else:
        library.with_suffix(".sha256").unlink()
    code = "from unlocked.kernels import cpp; print(cpp.unavailable('cpu') or 'fine')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
    assert library.read_bytes() == whole


def test_a_cache_that_can_not_be_written_has_a_stand_in(
    cache: Path, quick: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache.parent.write_text("a file where a folder is due")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    Path(tempfile.tempdir or "").mkdir()
    assert cpp.unavailable("cpu") == ""
    (stand_in,) = (tmp_path / "temporary").iterdir()
    assert stand_in.stat().st_mode & 0o777 == 0o700
    assert [path.suffix for path in stand_in.glob("*.so")] == [".so"]

    stand_in.chmod(0o777)  # now anybody may have put it there
    bindings.load_kernels.cache_clear()
    bindings.unavailable.cache_clear()
    assert "this user alone" in falls_back()
    shutil.rmtree(stand_in)
    stand_in.symlink_to(tmp_path)
    bindings.load_kernels.cache_clear()
    bindings.unavailable.cache_clear()
    with pytest.raises(RuntimeError, match="set XDG_CACHE_HOME"):
        bindings.load_kernels()


def test_who_waits_for_a_build_shares_its_failure(
    cache: Path, compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else every process of a run waits for a compiler that hangs, one after the other."""
    waiting, calls, gate = threading.Semaphore(0), tmp_path / "calls", tmp_path / "gate"
    subprocess.run(["mkfifo", gate], check=True)
    compiler(VERSION + f"echo called >> {calls}; read line < {gate}; echo out of memory; exit 1")
    real = fcntl.flock

    def flock(file: object, operation: int) -> None:
        if operation == fcntl.LOCK_EX:  # without a try before: it waits from now on
            waiting.release()
        real(file, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(native.fcntl, "flock", flock)
    said: list[str] = []

    def build() -> None:
        with pytest.raises(RuntimeError) as caught:
            bindings.build_library()
        said.append(str(caught.value))

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads[1:]:
        waiting.acquire()
    gate.write_text("go\n")
    for thread in threads:
        thread.join()
    assert len(set(said)) == 1
    assert "out of memory" in said[0]
    assert calls.read_text() == "called\n"
