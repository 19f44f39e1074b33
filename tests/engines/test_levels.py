"""What the levels promise: the side channel, views, the layers' accuracies, the read-out, and what is refused."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.models import small_conv
from unlocked.rules import (
    LLS,
    AugLocal,
    BarlowTwins,
    Carried,
    Draw,
    ForwardForward,
    LayerInfo,
    LayerPass,
    LocalRule,
    MonoForward,
    SoftHebb,
    TaskAndConsistency,
    Views,
)
from unlocked.rules.barlow_twins import TwoViews
from unlocked.rules.forward_forward import LabelOverlay
from unlocked.runtime import RunResult, Streams, Trainer
from unlocked.runtime.conformance import train_small
from unlocked.runtime.network import build_network
from unlocked.runtime.rule_trial import check_rules
from unlocked.workers.errors import StageError

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 3
SHAPES = (6, 9, 8, 7)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(SHAPES)]
    return nn.Sequential(*hidden, nn.Linear(SHAPES[-1], 3))


def fit(rule: Any, engine: Any = "sequential", model: Any = None, **options: Any) -> RunResult:
    optimizer = partial(torch.optim.SGD, lr=0.1)
    trainer = Trainer(model or network(), rule=rule, optimizer=optimizer, engine=engine, seed=1, **options)
    return trainer.fit((X, LABELS), epochs=2, batch_size=16, eval_data=(X, LABELS), eval_batch_size=12)


# --- every layer's accuracy, and the run's prediction


@pytest.mark.parametrize("engine", ["sequential", Streams(stages=3)])
@pytest.mark.parametrize("sums", [False, True])
def test_accuracies_of_layers_and_the_sum_of_their_scores(engine: Any, sums: bool) -> None:
    """Against the final network, layer by layer."""
    model = network()
    result = fit(partial(MonoForward, sums=sums), engine, model)
    x, total, expected = X, torch.zeros(40, 3), {}
    for k, layer in enumerate(model.eval(), start=1):
        with torch.no_grad():
            x = layer(x)
        name = f"sequential{k}" if k < 4 else "linear4"
        scores = x @ result.weights[f"{name}.rule.projection"].T if k < 4 else x
        total += scores if k < 4 else 0
        expected[name] = 100 * float((scores.argmax(1) == LABELS).float().mean())
    assert result.layer_acc1 == pytest.approx(expected)
    prediction = total if sums else x
    assert result.test_acc1 == pytest.approx(100 * float((prediction.argmax(1) == LABELS).float().mean()))
    assert result.test_loss == pytest.approx(float(F.cross_entropy(prediction, LABELS)), rel=1e-5)


def test_layers_without_scores_have_no_accuracy() -> None:
    assert list(fit([MonoForward, SoftHebb, LLS()]).layer_acc1) == ["sequential1", "sequential3", "linear4"]


def test_an_evaluation_leaves_no_trace_in_a_rule() -> None:
    """AugLocal's networks have batch norms, which must not count what is evaluated."""
    rules = []
    for eval_data in (None, _images()):
        trainer = Trainer(small_conv(1, 3, 8), rule=AugLocal, optimizer=partial(torch.optim.SGD, lr=0.1), seed=1)
        weights = trainer.fit(_images(), epochs=2, batch_size=12, eval_data=eval_data, eval_batch_size=12).weights
        rules.append({name: value for name, value in weights.items() if ".rule." in name})
    assert any("running_mean" in name for name in rules[0])
    assert all(torch.equal(value, rules[1][name]) for name, value in rules[0].items())


def _images() -> tuple[Tensor, Tensor]:
    return torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(24) % 3


# --- the side channel


class Sends(LocalRule):
    """The first layer's input, of two types, over as many layers as there are; a loss that tells what arrived."""

    receives = ("input", "half", "count")

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__(layer)
        if layer.index == 0:
            self.carries = {
                "input": Carried((6,)),
                "half": Carried((2, 3), torch.bfloat16),
                "count": Carried((), torch.int64, per_sample=True),
            }

    def carry(self, layer_pass: LayerPass) -> dict[str, Tensor]:
        x = layer_pass.input
        return {
            "input": x,
            "half": x.bfloat16().view(-1, 2, 3),
            "count": torch.full((len(layer_pass.labels),), layer_pass.step),
        }

    def step(self, layer_pass: LayerPass) -> Tensor:
        if layer_pass.carried:
            x, half = layer_pass.carried["input"], layer_pass.carried["half"]
            assert torch.equal(x.bfloat16(), half.flatten(1))
            assert layer_pass.carried["count"].tolist() == [layer_pass.step] * len(layer_pass.labels)
            assert not x.requires_grad
            return (layer_pass.activations.mean(1) * x.mean(1)).mean()
        return layer_pass.activations.square().mean()


def test_what_is_carried_arrives_whole_at_any_layer() -> None:
    """Relayed by LLS, which knows nothing of it; not sent where nobody receives it any more."""

    class Mute(Sends):
        receives = ()

    rules = [Sends, LLS(), Sends]
    expected = fit(rules)
    for stages in (2, 4):
        got = fit(rules, Streams(stages=stages, queue_depth=2))
        assert got.weights_sha256 == expected.weights_sha256
    blocks = build_network(network(), input_shape=(6,), num_classes=3, seed=0)
    channel = check_rules(blocks, rules).side_channel
    assert [list(leaves) for leaves in channel.leaves] == [["input", "half", "count"]] * 2 + [[], []]
    assert not any(check_rules(blocks, [Mute, LLS(), LLS()]).side_channel.leaves)


class Clocked(LocalRule):
    """Notes what time it is, and what it draws, in buffers."""

    seen: Tensor
    drawn: Tensor

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__(layer)
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("drawn", torch.zeros(0))

    def step(self, layer_pass: LayerPass) -> Tensor:
        self.seen.copy_(torch.tensor([layer_pass.step, layer_pass.epoch]))
        draw = torch.rand(3, generator=layer_pass.generator)
        again = layer_pass.forward(layer_pass.input + 0.1 * draw.mean())
        return F.mse_loss(again, layer_pass.activations.detach()) + layer_pass.activations.square().mean()


def test_a_pass_knows_the_time_and_forwards_again() -> None:
    expected = fit(Clocked)
    assert expected.weights["sequential2.rule.seen"].tolist() == [5, 1]  # three micro-batches an epoch
    assert fit(Clocked, Streams(stages=4)).weights_sha256 == expected.weights_sha256
    assert fit(Clocked, model=network()).weights_sha256 == expected.weights_sha256


class ByHand(LocalRule):
    """The gradients of a loss, set by the rule itself."""

    def step(self, layer_pass: LayerPass) -> Tensor:
        loss = layer_pass.activations.square().mean()
        parameters = list(layer_pass.block.parameters())
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = grad
        return loss.detach()


class ByLoss(LocalRule):
    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return activations.square().mean()


def test_gradients_that_a_rule_sets_are_those_of_its_loss() -> None:
    assert fit(ByHand).weights_sha256 == fit(ByLoss).weights_sha256


def test_an_optimizer_of_the_rules_own() -> None:
    class Slower(ByLoss):
        optimizer = partial(torch.optim.SGD, lr=0.05)

    assert fit(Slower, model=network()).weights_sha256 != fit(ByLoss).weights_sha256
    whole = Trainer(network(), rule=ByLoss, optimizer=partial(torch.optim.SGD, lr=0.05), seed=1)
    expected = whole.fit((X, LABELS), epochs=2, batch_size=16).weights
    got = fit(Slower).weights
    assert all(torch.equal(value, expected[name]) for name, value in got.items() if name.startswith("sequential"))


# --- views


class Noise(Views):
    def make(self, samples: Tensor, labels: Tensor, draw: Draw, num_classes: int) -> Tensor:
        return torch.cat([samples, draw(samples.shape[1])])


class Seen(LocalRule):
    """Keeps each sample's draws of each epoch: whatever the micro-batch, they are keyed by (seed, epoch, sample)."""

    views = Noise(train=2)
    table: Tensor

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__(layer)
        self.register_buffer("table", torch.zeros(3, 40, 6))

    def step(self, layer_pass: LayerPass) -> Tensor:
        if layer_pass.input.shape[1] == 6:
            samples, drawn = layer_pass.input.chunk(2)
            if samples[0].sum() != 0 and len(samples) != 3:
                places = [(one == X).all(1).nonzero().item() for one in samples if bool((one == X).all(1).any())]
                if places:
                    self.table[layer_pass.epoch, places] = drawn
        return layer_pass.activations.square().mean()


def test_views_are_keyed_by_epoch_and_sample() -> None:
    tables = []
    for batch_size in (8, 20):
        trainer = Trainer(network(), rule=Seen, optimizer=partial(torch.optim.SGD, lr=0.0), seed=1)
        result = trainer.fit((X, LABELS), epochs=3, batch_size=batch_size)
        tables.append(result.weights["sequential1.rule.table"])
    assert torch.equal(*tables)
    assert tables[0].unique().numel() > 600  # of 720: no two samples or epochs have the same
    assert 0 < float(tables[0].mean()) < 1


def test_two_views_shift_mirror_and_scale() -> None:
    views = TwoViews(shift=1, jitter=0.0)
    images = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    still = torch.tensor([[0.5, 0.5, 0.9, 0.5, 0.5]] * 2)
    assert torch.equal(views.make(images, LABELS[:2], lambda n: still[:, :n], 3), torch.cat([images, images]))
    mirrored = torch.tensor([[0.0, 0.5, 0.1, 0.5, 0.5]] * 2)  # up by one, then mirrored
    got = views.make(images, LABELS[:2], lambda n: mirrored[:, :n], 3)[:2]
    expected = F.pad(images, (0, 0, 1, 0))[:, :, :4].flip(3)
    assert torch.equal(got, expected)
    scaled = TwoViews(shift=0, jitter=0.5).make(images, LABELS[:2], lambda n: torch.full((2, n), 0.75), 3)[:2]
    torch.testing.assert_close(scaled, images * 1.25 + 0.25)


def test_labels_are_laid_over() -> None:
    views = LabelOverlay(4, 4, -1, 2.0)
    images = torch.ones(2, 1, 2, 2)
    draws = torch.tensor([[0.1, 0.9], [0.1, 0.9]])
    rows = views.make(images, torch.tensor([0, 2]), lambda n: draws[:, :n], 3).flatten(1)
    assert rows[:2].tolist() == [[2, 0, 0, 1], [0, 0, 2, 1]]
    assert rows[2:4].tolist() == [[0, 2, 0, 1], [2, 0, 0, 1]]  # wrong: the next label, or the one after it
    assert rows[4:6].tolist() == [[0, 0, 2, 1], [0, 2, 0, 1]]
    torch.testing.assert_close(rows[6:], torch.tensor([[2 / 3] * 3 + [1.0]] * 2))
    every = views.make_evaluation(images, 3).flatten(1)[:, :3].view(4, 2, 3)
    assert torch.equal(every[:3, 0], 2 * torch.eye(3))


# --- what is refused before the first step


class NoScores(ByLoss):
    read_out = 1.0


class Wants(LocalRule):
    receives = ("image",)

    def step(self, layer_pass: LayerPass) -> Tensor:
        return layer_pass.activations.mean()


class Misfit(Sends):
    def carry(self, layer_pass: LayerPass) -> dict[str, Tensor]:
        return {**super().carry(layer_pass), "input": layer_pass.input[:, :5]}


class Forgets(Sends):
    def carry(self, layer_pass: LayerPass) -> dict[str, Tensor]:
        return {"input": layer_pass.input}


class Spoils(LocalRule):
    optimizer = None

    def step(self, layer_pass: LayerPass) -> Tensor:
        next(iter(layer_pass.block.parameters())).data.div_(0.0)
        return torch.zeros(())


class SpoilsItsOwn(LocalRule):
    """What it keeps goes wrong with its second step, and shows in no loss. A limit that is infinite is none of that."""

    def __init__(self, layer: LayerInfo, *, after: int = 1) -> None:
        super().__init__(layer)
        self._after = after
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("limit", torch.tensor(float("inf")))

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        self.mean /= (self.steps < self._after).to(torch.float32)
        self.steps += 1
        return activations.square().mean()


class Idle(LocalRule):
    def step(self, layer_pass: LayerPass) -> Tensor:
        return layer_pass.activations.detach().mean()


class WrongScores(ByLoss):
    def scores(self, activations: Tensor) -> Tensor:
        return activations


class ThreeParts(LocalRule):
    def forward(self, activations: Tensor, labels: Tensor, input: Tensor) -> Tensor:  # type: ignore[override]
        return activations.mean()


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (NoScores, "rule NoScores of layer sequential1 has read_out 1.0, but no scores"),
        (Wants, r"rule Wants of layer sequential2 receives image, which no layer before it carries \(there is nothing"),
        (Misfit, r"rule Misfit does not fit layer sequential1 .*carry\(\) gives torch.float32 \[3, 5\].*'input'"),
        (Forgets, r"carry\(\) gives input; the rule declares that it carries input, half, count"),
        (Spoils, "rule Spoils leaves values that are not finite after one step"),
        (Idle, "rule Idle of layer sequential1 changes nothing in a step"),
        (WrongScores, r"rule WrongScores of layer sequential1 gives scores of shape \(2, 9\)"),
        (ThreeParts, r"rule ThreeParts does not fit layer sequential1 .*missing 1 required positional argument"),
        (BarlowTwins, r"rule BarlowTwins makes 2 views of every sample, which samples of shape \(6,\).* don't give"),
        (
            [partial(ForwardForward, negatives=n) for n in (1, 2, 1)],
            "rule ForwardForward of layer sequential2 has the views",
        ),
        ([ForwardForward, LLS(), ForwardForward], "rule LLS of layer sequential2 has the views None, but"),
        (partial(TaskAndConsistency, alpha=0.0), r"alpha is 0.0; it must lie in \(0, 1\]"),
        (partial(ForwardForward, negatives=0), "negatives is 0"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step(rule: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        fit(rule)
    assert len(str(caught.value).splitlines()) == 1


def test_a_buffer_that_begins_finite_must_stay_so() -> None:
    words = r"layer sequential1 holds values that are not finite in rule\.mean;"
    with pytest.raises(ValueError, match=rf"rule SpoilsItsOwn leaves values .* after one step .*{words}"):
        fit(partial(SpoilsItsOwn, after=0))
    with pytest.raises(StageError, match=rf"its last step \(epoch 1\).*{words}"):
        fit(SpoilsItsOwn)
    fit(partial(SpoilsItsOwn, after=1000))


def test_soft_hebb_needs_one_learner() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="SoftHebb learns in blocks with one Linear or plain Conv2d, this one has 2"):
        fit(SoftHebb, model=model)


def test_a_rule_that_takes_no_passes_runs_by_plain_layers() -> None:
    """What the levels cost a rule that does not use them: nothing, since none of their classes is there."""
    from unlocked.workers.pass_layer import PassLayer
    from unlocked.workers.passing import PassStage

    made: list[Any] = []
    original = PassLayer.__init__, PassStage.__init__
    for kind in (PassLayer, PassStage):
        init = kind.__init__

        def noting(self: Any, *args: Any, _init: Any = init, **options: Any) -> None:
            made.append(self)
            _init(self, *args, **options)

        kind.__init__ = noting  # type: ignore[method-assign]
    try:
        train_small(LLS())
        assert made == []
        train_small(SoftHebb)
        assert made
    finally:
        PassLayer.__init__, PassStage.__init__ = original  # type: ignore[method-assign]
