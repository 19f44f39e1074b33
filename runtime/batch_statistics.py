"""Which layers normalise by the micro-batch itself, and whether a run has a micro-batch too small for that.

A mean and a variance need more than one value per channel. torch refuses a single one when it meets it, at the end of
an epoch perhaps, and a fused kernel would train on a variance of zero; so it is said before a run begins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.hooks import RemovableHandle

from unlocked.runtime.schedules.stream import StreamPlan

__all__ = ["PROBE_ROWS", "BatchStatistics", "RuleStatistics", "check_batch_statistics", "find_batch_statistics"]

PROBE_ROWS = (2, 3)  # two batch sizes, so that a shape that depends on the batch shows


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStatistics:
    """One use of a normalisation by the micro-batch's own statistics.

    Attributes:
        layer: whose block holds it.
        module: its name in the block and its kind, for messages.
        values: of each channel, in a micro-batch of each of `PROBE_ROWS` rows.
        training, evaluation: when it normalises so; an evaluation may read running statistics instead.
    """

    layer: str
    module: str
    values: tuple[int, int]
    training: bool
    evaluation: bool

    def fits(self, rows: int) -> bool:
        """Whether a micro-batch of that many rows gives more than one value per channel."""
        few, more = self.values
        return few + (rows - PROBE_ROWS[0]) * (more - few) > 1


def find_batch_statistics(
    layer: str, calls: Sequence[Sequence[tuple[str, nn.Module, tuple[int, ...]]]]
) -> list[BatchStatistics]:
    """What a layer's block normalises so.

    Args:
        calls: for each of `PROBE_ROWS`, the modules that its forward entered, in order: name, module, and the shape of
            the input. The modules are in training mode by now.
    """
    found = []
    for (name, module, few), (_, other, more) in zip(*calls, strict=False):
        count = _values(module)
        if count is None or other is not module or len(few) < 2:
            continue
        keeps = getattr(module, "running_mean", None) is not None
        found.append(
            BatchStatistics(
                layer=layer,
                module=f"{name.removeprefix('body.')} = {module}",
                values=(count(few), count(more)),
                training=module.training or not keeps,
                evaluation=not keeps,
            )
        )
    return found


class RuleStatistics:
    """Inside, notes the normalisations that a rule's own modules do: in training alone, by as many rows as come.

    Args:
        layer: for messages.
        samples: of the micro-batch that the rule is tried with.
    """

    def __init__(self, layer: str, rule: nn.Module, samples: int) -> None:
        self._layer, self._rule, self._samples = layer, rule, samples
        self._handles: list[RemovableHandle] = []
        self.found: list[BatchStatistics] = []

    def __enter__(self) -> "RuleStatistics":
        for name, module in self._rule.named_modules():
            if isinstance(module, _BatchNorm):
                self._handles.append(module.register_forward_pre_hook(partial(self._note, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shape = inputs[0].shape
        each = shape[0] * prod(shape[2:]) // self._samples
        few, more = (each * rows for rows in PROBE_ROWS)
        module_name = f"its rule's {name} = {module}"
        self.found.append(
            BatchStatistics(layer=self._layer, module=module_name, values=(few, more), training=True, evaluation=False)
        )


def check_batch_statistics(uses: Sequence[BatchStatistics], plan: StreamPlan) -> None:
    """Holds the plan's micro-batches to what the network normalises.

    Raises:
        ValueError: a micro-batch leaves one value per channel; names the layer, the rows, the batch size, and sizes
            that work.
    """
    trained = plan.sizes("train") | plan.sizes("statistics")
    for use in uses:
        if use.training and not all(map(use.fits, trained)):
            hint = "drop_last=True (--drop-last) leaves it out" if use.fits(plan.batch_size) else ""
            raise _too_small(use, "training", plan.train_size, plan.batch_size, "batch_size", hint)
        if use.evaluation and not all(map(use.fits, plan.sizes("evaluate"))):
            raise _too_small(use, "evaluation", plan.eval_size, plan.eval_batch_size, "eval_batch_size", "")


def _too_small(use: BatchStatistics, kind: str, rows: int, batch: int, word: str, hint: str) -> ValueError:
    small = min(n for n in (batch, rows % batch, rows) if n and not use.fits(n))
    flag = "--batch-size" if word == "batch_size" else "--test-batch-size"
    work = [size for size in (_nearest(use, rows, batch, -1), _nearest(use, rows, batch, 1)) if size is not None]
    fixes = [hint] * bool(hint)
    fixes += [f"{word} ({flag}) {' or '.join(map(str, work))} would fit"] * bool(work)
    return ValueError(
        f"layer {use.layer} normalises by the statistics of its micro-batch ({use.module}), which need more than one "
        f"value per channel, but {rows} {kind} rows in micro-batches of {batch} give one of {small}; "
        f"{', or '.join(fixes) or f'give more {kind} data'}"
    )


def _nearest(use: BatchStatistics, rows: int, batch: int, step: int) -> int | None:
    """The nearest batch size, in the direction of `step`, of which all micro-batches fit."""
    stop = 0 if step < 0 else rows + 1
    fitting = (n for n in range(min(batch + step, rows), stop, step) if all(map(use.fits, (n, rows % n or n))))
    return next(fitting, None)


def _values(module: nn.Module) -> Callable[[tuple[int, ...]], int] | None:
    """How many values of an input of some shape go into one mean; None: the module takes none over a micro-batch."""
    if isinstance(module, _BatchNorm):
        return lambda shape: shape[0] * prod(shape[2:])
    if isinstance(module, _InstanceNorm):
        return lambda shape: prod(shape[2:])
    if isinstance(module, nn.GroupNorm):  # of each row, but torch refuses it only where there is one row as well
        groups = module.num_groups
        return lambda shape: shape[0] * shape[1] // groups * prod(shape[2:])
    return None
