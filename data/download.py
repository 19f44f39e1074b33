"""Getting a dataset's archive once, whole and checked, however often it is interrupted.

The archive grows as NAME.part and is renamed when its checksum is right; its files are unpacked into FOLDER.part,
which is renamed when they are all there. So what stands under the final names is always complete. A download that
broke off goes on where it stopped.
"""

import fcntl
import hashlib
import http.client
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

__all__ = ["Archive", "obtain"]

TIMEOUT_SECONDS = 5.0  # to connect, and between two pieces of the answer
_CHUNK = 2**18


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A .tar.gz file, and what is taken out of it."""

    url: str
    md5: str
    folder: str
    """The folder inside the archive, and in the dataset directory."""
    files: tuple[str, ...]
    """The files in that folder."""

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
    with _only_one(dataset_dir / f".{archive.folder}.lock"):
        if not folder.is_dir():
            path = dataset_dir / archive.file_name
            if not path.is_file():
                _download(archive, path)
            _unpack(archive, path, folder)
    return folder


def _how_to_get(archive: Archive, dataset_dir: Path) -> str:
    return f"To get it, download {archive.url} on any machine and put {archive.file_name} into {dataset_dir.resolve()}."


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Hold the lock file; the system lets go of it when its owner dies, and every step of the owner times out."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(archive: Archive, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    try:
        _receive(archive.url, part)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        kept = f" What arrived is kept in {part}, and another try goes on from there." if part.exists() else ""
        raise ValueError(
            f"no {archive.folder} in {path.parent}, and downloading it from {archive.url} failed: {reason}.{kept}"
            f" {_how_to_get(archive, path.parent)}"
        ) from error
    if (found := _md5(part)) != archive.md5:
        part.unlink()
        raise ValueError(
            f"what {archive.url} sent has the MD5 sum {found}, expected {archive.md5}; it was removed, try again."
            f" {_how_to_get(archive, path.parent)}"
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
    """Write the archive's known files into `folder`; nothing in the archive chooses a path."""
    if (found := _md5(path)) != archive.md5:
        raise ValueError(f"archive {path} has the MD5 sum {found}, expected {archive.md5}; remove it and run again")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    wanted = {f"{archive.folder}/{name}": name for name in archive.files}
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            name = wanted.get(member.name)
            content = tar.extractfile(member) if name else None
            if name and content:
                with content, (part / name).open("wb") as file:
                    shutil.copyfileobj(content, file)
                del wanted[member.name]
    if wanted:
        raise ValueError(f"archive {path} has no {', '.join(wanted)}; remove it and run again")
    part.rename(folder)
