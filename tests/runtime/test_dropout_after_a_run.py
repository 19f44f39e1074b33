"""After a run a user's dropout is dropout: it draws anew at every call, as PyTorch's does from the same generator."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.rules import LLS
from unlocked.runtime import Processes, Sequential, Streams, Trainer

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3


def network() -> nn.Sequential:
    torch.manual_seed(1)
    first = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5))
    second = nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Dropout1d(0.4), nn.Flatten(), nn.Linear(8, 3))
    return nn.Sequential(first, second)


def trained(rule: Any = None, engine: Any = "sequential", **how: Any) -> tuple[Trainer, nn.Sequential]:
    """A trainer after its run, and a network of PyTorch's own modules with the same weights."""
    model = network()
    names = list(model.state_dict())
    trainer = Trainer(model, rule=rule or LLS(), optimizer=partial(torch.optim.SGD, lr=0.1), engine=engine, threads=1)
    trainer.fit((X, Y), epochs=2, batch_size=8, **how)
    plain = network()
    plain.load_state_dict(model.state_dict())
    assert list(model.state_dict()) == names
    return trainer, plain


def steps(model: nn.Module) -> list[Tensor]:
    """What five steps of plain PyTorch leave of the weights, and what ten draws in evaluation say."""
    torch.manual_seed(5)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d):
            module.train()
    with torch.no_grad():
        draws = torch.stack([model(X) for _ in range(10)])
    assert (draws.std(0) > 0).all()
    return [*(value.detach().clone() for value in model.parameters()), draws]


def evaluated(trainer: Trainer) -> None:
    trainer.evaluate((X, Y))
    trainer.predict(X)


@pytest.mark.parametrize(
    ("rule", "engine", "then"),
    [
        (LLS(), Sequential(), lambda trainer: None),
        ("BP", Sequential(), lambda trainer: None),
        (LLS(), Streams(stages=2), lambda trainer: None),
        (LLS(), Processes(stages=2), lambda trainer: None),
        (LLS(), Sequential(), evaluated),
        (LLS(), Sequential(), lambda trainer: trainer.explain((X, Y), batch_size=8)),
    ],
    ids=["sequential", "BP", "streams", "processes", "evaluate", "explain"],
)
def test_plain_training_and_draws_in_evaluation_go_on_as_pytorchs(
    rule: Any, engine: Any, then: Callable[[Trainer], Any]
) -> None:
    trainer, plain = trained(rule, engine, eval_data=(X, Y))
    then(trainer)
    for found, expected in zip(steps(trainer.module), steps(plain), strict=True):
        assert torch.equal(found, expected)


def test_a_second_run_has_keys_again() -> None:
    """It depends on no generator's state, and is the one of a fresh trainer from the same weights."""
    trainer, plain = trained()
    others = copy.deepcopy(plain)
    torch.manual_seed(7)
    trainer.fit((X, Y), epochs=1, batch_size=8)
    torch.manual_seed(8)
    Trainer(others, rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1), threads=1).fit(
        (X, Y), epochs=1, batch_size=8
    )
    for found, expected in zip(trainer.module.parameters(), others.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_run_that_fails_leaves_no_key() -> None:
    model = network()
    trainer = Trainer(model, rule=LLS(), optimizer=partial(torch.optim.SGD, lr=1e30), threads=1)
    with pytest.raises(Exception, match=r"finite|nan|inf"):
        trainer.fit((X, Y), epochs=3, batch_size=8)
    first = model[0].train()
    with torch.no_grad():
        first[0].weight.fill_(1.0)
        first[0].bias.fill_(9.0)
        assert not torch.equal(first(X), first(X))
