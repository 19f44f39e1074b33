"""Numbers, several labels, pixels and sequences of different lengths, each learned by local losses in a second or two.

python examples/any_task.py [regression | labels | segmentation | sequences]
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from sklearn.datasets import load_diabetes, make_multilabel_classification
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unlocked import Trainer
from unlocked.data import pad_collate
from unlocked.rules import DGL, LLS, LocalLosses
from unlocked.runtime import RunResult

ADAM = partial(torch.optim.Adam, lr=1e-2)


def perceptron(inputs: int, outputs: int) -> list[nn.Module]:
    """Two hidden layers, each with a local loss of its own."""
    layers: list[nn.Module] = [nn.Sequential(nn.Linear(i, 32), nn.ReLU()) for i in (inputs, 32)]
    return [*layers, nn.Linear(32, outputs)]


def regression() -> RunResult:
    """Real numbers [N]: scikit-learn's diabetes data, standardised."""
    x, y = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    x, y = x / x.std(0), (y - y.mean()) / y.std()
    trainer = Trainer(perceptron(10, 1), rule=LocalLosses(), optimizer=ADAM)
    return trainer.fit((x[:350], y[:350]), epochs=10, batch_size=32, eval_data=(x[350:], y[350:]))


def labels() -> RunResult:
    """Several labels of every sample, bool [N, 5]."""
    x, y = make_multilabel_classification(800, n_features=20, n_classes=5, random_state=0)
    given, there = torch.tensor(x, dtype=torch.float32) / 10, torch.tensor(y).bool()
    trainer = Trainer(perceptron(20, 5), rule=DGL, optimizer=ADAM)
    return trainer.fit((given[:600], there[:600]), epochs=10, batch_size=32, eval_data=(given[600:], there[600:]))


def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 16, 16] of a bright square on noise, and the class of every pixel [N, 16, 16]; the rim, class -100,
    does not count."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(1, 8, (count, 2, 1, 1), generator=generator)
    places = torch.arange(16)
    inside = (places[:, None] >= corner[:, 0]) & (places[:, None] < corner[:, 0] + 6)
    inside = inside & (places >= corner[:, 1]) & (places < corner[:, 1] + 6)
    classes = inside.long()
    classes[:, 0] = classes[:, -1] = -100
    return inside[:, None] + 0.5 * torch.randn(count, 1, 16, 16, generator=generator), classes


def segmentation() -> RunResult:
    """A class for every pixel."""
    layers = [nn.Sequential(nn.Conv2d(i, 8, 3, padding=1), nn.ReLU()) for i in (1, 8)]
    trainer = Trainer([*layers, nn.Conv2d(8, 2, 3, padding=1)], rule=LocalLosses(), optimizer=ADAM)
    return trainer.fit(shapes(300, 1), epochs=3, batch_size=16, eval_data=shapes(60, 2))


class Embedding(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embed, self.recur = nn.Embedding(tokens, width), nn.GRU(width, width, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.recur(self.embed(ids))[0]
        return y


class MaskedMean(nn.Module):
    """Reads the batch's `attention_mask`, since its forward has a parameter of that name."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        counts = attention_mask[..., None].float()
        y: Tensor = self.linear((x * counts).sum(1) / counts.sum(1))
        return y


def sequences() -> RunResult:
    """Token sequences of 4 to 12, padded by the loader; the class: is there a token 3?"""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 13, (500,), generator=generator).tolist()
    ids = [torch.randint(1, 12, (length,), generator=generator) for length in lengths]
    samples = [{"input_ids": one, "labels": int((one == 3).any())} for one in ids]
    loader, held_out = (
        DataLoader(part, batch_size=25, collate_fn=pad_collate(12))  # type: ignore[arg-type]
        for part in (samples[:400], samples[400:])
    )
    trainer = Trainer([Embedding(12, 24), MaskedMean(24, 2)], rule=LLS(temperature=0.1), optimizer=ADAM)
    return trainer.fit(loader, epochs=12, eval_data=held_out)


TASKS: dict[str, Callable[[], RunResult]] = {
    "regression": regression,
    "labels": labels,
    "segmentation": segmentation,
    "sequences": sequences,
}


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or TASKS:
        torch.manual_seed(0)
        result = TASKS[name]()
        accuracy = "" if result.test_acc1 is None else f", accuracy {result.test_acc1:.1f} %"
        figures = "".join(f", {figure} {value:.3f}" for figure, value in result.test_figures.items())
        print(f"{name}: test loss {result.test_loss:.3f}{accuracy}{figures}")


if __name__ == "__main__":
    main()
