"""Law 1 inside one process: the plain loop, written again by hand, is what `sequential` and `streams` compute."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from unlocked.data import Augmentation, ImageDataset, epoch_order
from unlocked.kernels.images import load_batch
from unlocked.kernels.philox import Purpose
from unlocked.models import Block, initialise, set_dropout_keys, small_conv
from unlocked.rules import LLS, RULES, LayerInfo, LocalRule
from unlocked.runtime import RunResult, Trainer
from unlocked.workers.errors import StageError


def dataset(count: int, split: str = "train", *, augment: bool = True) -> ImageDataset:
    generator = torch.Generator().manual_seed(count)
    return ImageDataset(
        name="tiny",
        split=split,
        images=torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8),
        labels=torch.randint(0, 5, (count,), generator=generator),
        num_classes=5,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        augmentation=Augmentation(flip=True, crop_padding=2, erase_probability=0.5) if augment else Augmentation(),
    )


def trainer(engine: str = "sequential", rule: object = None, **options: object) -> Trainer:
    settings_ = {"seed": 5, "statistics_batches": 2, "optimizer": partial(torch.optim.Adam, lr=1e-2), **options}
    return Trainer(small_conv(3, 5, 16, dropout=0.2), rule=rule or LLS(), engine=engine, **settings_)  # type: ignore


def fit(one: Trainer, **options: object) -> RunResult:
    plan = {"epochs": 2, "batch_size": 16, "eval_batch_size": 25, **options}
    return one.fit(dataset(70), eval_data=dataset(40, "test", augment=False), **plan)  # type: ignore[arg-type]


def figures(result: RunResult) -> list[dict]:
    return [{k: v for k, v in asdict(epoch).items() if k != "seconds"} for epoch in result.epochs]


class PlainLoop:
    """Local learning as one would write it first: modules, autograd, an optimizer each, one batch after the other."""

    def __init__(self, seed: int) -> None:
        self.blocks: list[Block] = small_conv(3, 5, 16, dropout=0.2)
        for index, block in enumerate(self.blocks):
            initialise(block, seed, index)
            block.to(memory_format=torch.channels_last)
        self.seed, self.step = seed, 0
        self.optimizers = [torch.optim.Adam(block.parameters(), lr=1e-2) for block in self.blocks]
        self.train_set, self.test_set = dataset(70), dataset(40, "test", augment=False)
        frequencies = torch.linspace(50, 512, 5)
        sizes = {"conv1": 4, "conv2": 2, "conv3": 2, "linear1": 512}
        channels = {"conv1": 32, "conv2": 64, "conv3": 128}
        self.pools = sizes
        self.bases = {
            name: torch.sin(frequencies[:, None] * torch.arange(channels.get(name, 0) * p * p or p).float())
            for name, p in sizes.items()
        }

    def batch(self, data: ImageDataset, order: Tensor, start: int, size: int, epoch: int) -> tuple[Tensor, Tensor]:
        at = torch.tensor(start), torch.tensor(epoch)
        options = data.batch_options()
        return load_batch(data.images, data.labels, order, at[0], size, seed=self.seed, epoch=at[1], **options)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        order = epoch_order(70, self.seed, epoch)
        sums = dict.fromkeys((block.name for block in self.blocks), torch.zeros((), dtype=torch.float64))
        for start in range(0, 70, 16):
            size = min(16, 70 - start)
            x, labels = self.batch(self.train_set, order, start, size, epoch)
            for index, (block, optimizer) in enumerate(zip(self.blocks, self.optimizers, strict=True)):
                block.train()
                set_dropout_keys(block, self.seed, index, torch.tensor(self.step))
                activations = block.body(x)
                loss = self.loss(block, activations, labels)
                optimizer.zero_grad()
                loss.backward()
                with torch.no_grad():
                    x = block.tail(activations.detach())
                optimizer.step()
                sums[block.name] = sums[block.name] + loss.detach() * size
            self.step += 1
        return {name: float(total) / 70 for name, total in sums.items()}

    def loss(self, block: Block, activations: Tensor, labels: Tensor) -> Tensor:
        if block.is_output:
            return F.cross_entropy(activations, labels)
        p = self.pools[block.name]
        pooled = F.adaptive_avg_pool2d(activations, p) if activations.dim() == 4 else activations
        z = F.normalize(pooled.flatten(1), dim=1, eps=1e-12)
        return F.cross_entropy(z @ self.bases[block.name].T / 0.5, labels)

    @torch.no_grad()
    def evaluate(self, epoch: int) -> float:
        order = epoch_order(70, self.seed, epoch, purpose=Purpose.STATISTICS)
        for i in range(2):
            x, _ = self.batch(self.train_set, order, 16 * i, 16, epoch)
            for index, block in enumerate(self.blocks):
                set_dropout_keys(block, self.seed, index, torch.tensor(self.step))
                x = block(x)
        correct = 0
        for start in (0, 25):
            x, labels = self.batch(self.test_set, torch.arange(40), start, min(25, 40 - start), epoch)
            for block in self.blocks:
                x = block.eval()(x)
            correct += int((x.argmax(1) == labels).sum())
        return 100 * correct / 40


def test_sequential_is_the_plain_loop_bit_for_bit() -> None:
    result = fit(trainer(kernels="torch"))
    plain = PlainLoop(5)
    for epoch in range(2):
        losses, accuracy = plain.train_epoch(epoch), plain.evaluate(epoch)
        assert dict(result.epochs[epoch].local_losses) == losses
        assert result.epochs[epoch].eval_acc1 == accuracy
    for block in plain.blocks:
        for name, value in block.state_dict().items():
            assert torch.equal(result.weights[f"{block.name}.block.{name}"], value), (block.name, name)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_streams_equal_sequential_for_every_rule(rule: str, kernels: str) -> None:
    """On the CPU, at 2 to 5 stages: evaluation, partial batches, dropout, augmentation."""
    built = RULES[rule](temperature=0.5)
    expected = fit(trainer(rule=built, kernels=kernels), max_steps=7)
    stages = 2 + list(RULES).index(rule) % 4
    got = fit(trainer("streams", built, kernels=kernels, stages=stages, queue_depth=2), max_steps=7)
    assert len(got.stages) == stages
    assert got.weights_sha256 == expected.weights_sha256
    assert figures(got) == figures(expected)


@settings(max_examples=8)
@given(stages=st.integers(1, 5), depth=st.integers(1, 8), batch=st.integers(2, 40), steps=st.integers(1, 9))
def test_placement_never_changes_a_result(stages: int, depth: int, batch: int, steps: int) -> None:
    expected = fit(trainer(), batch_size=batch, max_steps=steps)
    got = fit(trainer("streams", stages=stages, queue_depth=depth), batch_size=batch, max_steps=steps)
    assert got.weights_sha256 == expected.weights_sha256
    assert figures(got) == figures(expected)
    assert got.steps == expected.steps


def test_kernels_agree_within_rounding() -> None:
    """The closed form in C++ against autograd, over an epoch of SGD."""
    options = {"optimizer": partial(torch.optim.SGD, lr=1e-2)}
    a, b = (fit(trainer(kernels=k, **options), max_steps=3, epochs=1) for k in ("torch", "auto"))
    for name, value in a.weights.items():
        torch.testing.assert_close(b.weights[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_backpropagation_trains_end_to_end() -> None:
    result = fit(trainer(rule="BP"), epochs=8)
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss
    with pytest.raises(ValueError, match="not local"):
        trainer("streams", "BP")


def test_a_non_finite_loss_names_layer_epoch_and_micro_batch() -> None:
    with pytest.raises(StageError, match=r"epoch 0, train micro-batch \d+\).*loss of layer \w+ is"):
        fit(trainer(optimizer=partial(torch.optim.SGD, lr=1e38)))


class Prototypes(LocalRule):
    """Distances to learnt class centres."""

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.zeros(layer.num_classes, layer.num_features))

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        distances = (activations.flatten(1)[:, None] - self.centres).square().mean(2)
        return F.cross_entropy(-distances, labels)


def test_a_rule_and_a_network_of_ones_own() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 20, generator=generator)
    labels = x[:, :3].argmax(1)
    net = nn.Sequential(
        nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU()),
        nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1)),
        nn.Linear(32, 3),
    )
    results = [
        Trainer(net, rule=[Prototypes, LLS()], optimizer=partial(torch.optim.Adam, lr=1e-2), engine=engine).fit(
            (x, labels), epochs=10, batch_size=32, eval_data=(x, labels)
        )
        for engine in ("sequential", "streams")
    ]
    assert results[0].weights_sha256 == results[1].weights_sha256
    assert results[0].test_acc1 is not None
    assert results[0].test_acc1 > 90


def test_shapes_that_do_not_chain_name_both_layers() -> None:
    net = nn.Sequential(nn.Linear(20, 64), nn.Linear(32, 3))
    one = Trainer(net, rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match=r"layer linear1 gives \(64,\) per sample, which layer linear2 can't take"):
        one.fit((torch.randn(8, 20), torch.arange(8) % 3), epochs=1, batch_size=4)


@pytest.mark.parametrize(
    ("stop", "engine", "options"),
    [
        (3, "sequential", {}),
        (4, "streams", {"stages": 3}),
        (6, "streams", {"stages": 5, "queue_depth": 1}),
        (5, "sequential", {}),  # at the end of the first epoch, before its evaluation
    ],
)
def test_a_resumed_run_ends_in_the_same_bits(stop: int, engine: str, options: dict, tmp_path: object) -> None:
    folder = f"{tmp_path}/snapshots"
    whole = fit(trainer(snapshot_every=1, snapshot_dir=folder))
    for extra in sorted(Path(folder).glob("step-*"))[stop:]:
        (extra / "manifest.json").unlink()  # as if the run had died before it was complete
    resumed = fit(trainer(engine, snapshot_every=1, snapshot_dir=folder, resume=folder, **options))
    assert resumed.weights_sha256 == whole.weights_sha256
    kept = figures(whole)[-len(resumed.epochs) :]
    assert figures(resumed) == kept


def test_a_snapshot_of_other_settings_or_a_damaged_one_is_refused(tmp_path: object) -> None:
    folder = f"{tmp_path}/snapshots"
    fit(trainer(snapshot_every=3, snapshot_dir=folder), epochs=1)
    with pytest.raises(ValueError, match="batch_size is 8 but was 16"):
        fit(trainer(snapshot_every=3, snapshot_dir=folder, resume=folder), batch_size=8)
    path = next(Path(folder).glob("*/layer-001-conv2.pt"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"layer-001-conv2\.pt is damaged"):
        fit(trainer(snapshot_every=3, snapshot_dir=folder, resume=folder))
    path.unlink()
    with pytest.raises(ValueError, match=r"has no file layer-001-conv2\.pt for layer conv2"):
        fit(trainer(snapshot_every=3, snapshot_dir=folder, resume=folder))
    with pytest.raises(ValueError, match="no complete snapshot"):
        trainer(resume=f"{tmp_path}/nothing")
