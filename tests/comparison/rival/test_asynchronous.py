"""Backpropagation without a flush: real processes against a plain loop, written from the papers' update rules."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.comparison.contenders import all_contenders
from unlocked.comparison.pool import ContenderFailed, Pool
from unlocked.comparison.request import Form, RankAnswer, Request, load_data, save_data
from unlocked.comparison.rival.weight_versions import WeightVersions
from unlocked.data import load_dataset
from unlocked.kernels.images import load_batch
from unlocked.runtime.network import build_network
from unlocked.runtime.recipe import Recipe, make_model, make_optimizer
from unlocked.runtime.tensors import weights_digest
from unlocked.workers.source import BatchSource

PARTS = {2: ((0, 2), (2, 5)), 3: ((0, 1), (1, 3), (3, 5))}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as made:
        save_data(made.folder / "data.pt", load_dataset("digits"))
        yield made


def _request(pool: Pool, schedule: str, processes: int, chunks: int, **settings: object) -> Request:
    specs = all_contenders("cpu", cores=processes, processes=processes)
    spec = next(spec for spec in specs if spec.schedule == schedule)
    recipe = Recipe(training_mode="BP", **{"lr": 0.01, **settings})  # type: ignore[arg-type]
    form = Form(chunks=chunks, parts=PARTS[processes])
    return Request(spec=spec, task="train", recipe=recipe, data=pool.folder / "data.pt", form=form, timeout=100.0)


class PlainLoop:
    """One process, one loop: every stage's weights after each update are kept, and taken out by the formula."""

    def __init__(self, request: Request) -> None:
        recipe, form = request.recipe, request.form
        assert form is not None
        self.train, self.test = load_data(request.data)
        self.plan = recipe.plan(self.train, self.test)
        network = build_network(
            make_model(recipe, self.train),
            input_shape=self.train.image_shape,
            num_classes=self.train.num_classes,
            seed=recipe.seed,
        )
        self.names, self.blocks = network.names, network.blocks
        self.stages = [nn.Sequential(*network.blocks[a:b]).to(memory_format=torch.channels_last) for a, b in form.parts]
        self.weights = [list(stage.parameters()) for stage in self.stages]
        self.optimizers = [make_optimizer(recipe)(weights) for weights in self.weights]
        self.versions = [[[w.detach().clone() for w in weights]] for weights in self.weights]
        self.chunks, self.schedule = form.chunks, request.spec.engine_name
        self.done = self.drained = 0
        self.source = BatchSource(
            self.train,
            self.test,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            eval_batch_size=recipe.test_batch_size,
            load_batch=load_batch,
        )

    def run(self) -> str:
        """All of the plan; the digest of the weights."""
        for item in self.plan:
            x, labels = self.source.load(item)
            if item.kind == "train":
                self.step(x, labels)
                continue
            self.drained = self.done
            if item.kind == "statistics":
                with torch.no_grad():
                    for stage in self.stages:
                        x = stage(x)
        tensors = {
            f"{name}.{key}": value
            for name, block in zip(self.names, self.blocks, strict=True)
            for key, value in block.state_dict().items()
        }
        return weights_digest(tensors.items())

    def step(self, x: Tensor, labels: Tensor) -> None:
        for stage in range(len(self.stages)):
            self.take(stage, self.version(stage))
        rows = len(x)
        fitting = [n for n in range(1, self.chunks + 1) if rows % n == 0 and (rows // n > 1 or n == 1)]
        chunks = self.chunks if rows == self.source.batch_size else max(fitting)
        for part, wanted in zip(x.chunk(chunks), labels.chunk(chunks), strict=True):
            inputs, outputs = [], []
            for stage in self.stages:
                inputs.append(part.detach().requires_grad_(bool(outputs)))
                part = stage(inputs[-1])
                outputs.append(part)
            (F.cross_entropy(part, wanted) / chunks).backward()
            for given, made in zip(inputs[:0:-1], outputs[-2::-1], strict=True):
                made.backward(given.grad)
        for stage, optimizer in enumerate(self.optimizers):
            self.take(stage, self.done)
            optimizer.step()
            optimizer.zero_grad()
            self.versions[stage].append([w.detach().clone() for w in self.weights[stage]])
        self.done += 1

    def version(self, stage: int) -> int:
        """Of the weights at which the gradient of the next micro-batch is taken."""
        if self.schedule == "PipeDream-2BW":
            return max(0, self.done - 1)
        return max(self.drained, self.done - (len(self.stages) - stage) + 1)

    def take(self, stage: int, version: int) -> None:
        with torch.no_grad():
            for weight, value in zip(self.weights[stage], self.versions[stage][version], strict=True):
                weight.copy_(value)


def _digest(answers: list[RankAnswer]) -> str | None:
    (found,) = {answer.weights_sha256 for answer in answers}
    return found


@pytest.mark.alone
@pytest.mark.parametrize(
    ("schedule", "processes", "chunks", "optimizer"),
    [
        ("PipeDream", 2, 1, "Adam"),
        ("PipeDream", 3, 1, "SGD"),
        ("PipeDream-2BW", 2, 4, "SGD"),
        ("PipeDream-2BW", 3, 4, "Adam"),
    ],
)
def test_every_bit_is_the_plain_loops(pool: Pool, schedule: str, processes: int, chunks: int, optimizer: str) -> None:
    """Over the end of an epoch, whose last micro-batch is a smaller one, and with evaluations, at which it drains."""
    common = {"optimizer": optimizer, "momentum": 0.9}
    settings = [{"max_steps": 27, "num_epochs": 9, "no_eval": True}]
    if (schedule, processes) == ("PipeDream", 2):
        settings.append({"num_epochs": 2})
    for one in settings:
        request = _request(pool, schedule, processes, chunks, **common, **one)
        answers = pool.run(request)
        loop = PlainLoop(request)
        assert answers[0].steps == loop.plan.train_steps
        assert _digest(answers) == loop.run()
        flushed = PlainLoop(replace(request, form=replace(request.form, parts=((0, 5),))))  # type: ignore[type-var]
        flushed.schedule = "PipeDream"  # of one stage, which is the plain loop of backpropagation
        assert _digest(answers) != flushed.run()


def test_forms_that_do_not_fit_are_refused(pool: Pool) -> None:
    with pytest.raises(ContenderFailed, match="PipeDream-2BW takes at least as many chunks as stages, 2, not 1"):
        pool.run(_request(pool, "PipeDream-2BW", 2, 1))


def test_versions_stay_as_they_are() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    versions = WeightVersions(module, 3)
    optimizer = torch.optim.SGD(versions.parameters, lr=1.0)
    x, expected = torch.randn(4, 3), []
    for n in range(5):
        expected.append([p.detach().clone() for p in versions.parameters])
        assert versions.newest == n
        for kept in range(max(0, n - 2), n + 1):
            for weight, value in zip(versions.weights(kept), expected[kept], strict=True):
                assert torch.equal(weight, value)
        for parameter in versions.parameters:
            parameter.grad = torch.ones_like(parameter)
        versions.at(max(0, n - 2))(x)
        versions.advance(optimizer.step)
    assert int(module[1].num_batches_tracked) == 5, "statistics are one for all versions"
    with pytest.raises(AssertionError):
        versions.at(2)
