"""What a trainer says of samples after a run, and before one."""

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from unlocked.data import ImageDataset, LoaderDataset
from unlocked.models import small_conv
from unlocked.rules import LLS
from unlocked.runtime import Trainer


def images(count: int = 30, mean: tuple[float, ...] = (0.4,)) -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 4
    std = (0.2,) * len(mean)
    return ImageDataset(name="t", split="train", images=pixels, labels=labels, num_classes=4, mean=mean, std=std)


def trainer(model: Any = None, **options: Any) -> Trainer:
    model = small_conv(1, 4, 8, dropout=0.2) if model is None else model
    return Trainer(model, rule=LLS(), optimizer=partial(torch.optim.Adam, lr=1e-2), **options)


def tabular() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(24, 6, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3


@pytest.mark.parametrize("rule", [LLS(), "BP"])
def test_the_evaluation_is_the_runs_own(rule: Any) -> None:
    one = Trainer(small_conv(1, 4, 8), rule=rule, optimizer=partial(torch.optim.Adam, lr=1e-2))
    result = one.fit(images(), epochs=2, batch_size=10, eval_data=images(), eval_batch_size=7)
    found = one.evaluate(images())
    assert (found.loss, found.acc1) == (result.test_loss, result.test_acc1)
    assert found.samples == 30
    assert found.confusion.sum(1).tolist() == [8, 8, 7, 7]
    hits = sum(found.confusion.diagonal().tolist())
    assert found.acc1 == pytest.approx(100 * hits / 30)
    taken_for = one.predict(images()).argmax(1)
    for row in range(4):
        for column in range(4):
            pairs = (images().labels == row) & (taken_for == column)
            assert int(found.confusion[row, column]) == int(pairs.sum())
    assert found.class_accuracy["0"] == pytest.approx(100 * int(found.confusion[0, 0]) / 8)
    assert "30 samples" in repr(found)
    assert found._repr_html_().count("<tr>") > 8


def test_samples_are_read_as_the_run_read_them() -> None:
    """uint8 is normalised, float is not; arrays and datasets are the same thing; the modes stay."""
    one = trainer()
    one.fit(images(), epochs=1, batch_size=10)
    modes = [module.training for module in one.module.modules()]
    data = images()
    whole = one.predict(data)
    assert whole.shape == (30, 4)
    assert whole.dtype == torch.float32
    by_hand = (data.images.float() / 255 - 0.4) / 0.2
    assert torch.equal(one.predict(data.images), whole)
    assert torch.equal(one.predict(data.images.numpy()), whole)
    assert torch.allclose(one.predict(by_hand), whole, atol=1e-4)
    assert not torch.allclose(one.predict(data.images.float() / 255), whole, atol=1e-2)
    assert torch.allclose(one.module.eval()(by_hand), whole, atol=1e-4)
    one.module.train()
    assert torch.allclose(one.predict(data, batch_size=7), whole, atol=1e-5)
    assert [module.training for module in one.module.modules()] == modes
    assert torch.equal(one.predict(data), whole)


def test_tokens_and_rows_and_loaders() -> None:
    tokens = torch.randint(0, 5, (12, 3), generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    network = [nn.Sequential(nn.Embedding(5, 4), nn.Flatten()), nn.Linear(12, 3)]
    one = trainer(network)
    one.fit(tokens, epochs=1, batch_size=4)
    assert one.predict(tokens[0]).shape == (12, 3)
    x, labels = tabular()
    two = trainer([nn.Linear(6, 5), nn.Linear(5, 3)])
    loader = [(x[:8], labels[:8]), (x[8:16], labels[8:16]), (x[16:], labels[16:])]
    two.fit(loader, epochs=1)
    assert two.evaluate(loader).acc1 == two.evaluate((x, labels)).acc1
    with pytest.warns(UserWarning, match="float64 samples are read as float32"):
        assert torch.allclose(two.predict(x.double().numpy()), two.predict(x))


def test_before_a_run_the_model_is_as_it_was_given() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x, labels = tabular()
    one = trainer(network)
    assert torch.allclose(one.predict(x), network(x), atol=1e-6)
    assert one.evaluate((x, labels)).samples == 24


@pytest.mark.parametrize(
    ("samples", "told"),
    [
        (
            torch.randn(1, 8, 8),
            r"have the shape \(8, 8\) each, the network reads \(1, 8, 8\); .* samples\[None\]",
        ),
        (torch.randn(0, 1, 8, 8), r"samples have the shape \[0, 1, 8, 8\]"),
        (torch.tensor(1.0), r"samples have the shape \[\]; give \[N, \.\.\.\]"),
        ("digits", "samples are a str; give a tensor or an array"),
        (np.zeros((2, 3, 8, 8), dtype=np.float32), r"\(3, 8, 8\) each"),
    ],
)
def test_samples_that_do_not_fit_are_refused(samples: Any, told: str) -> None:
    one = trainer()
    one.fit(images(), epochs=1, batch_size=10)
    with pytest.raises(ValueError, match=told):
        one.predict(samples)


class Squares(Dataset[Any]):
    """Indexable, and no tensors; its labels are those of no network here."""

    def __init__(self, samples: torch.Tensor, label: Any) -> None:
        self.samples, self.label = samples, label

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index] if self.label is None else (self.samples[index], self.label)


@pytest.mark.filterwarnings("ignore:the test data .Squares. is read through a DataLoader, one after the other")
@pytest.mark.parametrize(
    ("fitted", "label"),
    [*itertools.product([False, True], [None, 2, 99, -1, 0.5]), (True, torch.ones(3))],
    ids=str,
)
def test_a_datasets_labels_have_no_part_in_its_prediction(fitted: bool, label: Any) -> None:
    x, labels = tabular()
    torch.manual_seed(0)
    one = trainer([nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 3)])
    if fitted:
        one.fit((x, labels), epochs=1, batch_size=8)
    with torch.no_grad():
        expected = one.module(x)
    for given in (Squares(x, label), TensorDataset(x) if label is None else TensorDataset(x, torch.full((24,), 7))):
        for rows in (None, 5, 99):
            assert torch.allclose(one.predict(given, batch_size=rows), expected, atol=1e-6)
    if isinstance(label, int) and fitted:
        given = ImageDataset.from_tensors(x, labels + 4, 9)
        assert torch.allclose(one.predict(given), expected, atol=1e-6)


def test_before_a_fit_the_targets_tell_what_a_network_is_for() -> None:
    torch.manual_seed(0)
    one = trainer([nn.Embedding(7, 5), nn.Linear(5, 7)])
    ids = torch.arange(24).view(6, 4) % 7
    with torch.no_grad():
        expected = one.module(ids)
    for data in ([(ids, ids)], [ids]):
        assert torch.allclose(one.predict(LoaderDataset.wrap(data)), expected, atol=1e-6)


@pytest.mark.parametrize("rows", [0, -3, 2.5, True, "8"])
@pytest.mark.parametrize("data", [tabular(), TensorDataset(*tabular()), {"x": tabular()[0]}, Squares(tabular()[0], 1)])
def test_rows_that_are_no_number_of_rows_are_refused(data: Any, rows: Any) -> None:
    one = trainer([nn.Linear(6, 5), nn.Linear(5, 3)])
    one.fit(tabular(), epochs=1, batch_size=8)
    for call in (one.evaluate, one.predict):
        samples = data[0] if call == one.predict and isinstance(data, tuple) else data
        with pytest.raises(ValueError, match=rf"^batch_size is {rows!r}; it must be a whole number of at least 1$"):
            call(samples, batch_size=rows)


def test_labels_beyond_the_network_and_a_broken_network_are_refused() -> None:
    x, labels = tabular()
    one = trainer([nn.Linear(6, 5), nn.Linear(5, 3)])
    one.fit((x, labels), epochs=1, batch_size=8)
    with pytest.raises(ValueError, match="the test data has 5 classes, the model tells 3 apart"):
        one.evaluate((x, torch.full((24,), 4)))
    with torch.no_grad():
        one.module[1].bias[0] = float("nan")  # type: ignore[index,union-attr,operator]
    with pytest.raises(ValueError, match="the evaluation loss is nan"):
        one.evaluate((x, labels))


def test_the_users_module_computes_the_same_bits_before_and_after() -> None:
    torch.manual_seed(0)

    def network() -> nn.Sequential:
        first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        second = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        return nn.Sequential(first, second, nn.Sequential(nn.Flatten(), nn.Linear(32 * 64, 4)))

    module, fresh = network(), network()
    one = trainer(module)
    result = one.fit(images(), epochs=1, batch_size=10)
    strides = [value.stride() for value in module.parameters()]
    one.evaluate(images())
    one.predict(images())
    assert [value.stride() for value in module.parameters()] == strides
    fresh.load_state_dict(result.state_dict())
    x = torch.rand(7, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(module.eval()(x), fresh.eval()(x))
