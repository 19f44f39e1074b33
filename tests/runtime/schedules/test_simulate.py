"""The simulator against hand-made timelines, closed forms, and a recurrence over (micro-batch, stage)."""

import math
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.runtime.schedules.schedule import Schedule, build_schedule
from unlocked.runtime.schedules.simulate import Costs, main, simulate, transfer_seconds
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.runtime.schedules.timeline import Bubble, Span, Timeline, format_timeline
from unlocked.workers.actions import Action, ActionKind

KINDS = list(ActionKind)
QUARTERS = st.integers(0, 12).map(lambda number: number / 4)  # sums of these are exact in floats


def train_plan(microbatches: int) -> StreamPlan:
    return StreamPlan(epochs=1, train_size=microbatches, batch_size=1)


def recurrence(schedule: Schedule, costs: Costs, depth: int, fill: bool, plan: StreamPlan) -> dict[Action, tuple]:
    """Start and end of every action of a local schedule: micro-batch by micro-batch, down the stages."""
    stages = schedule.num_stages
    clock = [0.0] * stages
    delivered: dict[int, list[float]] = defaultdict(list)  # by receiving stage, in stream order
    finished: dict[int, list[float]] = defaultdict(list)
    times = {}
    for item in plan:
        for stage in range(stages):
            own = [action for action in schedule[stage] if action.microbatch == item.position]
            own = [action for action in own if (action.kind == "SNAP") == (item.kind == "snapshot")]
            crossed = len(finished[stage])  # micro-batches this stage has finished
            before = delivered[stage + 1][-1] if delivered[stage + 1] else 0.0
            for action in own:
                start = clock[stage]
                if action.kind == "RECV":
                    start = max(start, delivered[stage][crossed])
                if action.kind == "SEND" or (fill and action.kind in ("F", "E") and stage < stages - 1):
                    start = max(start, before)
                clock[stage] = start + costs.actions[stage].get(action.kind, 0.0)
                times[action] = (start, clock[stage])
                if action.kind == "SEND":
                    begin = clock[stage]
                    if crossed >= depth:
                        begin = max(begin, finished[stage + 1][crossed - depth])
                    delivered[stage + 1].append(begin + costs.transfers[stage])
            if item.kind != "snapshot":
                finished[stage].append(clock[stage])
    return times


@st.composite
def cases(draw: st.DrawFn) -> tuple[StreamPlan, Schedule, Costs, int, bool]:
    plan = StreamPlan(
        epochs=draw(st.integers(1, 2)),
        train_size=draw(st.integers(2, 7)),
        batch_size=draw(st.integers(1, 2)),
        eval_size=draw(st.integers(0, 3)),
        eval_batch_size=1,
        statistics_batches=draw(st.integers(0, 2)),
        snapshot_every=draw(st.integers(0, 3)),
    )
    stages = draw(st.integers(1, 5))
    row = st.fixed_dictionaries(dict.fromkeys(KINDS, QUARTERS))
    actions = draw(st.lists(row, min_size=stages, max_size=stages))
    transfers = draw(st.lists(QUARTERS, min_size=stages - 1, max_size=stages - 1))
    schedule = build_schedule(stages, plan)
    return plan, schedule, Costs(actions, transfers), draw(st.integers(1, 4)), draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_time_is_that_of_the_recurrence(case: tuple) -> None:
    plan, schedule, costs, depth, fill = case
    timeline = simulate(schedule, costs, depth, fill_in_place=fill)
    found = {span.action: (span.start, span.end) for span in timeline.spans}
    assert found == recurrence(schedule, costs, depth, fill, plan)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_no_stage_runs_further_ahead_than_the_queue(case: tuple) -> None:
    plan, schedule, costs, depth, fill = case
    timeline = simulate(schedule, costs, depth, fill_in_place=fill)
    assert all(0 < most <= depth for most in timeline.max_in_flight.values())
    start = {span.action: span.start for span in timeline.spans}
    spans = sorted((span for span in timeline.spans if span.action.kind != "SNAP"), key=lambda span: span.end)
    end = {(span.stage, span.action.microbatch): span.end for span in spans}
    crossing = [item for item in plan if item.kind != "snapshot"]
    for stage in range(schedule.num_stages - 1):
        for early, late in zip(crossing, crossing[depth + 1 :], strict=False):
            # While the next stage works on `early`, `depth` more may wait for it, but not `late`.
            kind = ("E" if late.kind == "evaluate" else "F") if fill else "SEND"
            assert start[Action(stage, ActionKind(kind), late.position)] >= end[stage + 1, early.position]


@settings(max_examples=100, deadline=None)
@given(cases())
def test_a_stage_is_busy_or_in_a_bubble(case: tuple) -> None:
    _, schedule, costs, depth, fill = case
    timeline = simulate(schedule, costs, depth, fill_in_place=fill)
    assert timeline.makespan == max(span.end for span in timeline.spans)
    for stage, (busy, bubble) in enumerate(zip(timeline.busy_seconds, timeline.bubbles, strict=True)):
        assert busy == sum(costs.actions[stage][action.kind] for action in schedule[stage])
        assert min(bubble) >= 0
        assert busy + bubble.total == timeline.makespan
        assert timeline.busy_fraction[stage] == (busy / timeline.makespan if timeline.makespan else 0)


@settings(max_examples=50, deadline=None)
@given(cases())
def test_a_deeper_queue_never_hurts(case: tuple) -> None:
    _, schedule, costs, depth, fill = case
    shallow = simulate(schedule, costs, depth, fill_in_place=fill)
    deep = simulate(schedule, costs, depth + 1, fill_in_place=fill)
    assert all(
        late <= early for ends in zip(deep.ends, shallow.ends, strict=True) for late, early in zip(*ends, strict=True)
    )


def test_two_stages_by_hand() -> None:
    costs = Costs.uniform(2, forward=1, update=1, transfer=0.5, scale=[1, 2])
    timeline = simulate(build_schedule(2, train_plan(3)), costs, 1)
    assert timeline.schedule.to_text() == (
        "0F0,0SEND0,0U0,0F1,0SEND1,0U1,0F2,0SEND2,0U2\n1RECV0,1F0,1U0,1RECV1,1F1,1U1,1RECV2,1F2,1U2\n"
    )
    # Stage 0's last SEND waits until micro-batch 1 is delivered (6.0), which waits for the slot of micro-batch 0 (5.5).
    assert timeline.starts == [[0, 1, 1, 2, 3, 3, 4, 6, 6], [1.5, 1.5, 3.5, 6, 6, 8, 10.5, 10.5, 12.5]]
    assert timeline.ends == [[1, 1, 2, 3, 3, 4, 5, 6, 7], [1.5, 3.5, 5.5, 6, 8, 10, 10.5, 12.5, 14.5]]
    assert timeline.spans[:3] == [
        Span(0, Action.parse("0F0"), 0, 1),
        Span(0, Action.parse("0SEND0"), 1, 1),
        Span(0, Action.parse("0U0"), 1, 2),
    ]
    assert timeline.bubbles == [Bubble(0.0, 1.0, 7.5), Bubble(1.5, 1.0, 0.0)]
    assert timeline.throughput == 2 / 9
    assert timeline.max_in_flight == {(0, 1): 1}


def test_with_two_slots_the_transfer_hides() -> None:
    costs = Costs.uniform(2, forward=1, update=1, transfer=0.5, scale=[1, 2])
    timeline = simulate(build_schedule(2, train_plan(9)), costs, 2)
    assert timeline.bubbles[1] == Bubble(1.5, 0.0, 0.0)
    assert timeline.max_in_flight == {(0, 1): 2}


@pytest.mark.parametrize("stages", [1, 2, 7])
@pytest.mark.parametrize("microbatches", [1, 2, 20])
def test_equal_stages_have_only_the_bubbles_of_fill_and_drain(stages: int, microbatches: int) -> None:
    timeline = simulate(build_schedule(stages, train_plan(microbatches)), Costs.uniform(stages), 1)
    assert timeline.makespan == 3.0 * microbatches + (stages - 1)
    assert timeline.bubbles == [Bubble(float(stage), 0.0, float(stages - 1 - stage)) for stage in range(stages)]
    assert timeline.throughput == (1 / 3 if microbatches > 1 else 1 / timeline.makespan)


@pytest.mark.parametrize("slow", range(4))
def test_the_slowest_stage_sets_the_pace(slow: int) -> None:
    costs = Costs.uniform(4, scale=[2 if stage == slow else 1 for stage in range(4)])
    timeline = simulate(build_schedule(4, train_plan(50)), costs, 2)
    assert timeline.throughput == 1 / 6
    assert timeline.bubbles[slow].steady == 0


@pytest.mark.parametrize(("depth", "fill", "ahead"), [(1, False, 1), (3, False, 3), (1, True, 1), (3, True, 3)])
def test_a_fast_stage_uses_the_whole_queue(depth: int, fill: bool, ahead: int) -> None:
    costs = Costs.uniform(2, scale=[0.001, 1])
    timeline = simulate(build_schedule(2, train_plan(20)), costs, depth, fill_in_place=fill)
    sent = {span.action.microbatch: span.end for span in timeline.spans if str(span.action).startswith("0SEND")}
    busy = next(span for span in timeline.spans if str(span.action) == "1U10")
    assert max(m for m, time in sent.items() if time < busy.end) - 10 == ahead
    assert timeline.max_in_flight == {(0, 1): depth}


def test_no_time_at_all() -> None:
    nothing = simulate(build_schedule(2, []), Costs.uniform(2), 1)
    assert (nothing.makespan, nothing.throughput, nothing.spans) == (0.0, 0.0, [])
    assert nothing.bubbles == [Bubble(0, 0, 0)] * 2
    free = simulate(build_schedule(2, train_plan(3)), Costs.uniform(2, forward=0, update=0), 1)
    assert (free.makespan, free.throughput, free.busy_fraction) == (0.0, math.inf, [0.0, 0.0])
    assert format_timeline(free, 4) == "stage 0 |....|\nstage 1 |....|"


def stopped(text: str, depth: int = 1) -> str:
    schedule = Schedule.from_text(text)
    with pytest.raises(ValueError, match="<-- ERROR HERE") as caught:
        simulate(schedule, Costs.uniform(schedule.num_stages), depth)
    return str(caught.value)


def marked(message: str) -> str:
    (line,) = (line for line in message.splitlines() if line.endswith("<-- ERROR HERE"))
    return line


def test_a_missing_send_is_found_where_it_begins() -> None:
    message = stopped("0F0,0U0\n1RECV0,1F0,1SEND0,1U0\n2RECV0,2F0,2U0")
    assert "stops at stage 1, step 0" in message
    assert "1RECV0 waits for micro-batch 0 from stage 0, but stage 0 has nothing left to do" in message
    assert marked(message).startswith("stage 1, step 0 ")
    message = stopped("0F0,0SEND0,0U0\n1RECV0,1F0,1U0\n2RECV0,2F0,2U0\n3F0")
    assert "2RECV0 waits for micro-batch 0 from stage 1, but stage 1 has nothing left" in message


def test_crossed_receives_are_found() -> None:
    message = stopped("0F0,0SEND0,0U0,0F1,0SEND1,0U1\n1RECV1,1F1,1U1,1RECV0,1F0,1U0")
    assert "1RECV1 waits for micro-batch 1, but micro-batch 0 comes before it" in message
    assert "[1RECV1]" in marked(message)


def test_a_send_that_nobody_takes() -> None:
    assert "stage 1 never receives what 0SEND1 sends" in stopped("0F0,0SEND0,0F1,0SEND1\n1RECV0,1F0", depth=2)
    message = stopped("0F0,0SEND0,0F1,0SEND1,0F2,0SEND2\n1RECV0,1F0", depth=1)
    assert "stage 1 never receives what 0SEND1 sends" in message
    message = stopped("0F0,0SEND0,0F1,0SEND1,0F2,0SEND2,0F3,0SEND3\n1RECV0,1F0", depth=1)
    assert "0SEND3 waits for stage 1 to free a slot for micro-batch 2, but stage 1 has nothing left" in message
    assert "stage 1 never receives what 0SEND0 sends" in stopped("0F0,0SEND0")


def test_receiving_ahead_needs_the_slots() -> None:
    text = "0F0,0SEND0,0F1,0SEND1\n1RECV0,1RECV1,1F0,1U0,1F1,1U1"
    assert "1RECV1 waits for micro-batch 1, which has no slot while this stage keeps all of them" in stopped(text, 1)
    assert simulate(Schedule.from_text(text), Costs.uniform(2), 2).max_in_flight == {(0, 1): 2}


def test_wrong_arguments() -> None:
    schedule = build_schedule(2, train_plan(2))
    with pytest.raises(ValueError, match="queue_depth=0"):
        simulate(schedule, Costs.uniform(2), 0)
    with pytest.raises(ValueError, match="costs are for 3 stages, but the schedule has 2"):
        simulate(schedule, Costs.uniform(3), 1)
    with pytest.raises(ValueError, match="costs of stage 1 lack U, which 1U1 needs"):
        simulate(schedule, Costs([{ActionKind.F: 1, ActionKind.U: 1}, {ActionKind.F: 1}], [0]), 1)
    with pytest.raises(ValueError, match="U on stage 0 is -1"):
        Costs([{ActionKind.U: -1}], [])
    with pytest.raises(ValueError, match="transfer from stage 0 to 1 is nan"):
        Costs([{}, {}], [math.nan])
    with pytest.raises(ValueError, match="2 stages need 1 transfer times"):
        Costs([{}, {}], [])
    with pytest.raises(ValueError, match="1 stage factors were given for 2"):
        Costs.uniform(2, scale=[1])


def test_transfer_time() -> None:
    assert transfer_seconds(3e9, latency=0.25, bandwidth=2e9) == 1.75
    assert transfer_seconds(3e9) == 0


def test_the_chart() -> None:
    timeline: Timeline = simulate(build_schedule(2, train_plan(2)), Costs.uniform(2, forward=1, update=3), 1)
    assert format_timeline(timeline, 27) == (
        "stage 0 |F0-U0-------F1-U1-------...|\n"  # 9 s in 27 characters
        "stage 1 |...F0-U0-------F1-U1-------|"
    )
    assert format_timeline(timeline, 9) == "stage 0 |FU0-FU1-.|\nstage 1 |.FU0-FU1-|"
    with pytest.raises(ValueError, match="width=0"):
        format_timeline(timeline, 0)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--stages", "2", "--microbatches", "2", "--queue-depth", "2", "--width", "21"]) == 0
    output = capsys.readouterr().out
    assert "1RECV0,1F0,1U0,1R ...\n" in output
    assert "stage 0 |F0-U0----F1-U1----...|\nstage 1 |...F0-U0----F1-U1----|\n" in output
    assert "    1   85.7%    14.3%    0.0%    0.0%\n" in output
    assert "7 s in all, 0.333333 micro-batches/s" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--stages 0", "stages is 0"),
        ("--microbatches 0", "microbatches is 0"),
        ("--queue-depth 0", "queue_depth is 0"),
        ("--stages 2 --scale 1,x", "--scale 1,x is not a list of numbers"),
        ("--stages 2 --scale 1", "1 stage factors"),
    ],
)
def test_command_line_mistakes(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags.split()) == 2
    assert message in capsys.readouterr().err
