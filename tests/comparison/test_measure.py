"""How a run becomes figures."""

import pytest

from unlocked.comparison.measure import make_run
from unlocked.comparison.request import RankAnswer


def test_the_parts_of_a_step_add_up() -> None:
    first = RankAnswer(
        steps=10,
        images=640,
        train_seconds=2.0,
        data_seconds=0.1,
        update_seconds=0.3,
        busy=(0.75, 0.5),
        energy_joules=5.0,
    )
    second = RankAnswer(steps=10, train_seconds=1.9, update_seconds=0.2)
    run = make_run("speed", 3, [first, second])
    assert (run.seed, run.images_per_second, run.bubble_share) == (3, 320.0, 0.375)
    assert [part.total for part in run.split] == pytest.approx([0.2, 0.19])
    assert [part.wait for part in run.split] == pytest.approx([0.05, 0.095])
    assert [part.data for part in run.split] == pytest.approx([0.01, 0.0])
