"""The comparison's parts: how pipelines are cut, how a run becomes figures, how failures are told."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from unlocked.comparison.contenders import all_contenders, choose
from unlocked.comparison.energy import _cpu_joules
from unlocked.comparison.excerpts import cut_excerpts
from unlocked.comparison.measure import make_run
from unlocked.comparison.pool import ContenderFailed, Pool
from unlocked.comparison.request import Form, LayerCosts, RankAnswer, Request, save_data
from unlocked.comparison.results import TimelineSpan
from unlocked.comparison.rival.forms import balanced_parts, forms_to_try
from unlocked.comparison.rival.pipeline import chunks_for, owner
from unlocked.data import load_dataset
from unlocked.runtime.recipe import Recipe


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_stages_lie_where_torch_puts_them(processes: int) -> None:
    for engine, style in (("zero-bubble", "loop"), ("ZBV", "v")):
        theirs = generate_stage_to_rank_mapping(processes, 2 * processes, style)
        assert {s: owner(s, engine, processes) for s in range(2 * processes)} == theirs


@given(rows=st.integers(1, 300), chunks=st.integers(1, 16))
def test_chunks_are_equal_and_as_many_as_fit(rows: int, chunks: int) -> None:
    found = chunks_for(rows, chunks)
    fitting = [n for n in range(1, chunks + 1) if rows % n == 0 and rows // n >= 2]
    assert found == max(fitting, default=1)


@settings(max_examples=40, deadline=None)
@given(
    costs=st.lists(st.integers(1, 50), min_size=4, max_size=8),
    engine=st.sampled_from(["zero-bubble", "ZBV"]),
)
def test_two_stages_per_process_are_balanced(costs: list[int], engine: str) -> None:
    def busiest(parts: Any) -> int:
        return max(
            sum(sum(costs[a:b]) for s, (a, b) in enumerate(parts) if owner(s, engine, 2) == rank) for rank in (0, 1)
        )

    parts = balanced_parts(costs, engine, 2)
    assert [i for a, b in parts for i in range(a, b)] == list(range(len(costs)))
    assert all(a < b for a, b in parts)
    every = [list(zip((0, *cuts), (*cuts, len(costs)), strict=True)) for cuts in combinations(range(1, len(costs)), 3)]
    assert busiest(parts) == min(map(busiest, every))


def test_both_splits_are_tried_where_they_differ() -> None:
    costs = LayerCosts(backpropagation=(1.0, 5.0, 1.0, 1.0, 1.0), local=(4.0, 1.0, 1.0, 1.0, 1.0))
    forms = forms_to_try("1F1B", costs, processes=2, batch_size=60, chunks=None)
    assert {form.parts for form in forms} == {((0, 2), (2, 5)), ((0, 1), (1, 5))}
    assert sorted(form.chunks for form in forms) == [2, 2, 4, 4], "8 does not divide 60, and 1F1B refuses 1"
    with pytest.raises(ValueError, match="ZBV holds 2 stages per process, 6 in all, for 5 layers"):
        forms_to_try("ZBV", costs, processes=3, batch_size=60, chunks=None)


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


def test_energy_of_all_cpu_packages_is_added(tmp_path: Path) -> None:
    assert _cpu_joules(tmp_path) is None
    for name, value in (("intel-rapl:0", "1500000"), ("intel-rapl:1", "500000"), ("intel-rapl:0:0", "7")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(value + "\n")
    assert _cpu_joules(tmp_path) == 2.0
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert _cpu_joules(tmp_path) is None, "half of the machine is no answer"


def test_contenders_are_chosen_by_the_beginning_of_their_names() -> None:
    specs = all_contenders("cpu", cores=2, processes=2)
    assert len({spec.name for spec in specs}) == len(specs)
    assert [spec.name for spec in choose(specs, ["LLS, 2", "bp, 1 thread"])] == [
        "BP, 1 thread",
        "LLS, 2 threads",
        "LLS, 2 processes",
    ]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as made:
        save_data(made.folder / "data.pt", load_dataset("digits"))
        yield made


def _request(pool: Pool, name: str, *, form: Form | None = None, timeout: float = 100.0, **settings: Any) -> Request:
    spec = next(spec for spec in all_contenders("cpu", cores=2, processes=2) if spec.name == name)
    common = {"max_steps": 20, "no_eval": True, "training_mode": spec.family, "engine": spec.engine}
    recipe = Recipe(**common | settings)
    return Request(spec=spec, task="train", recipe=recipe, data=pool.folder / "data.pt", form=form, timeout=timeout)


@pytest.mark.parametrize("name", ["LLS, 1 thread", "BP 1F1B, 2 processes"])
def test_a_diverging_contender_says_so(pool: Pool, name: str) -> None:
    form = Form(chunks=2, parts=((0, 2), (2, 5)))
    with pytest.raises(ContenderFailed, match=r"is (nan|inf); lower --lr"):
        pool.run(_request(pool, name, lr=1e30, form=form))


@pytest.mark.alone
def test_a_process_that_dies_is_told_with_its_exit_code(pool: Pool) -> None:
    request = _request(pool, "LLS, 1 thread", max_steps=100_000, num_epochs=10_000)
    caught: list[ContenderFailed] = []

    def run() -> None:
        try:
            pool.run(request)
        except ContenderFailed as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not (children := multiprocessing.active_children()):
        os.sched_yield()
    children[0].kill()
    thread.join(60)
    assert [str(error).split(":")[0] for error in caught] == ["process 0 ended with code -9"]


@pytest.mark.alone
def test_a_contender_that_takes_too_long_has_failed(pool: Pool) -> None:
    request = _request(pool, "LLS, 2 processes", max_steps=100_000, num_epochs=10_000, timeout=1.0)
    with pytest.raises(ContenderFailed, match="no answer within 1 s"):
        pool.run(request)
    assert not multiprocessing.active_children()
