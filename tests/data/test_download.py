"""Archives of folders of any depth, and single files: unpacked whole, checked, and never outside of their folder."""

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from file_server import serve

from unlocked.data import download
from unlocked.data.download import Archive, obtain, obtain_file

FILES = {"train/a/1.png": b"one", "train/b/2.png": b"two" * 1000, "words.txt": b"w"}
OUTSIDE = {"../evil.txt": b"x", "other/3.png": b"x", "/abs.txt": b"x", "set/../../evil.txt": b"x"}


def make(path: Path, members: dict[str, bytes]) -> Archive:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("set/train/", b"")
            for name, content in members.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, "w:gz") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            link = tarfile.TarInfo("set/link")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    return Archive(
        url=f"http://nowhere.invalid/{path.name}", md5=hashlib.md5(path.read_bytes()).hexdigest(), folder="set"
    )


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("suffix", ["zip", "tgz", "tar.gz"])
def test_everything_in_the_folder_is_unpacked_and_nothing_else(suffix: str, tmp_path: Path) -> None:
    inside = {f"set/{name}": value for name, value in FILES.items()}
    archive = make(tmp_path / f"set.{suffix}", inside | OUTSIDE)
    folder = obtain(archive, tmp_path, download=False)
    assert content(folder) == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"set", f"set.{suffix}", ".set.lock"}
    assert not (tmp_path.parent / "evil.txt").exists()


@pytest.mark.parametrize("suffix", ["zip", "tgz"])
def test_a_truncated_archive_is_refused_by_its_checksum_and_by_its_contents(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"set.{suffix}"
    archive = make(path, {f"set/{name}": value for name, value in FILES.items()})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=rf"{path} has the MD5 sum .*, expected {archive.md5}: it is damaged"):
        obtain(archive, tmp_path, download=False)
    believed = Archive(url=archive.url, md5=hashlib.md5(path.read_bytes()).hexdigest(), folder="set")
    with pytest.raises(ValueError, match=rf"archive {path} is damaged \(.*remove it and run again"):
        obtain(believed, tmp_path, download=False)
    assert not (tmp_path / "set").exists()


def test_an_archive_without_the_folder_names_it(tmp_path: Path) -> None:
    archive = make(tmp_path / "set.zip", {"other/1.png": b"x"})
    with pytest.raises(ValueError, match=r"set.zip has no set; remove it"):
        obtain(archive, tmp_path, download=False)


def test_a_file_that_broke_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "labels.gz").write_bytes(bytes(range(256)) * 40)
    md5 = hashlib.md5((site / "labels.gz").read_bytes()).hexdigest()
    path = tmp_path / "new" / "raw" / "labels.gz"
    with serve(site) as (url, handler):
        handler.cut = 3000
        with pytest.raises(ValueError, match=r"no labels.gz in .*closed after 3000 of 10240 bytes.* goes on from"):
            obtain_file(f"{url}/labels.gz", md5, path, download=True)
        assert not path.exists()
        handler.cut = None
        assert obtain_file(f"{url}/labels.gz", md5, path, download=True).read_bytes() == bytes(range(256)) * 40
        assert obtain_file(f"{url}/labels.gz", md5, path, download=False) == path
        assert handler.requests == [None, "bytes=3000-"]
        path.unlink()
        with pytest.raises(ValueError, match=rf"has the MD5 sum {md5}, expected 0{{32}}; it was removed"):
            obtain_file(f"{url}/labels.gz", "0" * 32, path, download=True)
        assert [one.name for one in path.parent.iterdir()] == [".labels.gz.lock"]
    with pytest.raises(ValueError, match=r"no labels.gz in .*downloading is off. To get it, download .*put labels.gz"):
        obtain_file(f"{url}/labels.gz", md5, path, download=False)


@pytest.mark.parametrize("suffix", ["zip", "tgz"])
def test_an_archive_that_unpacks_to_too_much_is_refused(suffix: str, tmp_path: Path) -> None:
    """Of 32 MiB of nothing gzip makes 32 kB."""
    path = tmp_path / f"set.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("set/zeros", bytes(32 << 20))
        archive = Archive(url="http://nowhere.invalid/x", md5=hashlib.md5(path.read_bytes()).hexdigest(), folder="set")
        archive = replace(archive, url=f"http://nowhere.invalid/{path.name}")
    else:
        archive = make(path, {"set/zeros": bytes(32 << 20)})
    with pytest.raises(ValueError, match=r"set\.\w+ unpacks to more than [\d,]+ bytes; remove it: it is no dataset"):
        obtain(archive, tmp_path, download=False)
    assert not (tmp_path / "set").exists()
    assert sum(file.stat().st_size for file in (tmp_path / "set.part").iterdir()) < 16 << 20


def test_an_archive_of_too_many_files_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(download, "_MOST_FILES", 2)
    archive = make(tmp_path / "set.zip", {f"set/{number}": b"x" for number in range(3)})
    with pytest.raises(ValueError, match="has more than 2 files"):
        obtain(archive, tmp_path, download=False)


def test_a_lock_is_neither_followed_nor_emptied(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("data")
    with download.only_one(precious):
        pass
    (tmp_path / ".lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"), download.only_one(tmp_path / ".lock"):
        pass
    assert precious.read_text() == "data"
