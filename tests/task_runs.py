"""Small runs of every task, for tests of engines: networks, data with ragged last micro-batches, and how they train."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked import Trainer
from unlocked.models import Block
from unlocked.rules import LLS, Task
from unlocked.runtime import RunResult
from unlocked.runtime.job import Engine

__all__ = ["CASES", "LENGTH", "TOKENS", "WIDTH", "Case", "Quantile", "language_model", "train"]

TOKENS, LENGTH, WIDTH = 17, 12, 16
BATCH, EVAL_BATCH, EPOCHS, SEED = 8, 5, 2, 3


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, WIDTH), nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.tokens(ids) + self.places
        return x


class Attention(nn.Module):
    """One causal head, which passes over what the mask hides."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, attention_mask: Tensor) -> Tensor:
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        seen = causal & attention_mask[:, None, :].bool()
        mixed = F.scaled_dot_product_attention(*self.inner(self.norm(x)).chunk(3, -1), attn_mask=seen)
        y: Tensor = x + self.outer(mixed)
        return y


class MeanOfMasked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        counts = attention_mask[..., None].to(x.dtype)
        scores: Tensor = self.linear((x * counts).sum(1) / counts.sum(1))
        return scores


class Quantile(Task):
    """A task of one's own, as the documentation shows one."""

    name = "quantile"

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        error = targets - scores[:, 0]
        return torch.maximum(0.9 * error, -0.1 * error).mean()

    def measure(self, scores: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"below": (targets < scores[:, 0]).double().sum()}


@dataclass(frozen=True)
class Case:
    network: Callable[[], list[nn.Module]]
    train: Any
    test: Any
    task: Task | None = None


def language_model(output: Callable[[], nn.Module] | None = None) -> list[nn.Module]:
    torch.manual_seed(0)
    end = output() if output else nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS))
    layers = [Block(f"attention{k}", Attention(), layout="tokens") for k in (1, 2)]
    return [Block("embedding", Embedding(), layout="tokens"), *layers, Block("output", end)]


def perceptron(inputs: int, outputs: int) -> list[nn.Module]:
    torch.manual_seed(0)
    widths = [(inputs, 16), (16, 12), (12, 10)]
    return [*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in widths), nn.Linear(10, outputs)]


def segmenter() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.Tanh()),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()),
        nn.Conv2d(8, 3, 3, padding=1),
    ]


def _sentences(count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, TOKENS, (count, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (count, 1), generator=generator)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def _labelled(count: int, seed: int) -> dict[str, Tensor]:
    given = _sentences(count, seed)
    return given | {"labels": given["input_ids"].sum(1) % 3}


def _numbers(count: int, seed: int) -> Tensor:
    return torch.randn(count, 7, generator=torch.Generator().manual_seed(seed))


def _pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    targets = (images[:, 0] > 0).long() + (images[:, 0] > 1).long()
    return images, targets.masked_fill(torch.rand(targets.shape, generator=generator) < 0.1, -100)


def _case(network: Any, make: Callable[[int, int], Any], task: Task | None = None) -> Case:
    return Case(network, make(43, 1), make(13, 2), task)  # both end in a smaller micro-batch


CASES: Mapping[str, Case] = {
    "tokens": _case(language_model, _sentences),
    "padded sequences": _case(partial(language_model, MeanOfMasked), _labelled),
    "regression": _case(partial(perceptron, 7, 2), lambda n, s: ((x := _numbers(n, s)), x[:, :2] * 2 + x[:, 2:4])),
    "multi-label": _case(partial(perceptron, 7, 3), lambda n, s: ((x := _numbers(n, s)), x[:, :3] > x[:, 3:6])),
    "segmentation": _case(segmenter, _pictures),
    "own": _case(partial(perceptron, 7, 1), lambda n, s: ((x := _numbers(n, s)), x[:, 0]), Quantile()),
}


def train(
    name: str, engine: Engine | str, *, max_steps: int | None = None, **options: Any
) -> tuple[Trainer, RunResult]:
    """Two epochs of a case."""
    case = CASES[name]
    how: dict[str, Any] = {"rule": LLS(temperature=0.3), "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9)}
    trainer = Trainer(case.network(), engine=engine, seed=SEED, task=case.task, threads=1, **how | options)
    data = {"batch_size": BATCH, "eval_data": case.test, "eval_batch_size": EVAL_BATCH, "max_steps": max_steps}
    return trainer, trainer.fit(case.train, epochs=EPOCHS, **data)
