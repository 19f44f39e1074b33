"""Blocks of every operation, random ones, and a layer around a block: for the tests of the step made of them."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from awkward_blocks import AWKWARD
from block_modules import Attended, Attending, Channels, Placed, Residual, Shifted, Turning, Twofold, Viewed
from grouped_blocks import GROUPED
from torch import Tensor, nn

from unlocked.kernels.reference import Layout
from unlocked.models import Block
from unlocked.models.generators import SOURCES
from unlocked.models.overwriting import find_writes
from unlocked.rules import LLS, CrossEntropy, LayerInfo, LocalRule, Rule, needs_pass
from unlocked.workers.fused import FusedStep, fused_step
from unlocked.workers.layer import Layer
from unlocked.workers.pass_layer import PassLayer

CPU = torch.device("cpu")
CLASSES = 5


class Probe(LocalRule):
    """A rule without a closed form: a probe of the activations, which are to be small as well."""

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__(layer)
        self.probe = nn.Linear(layer.num_features, layer.num_classes)

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(self.probe(activations.flatten(1)), labels)
        return loss + 0.1 * activations.square().mean()


def made_layer(
    block: Block,
    x: Tensor,
    backend: Any,
    *,
    precision: str = "fp32",
    sample: Tensor | None = None,
    rule: Rule | None = None,
) -> Layer:
    """A layer of `block` that trains by `rule` (or cross-entropy, if it is the output), on autograd where `backend` is
    None."""
    kept = {name: value.clone() for name, value in block.state_dict().items()}
    modes = [(module, module.training) for module in block.modules()]
    with torch.no_grad():
        shape = tuple(block.eval().body(x).shape[1:])
    for module, training in modes:
        module.training = training
    block.load_state_dict(kept)
    info = LayerInfo(
        name="layer",
        index=0,
        activation_shape=shape,
        num_classes=CLASSES,
        latent_size=block.latent_size or (shape[0] if len(shape) == 1 else 1),
        hidden=30,
        reduced_rank=4,
        seed=0,
        layout=block.layout,
    )
    torch.manual_seed(3)
    built = CrossEntropy() if block.is_output else (rule or LLS())(info)
    step = None if backend is None else fused_step(backend)
    optimizer = partial(torch.optim.SGD, lr=0.5)
    options: dict[str, Any] = {"device": CPU, "step": step, "precision": precision, "sample": sample}
    options["writes"] = find_writes(block, lambda: x.detach().clone())
    if needs_pass(built):
        return PassLayer(block, built, info, optimizer, sources=SOURCES, **options)
    return Layer(block, built, info, optimizer, **options)


def step_of(layer: Layer, x: Tensor) -> Tensor:
    """One step of training; its output."""
    labels = torch.arange(len(x)) % CLASSES
    output = forward_of(layer, x, labels).clone()
    layer.update(labels)
    return output


def forward_of(layer: Layer, x: Tensor, labels: Tensor) -> Tensor:
    """The first half of a step."""
    if isinstance(layer, PassLayer):
        layer.begin(0, labels, {})
    return layer.forward(x)


def assert_close_to_float64(
    make: Callable[[], Block],
    x: Tensor,
    backend: Any,
    limit: float = 2e-3,
    *,
    rule: Rule | None = None,
    kind: type = FusedStep,
) -> Layer:
    """One step each: outputs, every parameter's change, running statistics and counts."""
    tested, truth = made_layer(make(), x, backend, rule=rule), made_layer(make(), x, None, rule=rule)
    truth.block.double()
    truth.rule.double()
    assert isinstance(tested.step, kind)
    before = {name: value.clone() for name, value in truth.tensors()}
    labels = torch.arange(len(x)) % 5
    exact = x.double() if x.is_floating_point() else x
    expected, found = forward_of(truth, exact, labels), forward_of(tested, x, labels)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    truth.update(labels)
    tested.update(labels)
    scale = max(float((value - before[name]).double().norm()) for name, value in truth.tensors())
    for (name, a), (_, b) in zip(tested.tensors(), truth.tensors(), strict=True):
        change, wanted = a.double() - before[name], b.double() - before[name]
        error = float((change - wanted).norm())
        assert error <= limit * max(float(wanted.norm()), 1e-2 * scale), (name, error, float(wanted.norm()))
    return tested


def _layer(activation: str, *, norm_first: bool, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        16, 2, 24, 0.0, activation=activation, batch_first=True, norm_first=norm_first, **options
    )
    for p in layer.self_attn.parameters():
        p.data.add_(0.1 * torch.randn_like(p))  # its biases start at zero
    return layer


def _raised(linear: nn.Linear) -> nn.Linear:
    """Its bias is nothing that a mean could be without."""
    linear.bias.data.add_(3.0)
    return linear


def _branch(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)),
        *(nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out)),
    )


def seeded(make: Callable[[], nn.Module], **options: Any) -> Callable[[], Block]:
    def made() -> Block:
        torch.manual_seed(1)
        return Block("layer", make(), **options)

    return made


def _conv(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), *more)


def image(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, *shape, generator=generator)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    *(nn.ReLU, nn.LeakyReLU, nn.GELU, partial(nn.GELU, "tanh"), nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.ReLU6, nn.Hardtanh, nn.Softplus),
]

CASES: dict[str, tuple[Callable[[], Block], Tensor, bool]] = {
    "plain": (seeded(lambda: _conv(nn.ReLU()), latent_size=2), image(3, 8, 8), True),
    "pooled": (seeded(lambda: _conv(nn.ReLU(), nn.MaxPool2d(2)), latent_size=2), image(3, 8, 8), True),
    "activation alone": (
        seeded(lambda: nn.Sequential(nn.Conv2d(3, 20, 3), nn.LeakyReLU(0.1)), latent_size=2),
        image(3, 8, 8),
        True,
    ),
    "activation of a pool": (
        seeded(lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.MaxPool2d(3, 1, 1), nn.ReLU()), latent_size=3),
        image(3, 8, 8),
        True,
    ),
    "uneven": (seeded(lambda: _conv(nn.ReLU()), latent_size=3), image(3, 8, 8), True),
    "pools": (
        seeded(
            lambda: _conv(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(2), nn.Conv2d(16, 8, 1)),
            latent_size=2,
        ),
        image(3, 9, 9),
        False,
    ),
    "pooled inside": (
        seeded(lambda: _conv(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 8, 3, padding=1)).append(nn.MaxPool2d(2, 2))),
        image(3, 11, 8),
        True,
    ),
    "depthwise": (
        seeded(
            lambda: nn.Sequential(
                *(nn.Conv2d(4, 8, 3, 2, 1, groups=4), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 16, 1)),
                *(nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=2, dilation=2)),
            ),
            latent_size=2,
        ),
        image(4, 8, 8),
        False,
    ),
    "conv1d": (
        seeded(
            lambda: nn.Sequential(
                *(nn.Conv1d(3, 16, 5, 2, 2), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 16, 3)),
                *(nn.BatchNorm1d(16), nn.LeakyReLU(0.1)),
            ),
            latent_size=2,
            layout="channels_first",
        ),
        image(3, 24),
        True,
    ),
    **{
        name: (seeded(make, **options), image(*shape), joined)
        for name, (make, options, shape, joined) in (GROUPED | AWKWARD).items()
    },
    "silu": (
        seeded(
            lambda: nn.Sequential(nn.Linear(12, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 8)),
            latent_size=8,
        ),
        image(12),
        True,
    ),
    "silu of images": (
        seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3)), latent_size=2),
        image(3, 8, 8),
        False,
    ),
    "viewed": (seeded(lambda: Viewed(nn.Conv1d(3, 8, 3), 8 * 22), latent_size=8), image(3, 24), False),
    "linear": (seeded(lambda: nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)), latent_size=4), image(12), False),
    "flat": (
        seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8)), latent_size=8),
        image(3, 8, 8),
        False,
    ),
    "residual": (
        seeded(
            lambda: Residual(_branch(3, 16), nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)), nn.ReLU()),
            latent_size=2,
        ),
        image(3, 8, 8),
        True,
    ),
    "dropout": (
        seeded(lambda: nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 8)), latent_size=8),
        image(12),
        False,
    ),
    "parameter": (seeded(lambda: Placed(7, 16), layout="tokens"), image(7, 16), False),
    "encoder": (
        seeded(
            lambda: Residual(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))),
            layout="tokens",
        ),
        image(7, 16),
        True,
    ),
    "gelu of images": (
        seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3)), latent_size=2),
        image(3, 8, 8),
        False,
    ),
    "gelu": (
        seeded(lambda: nn.Sequential(nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 8)), layout="tokens"),
        image(7, 12),
        False,
    ),
    "summed": (
        seeded(lambda: Residual(_branch(4, 4), nn.Conv2d(4, 4, 1), nn.LeakyReLU(0.2)), latent_size=4),
        image(4, 8, 8),
        True,
    ),
    "summed, without an activation": (seeded(lambda: Residual(_branch(20, 20))), image(20, 9, 9), True),
    "attention": (seeded(lambda: Attending(16, 2, by_chunks=False), layout="tokens"), image(7, 16), True),
    "chunks": (seeded(lambda: Attending(16, 2, by_chunks=True), layout="tokens"), image(7, 16), True),
    "attention of many tokens": (
        seeded(lambda: Attending(24, 2, by_chunks=False, causal=True), layout="tokens"),
        image(70, 24),
        True,
    ),
    "chunks of many tokens": (
        seeded(lambda: Attending(16, 2, by_chunks=True), layout="tokens"),
        image(40, 16),
        True,
    ),
    "attention between channels": (seeded(lambda: Channels(40, apart=False), layout="tokens"), image(7, 40), True),
    "attention between channels, apart": (
        seeded(lambda: Channels(40, apart=True), layout="tokens"),
        image(7, 40),
        False,
    ),
    "twofold": (seeded(lambda: Twofold(16), layout="tokens"), image(40, 16), False),
    "shifted": (seeded(lambda: Shifted(12), latent_size=4), image(12), False),
    "norms around a product": (
        seeded(lambda: nn.Sequential(nn.LayerNorm(12), _raised(nn.Linear(12, 8)), nn.BatchNorm1d(8), nn.ReLU())),
        image(12),
        True,
    ),
    "BatchNorm of tokens": (
        seeded(lambda: nn.Sequential(_raised(nn.Linear(12, 8)), nn.BatchNorm1d(7), nn.GELU()), layout="tokens"),
        image(7, 12),
        False,
    ),
    "multi-head attention": (seeded(lambda: Attended(16, 2), layout="tokens"), image(7, 16), True),
    "encoder's layer": (seeded(lambda: _layer("gelu", norm_first=True), layout="tokens"), image(7, 16), True),
    "encoder's layer, norms after": (
        seeded(lambda: _layer("relu", norm_first=False, bias=False), layout="tokens"),
        image(7, 16),
        True,
    ),
    "output": (
        seeded(lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)), is_output=True),
        image(3, 8, 8),
        False,
    ),
    **{
        f"{make().__class__.__name__}{i}": (
            seeded(lambda make=make: nn.Sequential(nn.Linear(12, 16), make(), nn.Linear(16, 8)), latent_size=8),
            image(12),
            make in (nn.GELU, nn.SiLU),
        )
        for i, make in enumerate(ACTIVATIONS)
    },
}
"""Name -> a block's maker, an input, and whether something in it is joined."""


TURNED = (seeded(lambda: Turning(16, 40), layout="tokens"), image(40, 16))
"""One of which a part, the turning, is autograd's."""


def random_block(seed: int, *, tokens: bool) -> tuple[Callable[[], Block], Tensor]:
    """A block of up to five random parts, and an input of it: on tokens, or on images."""
    chance = random.Random(seed)
    width, count = chance.choice([4, 8, 20]), chance.randint(1, 5)
    side = chance.choice([6, 8, 9])

    def make() -> Block:
        torch.manual_seed(seed)
        draw = random.Random(seed + 1)
        parts: list[nn.Module] = [_on_tokens(draw, width) if tokens else _on_images(draw, width) for _ in range(count)]
        parts.append(nn.Linear(width, width) if tokens else nn.Conv2d(width, width, 1))
        if draw.random() < 0.7 and not tokens:
            parts += draw.choice([[nn.BatchNorm2d(width), nn.ReLU()], [nn.GroupNorm(2, width), _smooth(draw)]])
        layout: Layout | None = "tokens" if tokens else None
        block = Block("layer", nn.Sequential(*parts), latent_size=draw.choice([1, 2, 3]), layout=layout)
        # Where nothing before it trains, torch's own GroupNorm reads what is not there on its way back.
        freezes = not any(isinstance(module, nn.GroupNorm) for module in block.modules())
        for parameter in list(block.parameters())[:-2]:
            if freezes and draw.random() < 0.15:
                parameter.requires_grad_(False)
        return block

    generator = torch.Generator().manual_seed(seed)
    length = chance.choice([7, 40])
    x = torch.randn(*((5, length, width) if tokens else (5, width, side, side)), generator=generator)
    return make, x if tokens else x.contiguous(memory_format=torch.channels_last)


def _on_tokens(draw: random.Random, width: int) -> nn.Module:
    net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width, bias=draw.random() < 0.5), _smooth(draw))
    net.append(nn.Linear(2 * width, width))
    attending = Attending(width, draw.choice([1, 2]), by_chunks=draw.random() < 0.5, causal=draw.random() < 0.5)
    plain = nn.Sequential(nn.Linear(width, width), _smooth(draw))
    return draw.choice([Residual(net), net, nn.LayerNorm(width), plain, attending])


def _on_images(draw: random.Random, width: int) -> nn.Module:
    groups = draw.choice([1, 2, width])
    conv = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=draw.random() < 0.5)
    norm = draw.choice([nn.BatchNorm2d(width), nn.GroupNorm(2, width)])
    net = nn.Sequential(conv, norm, *draw.choice([[], [nn.ReLU()], [nn.LeakyReLU(0.2)], [_smooth(draw)]]))
    pool = draw.choice([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Identity()])
    return draw.choice([net, Residual(net), Residual(net, after=nn.ReLU()), nn.Sequential(net, pool)])


def _smooth(draw: random.Random) -> nn.Module:
    return draw.choice([nn.GELU, nn.SiLU, nn.Tanh, nn.ELU])()
