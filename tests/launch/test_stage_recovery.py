"""One worker dies, at any action of its schedule, and comes back alone: same weights, same figures, same neighbours."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from ranks import ENVIRONMENT, PIPELINE, first_error, ranks

from unlocked.runtime.faults import VARIABLE, Fault, fail_at
from unlocked.runtime.schedules.schedule import stage_actions
from unlocked.runtime.schedules.stream import StreamPlan

pytestmark = pytest.mark.alone

WORKER = str(Path(__file__).with_name("recovery_worker.py"))
SIZE = 3
PLAN = StreamPlan(  # of recovery_worker.py
    epochs=2, train_size=100, batch_size=25, eval_size=100, eval_batch_size=40, statistics_batches=2, snapshot_every=3
)
ALL = int(os.environ.get("UNLOCKED_KILLS", "3")) >= 20  # for the long check
SECONDS = 7200 if ALL else 600


def job(faults: Iterable[Fault | str] = (), how: str = "plain", saves: str = "rare", **other: str) -> dict[str, str]:
    return {
        "engine": "processes",
        "faults": ",".join(map(str, faults)),
        "transport": "shared",
        "how": how,
        "saves": saves,
        **other,
    }


def everything(stage: int) -> list[Fault]:
    """A death before every action of the stage, each of another incarnation."""
    actions = stage_actions(stage, SIZE, PLAN.items())
    return [fail_at(stage, a.kind, a.microbatch, incarnation=n) for n, a in enumerate(actions)]


def each(faults: Iterable[Fault]) -> list[Fault]:
    """Of each kind of action and each kind of item the first, as deaths of one run after the other."""
    first = {(f.action.kind, PLAN[f.action.microbatch].kind): f for f in reversed(list(faults))}
    found = sorted(first.values(), key=lambda f: f.incarnation)
    return [Fault(f.kind, f.action, n) for n, f in enumerate(found)]


JOBS = {
    "nothing": job(),
    "the first stage": job(each(everything(0)), saves="always"),
    "the middle stage": job(each(everything(1)), saves="rare"),
    "the last stage": job(each(everything(2)), how="best", saves="always"),
    "all at once": job([fail_at(stage, "F", 4) for stage in range(SIZE)]),
    "again in replay": job(["kill@1U3", "kill@1U2#1", "kill@1F0#2", "segv@1SEND7#3"]),
    "a neighbour in replay": job(["kill@1E7", "kill@0U2", "kill@2F1", "kill@0F9#1", "kill@2U10#1"]),
    "a rate that waits for losses": job(["kill@2E8", "kill@1F9", "kill@0U10", "kill@2F12#1"], how="plateau"),
    "the middle stage of a group": job(each(everything(1)), transport="group"),
    "all of a group": job(
        ["kill@0F4", "kill@1F4", "kill@2F4", "kill@1E7#1", "kill@0U10#1", "kill@2E17#1"],
        transport="group",
        saves="always",
    ),
    "a group's rate that waits for losses": job(
        ["kill@2E8", "kill@1F9", "kill@0U10", "kill@2F12#1"], how="plateau", transport="group"
    ),
    "a rule with a side channel": job(each(everything(1)), how="side channel", saves="always"),
    "a group's rule with a side channel": job(
        ["kill@0SEND9", "kill@1F2", "kill@1RECV9#1", "kill@2E8"], how="side channel of the input", transport="group"
    ),
    "a report that is lost": job(saves="always", loses="2"),
    "a lost report that a rate waits for": job(how="plateau", loses="1"),
    "a pause": job(["stop@1F5", "abort@0E6"], how="impatient"),
}
ALONE = ("plain", "plateau", "side channel", "side channel of the input")
"""Variants whose numbers are others; each is trained by the plain loop as well."""
if ALL:
    JOBS |= {
        f"{fault.action} {transport}": job([Fault(fault.kind, fault.action)], transport=transport)
        for transport in ("shared", "group")
        for stage in range(SIZE)
        for fault in everything(stage)
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came out of every job, and of the plain loop (`ALONE`)."""
    folder = tmp_path_factory.mktemp("recovery")
    (folder / "alone").mkdir()
    plain = [job(engine="sequential", how=how) for how in ALONE]
    (folder / "alone" / "jobs.json").write_text(json.dumps(plain))
    (folder / "jobs.json").write_text(json.dumps(list(JOBS.values())))
    alone = [sys.executable, WORKER, str(folder / "alone" / "jobs.json"), str(folder / "alone" / "out.json")]
    done = subprocess.run(alone, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    with ranks(SIZE, [WORKER, str(folder / "jobs.json"), str(folder / "out.json")]) as started:
        texts = [process.communicate(timeout=SECONDS)[1] for process in started]
        assert [process.returncode for process in started] == [0] * SIZE, texts
    lines = [json.loads(line) for path in ("alone/out.json", "out.json") for line in (folder / path).open()]
    return dict(zip([*ALONE, *JOBS], lines, strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_a_killed_worker_comes_back_alone(name: str, runs: dict[str, Any]) -> None:
    run, faults = runs[name], JOBS[name]["faults"].split(",")
    expected = runs[JOBS[name]["how"] if JOBS[name]["how"] in ALONE else "plain"]
    assert run["sha256"] == expected["sha256"]
    assert run["epochs"] == expected["epochs"]
    assert run["snapshots"] == expected["snapshots"]
    deaths = Counter(int(fault.partition("@")[2][0]) for fault in faults if fault)
    deaths.update(int(stage) for stage in JOBS[name].get("loses", ""))
    assert Counter(r["stage"] for r in run["recoveries"]) <= deaths, "one recovery may cover deaths amid replay"
    # Every stage had one worker, and one more for each of its own deaths: nobody else's process has changed.
    workers = Counter({layer: len({pid for name, pid in run["built"] if name == layer}) for layer, _ in run["built"]})
    for stage, layers in enumerate(run["stages"]):
        layers = [layer for layer in layers if layer != "output"]  # whose rule is not the run's
        assert [workers[layer] for layer in layers] == [1 + deaths[stage]] * len(layers), run["built"]
    if JOBS[name]["how"] == "best":
        assert run["best"] == ["best.json", "model_best.pt", "model_best.pt.sha256"], "no candidate is left"


def test_a_recovery_says_what_happened(runs: dict[str, Any]) -> None:
    [last] = runs["again in replay"]["recoveries"][-1:]
    assert (last["stage"], last["incarnation"], last["cause"]) == (1, 4, "was ended by SIGSEGV")
    assert last["replayed"] == 7 - last["position"]
    assert 0 < last["seconds"] < SECONDS
    causes = {r["stage"]: r["cause"] for r in runs["a pause"]["recoveries"]}
    assert causes == {1: "had no heartbeat for 3 s", 0: "was ended by SIGABRT"}


@pytest.mark.parametrize(
    ("faults", "flags", "words"),
    [
        ("kill@1F5,kill@1F9#1", ["--max-recoveries", "1"], ["SIGKILL", "1 recoveries within an hour are used up"]),
        (",".join(f"kill@1F5#{n}" for n in range(5)), [], ["SIGKILL", "for the 5th time at the same place"]),
        ("error@1U5", [], ["failed in 1U5", "it was told to fail by error@1U5"]),
        ("exit@1F5", [], ["failed in 1F5", "it called sys.exit(3)"]),
        ("vanish@1F5", [], ["left with exit code 9 and without a word"]),
    ],
    ids=["too many", "always the same", "an exception", "sys.exit", "without a word"],
)
def test_what_ends_the_run_names_the_stage(faults: str, flags: list[str], words: list[str]) -> None:
    command = [str(PIPELINE), "--plain", "--max-steps", "30", "--no-eval", *flags]
    with ranks(2, command, environment={VARIABLE: faults}) as started:
        texts = [process.communicate(timeout=SECONDS)[1] for process in started]
    assert [process.returncode for process in started] == [1, 1], texts
    assert all(word in first_error(texts[0]) for word in ["stage 1 (rank 1: ", *words]), texts
