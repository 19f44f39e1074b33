"""Files of the datasets' official layouts, written by the definitions of their formats, byte for byte."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

__all__ = ["draw", "idx", "mnist_pixels", "png", "png_of", "ppm", "tiff", "write_folder", "write_mnist"]

NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def idx(values: bytes, *sizes: int) -> bytes:
    return struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes) + values


def mnist_pixels(split: str, count: int) -> bytes:
    return bytes((i * 7 + len(split)) % 251 for i in range(count * 28 * 28))


def write_mnist(folder: Path, *, zipped: bool = False, sizes: tuple[int, int] = (12, 5)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for (split, (images, labels)), count in zip(NAMES.items(), sizes, strict=True):
        files = {
            images: idx(mnist_pixels(split, count), count, 28, 28),
            labels: idx(bytes(i % 10 for i in range(count)), count),
        }
        for name, content in files.items():
            (folder / f"{name}.gz" if zipped else folder / name).write_bytes(
                gzip.compress(content, mtime=0) if zipped else content
            )


def png(pixels: np.ndarray) -> bytes:
    """An RGB image [H, W, 3]."""
    return png_of(2, 8, pixels.tobytes(), pixels.shape[:2])


def png_of(kind: int, bits: int, values: bytes, size: tuple[int, ...]) -> bytes:
    """PNG of any colour type, of big-endian rows (PNG specification, section 11.2.2); `size`: height, width."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = size
    step = len(values) // height
    rows = b"".join(b"\0" + values[i * step : (i + 1) * step] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(bits: int, photometric: int, values: bytes, size: tuple[int, int]) -> bytes:
    """Grey, little-endian, one strip: by TIFF 6.0, sections 2 and 4; `size`: height, width."""
    height, width = size
    fields = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric)]
    fields += [(273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, height), (279, len(values))]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + directory + struct.pack("<I", 0) + values


def ppm(pixels: np.ndarray) -> bytes:
    return f"P6\n{pixels.shape[1]} {pixels.shape[0]}\n255\n".encode() + pixels.tobytes()


def draw(seed: int, height: int = 9, width: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def write_folder(root: Path, counts: dict[str, int], **size: int) -> list[np.ndarray]:
    """`counts`: folder -> images in it; every other one lies a folder deeper."""
    images = []
    for name, count in counts.items():
        for i in range(count):
            path = root / name / ("deep" if i % 2 else "") / f"{i:03d}.{'png' if i % 3 else 'PPM'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            images.append(draw(len(images) + sum(counts.values()), **size))
            path.write_bytes(png(images[-1]) if i % 3 else ppm(images[-1]))
    return images
