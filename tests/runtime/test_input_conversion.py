"""Data in other forms trains to the bits of the same numbers as two tensors, and says so where a type changes."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from unlocked.data import ImageDataset
from unlocked.models import small_conv
from unlocked.rules import LLS, Classification, Regression
from unlocked.runtime import Trainer

SAMPLES = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(2))


class Indexed(Dataset[Any]):
    """What torchvision's datasets are: no tensors, a sample for each index."""

    def __init__(self, size: int = 40) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return SAMPLES[index], int(LABELS[index])


class Shifted(TensorDataset):
    """Makes other samples of its tensors, as one that augments does."""

    def __getitem__(self, index: int) -> Any:
        samples, targets = super().__getitem__(index)
        return samples * 2 - 0.5, targets


def _fit(train: Any, test: Any = None, epochs: int = 2) -> Any:
    made = Trainer(
        small_conv(1, 4, 8),
        rule=LLS(),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        seed=3,
        statistics_batches=0,
    )
    return made.fit(train, epochs=epochs, batch_size=16, eval_data=test, eval_batch_size=16)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x, y: (x.numpy(), y.numpy()), None),
        (lambda x, y: [x, y], None),
        (lambda x, y: TensorDataset(x, y), None),
        (lambda x, y: (x.double(), y), "float64 samples are read as float32"),
        (lambda x, y: (x.double().numpy(), y), "float64 samples are read as float32"),
        (lambda x, y: (x.numpy().astype(">f4"), y.numpy().astype(">i8")), None),
        (lambda x, y: (x.flip(0).numpy()[::-1], y), None),
        (lambda x, y: (x, y.int()), "int32 labels are read as int64"),
        (lambda x, y: (x, y.numpy().astype(np.uint8)), "uint8 labels are read as int64"),
        (lambda x, y: (x, y[:, None]), r"labels \[40, 1\] are read as \[40\]"),
        (lambda x, y: Indexed(), r"\(Indexed\) is read through a DataLoader, in an order keyed by seed and epoch"),
    ],
)
def test_another_form_of_the_data_gives_the_same_weights(
    make: Callable[[Tensor, Tensor], Any], words: str | None
) -> None:
    expected = _fit((SAMPLES, LABELS), (SAMPLES, LABELS))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = _fit(make(SAMPLES, LABELS), make(SAMPLES, LABELS))
    assert found.weights_sha256 == expected.weights_sha256
    assert found.test_loss == expected.test_loss
    ours = [one for one in told if "data" in str(one.message)]
    assert len(ours) == (0 if words is None else 2)
    for one in ours:
        assert one.filename == __file__
        assert len(str(one.message).splitlines()) == 1
    if words is not None:
        with pytest.warns(UserWarning, match=f"the train data.*{words}"):
            _fit(make(SAMPLES, LABELS), epochs=1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            (SAMPLES, LABELS.float()),
            r"the targets are float32 \[N\], which fits no task: .*convert the targets \(.long\(\)",
        ),
        ((SAMPLES, LABELS - 9), "labels go down to -9"),
        ((SAMPLES, LABELS + 10**12), "end the model in a layer with output"),
        ((SAMPLES.double() * 1e300, LABELS), "samples go beyond float32"),
        ((SAMPLES.to_sparse(), LABELS), "give a dense one"),
        ((SAMPLES.to("meta"), LABELS), "give a dense one"),
        ((SAMPLES.to(torch.complex64), LABELS), "give a dense one"),
        ((np.array([None] * 40), LABELS), "an array of object; give one of numbers"),
        ((np.array(["a"] * 40), LABELS), "give one of numbers"),
        ((SAMPLES[:0], LABELS[:0]), "is empty"),
        (TensorDataset(SAMPLES), "TensorDataset of 1 tensors"),
        ((Indexed(), Indexed()), "two datasets; give the first alone"),
        (Indexed(0), r"\(Indexed\) is empty"),
        (SAMPLES, "the train data is a Tensor; give a dataset"),
        ("digits", "the train data is a str"),
        ({"x": SAMPLES}, "the targets are none, which fits no task"),
        ({"x": SAMPLES, "labels": LABELS, "name": "digits"}, "name is a str; give tensors or arrays"),
        ({"x": SAMPLES, "labels": LABELS[:-1]}, r"labels are \[40, ...\], one for each sample"),
    ],
)
def test_what_can_not_be_converted_is_one_line(data: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        _fit(data)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore:the .* data .Shifted. is read")
def test_a_subclass_of_tensor_dataset_makes_its_own_samples() -> None:
    expected = _fit((SAMPLES * 2 - 0.5, LABELS), (SAMPLES * 2 - 0.5, LABELS))
    found = _fit(Shifted(SAMPLES, LABELS), Shifted(SAMPLES, LABELS))
    assert (found.weights_sha256, found.test_loss) == (expected.weights_sha256, expected.test_loss)


@pytest.mark.filterwarnings("ignore:the .* data .Shifted. is read")
@pytest.mark.parametrize("task", [None, Regression()])
def test_so_does_one_of_numbers(task: Regression | None) -> None:
    def fit(data: Any) -> str:
        torch.manual_seed(0)
        network = [nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh()), nn.Linear(8, 2)]
        made = Trainer(network, rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1), seed=3, task=task)
        return made.fit(data, epochs=2, batch_size=16, eval_data=data).weights_sha256

    numbers = SAMPLES[:, 0, 0, :2] + 1
    assert fit(Shifted(SAMPLES, numbers)) == fit((SAMPLES * 2 - 0.5, numbers))


def test_arrays_of_truth_values_are_targets_and_masks() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            scores: Tensor = self.linear(x * mask[:, None])
            return scores

    def fit(data: Any) -> tuple[str, float | None, str]:
        torch.manual_seed(0)
        network = [nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh()), Masked()]
        made = Trainer(network, rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1), seed=3)
        found = made.fit(data, epochs=2, batch_size=16, eval_data=data)
        return found.weights_sha256, found.test_loss, repr(made.evaluate(data))

    truth, mask = SAMPLES[:, 0, 0, :3] > 0, SAMPLES[:, 0, 1, 0] > -1
    expected = fit({"x": SAMPLES, "mask": mask, "labels": truth})
    assert fit({"x": SAMPLES.numpy(), "mask": mask.numpy(), "labels": truth.numpy()}) == expected
    assert fit(({"x": SAMPLES, "mask": mask.numpy()}, truth.numpy())) == expected
    with pytest.raises(ValueError, match=r"got torch\.bool"):
        _fit((SAMPLES.numpy() > 0, LABELS))


@pytest.mark.filterwarnings("ignore:the .* data .Indexed. is read")
def test_a_dataset_has_the_micro_batches_of_the_same_tensors() -> None:
    """Of any size: one that is larger than the evaluation data, and no smaller last one, if it is to be left out."""

    def run(train: Any, test: Any, **how: Any) -> tuple[str, float | None, float]:
        adam = partial(torch.optim.Adam, lr=1e-2)
        made = Trainer(small_conv(1, 4, 8), rule=LLS(), optimizer=adam, seed=3, statistics_batches=0)
        found = made.fit(train, epochs=2, eval_data=test, **how)
        whole = made.evaluate(test, batch_size=64)
        assert made.evaluate(test).loss == pytest.approx(whole.loss)
        return found.weights_sha256, found.test_loss, whole.loss

    tensors = (SAMPLES, LABELS)
    few = (SAMPLES[:10], LABELS[:10])
    for how in ({"batch_size": 16, "eval_batch_size": 32}, {"batch_size": 32}, {"batch_size": 16, "drop_last": True}):
        assert run(Indexed(), Indexed(10), **how) == run(tensors, few, **how), how
    with pytest.raises(ValueError, match="batch_size=64 is larger than the training data, which has 40 rows"):
        run(Indexed(), None, batch_size=64)


def few(samples: Tensor = SAMPLES, labels: Tensor = LABELS) -> tuple[Tensor, Tensor]:
    """Without the highest class of the network's four."""
    return samples[labels < 3], labels[labels < 3]


@pytest.mark.parametrize("given", ["tensors", "arrays", "named tensors"])
@pytest.mark.parametrize("task", [None, Classification()])
def test_a_training_subset_without_the_highest_class(task: Classification | None, given: str) -> None:
    """The network tells how many classes there are, as it does for a loader."""
    samples, labels = few()
    forms = {"arrays": (samples.numpy(), labels.numpy()), "named tensors": {"x": samples, "labels": labels}}
    expected = _fit(ImageDataset.from_tensors(samples, labels, 4), ImageDataset.from_tensors(SAMPLES, LABELS, 4))
    made = Trainer(
        small_conv(1, 4, 8),
        rule=LLS(),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        seed=3,
        statistics_batches=0,
        task=task,
    )
    found = made.fit(
        forms.get(given, (samples, labels)), epochs=2, batch_size=16, eval_data=(SAMPLES, LABELS), eval_batch_size=16
    )
    assert (found.weights_sha256, found.test_loss) == (expected.weights_sha256, expected.test_loss)
    right = (made.predict(SAMPLES).argmax(1) == LABELS).double().mean()
    assert found.test_acc1 == pytest.approx(100 * float(right))
    assert made.evaluate((SAMPLES, LABELS)).confusion.shape == (4, 4)
    alone = _fit(few(), epochs=2)
    assert alone.weights_sha256 == expected.weights_sha256, "without an evaluation"


def test_so_does_an_evaluation_after_a_loader() -> None:
    loader = DataLoader(TensorDataset(SAMPLES, LABELS), 16)
    assert _fit(loader, few()).test_loss == _fit(loader, DataLoader(TensorDataset(*few()), 16)).test_loss


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ((SAMPLES, LABELS + 1), None, r"but the data has 5 classes; end the model in a layer with output \(5,\)"),
        (few(), (SAMPLES, LABELS + 1), "the test data has 5 classes, the model tells 4 apart"),
        (
            {"x": SAMPLES, "labels": LABELS + 1},
            None,
            "the train data: labels from 1 to 4; valid: 0 to 3, which the model",
        ),
        (few(), {"x": SAMPLES, "labels": LABELS + 1}, "the test data: labels from 1 to 4; valid: 0 to 3"),
        (ImageDataset.from_tensors(*few(), 3), None, "the data has 3 classes; end the model in"),
    ],
)
def test_more_classes_than_the_network_tells_apart_are_refused(train: Any, test: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        _fit(train, test)
    assert len(str(error.value).splitlines()) == 1


def test_a_loader_is_left_as_it_is() -> None:
    loader = DataLoader(Indexed(), batch_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _fit(loader).steps == 6
