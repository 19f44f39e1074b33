"""`ImageDataset`: images and labels as whole tensors, on the device or mapped, and how batches are made of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unlocked.kernels.images import make_erase_boxes

_TOKENS = (torch.int16, torch.int32, torch.int64)

__all__ = ["Augmentation", "ImageDataset", "channel_statistics", "count_statistics"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """What happens to an image of the training set each time it is read; by default nothing."""

    flip: bool = False
    """Mirror left and right with probability 1/2."""
    crop_padding: int = 0
    """Pad by this many black pixels on every side, then crop the original size at a random place."""
    crop_margin: bool = False
    """Cut images that are stored with a margin out at a random place instead of the middle."""
    erase_probability: float = 0.0
    """How often a random rectangle is blanked (Zhong et al., "Random Erasing Data Augmentation", AAAI 2020)."""

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding is a number of pixels, at least 0, got {self.crop_padding}")
        if self.crop_padding and self.crop_margin:
            raise ValueError("crop_padding and crop_margin are two ways to crop; choose one")
        if not 0.0 <= self.erase_probability <= 1.0:
            raise ValueError(f"erase_probability is a probability in [0, 1], got {self.erase_probability}")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageDataset:
    """One split of a dataset.

    Raises:
        ValueError: sizes, types, labels or statistics that do not fit together (says which).
    """

    name: str
    split: str
    images: Tensor
    """uint8 [N, C, H, W], 0 to 255; or float32 or int64 (tokens), which are used as they are (see `from_tensors`).
    int16 and int32 are tokens that are stored narrow and read as int64."""
    labels: Tensor
    """int64 [N], in [0, num_classes); or with `num_classes` 0 targets [N, ...] of any shape, float32, bool or
    integers, which are read as int64; uint8 [N, 0]: there are none."""
    num_classes: int
    """0: the targets are no class numbers of samples; a task says what they are."""
    open_classes: bool = False
    """`num_classes` is what the labels show, and the model may tell more apart."""
    classes: Sequence[str] = ()
    """The classes' names; empty: their numbers."""
    mean: tuple[float, ...] = ()
    """Of each channel, where 255 counts as 1; empty: 0."""
    std: tuple[float, ...] = ()
    """Of each channel, where 255 counts as 1; empty: 1."""
    augmentation: Augmentation = Augmentation()
    margin: int = 0
    """Pixels on every side of the stored uint8 images that are cut off when they are read."""
    streamed: bool | None = None
    """True: the images stay where they are (in host memory, or in a file mapped into it), and micro-batches are read
    ahead of stage 0; False: they move to the device as a whole; None: as a whole where they fit. The numbers are the
    same."""
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors [N, ...] that layers read beside the samples, by the name of their forward's parameter."""
    num_tokens: int = 0
    """Of a text: how many tokens its vocabulary has; 0: nobody knows."""
    bytes_per_token: float | None = None
    """Of a text, on average."""
    text_digest: str = ""
    """Of a text: of all of its tokens."""
    classes_per_batch: int | None = None
    """Of how many classes a training micro-batch holds samples (see `class_order`); None: of any, all samples once."""

    def __post_init__(self) -> None:
        if not self.classes or isinstance(self.classes, _Numbers):
            object.__setattr__(self, "classes", _Numbers(max(self.num_classes, 0)))
        problem = self._shape_problem() or self._label_problem() or self._statistics_problem() or self._order_problem()
        if problem:
            raise ValueError(f"dataset {self.name} ({self.split}): {problem}")
        object.__setattr__(self, "images", self.images.contiguous())

    @classmethod
    def from_tensors(
        cls,
        images: Tensor,
        labels: Tensor,
        num_classes: int,
        *,
        name: str = "custom",
        split: str = "train",
        flip: bool = False,
    ) -> "ImageDataset":
        """A dataset of your own tensors.

        Args:
            images: [N, C, H, W]: float32, used as it is, or uint8, divided by 255. Float samples may have any [N, ...],
                and so may int64 ones, such as tokens [N, T] for a network that begins with an embedding.
            labels: int64 [N], in [0, num_classes).
            flip: mirror images with probability 1/2; for uint8 images, `augmentation` offers more.

        Raises:
            ValueError: see the class.
        """
        augmentation = Augmentation(flip=flip)
        return cls(
            name=name, split=split, images=images, labels=labels, num_classes=num_classes, augmentation=augmentation
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """One sample's as it is read: (C, H, W) of images; others may have any shape, such as (D,), (T, D) or, for
        tokens, (T,)."""
        shape = tuple(self.images.shape[1:])
        return (shape[0], shape[1] - 2 * self.margin, shape[2] - 2 * self.margin) if self.margin else shape

    @property
    def sample_dtype(self) -> torch.dtype:
        """What a network reads: float32, or int64 of tokens."""
        return torch.int64 if self.images.dtype in _TOKENS else torch.float32

    @property
    def target_shape(self) -> tuple[int, ...]:
        """One sample's."""
        return tuple(self.labels.shape[1:])

    @property
    def target_dtype(self) -> torch.dtype:
        """What targets are read as."""
        return torch.int64 if self.labels.dtype in _TOKENS else self.labels.dtype

    @property
    def mean255(self) -> Tensor:
        """float32 [C]: a network reads (value - mean255) * inv_std255. Zero for float images."""
        return self._per_channel(self.mean, 0.0, lambda mean: mean * 255.0)

    @property
    def inv_std255(self) -> Tensor:
        """float32 [C], see `mean255`. One for float images."""
        return self._per_channel(self.std, 1.0, lambda std: 1.0 / (std * 255.0))

    def batch_options(self) -> dict[str, Any]:
        """How `load_batch` of the kernels makes a batch of this dataset: normalisation and augmentation."""
        height, width = self.image_shape[-2:] if len(self.image_shape) == 3 else (1, 1)
        probability = self.augmentation.erase_probability
        cut = {"margin": self.margin, "crop_margin": self.augmentation.crop_margin} if self.margin else {}
        return {
            **cut,
            "mean": self.mean255,
            "inv_std": self.inv_std255,
            "flip": self.augmentation.flip,
            "crop_padding": self.augmentation.crop_padding,
            "erase_probability": probability,
            "erase_boxes": make_erase_boxes(height, width, self.images.device) if probability else None,
        }

    def to(self, device: torch.device | str) -> "ImageDataset":
        """This dataset with its tensors on `device`; itself where they are there already."""
        images, labels = self.images.to(device), self.labels.to(device)
        if images is self.images and labels is self.labels:
            return self
        beside = {name: value.to(device) for name, value in self.beside.items()}
        return replace(self, images=images, labels=labels, beside=beside)

    def _per_channel(self, values: Sequence[float], default: float, scale: Callable[[float], float]) -> Tensor:
        channels = self.images.shape[1]
        if self.images.dtype != torch.uint8:
            return torch.full((channels,), default, device=self.images.device)
        # In float64 on the host, rounded once: the same bits on every device.
        wide = [scale(value) for value in (values or [default] * channels)]
        return torch.tensor(wide, dtype=torch.float32, device=self.images.device)

    def _shape_problem(self) -> str | None:
        images, labels = self.images, self.labels
        fits = images.dim() == 4 or (images.dim() > 1 and images.dtype != torch.uint8)
        if not fits or images.numel() == 0:
            return (
                "images have the shape [N, C, H, W] (float samples and tokens any [N, ...]) with no size 0, "
                f"got {list(images.shape)}"
            )
        if images.dtype not in (torch.uint8, torch.float32, *_TOKENS):
            return (
                f"images are uint8 or float32 and tokens int64, got {images.dtype}; convert them, for instance with "
                ".float() or .long()"
            )
        if self.num_classes == 0:
            return self._target_problem()
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            return (
                f"labels are int64 of the shape [{len(images)}], one for each image,"
                f" got {labels.dtype} {list(labels.shape)}"
            )
        if self.margin and (images.dtype != torch.uint8 or not 0 < 2 * self.margin < min(images.shape[2:])):
            return f"a margin leaves some of uint8 images {list(images.shape)}, got {self.margin}"
        if images.device != labels.device:
            return f"images and labels are on one device, got {images.device} and {labels.device}"
        return None

    def _target_problem(self) -> str | None:
        for name, value in {"targets": self.labels, **self.beside}.items():
            if value.dim() < 1 or len(value) != len(self.images):
                return f"{name} have the shape {list(value.shape)} for {len(self.images)} samples"
        if self.classes_per_batch is not None or self.augmentation != Augmentation():
            return "classes_per_batch and augmentation are for images with class numbers [N]"
        return None

    def _label_problem(self) -> str | None:
        if self.num_classes == 0:
            return None
        if self.num_classes < 1 or (not isinstance(self.classes, _Numbers) and len(self.classes) != self.num_classes):
            return f"num_classes is {self.num_classes}, but there are {len(self.classes)} class names"
        low, high = (int(bound) for bound in torch.aminmax(self.labels))
        if low < 0 or high >= self.num_classes:
            return f"labels are in [0, {self.num_classes - 1}], got values from {low} to {high}"
        return None

    def _statistics_problem(self) -> str | None:
        channels = self.images.shape[1]
        for word, values in {"mean": self.mean, "std": self.std}.items():
            if values and len(values) != channels:
                return f"{word} has one value for each of {channels} channels, got {len(values)}"
        if self.augmentation.crop_margin and not self.margin:
            return "crop_margin is for images that are stored with a margin; use crop_padding"
        if any(value <= 0 for value in self.std):
            return f"std is positive, got {self.std}"
        if self.images.dtype == torch.uint8:
            return None
        if self.mean or self.std:
            return "float images are used as they are; leave mean and std out, or pass uint8 images"
        if self.augmentation.flip and (self.images.dim() != 4 or not self.images.is_floating_point()):
            return f"only images [N, C, H, W] can be flipped, got {self.images.dtype} {list(self.images.shape)}"
        if self.augmentation.crop_padding or self.augmentation.erase_probability:
            return "float images can only be flipped; pass uint8 images to crop and erase"
        return None

    def _order_problem(self) -> str | None:
        most = self.classes_per_batch
        if most is None:
            return None
        there = len(self.labels.unique())
        if 1 <= most <= there:
            return None
        return f"classes_per_batch is {most}; the labels have {there} classes, give 1 to {there}"


class _Numbers(Sequence[str]):
    """The names "0", "1" and so on, made when they are asked for: the number of classes of a user's labels may be wrong
    by as much as an int64 allows."""

    def __init__(self, count: int) -> None:
        self._numbers = range(count)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        found = self._numbers[index]
        return str(found) if isinstance(found, int) else tuple(map(str, found))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _Numbers):
            return self._numbers == other._numbers
        return isinstance(other, tuple) and len(self) == len(other) and tuple(self) == other


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel of uint8 images [N, C, H, W], where 255 counts as 1."""
    return count_statistics(torch.stack([torch.bincount(c.reshape(-1), minlength=256) for c in images.unbind(1)]))


def count_statistics(counts: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The same from how often each value occurs in each channel: int64 [C, 256].

    Summed as integers, so that every machine gets the same floats.
    """
    values = torch.arange(256)
    means, stds = [], []
    for channel in counts:
        count = int(channel.sum())
        mean = int((channel * values).sum()) / count
        variance = int((channel * values * values).sum()) / count - mean * mean
        means.append(mean / 255.0)
        stds.append(max(variance, 0.0) ** 0.5 / 255.0)
    return tuple(means), tuple(stds)
