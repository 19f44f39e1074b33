"""Looks into a few steps of a cell: activation memory, bytes over the edges, and whether its layers really are local.

Locality is tested on the cell itself: at a cut between two layers all later layers begin with other weights, and after
some steps every earlier layer must hold the same bits, weights, buffers and the rule's own, as without the change.
"""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from unlocked.comparison.leaderboard.results import Inspection
from unlocked.comparison.memory.allocations import count_steps
from unlocked.data import ImageDataset
from unlocked.models import Block
from unlocked.models.errors import first_line
from unlocked.rules import GLOBAL_RULES
from unlocked.runtime import Trainer
from unlocked.runtime.job import Job
from unlocked.runtime.recipe import Recipe, make_model
from unlocked.workers.cargo import make_layout

__all__ = ["audited_cuts", "find_leaks", "inspect"]

_STEPS = 3
"""A wrong gradient shows in the first update; what passes through it to earlier layers, in the ones after it."""
_MOST_ROWS = 32  # of an audit's micro-batch
_MOST_CUTS = 8
_T = TypeVar("_T")


def inspect(recipe: Recipe, train: ImageDataset) -> Inspection:
    """The cell's memory, traffic and locality. What fails is noted, and the rest still told."""
    blocks = make_model(recipe, train)
    notes: list[str] = []
    cuts = audited_cuts(len(blocks))
    leaks = _noted("locality", notes, lambda: find_leaks(recipe, train, cuts))
    memory = _noted("activation memory", notes, lambda: _activation_bytes(recipe, train))
    traffic = _noted("traffic", notes, lambda: _edge_bytes(recipe, train))
    return Inspection(
        layers=tuple(block.name for block in blocks),
        parameters=sum(p.numel() for block in blocks for p in block.parameters()),
        activation_bytes=memory,
        edge_bytes=traffic or (),
        cuts=len(cuts),
        steps=_STEPS,
        leaks=leaks,
        notes=tuple(notes),
    )


def audited_cuts(layers: int) -> list[int]:
    """The cuts, each by the layer that it stands before: all of them, or so many spread over a deep network, the first
    and the last among them."""
    cuts = list(range(1, layers))
    if len(cuts) <= _MOST_CUTS:
        return cuts
    return sorted({cuts[round(i * (len(cuts) - 1) / (_MOST_CUTS - 1))] for i in range(_MOST_CUTS)})


def find_leaks(recipe: Recipe, train: ImageDataset, cuts: Sequence[int]) -> tuple[str, ...]:
    """The layers that a change of later layers' start weights alone reaches, in network order.

    Raises:
        RuntimeError: the change had no effect on the layers that were changed, so the test would prove nothing.
    """
    short = replace(
        recipe,
        batch_size=min(recipe.batch_size, _MOST_ROWS, len(train)),
        num_epochs=1,
        max_steps=_STEPS,
        no_eval=True,
        summary=None,
    )
    as_it_is = _trained(short, train, None)
    names = list(as_it_is)
    reached = set()
    for cut in cuts:
        changed = _trained(short, train, cut)
        differ = {name for name in names if not _equal(as_it_is[name], changed[name])}
        if not differ >= set(names[cut:]):
            raise RuntimeError(f"other start weights from layer {names[cut]} on changed only {sorted(differ)}")
        reached |= differ & set(names[:cut])
    return tuple(name for name in names if name in reached)


def _trained(recipe: Recipe, train: ImageDataset, cut: int | None) -> dict[str, list[Tensor]]:
    """Every layer's tensors after a few steps; from layer `cut` on they began with other weights."""
    blocks = make_model(recipe, train)
    if cut is not None:
        _change(blocks[cut:])
    result = recipe.trainer(train, model=blocks).fit(
        train, epochs=1, batch_size=recipe.batch_size, max_steps=recipe.max_steps
    )
    return {
        block.name: [
            *(value.clone() for value in block.state_dict().values()),
            *(value for key, value in result.weights.items() if key.startswith(f"{block.name}.")),
        ]
        for block in blocks
    }


def _change(blocks: Sequence[Block]) -> None:
    """By a tenth of the weights' own size, and something where they are zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in blocks:
            for parameter in block.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise * (parameter.abs().mean() + 1e-3))


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _Jobs(Trainer):
    """A trainer that shows the job which an engine would be given."""

    def job(self, recipe: Recipe, train: ImageDataset) -> Job:
        return self._job(train, None, replace(recipe, no_eval=True).plan(train, train))


def _job(recipe: Recipe, train: ImageDataset) -> Job:
    trainer = recipe.trainer(train, _Jobs)
    assert isinstance(trainer, _Jobs)
    return trainer.job(recipe, train)


def _activation_bytes(recipe: Recipe, train: ImageDataset) -> int:
    job = _job(recipe, train)
    stage = job.stage(0, range(len(job.network.blocks)), prefetch=0)
    try:
        x, labels = stage.load(job.plan[0])
        x, labels = x.clone(), labels.clone()
    finally:
        stage.close()
    found = count_steps(stage, x, labels, steps=_STEPS, end_to_end=recipe.training_mode in GLOBAL_RULES)
    return found.activation_bytes


def _edge_bytes(recipe: Recipe, train: ImageDataset) -> tuple[float, ...]:
    if recipe.training_mode in GLOBAL_RULES:
        return ()
    job = _job(recipe, train)
    rows, found = recipe.batch_size, []
    for layer, shape in enumerate(job.network.output_shapes[:-1]):
        traffic = job.network.side_channel.traffic(layer)
        found.append(make_layout(rows, shape, job.storage, traffic, job.network.target).nbytes(rows) / rows)
    return tuple(found)


def _noted(what: str, notes: list[str], find: Callable[[], _T]) -> _T | None:
    try:
        return find()
    except Exception as error:  # whatever a new rule may do; the other figures stand
        traceback.print_exc()
        notes.append(f"{what}: {type(error).__name__}: {first_line(error)}")
        return None
