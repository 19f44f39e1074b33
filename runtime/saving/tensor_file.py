"""Files of tensors: what one claims to hold must lie in it, and weights have their checksum beside them."""

import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unlocked.runtime.saving.whole_file import whole_file, write_whole

__all__ = ["CHECKSUM", "check_weights", "load_tensors", "save_tensors", "save_weights"]

CHECKSUM = ".sha256"
"""What is added to the name of a file of weights for that of its checksum, which `sha256sum -c` reads."""


def save_tensors(content: Any, path: Path) -> None:
    """`torch.save`, which says why it could not write: of a full disk, or a limit on files, it tells no more than that
    its position in the file is not what it expected.

    Raises:
        OSError: the operating system's, with the file's name.
    """
    with path.open("wb", buffering=0) as file:
        told = _Told(file)
        try:
            torch.save(content, told)  # type: ignore[arg-type]
        except (OSError, RuntimeError):
            if told.error is None:
                raise
            raise OSError(told.error.errno, told.error.strerror, str(path)) from None


class _Told:
    """A file that keeps the first error of a write.

    Args:
        file: unbuffered, so that a write may take a part only.
    """

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes all of it."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            self.error = self.error or error
            raise
        return size

    def flush(self) -> None:
        """Nothing waits."""


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes {name: tensor}, whole, and its checksum beside it. A crash in between leaves the file without one.

    Raises:
        DiskFullError: there is no room for it.
    """
    checksum = path.with_name(path.name + CHECKSUM)
    with whole_file(path) as temporary:
        save_tensors(dict(weights), temporary)
        digest = _digest(temporary)
        checksum.unlink(missing_ok=True)
    write_whole(checksum, f"{digest}  {path.name}\n")


def check_weights(path: Path) -> None:
    """Raises: ValueError: the file is not the one for which the checksum beside it was written."""
    checksum = path.with_name(path.name + CHECKSUM)
    if not checksum.is_file():
        return
    known = checksum.read_text(encoding="utf-8", errors="replace").split()
    if _digest(path) not in known:
        raise ValueError(
            f"{path} is damaged or was exchanged: it does not have the checksum in {checksum.name}; remove that file "
            "if you have put other weights there yourself"
        )


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU; nothing in the file is executed.

    Raises:
        ValueError: it claims to hold more than its bytes, which is found out before that takes memory.
        Others: it is no such file, or is damaged.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    claimed = sum(entry.file_size for entry in entries)
    if claimed > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"its {size} bytes claim to hold {claimed}")
    content = torch.load(path, map_location="cpu", weights_only=True)
    storages = {}
    for tensor in _dense(content):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} claims more than its {storage.nbytes()} bytes")
    if sum(storages.values()) > size:
        raise ValueError(f"its {size} bytes claim to hold {sum(storages.values())}")
    return content


def _dense(value: object) -> Iterator[Tensor]:
    """Those that have a storage of their own."""
    if isinstance(value, Tensor):
        if value.layout == torch.strided and not value.is_meta:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _dense(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _dense(item)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
