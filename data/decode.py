"""Decodes image files into an array on disk, in this process or as a program of its own.

Run as `python decode.py` it reads one task as JSON from standard input, writes into the task's array, and prints a line
per step: {"done": N} or {"error": "..."}. It imports nothing of this project, so that it starts in a fraction of a
second; a process of its own rather than a fork, since forks of a process with threads may hang.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["decode_into", "image_size", "pillow_version"]

_REPORT_EVERY = 64


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file.

    Raises:
        ValueError: it can't be read, or Pillow is not installed.
    """
    with _opened(path) as image:
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

    Args:
        resize: scale every image so that its shorter side has this many pixels, or, where H and W differ, so that it
            just covers H x W (bilinear, anti-aliased, as torchvision scales), and cut H x W out of the middle. None:
            every image must be H x W.
        example: the file that H x W comes from, for messages.

    Raises:
        ValueError: a file can't be read, or has another size; names it.
    """
    import numpy as np

    channels, height, width = array.shape[1:]
    for number, (row, path) in enumerate(zip(rows, paths, strict=True), start=1):
        with _opened(Path(path)) as image:
            if resize is None and (image.height, image.width) != (height, width):
                raise ValueError(
                    f"image {path} is {image.height} x {image.width} pixels, but {example} is {height} x {width}; give "
                    "image_size (--image-size) to have all images scaled and cropped to one size"
                )
            try:
                whole = image.convert("L" if channels == 1 else "RGB")
                pixels = np.asarray(whole if resize is None else _scaled(whole, resize, height, width))
            except (OSError, SyntaxError, ValueError) as error:
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


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("reading images needs the package pillow; pip install pillow") from error
    return Image


def _opened(path: Path) -> Any:
    pillow = _pillow()
    try:
        return pillow.open(path)
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise ValueError(f"image {path} can't be read: {error}") from error


def _scaled(image: Any, shorter: int, height: int, width: int) -> Any:
    if height == width:
        size = [shorter if side == min(image.size) else int(shorter * side / min(image.size)) for side in image.size]
    elif image.width * height >= image.height * width:
        size = [image.width * height // image.height, height]
    else:
        size = [width, image.height * width // image.width]
    if size != list(image.size):
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
