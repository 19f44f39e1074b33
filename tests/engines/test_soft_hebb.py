"""SoftHebb as it is by default learns features that are of use, and goes on to."""

from functools import partial

import torch

from unlocked.data import load_dataset
from unlocked.models import small_conv
from unlocked.rules import SoftHebb
from unlocked.runtime import Trainer


def test_features_do_not_get_worse_by_training() -> None:
    torch.manual_seed(0)
    train, test = load_dataset("digits")
    model = small_conv(in_channels=1, num_classes=10, image_size=8)
    trainer = Trainer(model, rule=SoftHebb, optimizer=partial(torch.optim.Adam, lr=1e-2), engine="sequential", seed=0)
    result = trainer.fit(train, epochs=3, batch_size=64, eval_data=test)
    first, *_, last = (one.eval_acc1 or 0.0 for one in result.epochs)
    assert last > 93  # of features that are never trained: 97 to 98; where all but a few neurons only lose: below 60
    assert last > first - 1
