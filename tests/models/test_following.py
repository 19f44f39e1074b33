"""A network that is cut computes what it computed: in both modes, in every call, whatever its buffers hold later."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.models import split
from unlocked.rules import LLS
from unlocked.runtime import Trainer


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("m", torch.linspace(0, 1, 5))
        self.slope = nn.RReLU()


class _Branch(_Two):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 10
        return self.second(self.first(x))


class _Argument(_Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.rrelu(self.first(x), training=self.training))


class _Number(_Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * (0.5 if self.training else 1))


class _Module(_Two):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(self.slope(x) if self.training else x)


class _Outputs(_Two):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.first(x)
        return (self.second(x), x) if not self.training else self.second(x)


class _Drawn(_Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + torch.randn(5))


class _Counting(_Two):
    calls = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.first(x) * self.calls)


class _ReadsItem(_Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * (2 if self.m[0] > 0.5 else 1))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (_Branch, "is another in training (add(x, 10)) than in evaluation (first(x))"),
        (_Argument, "is another in training (rrelu(training=True)) than in evaluation (rrelu(training=False))"),
        (_Number, "is another in training (mul(0.5)) than in evaluation (mul(1))"),
        (_Module, "is another in training (slope(first)) than in evaluation (second(first))"),
        (_Outputs, "gives a tuple, in evaluation"),
        (_Drawn, "is another each time it is called (a tensor [5], first "),
        (_Counting, "is another each time it is called (mul(1.0), then mul(2.0))"),
        (_ReadsItem, "torch.fx can't follow the forward() of _ReadsItem"),
    ],
)
def test_what_a_graph_would_keep_for_good_is_refused(kind: type[_Two], told: str) -> None:
    module = kind()
    module.second.eval()
    modes, names = [one.training for one in module.modules()], set(vars(module)) - {"calls"}
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        split(module, ["second"])
    assert "\n" not in str(caught.value)
    assert [one.training for one in module.modules()] == modes
    assert set(vars(module)) - {"calls"} == names


class _Buffers(_Two):
    """Expressions of a buffer, of its sizes, and of a constant, read before a cut and behind it."""

    def forward(self, x: Tensor) -> Tensor:
        weights = 1 - self.m * 0.5
        halves = [self.m[i] for i in range(self.m.shape[0])]
        x = self.first(x) * torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
        return self.second(x * weights + sum(halves) / self.m.size(-1))


@pytest.mark.parametrize("training", [True, False])
def test_a_buffer_is_read_whenever_a_layer_runs(training: bool) -> None:
    torch.manual_seed(0)
    module = _Buffers().train(training)
    blocks = split(module, ["second"])
    x = torch.randn(6, 4)
    for value in (0.25, -3.0):
        module.get_buffer("m").fill_(value)
        y = x
        for block in blocks:
            y = block(y)
        assert torch.equal(y, module(x))


def test_a_run_and_its_evaluation_are_those_of_the_module() -> None:
    torch.manual_seed(0)
    module = _Buffers()
    x, labels = torch.randn(40, 4), torch.arange(40) % 3
    trainer = Trainer(split(module, ["second"]), rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1))
    result = trainer.fit((x, labels), epochs=2, batch_size=8, eval_data=(x, labels))
    with torch.no_grad():
        scores = module.eval()(x)
    assert torch.allclose(trainer.predict(x), scores, atol=1e-6)
    assert result.test_loss == pytest.approx(F.cross_entropy(scores, labels).item(), rel=1e-5)


class _ModuleOfItsOwn(_Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.slope(self.first(x)))


def test_a_module_of_its_own_knows_its_mode() -> None:
    module = _ModuleOfItsOwn()
    blocks = split(module, ["second"])
    x = torch.randn(6, 4)
    for training in (True, False):
        module.train(training)
        y = x
        with torch.random.fork_rng(devices=[]):
            expected = module(x)
        for block in blocks:
            y = block.train(training)(y)
        assert torch.equal(y, expected)
