"""Valid blocks with unusual strides, sizes and spellings, beyond what every operation's own tests ask of them."""

from functools import partial
from typing import Any

import pytest
from awkward_blocks import AWKWARD, Asking
from graph_blocks import CASES, assert_close_to_float64, image, made_layer, seeded, step_of

from unlocked.kernels import cpp, reference


@pytest.mark.parametrize("name", AWKWARD)
def test_by_the_library_alone(name: str) -> None:
    make, x, _ = CASES[name]
    assert_close_to_float64(make, x, reference)


@pytest.mark.parametrize("backend", [cpp, reference])
def test_learned_queries_may_be_expanded(backend: Any) -> None:
    """By autograd: `expand` is not in the table."""
    make = seeded(partial(Asking, 16, 1, 2, heads=2, expanded=True), layout="tokens")
    assert_close_to_float64(make, image(16, 16), backend)


@pytest.mark.parametrize("name", [name for name in AWKWARD if "learned" in name or "head" in name or "few" in name])
def test_attention_in_bfloat16_stays_near(name: str) -> None:
    make, x, _ = CASES[name]
    single, half = (made_layer(make(), x, cpp, precision=precision) for precision in ("fp32", "bf16"))
    before = [p.detach().clone() for p in single.parameters]
    outputs = [step_of(layer, x).float() for layer in (single, half)]
    assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 0.03
    for start, a, b in zip(before, single.parameters, half.parameters, strict=True):
        if float((a.detach() - start).norm()) > 1e-3:
            assert float((b - a).detach().norm() / (a.detach() - start).norm()) < 0.25
