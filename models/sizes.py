"""What every network asks of its sizes."""

from numbers import Integral
from typing import Any

__all__ = ["check_positive", "latent_side", "too_small"]


def check_positive(**sizes: Any) -> None:
    """Raises: ValueError: a size is not a positive integer, of Python or NumPy; names it. None is no size."""
    for word, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, Integral) or size < 1):
            raise ValueError(f"{word} is a positive integer, got {size}")


def too_small(name: str, sides: tuple[int, int], image: tuple[int, int]) -> ValueError:
    """The error of a 2x2 max pool in the block `name` that is given `sides` pixels."""
    return ValueError(
        f"block {name}: a 2x2 max pool needs at least 2 x 2 pixels, got {sides[0]} x {sides[1]} from images of "
        f"{image[0]} x {image[1]}; use larger images or a network with fewer pools"
    )


def latent_side(channels: int, sides: tuple[int, int], most: int = 2048) -> int:
    """p of the latents' p x p windows: no more than `most` latents, no more windows than pixels, at least one."""
    return max(1, min(*sides, int((most / channels) ** 0.5)))
