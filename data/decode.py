"""Decodes image files into an array on disk, in this process or as a program of its own.

Run as `python decode.py` it reads one task as JSON from standard input, writes into the task's array, and prints a line
per step: {"done": N} or {"error": "..."}. It imports nothing of this project, so that it starts in a fraction of a
second; a process of its own rather than a fork, since forks of a process with threads may hang.

What every kind of image becomes is the table in docs/data.md, which a test reads.
"""

import json
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["decode_into", "image_size", "kind_of_file", "pillow_version", "pixel_limit"]

_REPORT_EVERY = 64
_EIGHT_BITS = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"))
"""Modes that Pillow converts to RGB and grey without loss of scale; it drops alpha and keeps the colours below it."""
_SIXTEEN_BITS = frozenset(("I;16", "I;16B", "I;16L", "I;16N"))
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFSOCK: "a socket"}
_HOW_TO_RAISE = "Make it smaller, remove it, or set PIL.Image.MAX_IMAGE_PIXELS before the dataset is loaded"
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF 6.0, section 3


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file.

    Raises:
        ValueError: it can't be read, is of a kind that is not decoded or too large, or Pillow is not installed.
    """
    with _strict(), _opened(path) as image:
        return int(image.height), int(image.width)


def decode_into(
    array: Any,
    rows: list[int],
    paths: list[str],
    *,
    resize: int | None,
    example: str,
    report: Callable[[int], None] = lambda done: None,
) -> None:
    """array[row] = the image of each path: uint8 [C, H, W] of an array [N, C, H, W].

    The first frame of several; the EXIF orientation is not applied, as torchvision's ImageFolder doesn't.

    Args:
        resize: scale every image so that its shorter side has this many pixels (bilinear, anti-aliased, as torchvision
            scales), and cut H x W out of the middle. None: every image must be H x W.
        example: the file that H x W comes from, for messages.

    Raises:
        ValueError: a file can't be read, is of a kind that is not decoded, has another size or too many pixels, before
            or after scaling; names it.
    """
    with _strict():
        _decode_into(array, rows, paths, resize, example, report)


def _decode_into(
    array: Any, rows: list[int], paths: list[str], resize: int | None, example: str, report: Callable[[int], None]
) -> None:
    import numpy as np

    channels, height, width = array.shape[1:]
    for number, (row, path) in enumerate(zip(rows, paths, strict=True), start=1):
        with _opened(Path(path)) as image:
            if resize is None and (image.height, image.width) != (height, width):
                raise ValueError(
                    f"image {path} is {image.height} x {image.width} pixels, but {example} is {height} x {width}; give "
                    "image_size (--image-size) to have all images scaled and cropped to one size"
                )
            size = image.size if resize is None else _scaled_size(image, resize, path)
            try:
                whole = _eight_bits(image, "L" if channels == 1 else "RGB")
                pixels = np.asarray(whole if resize is None else _scaled(whole, size, height, width))
            except _damages() as error:
                raise ValueError(f"image {path} is damaged: {error}") from error
        array[row] = pixels if channels == 1 else pixels.transpose(2, 0, 1)
        if number % _REPORT_EVERY == 0 or number == len(rows):
            report(number)


def pillow_version() -> str:
    """Of what decodes: another version may give other pixels.

    Raises:
        ValueError: Pillow is not installed.
    """
    _pillow()
    from PIL import features

    return f"{features.version('pil')} {features.version('jpg')}"


def pixel_limit() -> int | None:
    """The most pixels that an image may have: Pillow's own limit, which the user can set; None: any number."""
    return getattr(_pillow(), "MAX_IMAGE_PIXELS", None)


def kind_of_file(mode: int) -> str | None:
    """What a file with this st_mode is where it is no regular one: reading a pipe or a device may never end."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "a device")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("reading images needs the package pillow; pip install pillow") from error
    return Image


def _damages() -> tuple[type[Exception], ...]:
    """What Pillow raises where the bytes of an image are not what its header says."""
    return OSError, SyntaxError, ValueError, *_too_large()


def _too_large() -> tuple[type[Exception], ...]:
    """What Pillow raises where an image has more pixels than its limit."""
    pillow = _pillow()
    return pillow.DecompressionBombError, pillow.DecompressionBombWarning


@contextmanager
def _strict() -> Iterator[None]:
    """Pillow only warns of images of up to twice its limit. That a palette's transparency is dropped is documented."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", _pillow().DecompressionBombWarning)
        warnings.filterwarnings("ignore", message="Palette images with Transparency")
        yield


def _opened(path: Path) -> Any:
    """The image, of which only the header was read, if it is of a kind that is decoded."""
    pillow = _pillow()
    try:
        if kind := kind_of_file(os.stat(path).st_mode):
            raise ValueError(f"it is {kind}, no regular file")
        image = pillow.open(path)
    except _too_large() as error:
        raise ValueError(f"image {path} has too many pixels: {error} {_HOW_TO_RAISE}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image {path} can't be read: {error}") from error
    if image.mode in _EIGHT_BITS or _is_sixteen_bits(image):
        return image
    image.close()
    raise ValueError(
        f"image {path} has Pillow's mode {image.mode}, whose values have no known black and white or depend on a "
        "profile; save it as RGB, or as grey of 8 or 16 bits"
    )


def _is_sixteen_bits(image: Any) -> bool:
    """Pillow opens 16-bit PGM files as 32-bit integers, scaled to 0 to 65535 whatever their largest value is."""
    return image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format == "PPM")


def _eight_bits(image: Any, wanted: str) -> Any:
    """The image in the mode L or RGB. Of 16 bits the upper eight: Pillow's `convert` would cut off at 255."""
    if image.mode == wanted:
        return image
    if _is_sixteen_bits(image):
        import numpy as np

        tags = image.tag_v2 if image.format == "TIFF" else {}
        shift = tags.get(_BITS_PER_SAMPLE, (16,))[0] - 8  # 12-bit files are opened as 16 bits, unscaled
        upper = (np.asarray(image) >> shift).astype(np.uint8)
        image = _pillow().fromarray(255 - upper if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else upper)
    return image.convert(wanted)


def _scaled_size(image: Any, shorter: int, path: str) -> tuple[int, int]:
    """(width, height) of the image when its shorter side has `shorter` pixels."""
    least = min(image.size)
    width, height = (shorter if side == least else int(shorter * side / least) for side in image.size)
    limit = pixel_limit()
    if limit is not None and width * height > limit:
        raise ValueError(
            f"image {path} is {image.height} x {image.width} pixels, and {height} x {width} when its shorter side is "
            f"scaled to {shorter}: more than the limit of {limit} pixels. {_HOW_TO_RAISE}"
        )
    return width, height


def _scaled(image: Any, size: tuple[int, int], height: int, width: int) -> Any:
    if size != image.size:
        image = image.resize(size, _pillow().Resampling.BILINEAR)
    top, left = round((image.height - height) / 2.0), round((image.width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))


def _main() -> int:
    import numpy as np

    def say(**message: Any) -> None:
        print(json.dumps(message), flush=True)

    try:
        task = json.load(sys.stdin)
        array = np.load(task["array"], mmap_mode="r+")
        _pillow().MAX_IMAGE_PIXELS = task["pixel_limit"]
        decode_into(
            array,
            task["rows"],
            task["paths"],
            resize=task["resize"],
            example=task["example"],
            report=lambda done: say(done=done),
        )
        array.flush()
    except ValueError as error:
        say(error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
