"""The plain loop against one written without this project's layers and stages: plain torch modules, one optimizer each.

Only what defines the data and the draws is shared: `epoch_order`, `load_batch`, `keyed_uniform`, the start values.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked import AdamWSF
from unlocked.data import Augmentation, ImageDataset, epoch_order
from unlocked.data.synthetic import load_synthetic
from unlocked.kernels.images import load_batch
from unlocked.kernels.philox import Purpose, keyed_uniform, philox_int
from unlocked.models import small_conv
from unlocked.rules import DRTP, LLS, LLS_MxM, LocalLosses
from unlocked.runtime import RunResult, Sequential, Trainer
from unlocked.runtime.learning_rate import MultiStepLR
from unlocked.runtime.network import build_network

schedulefree = pytest.importorskip("schedulefree")

SEED, DROPOUT, CLASSES, SIDE = 11, 0.3, 4, 8
TRAIN, TEST = load_synthetic(num_train=27, num_test=13, num_classes=CLASSES, image_size=SIDE, seed=1)
TRAIN = replace(TRAIN, augmentation=Augmentation(flip=True, crop_padding=1, erase_probability=0.5))
EPOCHS, BATCH, EVAL_BATCH, STATISTICS, LR = 3, 8, 6, 2, 5e-3
FACTOR = MultiStepLR((1,), 0.5)
ADAM = partial(torch.optim.Adam, lr=LR)
ADAMW_SF = partial(AdamWSF, lr=LR, weight_decay=0.01)
ADAMW_SCHEDULE_FREE = partial(schedulefree.AdamWScheduleFree, lr=LR, weight_decay=0.01)
SGD_SF = partial(schedulefree.SGDScheduleFree, lr=LR)


@dataclass
class PlainLayer:
    """One block taken apart into torch modules, with its loss written out."""

    modules: list[nn.Module]  # with parameters
    body: Callable[[Tensor], Tensor]
    tail: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    rule: list[nn.Parameter]
    optimizer: Any = None
    sum: float = 0.0


@dataclass
class PlainLoop:
    """Local learning, or with `end_to_end` backpropagation."""

    mode: str
    make_optimizer: Callable[[list[nn.Parameter]], Any]
    max_steps: int = 10**9
    steps: int = 0
    training: bool = True
    layers: list[PlainLayer] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def end_to_end(self) -> bool:
        return self.mode == "BP"

    @property
    def averages(self) -> bool:
        return self.make_optimizer is not ADAM

    def run(self) -> None:
        self._build()
        for epoch in range(EPOCHS):
            if self.steps < self.max_steps:
                self._train(epoch)
                self._evaluate(epoch)

    def state(self) -> list[Tensor]:
        """In the order of the run's weights: each layer's rule, then its block."""
        tensors: list[Tensor] = []
        for layer in self.layers:
            tensors += [*layer.rule, *(value for module in layer.modules for value in module.state_dict().values())]
        return [tensor.detach() for tensor in tensors]

    def _build(self) -> None:
        network = build_network(
            small_conv(3, CLASSES, SIDE), input_shape=(3, SIDE, SIDE), num_classes=CLASSES, seed=SEED
        )
        values = [list(block.state_dict().values()) for block in network.blocks]
        pools = [lambda a: F.max_pool2d(a, 2), lambda a: F.max_pool2d(a, 2), lambda a: F.adaptive_avg_pool2d(a, 2)]
        widths, latent_sizes = [3, 32, 64, 128], [4, 2, 2]
        for i in range(3):
            modules = [nn.Conv2d(widths[i], widths[i + 1], 3, padding=1), nn.BatchNorm2d(widths[i + 1])]
            pool, drop = pools[i], self._dropout(i)
            self._add(i, modules, values[i], lambda a, pool=pool, drop=drop: drop(pool(a)), latent_sizes[i])
        self._add(3, [nn.Linear(512, 512), nn.BatchNorm1d(512)], values[3], lambda a: a, 512)
        self._add(4, [nn.Linear(512, CLASSES)], values[4], lambda a: a, None)
        if self.end_to_end:
            everything = [p for layer in self.layers for module in layer.modules for p in module.parameters()]
            self.layers[-1].optimizer = self.make_optimizer(everything)

    def _add(
        self,
        index: int,
        modules: list[nn.Module],
        values: list[Tensor],
        tail: Callable[[Tensor], Tensor],
        latent_size: int | None,
    ) -> None:
        whole = nn.Sequential(*modules)
        whole.load_state_dict(dict(zip(whole.state_dict(), values, strict=True)))
        whole.to(memory_format=torch.channels_last)

        def body(x: Tensor) -> Tensor:
            if isinstance(modules[0], nn.Linear):
                x = x.flatten(1)
            for module in modules:
                x = module.train(self.training)(x)
            return x if latent_size is None else F.leaky_relu(x, 0.01)

        rule: list[nn.Parameter] = []
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
        if latent_size is not None and not self.end_to_end:
            loss, rule = self._rule(index, latent_size)
        layer = PlainLayer(modules, body, tail, loss, rule)
        if not self.end_to_end:
            layer.optimizer = self.make_optimizer([*rule, *whole.parameters()])
        self.layers.append(layer)

    def _rule(self, index: int, p: int) -> tuple[Callable[[Tensor, Tensor], Tensor], list[nn.Parameter]]:
        dim = [512, 256, 512, 512][index]
        frequencies = torch.linspace(50, 512, CLASSES)
        waves = torch.sin(frequencies[:, None] * torch.arange(dim, dtype=torch.float32))
        draws = torch.Generator().manual_seed(philox_int(SEED, Purpose.RULE, index))
        trained = []
        if self.mode == "LLS_MxM":
            trained = [nn.Parameter(0.01 * torch.randn(CLASSES, CLASSES, generator=draws))]
        elif self.mode == "LocalLosses":  # as wide as the latents in SmallConv, so there is nothing to pool
            trained = [nn.Parameter(0.1 * torch.randn(CLASSES, dim, generator=draws))]

        features = [32 * 64, 64 * 16, 128 * 4, 512][index]
        bound = math.sqrt(6 / features)
        targets = torch.rand(CLASSES, features, generator=draws) * (2 * bound) - bound if self.mode == "DRTP" else None

        def loss(activations: Tensor, labels: Tensor) -> Tensor:
            if targets is not None:
                return (activations.flatten(1) * targets[labels]).sum(1).mean()
            z = F.adaptive_avg_pool2d(activations, p).flatten(1) if activations.dim() == 4 else activations
            if self.mode == "LocalLosses":
                return F.cross_entropy(z @ trained[0].T / 0.5, labels)
            scores = F.normalize(z, dim=1) @ waves.T
            return F.cross_entropy((scores @ trained[0] if trained else scores) / 0.5, labels)

        return loss, trained

    def _dropout(self, index: int) -> Callable[[Tensor], Tensor]:
        """Layer `index`'s only dropout; within the one layer of backpropagation its number `index`."""
        layer, number = (0, index) if self.end_to_end else (index, 0)

        def drop(x: Tensor) -> Tensor:
            if not self.training:
                return x
            counter = torch.arange(-(-x.numel() // 4)) + (number << 40)
            draws = keyed_uniform(SEED, Purpose.DROPOUT, counter, major=self.steps, minor=layer)
            keep = draws.flatten()[: x.numel()].view(x.shape) >= DROPOUT
            return x * (keep * (1 / (1 - DROPOUT)))

        return drop

    def _batch(self, data: ImageDataset, order: Tensor, start: int, rows: int, epoch: int) -> tuple[Tensor, Tensor]:
        size = min(rows, len(order) - start)
        place = {"seed": SEED, "epoch": torch.tensor(epoch)}
        return load_batch(data.images, data.labels, order, torch.tensor(start), size, **place, **data.batch_options())

    def _train(self, epoch: int) -> None:
        self.training = True
        scores, seen = [0.0, 0, 0], 0
        for layer in self.layers:
            layer.sum = 0.0
            if layer.optimizer is not None:
                layer.optimizer.param_groups[0]["lr"] = LR * FACTOR(epoch)
                if self.averages:
                    layer.optimizer.train()
        order = epoch_order(len(TRAIN), SEED, epoch)
        for start in range(0, len(TRAIN), BATCH):
            if self.steps == self.max_steps:
                break
            x, labels = self._batch(TRAIN, order, start, BATCH, epoch)
            for layer in self.layers:
                activations = layer.body(x if self.end_to_end else x.detach())
                x = layer.tail(activations)
                if layer.optimizer is not None:
                    loss = layer.loss(activations, labels)
                    layer.optimizer.zero_grad()
                    loss.backward()
                    layer.optimizer.step()
                    layer.sum += (loss.detach() * len(labels)).item()
            self._score(scores, activations.detach(), labels)
            seen += len(labels)
            self.steps += 1
        losses = [layer.sum / seen for layer in self.layers if layer.optimizer is not None]
        self.epochs.append(
            {"losses": losses, "train": [100 * scores[1] / seen, 100 * scores[2] / seen]}  # one class in the best five
        )

    @torch.no_grad()
    def _evaluate(self, epoch: int) -> None:
        for layer in self.layers:
            if self.averages and layer.optimizer is not None:
                layer.optimizer.eval()  # BatchNorm's statistics are those of the averaged weights, too
        order = epoch_order(len(TRAIN), SEED, epoch, purpose=Purpose.STATISTICS)
        for i in range(STATISTICS):
            self._forward(self._batch(TRAIN, order, i * BATCH, BATCH, epoch)[0])
        self.training = False
        scores: list[float] = [0.0, 0, 0]
        for start in range(0, len(TEST), EVAL_BATCH):
            x, labels = self._batch(TEST, torch.arange(len(TEST)), start, EVAL_BATCH, epoch)
            logits = self._forward(x)
            scores[0] += F.cross_entropy(logits, labels, reduction="sum").item()
            self._score(scores, logits, labels)
        n = len(TEST)
        self.epochs[-1]["evaluation"] = [scores[0] / n, 100 * (scores[1] / n), 100 * (scores[2] / n)]

    def _forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.tail(layer.body(x))
        return x

    @staticmethod
    def _score(scores: list[float], logits: Tensor, labels: Tensor) -> None:
        scores[1] += int((logits.argmax(1) == labels).sum())
        scores[2] += len(labels)  # four classes: every label is among the best five


def _run(rule: Any, kernels: str = "torch", optimizer: Any = None, **plan: Any) -> RunResult:
    trainer = Trainer(
        small_conv(3, CLASSES, SIDE, dropout=DROPOUT),
        rule=rule,
        optimizer=optimizer or ADAM,
        seed=SEED,
        kernels=kernels,
        lr_factor=FACTOR,
        statistics_batches=STATISTICS,
    )
    sizes = {"epochs": EPOCHS, "batch_size": BATCH, "eval_batch_size": EVAL_BATCH}
    return trainer.fit(TRAIN, eval_data=TEST, **{**sizes, **plan})


RULES = {"LLS": LLS(), "LLS_MxM": LLS_MxM(), "LocalLosses": LocalLosses(), "DRTP": DRTP, "BP": "BP"}
CASES = [
    *((mode, ADAM) for mode in RULES),
    ("LLS_MxM", ADAMW_SF),
    ("LLS", ADAMW_SCHEDULE_FREE),
    ("DRTP", SGD_SF),
    ("BP", ADAMW_SF),
]


@pytest.mark.parametrize(("mode", "optimizer"), CASES)
@pytest.mark.parametrize("max_steps", [None, 6], ids=["whole", "cut"])
def test_weights_and_figures_are_the_plain_loops(mode: str, optimizer: Any, max_steps: int | None) -> None:
    """Partial batches, augmentation, dropout, a rate that falls, statistics and evaluation after every epoch."""
    plain = PlainLoop(mode, optimizer, max_steps or 10**9)
    plain.run()
    result = _run(RULES[mode], optimizer=optimizer, max_steps=max_steps)
    assert result.steps == plain.steps == (max_steps or 12)
    assert len(result.epochs) == len(plain.epochs) == (2 if max_steps else 3)
    for found, expected in zip(result.epochs, plain.epochs, strict=True):
        assert [loss for _, loss in found.local_losses] == expected["losses"]
        assert found.train_loss == expected["losses"][-1]
        assert [found.train_acc1, found.train_acc5] == pytest.approx(expected["train"], rel=1e-12)
        assert [found.eval_loss, found.eval_acc1, found.eval_acc5] == expected["evaluation"]
    state = plain.state()
    assert len(result.weights) == len(state)
    for (name, value), wanted in zip(result.weights.items(), state, strict=True):
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_batch_norm_counts_its_batches(kernels: str) -> None:
    """The closed form bypasses torch's BatchNorm in training and has to count for it: 12 steps, 3 x 2 statistics."""
    weights = _run(LLS(), kernels).weights
    counts = {name: int(value) for name, value in weights.items() if name.endswith("num_batches_tracked")}
    assert len(counts) == 4
    assert set(counts.values()) == {18}, counts


def test_the_model_that_was_passed_holds_the_trained_weights() -> None:
    model = small_conv(3, CLASSES, SIDE)
    trainer = Trainer(model, rule=LLS(), optimizer=partial(torch.optim.SGD, lr=LR))
    result = trainer.fit(TRAIN, epochs=1, batch_size=BATCH)
    for block in model:
        for name, value in block.state_dict().items():
            assert torch.equal(value, result.weights[f"{block.name}.block.{name}"]), name


def test_stages_of_the_plain_loop_are_refused() -> None:
    with pytest.raises(TypeError, match="stages"):
        Sequential(stages=2)  # type: ignore[call-arg]
    options: dict[str, Any] = {"rule": LLS(), "optimizer": partial(torch.optim.SGD, lr=LR), "stages": 2}
    with pytest.raises(TypeError, match=r"give it to the engine: engine=Streams\(stages=2\)"):
        Trainer(small_conv(3, CLASSES, SIDE), **options)
