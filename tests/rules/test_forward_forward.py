"""Forward-Forward's prediction, from the layers that it is summed over."""

from functools import partial

import pytest
import torch

from unlocked.data import load_dataset
from unlocked.models import mlp
from unlocked.rules import ForwardForward
from unlocked.runtime import RunResult, Trainer


def trained(depth: int) -> RunResult:
    train, test = load_dataset("digits")
    model = mlp(in_channels=1, num_classes=10, image_size=8, width=64, depth=depth)
    trainer = Trainer(model, rule=ForwardForward, optimizer=partial(torch.optim.Adam, lr=1e-2), threads=1)
    return trainer.fit(train, epochs=2, batch_size=64, eval_data=test)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_only_layer_that_counts_is_the_prediction(depth: int) -> None:
    """The first counts where there is no other, and only there."""
    result = trained(depth)
    assert result.test_acc1 is not None
    assert result.test_acc1 == result.layer_acc1[f"linear{depth}"]
    assert result.test_acc1 > 50
