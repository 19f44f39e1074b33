"""Cuts excerpts of equal length out of recorded runs, so that two timelines can stand one above the other."""

from collections.abc import Sequence
from dataclasses import replace

from unlocked.comparison.request import RankAnswer
from unlocked.comparison.results import TimelineExcerpt, TimelineSpan

__all__ = ["cut_excerpts"]

_FIRST_STEP = 20  # the pipeline has long been full
_STEPS = 4  # of the slowest run, in the excerpt


def cut_excerpts(runs: Sequence[tuple[str, Sequence[RankAnswer]]]) -> list[TimelineExcerpt]:
    """One excerpt per run: each begins with its own step `_FIRST_STEP`, and all last as long as the slowest run's
    next `_STEPS` steps.

    Args:
        runs: the contender's name, and its processes' answers with their spans, from which process soever.
    """
    recorded = [[span for answer in answers for span in answer.spans] for _, answers in runs]
    begins = [_start_of(spans, _FIRST_STEP) for spans in recorded]
    seconds = max(_start_of(spans, _FIRST_STEP + _STEPS) - begin for spans, begin in zip(recorded, begins, strict=True))
    excerpts = []
    for (name, answers), spans, begin in zip(runs, recorded, begins, strict=True):
        moved = [_moved(span, begin) for span in spans if span.end > begin and span.start < begin + seconds]
        moved.sort(key=lambda span: span.start)
        excerpts.append(TimelineExcerpt(contender=name, rows=_row_names(answers), seconds=seconds, spans=tuple(moved)))
    return excerpts


def _start_of(spans: Sequence[TimelineSpan], step: int) -> float:
    return min(span.start for span in spans if span.microbatch == step)


def _moved(span: TimelineSpan, begin: float) -> TimelineSpan:
    return replace(span, start=span.start - begin, end=span.end - begin)


def _row_names(answers: Sequence[RankAnswer]) -> tuple[str, ...]:
    """The layers of each process."""
    stages, processes = answers[0].stages, len(answers)
    held: list[list[str]] = [[] for _ in range(processes)]
    for stage, layers in enumerate(stages):
        held[stage % processes] += layers  # only contenders with one stage per process have timelines
    return tuple(f"process {rank}: {', '.join(layers)}" for rank, layers in enumerate(held))
