"""A contender's own processes, and how their failures are told."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from unlocked.comparison.contenders import all_contenders
from unlocked.comparison.pool import ContenderFailed, Pool
from unlocked.comparison.request import Form, Request, save_data
from unlocked.data import load_dataset
from unlocked.runtime.recipe import Recipe


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
@pytest.mark.alone
def test_a_contender_that_takes_too_long_has_failed(pool: Pool) -> None:
    request = _request(pool, "LLS, 2 processes", max_steps=100_000, num_epochs=10_000, timeout=1.0)
    with pytest.raises(ContenderFailed, match="no answer within 1 s"):
        pool.run(request)
    assert not multiprocessing.active_children()
