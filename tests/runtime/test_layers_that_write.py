"""A layer may write into what it reads: it is no layer that draws, and the run is that of a plain loop."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.runtime import Trainer


class Centres(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.a = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        x -= x.mean(1, keepdim=True) + 1
        y: Tensor = self.a(x)
        return y


class Activates(Centres):
    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(self.act(x))
        return y


@pytest.mark.parametrize("kind", [Centres, Activates])
def test_backpropagation_is_that_of_a_plain_loop(kind: type[Centres]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(8, 6), kind(6, 5), kind(5, 3))
    plain = copy.deepcopy(model)
    x, labels = torch.randn(50, 8), torch.arange(50) % 3
    kept = x.clone()
    trainer = Trainer(model, rule="BP", optimizer=partial(torch.optim.SGD, lr=0.1), threads=1)
    result = trainer.fit((x, labels), epochs=3, batch_size=50, eval_data=(x, labels))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(plain(x.clone()), labels).backward()
        optimizer.step()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    with torch.no_grad():
        assert result.test_loss == pytest.approx(F.cross_entropy(plain(x.clone()), labels).item(), rel=1e-5)
    assert torch.equal(x, kept)
