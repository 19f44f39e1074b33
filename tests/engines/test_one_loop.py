"""Law 7: every engine executes the schedule's list, so an action that is not in it is missed by all, by its name."""

from functools import partial
from pathlib import Path

import incomplete_schedule
import pytest
import torch
from engine_runs import fit, trainer
from ranks import ranks

from unlocked.workers.errors import MissingActionError, NonFiniteLossError, StageError

# The first action that a run misses: engine -> kind -> action.
IN_PROCESS = {
    "sequential": {"F": "0F0", "U": "0U0", "E": "0E", "SNAP": "0SNAP1"},
    "streams": {"RECV": "1RECV0", "F": "0F0", "SEND": "0SEND0", "U": "0U0", "E": "0E", "SNAP": "0SNAP1"},
}


@pytest.mark.parametrize(("engine", "kind"), [(engine, kind) for engine in IN_PROCESS for kind in IN_PROCESS[engine]])
def test_an_action_that_is_not_in_the_schedule_is_missed(engine: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        incomplete_schedule.run(engine, kind, tmp_path)
    assert isinstance(caught.value.cause, MissingActionError)
    assert caught.value.cause.action.startswith(IN_PROCESS[engine][kind])
    assert f"failed in {caught.value.cause.action} (" in str(caught.value)


@pytest.mark.alone
@pytest.mark.parametrize(("kind", "missed"), [("RECV", "1RECV0"), ("SEND", "0SEND0"), ("U", "U0")])
def test_two_processes_miss_it_as_well(kind: str, missed: str, tmp_path: Path) -> None:
    with ranks(2, [incomplete_schedule.__file__, "processes", kind, str(tmp_path)]) as started:
        texts = [process.communicate(timeout=60)[1] for process in started]
    assert all(process.returncode for process in started)
    assert f"{missed}; every stage must do" in texts[0], texts


@pytest.mark.parametrize("engine", ["sequential", "streams"])
def test_a_loss_that_is_not_finite_has_a_place(engine: str) -> None:
    """A warm-up meets it as well, and leaves it to the run to say where."""
    with pytest.raises(StageError, match=r"stage \d \(rank 0: .* failed in \d[FU]\d") as caught:
        fit(trainer(engine, optimizer=partial(torch.optim.SGD, lr=1e30)))
    assert isinstance(caught.value.cause, NonFiniteLossError)
