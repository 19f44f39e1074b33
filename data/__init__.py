"""Datasets, resident, mapped into memory or read from a loader, and the order in which an epoch visits them.

Knows nothing of pipelines.
"""

from unlocked.data.dataset import Augmentation, ImageDataset
from unlocked.data.loader import LoaderDataset
from unlocked.data.order import class_order, epoch_order
from unlocked.data.registry import DATASETS, load_dataset
from unlocked.data.sequences import pack, pad_collate

__all__ = [
    "DATASETS",
    "Augmentation",
    "Dataset",
    "ImageDataset",
    "LoaderDataset",
    "class_order",
    "epoch_order",
    "load_dataset",
    "pack",
    "pad_collate",
]

Dataset = ImageDataset | LoaderDataset
"""Whatever a run can read."""
