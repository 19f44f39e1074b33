"""Triton's fused optimizers against torch.optim, `AdamWSF`, the schedulefree package and a float64 loop.

Tolerance of the comparisons: both sides do the same dozen float32 operations per step on values around 1 and differ by
contracted multiply-adds and by divisions, half a unit in the last place (6e-8) each; over 20 steps of either sign that
stays below 1e-6.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from unlocked.kernels.schedule_free import AdamWSF

optim = pytest.importorskip("unlocked.kernels.triton.optim")

SHAPES: list[tuple[int, ...]] = [(8, 4, 3, 3), (1,), (), (5, 7), (1300,)]  # one element, odd sizes, two chunks
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
Maker = Callable[[list[Tensor]], Any]


def _params(device: str, shapes: Iterable[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    params[0] = params[0].to(memory_format=torch.channels_last) if params[0].dim() == 4 else params[0]
    return [torch.nn.Parameter(p.to(device)) for p in params]


def _gradients(params: list[Tensor], step: int) -> list[Tensor]:
    """Keyed by the step; with the parameters' strides, as autograd makes them."""
    generator = torch.Generator().manual_seed(100 + step)
    made = [torch.randn(p.shape, generator=generator).to(p.device) for p in params]
    return [torch.empty_like(p).copy_(g).detach() for p, g in zip(params, made, strict=True)]


def _assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def _library(name: str, **options: Any) -> Maker:
    def make(params: list[Tensor]) -> Any:
        if name == "AdamWSF":
            return AdamWSF(params, **options)
        module = torch.optim if hasattr(torch.optim, name) else pytest.importorskip("schedulefree")
        return getattr(module, name)(params, **options)

    return make


LIBRARY = [
    pytest.param(_library("SGD", lr=0.1), id="sgd"),
    pytest.param(_library("SGD", lr=0.1, momentum=0.9, weight_decay=0.1), id="sgd-momentum"),
    pytest.param(_library("SGD", lr=0.1, momentum=0.8, weight_decay=0.1, nesterov=True), id="sgd-nesterov"),
    pytest.param(_library("Adam", lr=0.01), id="adam"),
    pytest.param(_library("Adam", lr=0.01, betas=(0.0, 0.95), weight_decay=0.1, eps=1e-3), id="adam-decay"),
    pytest.param(_library("AdamW", lr=0.01, weight_decay=0.5), id="adamw"),
    pytest.param(_library("AdamWSF", lr=0.01, weight_decay=0.1), id="adamw-sf"),
    pytest.param(
        _library("AdamWSF", lr=0.02, betas=(0.8, 0.9), warmup_steps=6, r=1.0, weight_lr_power=1.5), id="adamw-sf-warmup"
    ),
    pytest.param(_library("AdamWScheduleFree", lr=0.01, weight_decay=0.1), id="schedule-free-adamw"),
    pytest.param(
        _library("AdamWScheduleFree", lr=0.02, betas=(0.8, 0.9), warmup_steps=6, r=1.0, weight_lr_power=1.5),
        id="schedule-free-adamw-warmup",
    ),
    pytest.param(_library("SGDScheduleFree", lr=0.1, weight_decay=0.01), id="schedule-free-sgd"),
    pytest.param(
        _library("SGDScheduleFree", lr=0.1, warmup_steps=4, weight_lr_power=0.0), id="schedule-free-sgd-warmup"
    ),
]


@pytest.mark.parametrize("make", LIBRARY)
def test_twenty_steps_are_the_librarys(make: Maker, kernel_device: str) -> None:
    """With a change of the learning rate on the way and, for schedule-free, a look at the averaged weights."""
    expected, actual = _params(kernel_device), _params(kernel_device)
    library, fused = make(expected), optim.from_torch(make(actual))
    scheduled = hasattr(library, "train")
    if scheduled:
        library.train()
    fused.train()
    for step in range(20):
        for p, q, g in zip(expected, actual, _gradients(expected, step), strict=True):
            p.grad, q.grad = g.clone(), g
        if step == 8:
            library.param_groups[0]["lr"] *= 0.3
            fused.param_groups[0]["lr"] *= 0.3
        if step == 12 and scheduled:
            library.eval()
            fused.eval()
            torch.testing.assert_close(actual, expected, **TOLERANCE)
            library.train()
            fused.train()
        library.step()
        fused.step()
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    ours, theirs = fused.state_dict(), library.state_dict()
    for index, state in theirs["state"].items():
        for name, value in state.items():
            if value is not None:
                # A second moment is a sum of squares: no cancellation, so its relative error stays that of a few steps.
                tolerance = {"rtol": 2e-6, "atol": 0.0} if name == "exp_avg_sq" else TOLERANCE
                # The library counts Adam's steps on the host.
                torch.testing.assert_close(ours["state"][index][name].to(value.device), value, **tolerance)
    for name in ("k", "weight_sum", "lr_max") if scheduled else ():
        assert ours["param_groups"][0][name] == pytest.approx(theirs["param_groups"][0][name], rel=1e-12)


@pytest.mark.parametrize("kind", ["schedule_free_adamw", "schedule_free_sgd"])
def test_schedule_free_is_the_papers_recursion(kind: str, kernel_device: str) -> None:
    """Defazio et al., "The Road Less Scheduled", with x, y and z held apart, in float64:
    y = (1 - b) z + b x, z -= lr d, x += c (z - x), c = lr_t^2 / sum of lr^2."""
    start = torch.linspace(-1, 2, 40)
    param = start.clone().to(kernel_device)
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "warmup_steps": 5}
    fused = optim.FusedOptimizer([param], kind, **options)
    fused.train()
    x = z = start.double()
    v, total = torch.zeros_like(x), 0.0
    for step in range(12):
        y = 0.1 * z + 0.9 * x
        gradient = torch.cos(3 * start + step)
        fused.step([gradient.to(kernel_device)])
        direction = gradient.double()
        if kind == "schedule_free_adamw":
            v = 0.999 * v + 0.001 * direction**2
            direction = direction / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        lr = 0.05 * min(1.0, (step + 1) / 5)
        total += lr**2
        z = z - lr * (direction + 0.1 * y)
        x = x + lr**2 / total * (z - x)
        torch.testing.assert_close(param.cpu().double(), 0.1 * z + 0.9 * x, rtol=1e-6, atol=2e-6)
    fused.eval()
    torch.testing.assert_close(param.cpu().double(), x, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("make", [LIBRARY[i] for i in (1, 3, 5, 7, 9, 10)])
def test_a_loaded_state_continues_identically(make: Maker, kernel_device: str) -> None:
    """Ours into ours bit for bit; ours into the library's, and the library's into ours, within the tolerance."""
    params = _params(kernel_device)
    fused = optim.from_torch(make(params))
    fused.train()
    for step in range(3):
        fused.step(_gradients(params, step))
    state = copy.deepcopy(fused.state_dict())
    twin_params, library_params = copy.deepcopy(params), copy.deepcopy(params)
    twin = optim.from_torch(make(twin_params))
    twin.load_state_dict(state)
    library = make(library_params)
    library.load_state_dict(state)
    adopted = optim.from_torch(library)
    assert adopted.state_dict()["param_groups"][0].get("k") == state["param_groups"][0].get("k")
    for step in range(3, 6):
        fused.step(_gradients(params, step))
        twin.step(_gradients(twin_params, step))
        for p, g in zip(library_params, _gradients(library_params, step), strict=True):
            p.grad = g
        library.step()
    _assert_equal(twin_params, params)
    torch.testing.assert_close(library_params, params, **TOLERANCE)
    twin.load_state_dict(library.state_dict())
    twin.eval()
    fused.eval()
    torch.testing.assert_close(twin_params, params, **TOLERANCE)


@pytest.mark.parametrize(("most", "count"), [(32, 40), (3, 7), (2, 7), (2, 6)])
def test_missing_gradients_empty_tensors_and_many_tensors(
    kernel_device: str, most: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tensors than a launch takes; one is empty, one has two chunks, and one gets its gradient every other step
    only, which moves those behind it to other launches."""
    monkeypatch.setattr(optim, "_MAX_TENSORS", most)
    late = count - 5
    shapes = [(3,), (1300,)] + [(3,)] * (count - 2) + [(0,)]
    expected, actual = _params(kernel_device, shapes), _params(kernel_device, shapes)
    library, fused = torch.optim.Adam(expected, lr=0.01), optim.FusedOptimizer(actual, "adam", lr=0.01)
    for step in range(4):
        gradients: list[Tensor | None] = list(_gradients(expected, step))
        if step % 2:
            gradients[late] = None
        for p, g in zip(expected, gradients, strict=True):
            p.grad = g
        library.step()
        fused.step(gradients)
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert [fused.state_dict()["state"][i]["step"].item() for i in (late - 1, late, late + 1)] == [4, 2, 4]


@pytest.mark.parametrize("make", [case for case in LIBRARY if "schedule" in str(case.id) or "sf" in str(case.id)])
def test_schedule_free_steps_count_for_tensors_without_a_gradient(make: Maker, kernel_device: str) -> None:
    """As the library's groups count them. One tensor of two chunks gets its first gradient late, one every other step,
    one never; one step brings none at all. Half way each takes over the other's state."""
    shapes = [(3,), (1300,), (4, 2), (5,)]
    expected, actual = _params(kernel_device, shapes), _params(kernel_device, shapes)
    library, fused = make(expected), optim.from_torch(make(actual))
    for step in range(9):
        library.train()
        fused.train()
        gradients: list[Tensor | None] = list(_gradients(expected, step))
        absent = {0: step == 4, 1: step < 3 or step == 4, 2: step % 2 == 0, 3: True}
        gradients = [None if absent[i] else gradient for i, gradient in enumerate(gradients)]
        fused.step(gradients)
        for p, g in zip(expected, gradients, strict=True):
            p.grad = None if g is None else g.clone()  # the library writes into them
        library.step()
        torch.testing.assert_close(actual, expected, **TOLERANCE)
        if step in (1, 5):
            states = library.state_dict(), fused.state_dict()
            library, fused = make(expected), optim.from_torch(make(actual))
            fused.load_state_dict(states[0])
            library.load_state_dict(states[1])
        if step % 3 == 0:
            library.eval()
            fused.eval()
            torch.testing.assert_close(actual, expected, **TOLERANCE)
    state = fused.state_dict()["param_groups"][0]
    for name in ("k", "weight_sum", "lr_max"):
        assert state[name] == pytest.approx(library.state_dict()["param_groups"][0][name], rel=1e-9)


def test_a_gradient_in_another_memory_layout_is_understood(kernel_device: str) -> None:
    params = _params(kernel_device)
    gradient = _gradients(params, 0)[0]
    before = params[0].detach().clone()
    optim.FusedOptimizer(params[:1], "sgd", lr=1.0).step([gradient.contiguous()])
    assert gradient.stride() != gradient.contiguous().stride()
    torch.testing.assert_close(params[0].detach(), before - gradient)


def test_zero_grad_drops_or_clears(kernel_device: str) -> None:
    params = _params(kernel_device)
    fused = optim.FusedOptimizer(params)
    for p, g in zip(params, _gradients(params, 0), strict=True):
        p.grad = g
    fused.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    fused.zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("adamax", {}, "'adamax' is not known; valid: sgd, adam"),
        ("sgd", {"betas": (0.9, 0.99)}, r"does not take \['betas'\]; valid: lr, momentum"),
        ("adam", {"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ("adam", {"lr": math.nan}, "lr must be at least 0, got nan"),
        ("adam", {"betas": (0.9, 1.0)}, "betas"),
        ("sgd", {"nesterov": True}, "nesterov needs a momentum"),
        ("schedule_free_sgd", {"momentum": 0.0}, "above 0"),
    ],
)
def test_bad_options_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.FusedOptimizer([torch.zeros(3)], kind, **options)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        optim.FusedOptimizer([])
    with pytest.raises(ValueError, match=r"parameter 1 is torch\.float64"):
        optim.FusedOptimizer([torch.zeros(2), torch.zeros(2, dtype=torch.float64)])
    with pytest.raises(ValueError, match="contiguous or channels-last"):
        optim.FusedOptimizer([torch.zeros(2, 4)[:, ::2]])
    fused = optim.FusedOptimizer([torch.zeros(2), torch.zeros(3)], "sgd", lr=0.5)
    with pytest.raises(ValueError, match=r"per parameter: 2, got 1"):
        fused.step([torch.zeros(2)])
    with pytest.raises(ValueError, match="gradients, not a closure"):
        fused.step(lambda: torch.zeros(()))
    with pytest.raises(ValueError, match=r"gradient of parameter 1 must be float32 or bfloat16, \[3\]"):
        fused.step([torch.zeros(2), torch.zeros(2)])
    with pytest.raises(ValueError, match=r"lr must be at least 0, got -0\.5"):
        fused.param_groups[0]["lr"] = -0.5
    assert fused.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="built without momentum"):
        fused.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="1 parameters in 1 groups; this optimizer has 2"):
        fused.load_state_dict(torch.optim.SGD([torch.zeros(2)]).state_dict())
    with pytest.raises(ValueError, match="evaluation mode; call train"):
        optim.FusedOptimizer([torch.zeros(2)], "schedule_free_sgd").step([torch.zeros(2)])


def test_from_torch_takes_what_it_can_do_exactly() -> None:
    a, b = torch.zeros(3, requires_grad=True), torch.zeros(2, requires_grad=True)
    two_groups = torch.optim.Adam([{"params": [a]}, {"params": [b]}], lr=0.5)
    fused = optim.from_torch(two_groups)
    assert fused.kind == "adam"
    assert fused.param_groups[0]["lr"] == 0.5
    assert fused.param_groups[0]["params"] == [a, b]
    assert optim.from_torch(torch.optim.AdamW([a])).kind == "adamw"
    for refused in (
        torch.optim.Adam([{"params": [a]}, {"params": [b], "lr": 0.1}]),
        torch.optim.Adam([a.double().detach()]),
    ):
        assert optim.from_torch(refused) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", LIBRARY)
def test_replays_of_a_graph_are_eager_steps(make: Maker) -> None:
    """50 replays, the learning rate changed after 20; and again from the same start with the same bits."""
    shapes = [(64, 32, 3, 3), (64,), (64,), (10, 64), (1,)]
    expected = _params("cuda", shapes)
    library = make(expected)
    if hasattr(library, "train"):
        library.train()
    runs = []
    for _ in range(2):
        actual = _params("cuda", shapes)
        fused = optim.from_torch(make(actual))
        fused.train()
        gradients = [torch.zeros_like(p) for p in actual]
        if "train_mode" not in fused.param_groups[0]:  # a schedule-free optimizer would count it
            fused.step([None] * len(actual))
        warm_params = _params("cuda", shapes)  # compiles outside the capture, without touching the state
        warm = optim.from_torch(make(warm_params))
        warm.train()
        warm.step(_gradients(warm_params, 0))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fused.step(gradients)
        for step in range(50):
            if step == 20:
                fused.param_groups[0]["lr"] *= 0.1
            torch._foreach_copy_(gradients, _gradients(actual, step))
            graph.replay()
        fused.eval()
        runs.append(actual)
    for step in range(50):
        if step == 20:
            library.param_groups[0]["lr"] *= 0.1
        for p, g in zip(expected, _gradients(expected, step), strict=True):
            p.grad = g
        library.step()
    if hasattr(library, "train"):
        library.eval()
    _assert_equal(runs[0], runs[1])
    torch.testing.assert_close(runs[0], expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", list(optim.KINDS))
def test_bfloat16_gradients_are_taken_and_bfloat16_weights_left_behind(kind: str, kernel_device: str) -> None:
    """Without a kernel before or after: of two tensors the gradients are bfloat16 and of two others a copy is kept."""
    expected, actual = _params(kernel_device), _params(kernel_device)
    plain, mixed = optim.FusedOptimizer(expected, kind), optim.FusedOptimizer(actual, kind)
    halves = [mixed.bfloat16_of(actual[i]) for i in (0, 4)]
    places = [half.data_ptr() for half in halves]
    for optimizer in (plain, mixed):
        optimizer.train()
    for step in range(3):
        grads = [g.to(torch.bfloat16) if i in (0, 3) else g for i, g in enumerate(_gradients(actual, step))]
        plain.step([g.float() for g in grads])
        mixed.step(grads)
        _assert_equal(actual, expected)
        for i, half in zip((0, 4), halves, strict=True):
            if kernel_device == "cpu":  # the interpreter cuts off what a device rounds to nearest
                bits = actual[i].detach().view(torch.int32) >> 16
                assert torch.equal(half.view(torch.int16), bits.to(torch.int16))
            else:
                assert torch.equal(half, actual[i].to(torch.bfloat16))
            assert half.stride() == actual[i].stride()
    with torch.no_grad():
        actual[4].fill_(2.0)
    mixed.renew_bfloat16()
    assert [mixed.bfloat16_of(actual[i]).data_ptr() for i in (0, 4)] == places
    assert torch.equal(halves[1], torch.full_like(halves[1], 2.0))
