"""What lies in the cache of compiled kernels is executed: nobody but the user may have put it there."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from unlocked.kernels import native

SOURCE = 'extern "C" int answer() { return 42; }\n'
COMPILER = shutil.which("g++") or shutil.which("c++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "source.cpp").write_text(SOURCE)


def build(tmp_path: Path) -> Path:
    return native.build_once("answer", Path(COMPILER or ""), ("-shared", "-fPIC"), [tmp_path / "source.cpp"])


def planted(library: Path) -> None:
    """As somebody would who knows how the cache works: a library and its checksum."""
    library.write_bytes(b"planted")
    native._checksum_file(library).write_bytes(native._checksum(library))


def test_a_new_cache_is_the_users_alone(tmp_path: Path) -> None:
    before = os.umask(0o002)  # as where every user has a group of his own
    try:
        library = build(tmp_path)
    finally:
        os.umask(before)
    assert library.parent == tmp_path / "cache" / "unlocked"
    assert library.parent.stat().st_mode & 0o777 == 0o700
    assert not any(path.stat().st_mode & 0o022 for path in library.parent.iterdir())
    seen = library.stat().st_mtime_ns
    assert build(tmp_path) == library
    assert library.stat().st_mtime_ns == seen, "it is taken as it is"


def test_a_cache_that_others_can_read_is_closed(tmp_path: Path) -> None:
    (tmp_path / "cache" / "unlocked").mkdir(mode=0o755, parents=True)
    assert build(tmp_path).parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("opened", ["the cache", "the folder around it"])
def test_a_library_that_others_could_have_planted_is_not_loaded(opened: str, tmp_path: Path) -> None:
    library = build(tmp_path)
    whole = library.read_bytes()
    planted(library)
    (library.parent if opened == "the cache" else library.parent.parent).chmod(0o777)
    again = build(tmp_path)
    assert again.parent == tmp_path / "temporary" / f"unlocked-{os.getuid()}"
    assert again.read_bytes() == whole


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("given", ["library", "folder"])
def test_what_another_user_owns_is_not_loaded(given: str, tmp_path: Path) -> None:
    library = build(tmp_path)
    whole = library.read_bytes()
    planted(library)
    os.chown(library if given == "library" else library.parent, 65534, 65534)
    assert build(tmp_path).read_bytes() == whole


def test_a_library_that_others_may_write_to_is_built_anew(tmp_path: Path) -> None:
    library = build(tmp_path)
    whole = library.read_bytes()
    planted(library)
    library.chmod(0o777)
    assert build(tmp_path).read_bytes() == whole


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    library = build(tmp_path)
    precious = tmp_path / "precious"
    precious.write_text("data")
    library.unlink()
    library.with_suffix(".lock").unlink()
    library.with_suffix(".lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        build(tmp_path)
    assert precious.read_text() == "data"


def test_a_relative_cache_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    with pytest.raises(RuntimeError, match="XDG_CACHE_HOME is 'cache'; it must be an absolute path"):
        build(tmp_path)
