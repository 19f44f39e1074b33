"""Actions, schedules, their text and the validator - and that none of it needs torch."""

import os
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlocked.runtime.schedules.schedule import Schedule, build_schedule, format_grid, stage_actions, validate
from unlocked.runtime.schedules.stream import StreamPlan
from unlocked.workers.actions import Action, ActionKind, Item

PLAN = StreamPlan(
    epochs=2, train_size=10, batch_size=4, eval_size=5, eval_batch_size=3, statistics_batches=1, snapshot_every=2
)

WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch was imported")

sys.meta_path.insert(0, NoTorch())
import unlocked.workers.actions, unlocked.runtime.schedules.partition
from unlocked.runtime.schedules.simulate import main
sys.exit(main(["--stages", "3", "--microbatches", "4"]))
"""


def test_actions_print_and_parse() -> None:
    assert (
        str(Action(2, ActionKind.F, 0)) == repr(Action(2, ActionKind.F, 0)) == f"{Action(2, ActionKind.F, 0)}" == "2F0"
    )
    assert Action.parse("3SEND17") == Action(3, ActionKind.SEND, 17)
    local, backpropagation = ["RECV", "F", "U", "SEND", "E", "SNAP"], ["B", "W", "SENDB", "RECVB"]
    assert [kind.value for kind in ActionKind] == local + backpropagation


@given(st.builds(Action, st.integers(0, 10**6), st.sampled_from(ActionKind), st.integers(0, 10**9)))
def test_actions_round_trip(action: Action) -> None:
    assert Action.parse(str(action)) == action
    assert Action.parse(f" {action}\n").kind is action.kind


@pytest.mark.parametrize("text", ["", "2F", "F0", "2G0", "2f0", "-1F0", "2F0.5", "2 F 0", "2F0,", "٢F0"])
def test_texts_that_are_no_actions(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an action.*RECV, F, U, SEND, E, SNAP"):
        Action.parse(text)


def test_schedule_by_hand() -> None:
    items = [
        Item(5, "train", 0, 5, 4, True),
        Item(5, "snapshot", 0, 5, 0, False),
        Item(6, "statistics", 0, 0, 4, True),
        Item(7, "evaluate", 0, 0, 4, True),
    ]
    assert build_schedule(3, items).to_text() == (
        "0F5,0SEND5,0U5,0SNAP5,0F6,0SEND6,0E7,0SEND7\n"
        "1RECV5,1F5,1SEND5,1U5,1SNAP5,1RECV6,1F6,1SEND6,1RECV7,1E7,1SEND7\n"
        "2RECV5,2F5,2U5,2SNAP5,2RECV6,2F6,2RECV7,2E7\n"
    )
    assert build_schedule(1, items).to_text() == "0F5,0U5,0SNAP5,0F6,0E7\n"
    assert build_schedule(2, []).to_text() == "-\n-\n"


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(0, len(PLAN)))
def test_built_schedules_are_valid_and_round_trip(num_stages: int, start: int) -> None:
    items = list(PLAN.items(start))
    schedule = build_schedule(num_stages, items)
    validate(schedule, items)
    text = schedule.to_text()
    assert Schedule.from_text(text) == schedule
    assert Schedule.from_text("# a comment\n\n" + text.replace(",", " , ")) == schedule
    assert [list(stage_actions(stage, num_stages, iter(items))) for stage in range(num_stages)] == list(
        schedule.stages.values()
    )


def test_late_sending_is_valid_too() -> None:
    schedule = build_schedule(3, PLAN)
    for actions in schedule.stages.values():
        for step in range(len(actions) - 1):
            if [action.kind for action in actions[step : step + 2]] == [ActionKind.SEND, ActionKind.U]:
                actions[step : step + 2] = reversed(actions[step : step + 2])
    assert schedule != build_schedule(3, PLAN)
    validate(schedule, PLAN)


ALLOWED_SWAPS = ({ActionKind.SEND, ActionKind.U},)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.randoms(use_true_random=False), st.sampled_from(["drop", "repeat", "swap", "change"]))
def test_any_single_fault_is_found(num_stages: int, chance: random.Random, fault: str) -> None:
    schedule = build_schedule(num_stages, PLAN)
    stage = chance.randrange(num_stages)
    actions = schedule[stage]
    step = chance.randrange(len(actions) - 1)
    if fault == "drop":
        del actions[step]
    elif fault == "repeat":
        actions.insert(chance.randrange(len(actions) + 1), actions[step])
    elif fault == "swap":
        first, second = actions[step : step + 2]
        if first.microbatch == second.microbatch and {first.kind, second.kind} in ALLOWED_SWAPS:
            return
        actions[step : step + 2] = second, first
    else:
        old = actions[step]
        changed = [Action(old.stage + 1, old.kind, old.microbatch), Action(old.stage, old.kind, old.microbatch + 1)]
        changed += [Action(old.stage, kind, old.microbatch) for kind in ActionKind if kind is not old.kind]
        actions[step] = chance.choice(changed)
    with pytest.raises(ValueError, match="<-- ERROR HERE") as caught:
        validate(schedule, PLAN)
    assert f"at stage {stage}, step " in str(caught.value)
    (marked,) = (line for line in str(caught.value).splitlines() if line.endswith("<-- ERROR HERE"))
    assert marked.startswith(f"stage {stage}, step ")


def fault_of(text: str, items: list[Item]) -> str:
    with pytest.raises(ValueError, match="not valid") as caught:
        validate(Schedule.from_text(text), items)
    return str(caught.value)


def test_faults_are_named() -> None:
    items = list(StreamPlan(epochs=1, train_size=2, batch_size=1))
    good = "1RECV0,1F0,1U0,1RECV1,1F1,1U1"
    send = "0F0,0SEND0,0U0,0F1,0SEND1,0U1"
    validate(Schedule.from_text(f"{send}\n{good}"), items)
    assert "1U0 comes before 1F0" in fault_of(f"{send}\n1RECV0,1U0,1F0,1RECV1,1F1,1U1", items)
    assert "1F0 comes before 1RECV0" in fault_of(f"{send}\n1F0,1RECV0,1U0,1RECV1,1F1,1U1", items)
    assert "0SEND0 comes before 0F0" in fault_of(f"0SEND0,0F0,0U0,0F1,0SEND1,0U1\n{good}", items)
    assert "1U0 should come before this" in fault_of(f"{send}\n1RECV0,1F0,1RECV1,1F1,1U1,1U0", items)
    assert "1F1 comes twice" in fault_of(f"{send}\n1RECV0,1F0,1U0,1RECV1,1F1,1F1,1U1", items)
    assert "1U0 comes twice" in fault_of(f"{send}\n{good},1U0", items)
    assert "1RECV0 would wait for ever" in fault_of(f"0F0,0U0,0F1,0SEND1,0U1\n{good}", items)
    assert "nothing takes 0SEND1" in fault_of(f"{send}\n1RECV0,1F0,1U0", items)
    assert "1U1 should come before this" in fault_of(f"{send}\n1RECV0,1F0,1U0,1RECV1,1F1", items)
    assert "1F2 names micro-batch 2, which is not in the stream (0 to 1)" in fault_of(f"{send}\n{good},1F2", items)
    assert "stage 1 of 2 needs RECV, F, U for train micro-batch 1" in fault_of(f"{send}\n{good},1SEND1", items)
    assert "stage 0 of 2 needs F, SEND, U" in fault_of(f"0RECV0,{send}\n{good}", items)
    assert "1SNAP1 has no snapshot mark behind micro-batch 1" in fault_of(f"{send}\n{good},1SNAP1", items)
    assert "0F0 names micro-batch 0, which is not in the stream (none)" in fault_of(f"{send}\n{good}", [])


def test_the_grid_shows_the_fault() -> None:
    schedule = build_schedule(9, PLAN)
    grid = format_grid(schedule, 5, 4)
    assert [line.split(",")[0] for line in grid.splitlines()] == [f"stage {stage}" for stage in range(2, 9)]
    (line,) = (line for line in grid.splitlines() if "ERROR" in line)
    assert line.startswith("stage 5, step 4 | ")
    assert line.endswith("  <-- ERROR HERE")
    assert line.split()[5:-3] == ["5F0", "5SEND0", "5U0", "[5RECV1]", "5F1", "5SEND1", "5U1"]
    end = format_grid(build_schedule(1, list(PLAN)[:1]), 0, 2)
    assert end == "stage 0, step 2 |    0F0  0U0  [(end)]        <-- ERROR HERE"


def test_schedules_that_are_no_schedules() -> None:
    with pytest.raises(ValueError, match=r"line 2 of the schedule: '1X0' is not an action"):
        Schedule.from_text("0F0\n1X0\n")
    with pytest.raises(ValueError, match=r"line 2 of the schedule holds stage 1, but also 0U0"):
        Schedule.from_text("0F0\n1F0,0U0\n")
    with pytest.raises(ValueError, match="num_stages=0"):
        build_schedule(0, PLAN)
    with pytest.raises(ValueError, match="stage 3 does not exist among 3"):
        stage_actions(3, 3, PLAN)
    with pytest.raises(ValueError, match="has no stages"):
        validate(Schedule({}), PLAN)
    with pytest.raises(ValueError, match=r"stages \[0, 2\]"):
        validate(Schedule({0: [], 2: []}), PLAN)
    with pytest.raises(ValueError, match="not in stream order: position 0 after 1"):
        validate(build_schedule(1, PLAN), list(PLAN)[1::-1])


def test_nothing_here_imports_torch() -> None:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Timeline" in done.stdout
