"""The stream's arithmetic against a list built by plain loops."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.actions import Item


def naive(plan: StreamPlan) -> list[Item]:
    """What the plan promises, by counting rows and steps one at a time; `last` is set when a kind's run has ended."""
    items: list[Item] = []

    def put(kind, epoch: int, size: int) -> None:
        index = sum(item.kind == kind and item.epoch == epoch for item in items)
        position = sum(item.kind != "snapshot" for item in items)
        items.append(Item(position, kind, epoch, index, size, False))

    def sizes(rows: int, batch: int) -> list[int]:
        found = []
        while rows > 0:
            found.append(min(batch, rows))
            rows -= batch
        return found

    steps = 0
    for epoch in range(plan.epochs):
        if steps == plan.max_steps:
            break
        batches = sizes(plan.train_size, plan.batch_size)
        if plan.drop_last:
            batches = [size for size in batches if size == plan.batch_size]
        for size in batches:
            if steps == plan.max_steps:
                break
            put("train", epoch, size)
            steps += 1
            if plan.snapshot_every and steps % plan.snapshot_every == 0:
                items.append(replace(items[-1], kind="snapshot", size=0))
        if plan.eval_size:
            for size in batches[: plan.statistics_batches]:
                put("statistics", epoch, size)
            for size in sizes(plan.eval_size, plan.eval_batch_size):
                put("evaluate", epoch, size)
    final = {(item.kind, item.epoch): item.position for item in items if item.kind != "snapshot"}
    return [replace(item, last=final.get((item.kind, item.epoch)) == item.position) for item in items]


@st.composite
def plans(draw: st.DrawFn) -> StreamPlan:
    train_size = draw(st.integers(1, 30))
    return StreamPlan(
        epochs=draw(st.integers(1, 5)),
        train_size=train_size,
        batch_size=draw(st.integers(1, train_size)),
        eval_size=draw(st.integers(0, 12)),
        eval_batch_size=draw(st.integers(1, 14)),
        statistics_batches=draw(st.integers(0, 6)),
        snapshot_every=draw(st.integers(0, 9)),
        max_steps=draw(st.none() | st.integers(1, 160)),
        drop_last=draw(st.booleans()),
    )


@settings(max_examples=200, deadline=None)
@given(plans())
def test_plan_is_the_naive_list(plan: StreamPlan) -> None:
    expected = naive(plan)
    assert list(plan) == expected
    data = [item for item in expected if item.kind != "snapshot"]
    assert len(plan) == len(data)
    assert [plan[position - len(plan)] for position in range(len(plan))] == data
    for kind in ("train", "statistics", "evaluate"):
        assert plan.sizes(kind) == {item.size for item in expected if item.kind == kind}


@settings(max_examples=100, deadline=None)
@given(plans(), st.data())
def test_windows_and_positions(plan: StreamPlan, data: st.DataObject) -> None:
    expected = naive(plan)
    start = data.draw(st.integers(0, len(plan)))
    stop = data.draw(st.integers(start, len(plan)))
    inside = [item for item in expected if start <= item.position < stop]
    assert list(plan.items(start, stop)) == inside
    assert list(plan.items(start)) == [item for item in expected if start <= item.position]
    assert plan.has_mark(start, stop) == any(item.kind == "snapshot" for item in inside)
    assert sum(item.kind == "train" for item in expected) == plan.train_steps
    first: dict[int, int] = {}
    for item in expected:
        first.setdefault(item.epoch, item.position)
    assert {epoch: plan.position_of_epoch(epoch) for epoch in range(plan.num_epochs)} == first


@settings(max_examples=60)
@given(plan=plans(), data=st.data())
def test_a_run_is_stopped_where_it_can_be_resumed(plan: StreamPlan, data: st.DataObject) -> None:
    """At the first place from where it is on that has no evaluation, or its statistics, on both sides."""
    kinds = ["train" if item.kind == "train" else "evaluate" for item in map(plan.__getitem__, range(len(plan)))]
    asked = data.draw(st.integers(0, len(plan)))
    around = ["train", *kinds, "train"]  # of position p: around[p] before, around[p + 1] at it
    whole = [p for p in range(asked, len(plan) + 1) if "train" in around[p : p + 2]]
    assert plan.resumable(asked) == whole[0]


def test_an_epoch_by_hand() -> None:
    plan = StreamPlan(
        epochs=1, train_size=10, batch_size=4, eval_size=5, eval_batch_size=3, statistics_batches=2, snapshot_every=2
    )
    assert list(plan) == [
        Item(0, "train", 0, 0, 4, False),
        Item(1, "train", 0, 1, 4, False),
        Item(1, "snapshot", 0, 1, 0, False),
        Item(2, "train", 0, 2, 2, True),
        Item(3, "statistics", 0, 0, 4, False),
        Item(4, "statistics", 0, 1, 4, True),
        Item(5, "evaluate", 0, 0, 3, False),
        Item(6, "evaluate", 0, 1, 2, True),
    ]
    marked = list(plan.items(2, 7, marks={2, 4}))  # the clock's: never behind what is no training
    assert [(item.position, item.kind) for item in marked[:3]] == [(2, "train"), (2, "snapshot"), (3, "statistics")]
    assert len(marked) == 6
    assert plan.has_mark(2, 3, {2})
    assert not plan.has_mark(3, 7, {2})
    assert [plan.next_training(position) for position in (0, 2, 3, 6)] == [0, 2, None, None]


def test_a_cut_epoch_is_still_evaluated() -> None:
    plan = StreamPlan(epochs=9, train_size=10, batch_size=4, eval_size=1, statistics_batches=0, max_steps=4)
    assert [(item.kind, item.epoch, item.last) for item in plan] == [
        *[("train", 0, False)] * 2,
        ("train", 0, True),
        ("evaluate", 0, True),
        ("train", 1, True),
        ("evaluate", 1, True),
    ]


def test_a_very_long_run_is_reached_directly() -> None:
    plan = StreamPlan(epochs=10**9, train_size=10**9, batch_size=7, eval_size=100, snapshot_every=1000)
    tail = [plan[position] for position in range(len(plan) - 200, len(plan))]
    assert [item.last for item in tail if item.kind == "train"][-2:] == [False, True]
    assert sum(item.kind == "snapshot" for item in plan.items(len(plan) - 2000)) == 2
    assert plan[-1] == Item(len(plan) - 1, "evaluate", 10**9 - 1, 0, 100, True)
    assert plan[plan.position_of_epoch(10**6)] == Item(plan.position_of_epoch(10**6), "train", 10**6, 0, 7, False)


def test_micro_batch_larger_than_the_data_names_both() -> None:
    with pytest.raises(ValueError, match=r"batch_size=64 .* 50 rows"):
        StreamPlan(epochs=1, train_size=50, batch_size=64)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("train_size", 0),
        ("batch_size", 0),
        ("eval_batch_size", 0),
        ("eval_size", -1),
        ("statistics_batches", -1),
        ("snapshot_every", -1),
        ("max_steps", 0),
    ],
)
def test_numbers_out_of_range_are_named(name: str, value: int) -> None:
    good = {"epochs": 2, "train_size": 10, "batch_size": 5}
    with pytest.raises(ValueError, match=f"{name} is {value}; "):
        StreamPlan(**{**good, name: value})


def test_places_outside_the_plan() -> None:
    plan = StreamPlan(epochs=2, train_size=10, batch_size=5)
    for position in (4, -5):
        with pytest.raises(IndexError, match=f"position {position} .*4 items"):
            plan[position]
    for window in ((0, 5), (-1, 2), (3, 2)):
        with pytest.raises(ValueError, match="window"):
            plan.items(*window)
    for epoch in (2, -1):
        with pytest.raises(ValueError, match=f"epoch {epoch} .*0 to 1"):
            plan.position_of_epoch(epoch)
