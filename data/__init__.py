"""Datasets as resident tensors, and the order in which an epoch visits them. Knows nothing of pipelines."""

from unlocked.data.dataset import Augmentation, ImageDataset
from unlocked.data.order import epoch_order
from unlocked.data.registry import DATASETS, load_dataset

__all__ = ["DATASETS", "Augmentation", "ImageDataset", "epoch_order", "load_dataset"]
