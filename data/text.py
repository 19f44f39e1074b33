"""Text as sequences of tokens, each with the token that follows it as its target: Python's standard library, which is
always there, and files of one's own."""

import hashlib
import sysconfig
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unlocked.data.dataset import ImageDataset

__all__ = ["BYTES", "TEXTS", "load_stdlib", "load_text", "stdlib_files"]

BYTES = 256
"""The tokens of a text without a tokenizer."""
TEXTS = ("stdlib", "text")
"""The datasets whose samples are sequences of tokens."""
_EVERY = 10  # one module, or file, of so many is for the test
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "turtledemo", "_bundled"}
_MOST_TOKENS = 1 << 15  # int16

Splits = tuple[ImageDataset, ImageDataset]


def load_stdlib(
    *, name: str = "stdlib", sequence_length: int = 256, num_train: int | None = None, num_test: int | None = None
) -> Splits:
    """The source of Python's own standard library, docstrings and all, as bytes: about 11 MB. One top-level module of
    ten is for the test. Which bytes those are depends on the Python version alone; their digest is kept with a run.

    Args:
        sequence_length: bytes of a sample.
        num_train, num_test: so many samples, spread evenly over the text; None: all.

    Raises:
        ValueError: there are no sources, or they don't give so many samples.
    """
    files = stdlib_files()
    parts: dict[str, list[bytes]] = {"train": [], "test": []}
    for module, paths in files.items():
        word = "test" if zlib.crc32(module.encode()) % _EVERY == 0 else "train"
        parts[word] += [path.read_bytes() for path in paths]
    texts = {word: np.frombuffer(b"\n".join(found), np.uint8) for word, found in parts.items()}
    sizes = {"train": num_train, "test": num_test}
    train, test = (_split(name, word, texts[word], sequence_length, sizes[word], BYTES, 1.0) for word in sizes)
    return train, test


def stdlib_files() -> Mapping[str, list[Path]]:
    """The sources by top-level module, all in alphabetical order; without tests and what was installed beside.

    Raises:
        ValueError: there are none.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if not _LEFT_OUT & set(parts) and not parts[0].startswith(("config-", "_sysconfigdata", "lib-dynload")):
            found.setdefault(parts[0].removesuffix(".py"), []).append(path)
    if not found:
        raise ValueError(f"dataset stdlib: {root} holds no Python sources")
    return found


def load_text(
    dataset_dir: Path,
    *,
    name: str = "text",
    sequence_length: int = 256,
    num_train: int | None = None,
    num_test: int | None = None,
    tokenizer: str | Path | None = None,
) -> Splits:
    """The files of a folder. Where it has folders `train` and `test`, those are the splits; else every tenth file in
    alphabetical order is for the test, and of a single file its last tenth.

    Args:
        tokenizer: a file of the package `tokenizers` (tokenizer.json, of at most 32,768 tokens). None: the folder's
            `tokenizer.json` if there is one, else bytes.
        sequence_length: tokens of a sample.
        num_train, num_test: see `load_stdlib`.

    Raises:
        ValueError: no folder, no files, a tokenizer that can't be read, or text too short for one sample.
    """
    if not dataset_dir.is_dir():
        raise ValueError(f"dataset {name}: {dataset_dir} is no folder; give --dataset-dir, the one with the text files")
    own = dataset_dir / "tokenizer.json"
    chosen = Path(tokenizer) if tokenizer is not None else own if own.is_file() else None
    encoder = None if chosen is None else _tokenizer(chosen)
    parts = _text_parts(dataset_dir, name, chosen)
    vocabulary = BYTES if encoder is None else encoder.get_vocab_size()
    sizes = {"train": num_train, "test": num_test}
    tokens, lengths = {}, {}
    for word, texts in parts.items():
        tokens[word] = _tokens(texts, encoder)
        lengths[word] = sum(map(len, texts))
    ratio = 1.0 if encoder is None else lengths["test"] / max(len(tokens["test"]), 1)
    train, test = (_split(name, word, tokens[word], sequence_length, sizes[word], vocabulary, ratio) for word in sizes)
    return train, test


def _text_parts(folder: Path, name: str, tokenizer: Path | None) -> dict[str, list[bytes]]:
    split = (folder / "train").is_dir() and (folder / "test").is_dir()
    if split:
        return {word: [path.read_bytes() for path in _files(folder / word, name, None)] for word in ("train", "test")}
    files = [path.read_bytes() for path in _files(folder, name, tokenizer)]
    if len(files) == 1:
        cut = len(files[0]) * (_EVERY - 1) // _EVERY
        return {"train": [files[0][:cut]], "test": [files[0][cut:]]}
    test = files[_EVERY - 1 :: _EVERY] or files[-1:]
    return {"train": [one for one in files if not any(one is other for other in test)], "test": test}


def _files(folder: Path, name: str, left_out: Path | None) -> list[Path]:
    named = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    found = [path for path in named if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    found = [path for path in found if left_out is None or path.resolve() != left_out.resolve()]
    if not found:
        raise ValueError(f"dataset {name}: {folder} holds no files")
    return found


def _tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError("a tokenizer needs the package tokenizers; pip install 'unlocked[text]'") from error
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # whatever the package raises: its own class is a plain Exception
        raise ValueError(f"{path} is no tokenizer of the package tokenizers: {error}") from error
    if not 1 < found.get_vocab_size() <= _MOST_TOKENS:
        raise ValueError(f"{path} has {found.get_vocab_size()} tokens; a text's are at most {_MOST_TOKENS}")
    return found


def _tokens(texts: Iterable[bytes], encoder: Any) -> np.ndarray:
    if encoder is None:
        return np.frombuffer(b"\n".join(texts), np.uint8)
    decoded = [text.decode("utf-8", errors="replace") for text in texts]
    ids = [np.asarray(one.ids, np.int16) for one in encoder.encode_batch(decoded)]
    return np.concatenate(ids) if ids else np.zeros(0, np.int16)


def _split(
    name: str, word: str, tokens: np.ndarray, length: int, rows: int | None, vocabulary: int, ratio: float
) -> ImageDataset:
    there = (len(tokens) - 1) // length if length > 0 else 0
    if there < 1 or (rows is not None and not 1 <= rows <= there):
        wanted = "one sample" if rows is None else f"{rows} samples"
        raise ValueError(
            f"dataset {name} ({word}): {len(tokens)} tokens make {max(there, 0)} samples of {length}, not {wanted}"
        )
    samples = _rows(tokens[: there * length], length)
    targets = _rows(tokens[1 : there * length + 1], length)
    if rows is not None and rows < there:
        chosen = torch.arange(rows) * there // rows
        samples, targets = samples[chosen], targets[chosen]
    return ImageDataset(
        name=name,
        split=word,
        images=samples,
        labels=targets,
        num_classes=0,
        num_tokens=vocabulary,
        bytes_per_token=ratio,
        text_digest=hashlib.sha256(tokens.tobytes()).hexdigest()[:16],
    )


def _rows(tokens: np.ndarray, length: int) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int16)).view(-1, length)
