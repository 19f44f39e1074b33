"""What a stranger's script tells a trainer: each is done, or refused in one line."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from unlocked.models import architecture_of, gpt, mlp, rebuild, small_conv
from unlocked.rules import LLS, LLS_M
from unlocked.runtime import EarlyStopping, Streams, Trainer
from unlocked.runtime.metrics.dashboard import Dashboard
from unlocked.runtime.metrics.run_log import RunLog

SGD = partial(torch.optim.SGD, lr=0.1)
X = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (50,), generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Flatten(), nn.Linear(6, 3))


def fit(model: Any = None, *, evaluates: bool = False, **settings: Any) -> Any:
    settings = {"rule": LLS(), "optimizer": SGD, "threads": 1, **settings}
    trainer = Trainer(network() if model is None else model, **settings)
    return trainer.fit((X, Y), epochs=2, batch_size=16, eval_data=(X, Y) if evaluates else None)


# --- optimizers by layer


@pytest.mark.parametrize("engine", ["sequential", Streams(stages=3)])
def test_a_layer_without_parameters_needs_no_optimizer(engine: Any) -> None:
    by_name = {"linear1": SGD, "linear3": partial(torch.optim.SGD, lr=0.05)}
    left_out = fit(optimizer=by_name, engine=engine, seed=3)
    given = fit(optimizer={**by_name, "flatten2": SGD}, engine=engine, seed=3)
    assert left_out.weights_sha256 == given.weights_sha256
    with pytest.raises(ValueError, match="no optimizer for linear3; the layers are linear1, flatten2, linear3"):
        fit(optimizer={"linear1": SGD})


def test_a_rule_that_trains_on_such_a_layer_needs_one() -> None:
    with pytest.raises(ValueError, match="no optimizer for flatten2, whose rule trains parameters"):
        fit(rule=LLS_M(), optimizer={"linear1": SGD, "linear3": SGD})
    fit(rule=LLS_M(), optimizer={"linear1": SGD, "flatten2": SGD, "linear3": SGD})


# --- gradients that are sparse


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.SparseAdam, lr=0.1), partial(torch.optim.Adagrad)])
def test_sparse_gradients_are_the_librarys(optimizer: Any) -> None:
    """On the kernels of one's choice and on plain PyTorch: the same weights, those of a plain embedding by SGD."""
    tokens = torch.randint(7, (40, 5), generator=torch.Generator().manual_seed(2))

    def trained(kernels: str, sparse: bool = True) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(nn.Embedding(7, 4, sparse=sparse), nn.Flatten()), nn.Linear(20, 3))
        optimizers = {"sequential1": optimizer, "linear2": SGD}
        trainer = Trainer(model, rule=LLS(), optimizer=optimizers, kernels=kernels, threads=1)
        return trainer.fit((tokens, Y[:40]), epochs=2, batch_size=10).weights

    found = trained("auto")
    for name, weight in trained("torch").items():
        torch.testing.assert_close(found[name], weight)
    if optimizer is SGD:
        for name, weight in trained("torch", sparse=False).items():
            torch.testing.assert_close(found[name], weight)


# --- sinks


def test_a_dashboard_shows_one_fit_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(network(), rule=LLS(), optimizer=SGD, threads=1, sinks=[Dashboard(plain=True)])
    for _ in range(2):
        trainer.fit((X, Y), epochs=1, batch_size=16)
    assert capsys.readouterr().out.count("finished: ") == 2


def test_tensorboard_keeps_the_figures_of_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from unlocked.runtime.metrics.tensorboard import TensorBoard

    numbers = X[:, :1] * 2
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 1))
    trainer = Trainer(
        model, rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.01), threads=1, sinks=[TensorBoard(tmp_path)]
    )
    trainer.fit((X, numbers), epochs=2, batch_size=16, eval_data=(X, numbers))
    assert capsys.readouterr().err == ""
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"loss/train", "loss/test", "steps/loss"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("loss/test")) == 2


def test_a_log_is_of_one_fit(tmp_path: Path) -> None:
    trainer = Trainer(network(), rule=LLS(), optimizer=SGD, threads=1, sinks=[RunLog(tmp_path / "run")])
    trainer.fit((X, Y), epochs=2, batch_size=16)
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    with pytest.raises(ValueError, match="holds the run of an earlier fit; give every fit a RunLog of its own"):
        trainer.fit((X, Y), epochs=1, batch_size=16)
    assert (tmp_path / "run" / "metrics.csv").read_text() == rows


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sinks": [EarlyStopping(1)]}, r"no eval_loss without an evaluation; give fit\(eval_data=...\)"),
        ({"best_dir": Path("best")}, r"told by an evaluation, and there is none; give fit\(eval_data=...\)"),
        ({"names": {"modle": "mine"}}, "strings by the keys model, dataset and rule"),
    ],
)
def test_what_would_not_be_done_is_refused(
    settings: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        fit(**settings)


def test_early_stopping_by_the_training_loss_needs_no_evaluation() -> None:
    assert fit(sinks=[EarlyStopping(np.int64(5), figure="train_loss")]).epochs_done == 2


# --- sizes that NumPy gives


def test_sizes_may_be_numpys() -> None:
    count, side = np.int64(3), np.int32(8)
    small = partial(gpt, width=16, depth=2)
    for made, plain in (
        (small_conv(1, count, side), small_conv(1, 3, 8)),
        (mlp(1, count, np.array([8, 8]), depth=np.int64(2)), mlp(1, 3, 8, depth=2)),
        (small(num_classes=np.int64(9), image_size=np.int64(4)), small(num_classes=9, image_size=4)),
    ):
        assert repr(made) == repr(plain)
        architecture = architecture_of(made)
        assert architecture is not None
        assert architecture == architecture_of(plain)
        assert all(type(size) is not np.int64 for size in architecture.values())
        assert repr(rebuild(architecture)) == repr(plain)
