"""Networks that nobody foresaw: the plain loop and a stage per layer give the same bits, and the layers learn."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from residual import RESNET_LAYERS, ResNet
from torch import Tensor, nn

from unlocked.data import ImageDataset
from unlocked.models import Block, split
from unlocked.rules import LLS, LayerInfo, LLS_MxM, LocalLosses, LocalRule
from unlocked.runtime import Trainer
from unlocked.runtime.result import RunResult

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def _images(size: int = 16, channels: int = 3) -> ImageDataset:
    """Ten classes of noisy images, each around a pattern of its own."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 10
    patterns = torch.randn(10, channels, size, size, generator=generator)
    noise = torch.randn(60, channels, size, size, generator=generator)
    return ImageDataset.from_tensors(patterns[labels] + 0.3 * noise, labels, 10)


def _fit(
    model: Callable[[], object],
    data: object,
    engine: str,
    rule: object = LLS,
    epochs: int = 2,
    batch: int | None = 16,
    **settings: object,
) -> RunResult:
    rule = rule() if isinstance(rule, type) and issubclass(rule, LLS | LLS_MxM | LocalLosses) else rule
    torch.manual_seed(1)  # where training starts
    trainer = Trainer(model(), rule=rule, optimizer=SGD, engine=engine, seed=1, **settings)  # type: ignore[arg-type]
    return trainer.fit(data, epochs=epochs, batch_size=batch, eval_data=data)  # type: ignore[arg-type]


def _same_everywhere(model: Callable[[], object], data: object, rule: object = LLS, epochs: int = 2) -> RunResult:
    plain, stages = (_fit(model, data, engine, rule, epochs) for engine in ("sequential", "streams"))
    assert len(stages.stages) == len(plain.stages[0])
    assert stages.weights_sha256 == plain.weights_sha256
    assert stages.test_loss == plain.test_loss
    return plain


@pytest.mark.parametrize("rule", [LLS, LLS_MxM, LocalLosses])
def test_a_residual_network_in_one_module(rule: type) -> None:
    result = _same_everywhere(lambda: split(ResNet(), RESNET_LAYERS), _images(32), rule, epochs=6)
    assert result.stages == [["conv1", *RESNET_LAYERS]]
    assert "layer1.block.body.layer1.0.conv1.weight" in result.weights
    first, last = result.epochs[0], result.epochs[-1]
    for (name, before), (_, after) in zip(first.local_losses, last.local_losses, strict=True):
        assert after < before, name


class Attention(nn.Module):
    """Pre-norm causal self-attention with a residual connection: [B, T, D] -> [B, T, D], in a transposed view."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (x + mixed).transpose(1, 2).contiguous().transpose(1, 2)


class Embedding(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)


def _transformer(vocabulary: int = 12) -> list[nn.Module]:
    return [
        Block("embed", Embedding(vocabulary, 8)),
        Block("attend", Attention(8), latent_size=3),  # three pieces of the sequence
        Block("mix", Attention(8)),
        Block("head", nn.Sequential(nn.Flatten(), nn.Linear(6 * 8, 4))),
    ]


def _tokens() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 12, (80, 6), generator=torch.Generator().manual_seed(0))
    return tokens, tokens[:, 2] % 4


@pytest.mark.parametrize("rule", [LLS, LocalLosses])
def test_tokens_through_a_transformer(rule: type) -> None:
    tokens, labels = _tokens()
    result = _same_everywhere(_transformer, (tokens, labels), rule, epochs=5)
    assert result.test_acc1 is not None
    assert result.test_acc1 > 50  # of four classes
    ahead = _fit(_transformer, (tokens, labels), "sequential", rule, epochs=5, prefetch=2)
    assert ahead.weights_sha256 == result.weights_sha256
    batches = [(tokens[i : i + 16], labels[i : i + 16]) for i in range(0, 80, 16)]
    plain, stages = (_fit(_transformer, batches, engine, rule, batch=None) for engine in ("sequential", "streams"))
    assert plain.weights_sha256 == stages.weights_sha256
    if rule is LocalLosses:
        assert result.weights["attend.rule.feedback"].shape == (4, 2048)


def test_tokens_that_the_embedding_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"value is out of range: the data .* layer embed .*Embedding\(11, 8\)"):
        _fit(lambda: _transformer(11), _tokens(), "sequential")


class Reordered(nn.Module):
    """Gives its input in another memory format, as blocks of any origin may."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "plain":
            return x.contiguous()
        return x.transpose(1, 2).contiguous().transpose(1, 2)


class Reader(nn.Module):
    """Notes how its input lies in memory."""

    def __init__(self, seen: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        if self.training:  # not while the shapes are followed through
            self.seen.add(x.stride()[1:])
        return x * 1.0


@pytest.mark.parametrize("kind", ["plain", "transposed"])
@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 1, 16), (1, 16, 16), (7, 5), (1, 5)])
def test_a_layer_reads_the_same_memory_format_wherever_stages_are_cut(shape: tuple[int, ...], kind: str) -> None:
    """Libraries choose kernels by strides, so law 1 needs them equal; only a layer known to flatten may differ."""
    labels = torch.arange(20) % 4
    data = torch.randn(20, *shape), labels
    seen: dict[str, set[tuple[int, ...]]] = {"sequential": set(), "streams": set()}
    for engine, strides in seen.items():
        blocks = [
            Block("source", Reader(strides), layout="tokens"),  # which reaches the layers after it
            Block("odd", Reordered(kind)),
            Block("reader", nn.Sequential(Reader(strides), nn.Flatten())),
            Block("output", nn.LazyLinear(4)),
        ]
        trainer = Trainer(blocks, rule=LLS(), optimizer=SGD, engine=engine)
        trainer.fit(data, epochs=1, batch_size=8, eval_data=data)
    assert seen["streams"] == seen["sequential"]


def test_layers_without_weights_pass_things_on() -> None:
    """They have nothing to train (or their rule's weights alone), report their loss, and change no other layer."""

    def model(extra: bool) -> list[nn.Module]:
        pool = [Block("pool", nn.MaxPool2d(2)), Block("flat", nn.Flatten())] if extra else []
        conv = Block("conv", nn.Conv2d(3, 6, 3), None if extra else nn.Sequential(nn.MaxPool2d(2), nn.Flatten()))
        return [conv, *pool, Block("output", nn.Linear(6 * 7 * 7, 10))]

    data = _images()
    with_layers = _same_everywhere(lambda: model(True), data)
    assert set(with_layers.local_losses) == {"conv", "pool", "flat", "output"}
    without = _fit(lambda: model(False), data, "sequential")
    conv = {name: value for name, value in without.weights.items() if name.startswith("conv.")}
    assert conv
    for name, value in conv.items():
        assert torch.equal(with_layers.weights[name], value), name
    _same_everywhere(lambda: model(True), data, LLS_MxM)


def test_rules_by_the_layers_names() -> None:
    rules = {"attend": LocalLosses(), "embed": LLS(), "mix": LLS_MxM()}
    by_name = _same_everywhere(_transformer, _tokens(), rules)
    in_order = _fit(_transformer, _tokens(), "sequential", [LLS(), LocalLosses(), LLS_MxM()])
    assert by_name.weights_sha256 == in_order.weights_sha256
    for wrong, message in [
        ({"embed": LLS(), "mix": LLS()}, "no rule for attend; the local layers are embed, attend, mix"),
        ({**rules, "head": LLS()}, "a rule for head; the local layers are embed, attend, mix"),
        ([LLS()] * 4, "4 rules for 3 local layers"),
    ]:
        with pytest.raises(ValueError, match=message):
            _fit(_transformer, _tokens(), "sequential", wrong)


class Fussy(LocalRule):
    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()
        if len(layer.activation_shape) != 1:
            raise ValueError("needs flat activations")

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return activations.sum(1)


def test_a_rule_that_does_not_fit_is_named_before_training() -> None:
    with pytest.raises(ValueError, match=r"rule Fussy does not fit layer embed with activations \(6, 8\) .*needs flat"):
        _fit(_transformer, _tokens(), "sequential", Fussy)
    flat = [Block("flat", nn.Flatten()), Block("output", nn.Linear(768, 10))]
    with pytest.raises(ValueError, match=r"rule Fussy of layer flat gives a loss of shape \(2,\)"):
        _fit(lambda: flat, _images(), "sequential", Fussy)
    five = [Block("deep", nn.Unflatten(1, (1, 3))), Block("output", nn.Sequential(nn.Flatten(), nn.Linear(768, 10)))]
    with pytest.raises(ValueError, match=r"rule LLS does not fit layer deep with activations \(1, 3, 16, 16\)"):
        _fit(lambda: five, _images(), "sequential")


def test_the_measured_step_is_that_of_the_trace(tmp_path: Path) -> None:
    """Evaluation and statistics pass through the same stages, but are no part of what the stages were cut by."""
    trace = tmp_path / "trace.json"
    tokens, labels = _tokens()
    result = _fit(_transformer, (tokens, labels), "sequential", trace=trace)
    (measured,) = result.measured_stage_seconds
    events = {e["name"]: e["dur"] for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"}
    updates = [name for name in events if "U" in name]
    assert len(updates) == result.steps == 10
    expected = sum(events[name] + events[name.replace("U", "F")] for name in updates) / len(updates)
    assert measured == pytest.approx(expected / 1e6, rel=1e-3)
