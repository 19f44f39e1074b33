"""A learning-rate finder: one short run whose rate grows, and a sink that watches the loss and stops the run.

The rate is multiplied from `LOWEST` to `HIGHEST` over the run (Smith, "Cyclical Learning Rates for Training Neural
Networks", WACV 2017). A schedule is a function of the epoch, so an epoch is made a few micro-batches long here. Where
the loss has become far worse than its best the run is stopped; the suggestion is the rate at which it fell fastest.

    python examples/learning_rate_finder.py
"""

import itertools
from functools import partial

import torch
from torch.utils.data import DataLoader, TensorDataset

from unlocked.data import load_dataset
from unlocked.models import small_conv
from unlocked.rules import LLS
from unlocked.runtime import MetricsSink, Trainer
from unlocked.runtime.metrics.records import EpochResult

LOWEST, HIGHEST = 1e-5, 1.0
STEPS = 40  # rates that are tried
BATCHES = 2  # micro-batches at each of them
WORSE = 3.0  # times the best loss: beyond that there is nothing to learn


class Finder(MetricsSink):
    """Keeps the mean training loss at every rate."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_epoch(self, result: EpochResult) -> None:
        # An epoch's losses are its own micro-batches', before each one's update.
        self.losses.append(result.train_loss)
        if result.train_loss > WORSE * min(self.losses):
            self.stop(f"the loss grows beyond a rate of {rate_of(result.epoch):.1e}")

    def suggestion(self) -> float:
        """The middle of the steepest fall: of every four rates in a row, those whose loss falls most."""
        falls = [first - last for first, last in zip(self.losses, self.losses[3:], strict=False)]
        return rate_of(falls.index(max(falls)) + 2)


def rate_of(epoch: int) -> float:
    return float(LOWEST * (HIGHEST / LOWEST) ** (epoch / (STEPS - 1)))


def main() -> None:
    torch.set_num_threads(1)
    train, test = load_dataset("digits")
    torch.manual_seed(0)  # of the loader's shuffling
    samples = TensorDataset(train.images.float() / 255, train.labels)
    loader = DataLoader(samples, batch_size=32, shuffle=True, drop_last=True)
    # Of an iterator, which can't be begun anew, every epoch takes the next batches.
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    finder = Finder()
    trainer = partial(Trainer, rule=LLS(temperature=0.5), seed=0)
    finding = trainer(
        small_conv(in_channels=1, num_classes=10, image_size=8),
        optimizer=partial(torch.optim.SGD, lr=LOWEST, momentum=0.9),
        lr_factor=lambda epoch: rate_of(epoch) / LOWEST,
        sinks=[finder],
    ).fit(batches, epochs=STEPS, steps_per_epoch=BATCHES)
    rate = finder.suggestion()
    print(f"tried {len(finder.losses)} rates; {finding.stop_reason or 'the loss never grew'}")
    network = small_conv(in_channels=1, num_classes=10, image_size=8)
    optimizer = partial(torch.optim.SGD, lr=rate, momentum=0.9)
    result = trainer(network, optimizer=optimizer).fit(train, epochs=3, batch_size=64, eval_data=test)
    print(f"at the suggested rate of {rate:.1e}: test accuracy {result.test_acc1:.1f} % after 3 epochs")


if __name__ == "__main__":
    main()
