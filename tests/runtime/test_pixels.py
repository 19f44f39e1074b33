"""Pixels without statistics of their own are read as those that the network is trained on, in every evaluation."""

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from unlocked.data import ImageDataset
from unlocked.rules import LLS
from unlocked.runtime import Trainer

MEAN, STD = (0.7, 0.2), (0.05, 0.3)


def images(split: str = "train", **options: Any) -> ImageDataset:
    generator = torch.Generator().manual_seed(len(split))
    labels = torch.randint(0, 3, (24,), generator=generator)
    pixels = torch.randint(0, 200, (24, 2, 4, 4), generator=generator, dtype=torch.uint8)
    pixels[:, 0] += labels.to(torch.uint8)[:, None, None] * 20
    told = {"mean": MEAN, "std": STD} | options
    return ImageDataset(name="t", split=split, images=pixels, labels=labels, num_classes=3, **told)


def trainer(**options: Any) -> Trainer:
    torch.manual_seed(0)
    model = [nn.Sequential(nn.Flatten(), nn.Linear(32, 8), nn.ReLU()), nn.Linear(8, 3)]
    return Trainer(model, rule=LLS(), optimizer=partial(torch.optim.Adam, lr=1e-2), **options)


def plain(module: nn.Module, data: ImageDataset) -> tuple[float, float]:
    """Loss and accuracy, by PyTorch alone."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    scores = module.eval()((data.images.float() / 255 - mean) / std)
    hits = (scores.argmax(1) == data.labels).float().mean()
    return F.cross_entropy(scores, data.labels).item(), 100 * float(hits)


def forms() -> list[Any]:
    test = images("test")
    whole = TensorDataset(test.images, test.labels)
    return [test, (test.images, test.labels), whole, DataLoader(whole, batch_size=7)]


@pytest.mark.parametrize("form", range(4), ids=["dataset", "pair", "TensorDataset", "DataLoader"])
@pytest.mark.parametrize("engine", ["sequential", "streams"])
def test_fits_evaluation_and_evaluate_read_pixels_as_training_does(form: int, engine: str) -> None:
    one = trainer(engine=engine)
    given = forms()[form]
    rows = None if form == 3 else 7
    result = one.fit(images(), epochs=2, batch_size=8, eval_data=given, eval_batch_size=rows)
    loss, accuracy = plain(one.module, images("test"))
    assert result.test_loss == pytest.approx(loss, rel=1e-4)
    assert result.test_acc1 == pytest.approx(accuracy)
    found = one.evaluate(given)
    assert (found.loss, found.acc1) == (result.test_loss, result.test_acc1)
    with_statistics = trainer().fit(images(), epochs=2, batch_size=8, eval_data=forms()[0], eval_batch_size=7)
    assert result.test_loss == with_statistics.test_loss  # to the bit


def test_a_loader_of_floats_is_read_as_it_is() -> None:
    test = images("test")
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    floats = (test.images.float() / 255 - mean) / std
    one = trainer()
    result = one.fit(images(), epochs=1, batch_size=8, eval_data=DataLoader(TensorDataset(floats, test.labels), 7))
    assert result.test_loss == pytest.approx(plain(one.module, test)[0], rel=1e-4)


def test_statistics_that_training_does_not_know_are_refused() -> None:
    train, test = images(), images("test")
    told = re.escape("the test images are normalised (mean (0.7, 0.2), std (0.05, 0.3)), those that the network is ")
    one = trainer()
    with pytest.raises(ValueError, match=f"^{told}.*; give both as datasets with their statistics, or both as tensors"):
        one.fit((train.images, train.labels), epochs=1, batch_size=8, eval_data=test)
    one.fit((train.images, train.labels), epochs=1, batch_size=8, eval_data=(test.images, test.labels))
    with pytest.raises(ValueError, match=told):
        one.evaluate(test)
