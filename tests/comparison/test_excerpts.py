"""Excerpts of timelines that can stand one above the other."""

from unlocked.comparison.excerpts import cut_excerpts
from unlocked.comparison.request import RankAnswer
from unlocked.comparison.results import TimelineSpan


def test_excerpts_have_the_same_length() -> None:
    def answer(seconds: float, rank: int) -> RankAnswer:
        spans = tuple(
            TimelineSpan(
                row=rank,
                stage=rank,
                kind="forward",
                microbatch=n,
                chunk=None,
                start=n * seconds,
                end=(n + 0.5) * seconds,
            )
            for n in range(40)
        )
        return RankAnswer(stages=(("a",), ("b", "c")), spans=spans)

    slow, fast = cut_excerpts([("slow", [answer(2.0, 0), answer(2.0, 1)]), ("fast", [answer(1.0, 0), answer(1.0, 1)])])
    assert (slow.seconds, fast.seconds) == (8.0, 8.0)
    assert [span.microbatch for span in slow.spans if span.row == 1] == [20, 21, 22, 23]
    assert [span.start for span in fast.spans if span.row == 0] == list(range(8))
    assert fast.rows == ("process 0: a", "process 1: b, c")
