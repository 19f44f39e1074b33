"""Channels first or tokens: told by the operations that made [B, X, Y], declared, or refused before training."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.kernels.reference import make_basis
from unlocked.models import Block
from unlocked.rules import DRTP, LLS, LayerInfo, LLS_MxM_reduced, LocalLosses
from unlocked.runtime import Trainer
from unlocked.runtime.network import build_network

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.02)


class Function(nn.Module):
    """A function of modules, as a forward() may call it."""

    def __init__(self, function: Callable[..., Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.inner)


def _layouts(body: nn.Module, shape: tuple[int, ...], sample: Tensor | None = None) -> str | None:
    blocks = [Block("one", body), Block("output", nn.Sequential(nn.Flatten(), nn.LazyLinear(4)))]
    network = build_network(blocks, input_shape=shape, num_classes=4, seed=0, sample=sample)
    return network.infos[0].layout


def _name(body: nn.Module) -> str:
    return "-".join(type(module).__name__ for module in body.modules())


CONV, LINEAR = nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 6)
ATTENTION = nn.MultiheadAttention(6, 2, batch_first=True)


@pytest.mark.parametrize(
    "body",
    [
        CONV,
        nn.Sequential(CONV, nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2)),
        nn.Sequential(nn.LazyConv1d(6, 3), nn.GroupNorm(2, 6), nn.GELU(), nn.AdaptiveAvgPool1d(3), nn.Dropout(0.1)),
        nn.Sequential(nn.ReLU(), nn.BatchNorm1d(6)),
        nn.ConvTranspose1d(6, 6, 3),
        Function(lambda x, conv: x + conv(x), CONV),
        Function(lambda x, conv: torch.cat([x[:, :, :2], conv(x)], 2), CONV),
        Function(lambda x, conv: conv(x)[:, :, 1:].contiguous() * 2, CONV),
        Function(lambda x, conv: conv(x).chunk(2, dim=1)[0].sigmoid(), CONV),
        Function(lambda x: F.avg_pool1d(F.pad(x, (1, 1)), 2)),
        Function(lambda x, linear: linear(x.transpose(1, 2)).mT, LINEAR),
        Function(lambda x, linear: linear(x.permute(0, 2, 1)).permute((0, 2, 1)), LINEAR),
        Function(lambda x, conv: conv(x[:, :, None]).flatten(2), nn.Conv2d(6, 6, 1)),
    ],
    ids=_name,
)
def test_channels_first(body: nn.Module) -> None:
    assert _layouts(body, (6, 6)) == "channels_first"


@pytest.mark.parametrize(
    "body",
    [
        LINEAR,
        nn.Sequential(LINEAR, nn.LayerNorm(6), nn.Tanh()),
        nn.Sequential(nn.ReLU(), nn.RMSNorm(6)),
        Function(lambda x, attention: x + attention(x, x, x)[0], ATTENTION),
        nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
        Function(lambda x, lstm: lstm(x)[0], nn.LSTM(6, 6, batch_first=True)),
        Function(lambda x, gru: gru(x)[0].relu(), nn.GRU(6, 6, batch_first=True)),
        Function(lambda x, conv: conv(x).transpose(1, 2), CONV),
        Function(lambda x, conv: conv(x).mT.contiguous(), CONV),
        Function(lambda x, conv: conv(x[:, :, None]).flatten(2).transpose(2, 1), nn.Conv2d(6, 6, 1)),
        Function(lambda x, linear: linear(x.flatten(0, 1)).view(x.shape), LINEAR),
        Function(lambda x, conv, norm: norm(conv(x[:, :, None]).permute(0, 2, 3, 1))[:, :1].squeeze(1),
                 nn.Conv2d(6, 6, 1), nn.LayerNorm(6)),
    ],
    ids=_name,
)  # fmt: skip
def test_tokens(body: nn.Module) -> None:
    assert _layouts(body, (6, 6)) == "tokens"
    embedding = nn.Embedding(9, 6)
    assert _layouts(embedding, (6,), torch.zeros(6, dtype=torch.int64)) == "tokens"


@pytest.mark.parametrize(
    "body",
    [
        nn.ReLU(),
        nn.Flatten(1, 1),
        nn.Sequential(CONV, LINEAR),  # along the places, or along what was meant to be features?
        nn.Sequential(CONV, nn.LayerNorm((6, 6)), nn.LayerNorm(6)),
        nn.Sequential(CONV, LINEAR, nn.ReLU(), nn.Linear(6, 6)),
        nn.Sequential(LINEAR, nn.BatchNorm1d(6)),
        nn.Sequential(LINEAR, nn.AvgPool1d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(36, 36), nn.Unflatten(1, (6, 6))),
        Function(lambda x, conv: conv(x) @ x, CONV),
        Function(lambda x, conv, linear: conv(x) + linear(x), CONV, LINEAR),
        Function(lambda x, conv: conv(x).transpose(0, 1).reshape(-1, 6, 6), CONV),
        Function(lambda x, conv: conv(x)[:, :, None, 0], CONV),
    ],
    ids=_name,
)
def test_what_nothing_tells_is_refused_by_the_rules_that_pool(body: nn.Module) -> None:
    data = torch.randn(8, 6, 6), torch.arange(8) % 4

    def fit(rule: object, layout: str | None) -> dict[str, Tensor]:
        blocks = [
            Block("unclear", body, layout=layout),  # type: ignore[arg-type]
            Block("output", nn.Sequential(nn.Flatten(), nn.LazyLinear(4))),
        ]
        return Trainer(blocks, rule=rule, optimizer=SGD).fit(data, epochs=1, batch_size=4).weights  # type: ignore

    for rule in (LLS(), LocalLosses()):
        with pytest.raises(ValueError, match=r"layer unclear .*nothing tells .*layout=\"channels_first\""):
            fit(rule, None)
        for layout in ("channels_first", "tokens"):
            fit(rule, layout)
    fit(DRTP, None)  # which needs no latents


def test_a_declaration_reaches_the_layers_after_it() -> None:
    blocks = [
        Block("first", nn.ReLU(), layout="tokens"),
        Block("second", nn.Tanh(), nn.Sequential(nn.Identity(), nn.Hardtanh())),
        Block("third", nn.Sigmoid()),
        Block("output", nn.Sequential(nn.Flatten(), nn.Linear(35, 4))),
    ]
    network = build_network(blocks, input_shape=(5, 7), num_classes=4, seed=0)
    assert [info.layout for info in network.infos] == ["tokens", "tokens", "tokens", None]
    with pytest.raises(ValueError, match="layout 'NCL' is not known; valid: channels_first, tokens"):
        Block.wrap(nn.ReLU(), "first", layout="NCL")  # type: ignore[arg-type]


def _sound(rows: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 4
    waves = torch.sin(torch.arange(1, 5)[:, None, None] * torch.linspace(0, 6, 12))
    return waves[labels].expand(-1, 2, -1) + 0.3 * torch.randn(rows, 2, 12, generator=generator), labels


def _net(latent_size: int | None = None) -> list[Block]:
    def body(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv1d(inputs, outputs, 3, padding=1), nn.BatchNorm1d(outputs), nn.LeakyReLU())

    torch.manual_seed(0)  # every network of these starts from the same weights
    return [
        Block("conv1", body(2, 5), nn.MaxPool1d(2), latent_size=latent_size),
        Block("conv2", body(5, 7), nn.AdaptiveAvgPool1d(1), latent_size=latent_size),
        Block("output", nn.Sequential(nn.Flatten(), nn.Linear(7, 4))),
    ]


def test_one_dimensional_convolutions_are_those_of_images_of_one_column() -> None:
    """With one latent per channel both pool over all there is; the other way the numbers would be those of places."""
    samples, labels = _sound()

    def images() -> list[Block]:
        def body(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, (3, 1), padding=(1, 0)), nn.BatchNorm2d(outputs), nn.LeakyReLU()
            )

        torch.manual_seed(0)
        return [
            Block("conv1", body(2, 5), nn.MaxPool2d((2, 1)), latent_size=1),
            Block("conv2", body(5, 7), nn.AdaptiveAvgPool2d(1), latent_size=1),
            Block("output", nn.Sequential(nn.Flatten(), nn.Linear(7, 4))),
        ]

    runs = []
    for blocks, data in ((_net(1), samples), (images(), samples[..., None])):
        trainer = Trainer(blocks, rule=LocalLosses(), optimizer=SGD, seed=3)
        runs.append(trainer.fit((data, labels), epochs=2, batch_size=16, eval_data=(data, labels)))
    assert runs[0].local_losses == pytest.approx(runs[1].local_losses, rel=1e-5)
    for name, value in runs[0].weights.items():
        torch.testing.assert_close(value, runs[1].weights[name].reshape(value.shape), rtol=1e-4, atol=1e-5)


def test_latents_of_one_dimension_against_the_formula() -> None:
    blocks = _net()
    network = build_network(blocks, input_shape=(2, 12), num_classes=4, seed=0)
    assert [(i.layout, i.latent_size) for i in network.infos[:2]] == [("channels_first", 2)] * 2
    assert [i.num_latents for i in network.infos[:2]] == [10, 14]
    info: LayerInfo = network.infos[0]
    activations = torch.randn(6, 5, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(6) % 4
    z = activations.view(6, 5, 2, 6).mean(3).flatten(1)
    scores = z / z.norm(dim=1, keepdim=True) @ make_basis(4, 10).double().T
    expected = F.cross_entropy(scores / 0.5, labels)
    rule = LLS(temperature=0.5)(info).double()
    torch.testing.assert_close(rule(activations, labels), expected)
    with pytest.raises(ValueError, match="reduced_rank of at most 10"):
        LLS_MxM_reduced()(info)


@pytest.mark.parametrize("rule", [LLS(), LocalLosses()], ids=str)
def test_sound_learns_alike_on_every_engine(rule: object) -> None:
    data = _sound()
    runs = [
        Trainer(_net(), rule=rule, optimizer=ADAM, engine=engine, seed=1).fit(  # type: ignore[arg-type]
            data, epochs=15, batch_size=16, eval_data=data
        )
        for engine in ("sequential", "streams")
    ]
    assert runs[0].weights_sha256 == runs[1].weights_sha256
    assert runs[0].test_acc1 is not None
    assert runs[0].test_acc1 > 60  # of four classes
