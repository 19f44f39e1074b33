"""Getting a dataset's archive once, whole and checked, however often it is interrupted.

The archive grows as NAME.part and is renamed when its checksum is right; its files are unpacked into FOLDER.part,
which is renamed when they are all there. So what stands under the final names is always complete. A download that
broke off goes on where it stopped. Nothing is downloaded or unpacked whose checksum is not known.
"""

import fcntl
import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

__all__ = ["Archive", "obtain", "obtain_file", "only_one"]

TIMEOUT_SECONDS = 5.0  # to connect, and between two pieces of the answer
_CHUNK = 2**18
_MOST_FILES = 1_000_000  # in an archive: ten times what the largest of the known ones has
_MOST_BYTES = 64 << 30  # of them together
_MOST_GROWTH = 200  # times an archive's own bytes, as which it may unpack: more is no data


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A .tar.gz, .tgz or .zip file, and what is taken out of it."""

    url: str
    md5: str
    folder: str
    """The folder inside the archive, and in the dataset directory."""
    files: tuple[str, ...] = ()
    """The files in that folder; empty: all that are there, in folders of any depth."""

    @property
    def file_name(self) -> str:
        return PurePosixPath(self.url).name


def obtain(archive: Archive, dataset_dir: Path, *, download: bool) -> Path:
    """The folder `dataset_dir`/`archive.folder`, unpacked from the archive, downloaded if need be.

    An existing folder is returned as it is. An archive that lies in `dataset_dir` already is used. Processes that
    ask at the same time wait for one of them to do the work.

    Raises:
        ValueError: there is neither folder nor archive and `download` is false or fails; or the archive's checksum
            or contents are wrong.
    """
    folder = dataset_dir / archive.folder
    if folder.is_dir():
        return folder
    if not download and not (dataset_dir / archive.file_name).is_file():
        raise ValueError(
            f"no {archive.folder} in {dataset_dir}, and downloading is off. {_how_to_get(archive, dataset_dir)}"
        )
    dataset_dir.mkdir(parents=True, exist_ok=True)
    with only_one(dataset_dir / f".{archive.folder}.lock"):
        if not folder.is_dir():
            path = dataset_dir / archive.file_name
            if not path.is_file():
                _download(archive.url, archive.md5, path, f"no {archive.folder} in {dataset_dir}")
            _unpack(archive, path, folder)
    return folder


def obtain_file(url: str, md5: str, path: Path, *, download: bool) -> Path:
    """The file `path`, downloaded from `url` if it is not there. Processes wait for each other as in `obtain`.

    Raises:
        ValueError: it is not there and `download` is false or fails, or the checksum of what was sent is wrong.
    """
    if path.is_file():
        return path
    if not download:
        raise ValueError(f"no {path.name} in {path.parent}, and downloading is off. {_how_to_get_file(url, path)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with only_one(path.parent / f".{path.name}.lock"):
        if not path.is_file():
            _download(url, md5, path, f"no {path.name} in {path.parent}")
    return path


@contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Hold the lock file; the system lets go of it when its owner dies, and every step of the owner times out.

    What lies under its name is neither followed, if it is a link, nor emptied.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with open(descriptor, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _how_to_get(archive: Archive, dataset_dir: Path) -> str:
    return _how_to_get_file(archive.url, dataset_dir / archive.file_name)


def _how_to_get_file(url: str, path: Path) -> str:
    return f"To get it, download {url} on any machine and put {path.name} into {path.parent.resolve()}."


def _download(url: str, md5: str, path: Path, lacking: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        _receive(url, part)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        kept = f" What arrived is kept in {part}, and another try goes on from there." if part.exists() else ""
        raise ValueError(
            f"{lacking}, and downloading it from {url} failed: {reason}.{kept} {_how_to_get_file(url, path)}"
        ) from error
    if (found := _md5(part)) != md5:
        part.unlink()
        raise ValueError(
            f"what {url} sent has the MD5 sum {found}, expected {md5}; it was removed, try again."
            f" {_how_to_get_file(url, path)}"
        )
    part.rename(path)


def _receive(url: str, part: Path) -> None:
    """Append to `part` what it lacks of the file at `url`. Raises OSError or HTTPException where that fails."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if have and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # all bytes are here already; the checksum decides
        raise
    with response:
        if response.status != http.client.PARTIAL_CONTENT:
            have = 0  # the server starts from the beginning
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with part.open("ab" if have else "wb") as file, Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(PurePosixPath(url).name, total=total, completed=have)
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                progress.update(task, completed=have)
    if total is not None and have < total:
        raise ConnectionError(f"the connection closed after {have} of {total} bytes")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _unpack(archive: Archive, path: Path, folder: Path) -> None:
    """Write the archive's files into `folder`; nothing in the archive chooses a path outside of it."""
    if (found := _md5(path)) != archive.md5:
        raise ValueError(
            f"archive {path} has the MD5 sum {found}, expected {archive.md5}: it is damaged, or another one; remove it "
            "and run again"
        )
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    lacking = set(archive.files)
    room = _Room(path)
    try:
        for name, content in _members(path):
            room.take_file()
            inside = _inside(name, archive)
            if inside is not None:
                target = part / inside
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    room.copy(content, file)
                lacking.discard(inside)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"archive {path} is damaged ({error}); remove it and run again") from error
    if lacking or not any(part.iterdir()):
        what = ", ".join(sorted(lacking)) or archive.folder
        raise ValueError(f"archive {path} has no {what}; remove it and run again")
    part.rename(folder)


class _Room:
    """What an archive may still unpack to. A few kilobytes can hold terabytes of nothing.

    Raises (all methods):
        ValueError: it holds more; names the limit.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._files = path, 0
        self._bytes, self._most = 0, min(_MOST_BYTES, _MOST_GROWTH * path.stat().st_size + (1 << 20))

    def take_file(self) -> None:
        self._files += 1
        if self._files > _MOST_FILES:
            raise ValueError(f"archive {self._path} has more than {_MOST_FILES:,} files; remove it: it is no dataset")

    def copy(self, source: IO[bytes], target: IO[bytes]) -> None:
        while data := source.read(_CHUNK):
            self._bytes += len(data)
            if self._bytes > self._most:
                raise ValueError(
                    f"archive {self._path} unpacks to more than {self._most:,} bytes; remove it: it is no dataset"
                )
            target.write(data)


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The regular files of an archive in turn, each open while it is the current one."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    with archive.open(info) as content:
                        yield info.filename, content
        return
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            extracted = tar.extractfile(member) if member.isfile() else None
            if extracted is not None:
                with extracted:
                    yield member.name, extracted


def _inside(name: str, archive: Archive) -> str | None:
    """Where below its folder a wanted file of the archive belongs."""
    parts = PurePosixPath(name).parts
    if len(parts) < 2 or parts[0] != archive.folder or ".." in parts:
        return None
    inside = "/".join(parts[1:])
    return inside if not archive.files or inside in archive.files else None
