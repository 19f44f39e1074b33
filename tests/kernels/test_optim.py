"""What a fused optimizer may stand in for, asked of every backend's `from_torch`: all else stays with the library."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from unlocked.kernels import cpp
from unlocked.kernels.optim import kind_of
from unlocked.kernels.schedule_free import AdamWSF
from unlocked.models import Block
from unlocked.rules import LLS, LayerInfo
from unlocked.workers.layer import AutogradStep, Layer

schedulefree = pytest.importorskip("schedulefree")

# The CUDA backend's optimizers are Triton's.
BACKENDS = ["triton", pytest.param("cpp", marks=pytest.mark.skipif(bool(cpp.unavailable("cpu")), reason="no C++"))]
Made = Any


@pytest.fixture(params=BACKENDS)
def from_torch(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    module = pytest.importorskip(f"unlocked.kernels.{request.param}.optim")
    found: Callable[[Any], Any] = module.from_torch
    return found


def weight() -> Tensor:
    return torch.zeros(3, requires_grad=True)


KNOWN = {
    "sgd": [torch.optim.SGD([weight()], lr=0.1), torch.optim.SGD([weight()], momentum=0.9, fused=True)],
    "adam": [torch.optim.Adam([weight()]), torch.optim.Adam([weight()], fused=True)],
    "adamw": [torch.optim.AdamW([weight()]), torch.optim.Adam([weight()], decoupled_weight_decay=True)],
    "adamw_sf": [AdamWSF([weight()])],
    "schedule_free_adamw": [schedulefree.AdamWScheduleFree([weight()])],
    "schedule_free_sgd": [schedulefree.SGDScheduleFree([weight()])],
}


@pytest.mark.parametrize("kind", KNOWN)
def test_a_kind_is_known_by_its_exact_type(kind: str, from_torch: Callable[[Any], Any]) -> None:
    assert [kind_of(optimizer) for optimizer in KNOWN[kind]] == [kind] * len(KNOWN[kind])
    native = from_torch.__module__.endswith("cpp.optim") and kind.startswith("schedule_free")
    for optimizer in KNOWN[kind]:
        assert getattr(from_torch(optimizer), "kind", None) == (None if native else kind)


class Halved(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["params"][0].grad.mul_(0.5)
        return super().step(closure)


class FurtherAdamWSF(AdamWSF):
    pass


def hooked(register: str) -> Callable[[], Made]:
    def make() -> Made:
        optimizer = torch.optim.SGD([weight()], lr=0.1)
        getattr(optimizer, register)(lambda *_: None)
        return optimizer

    return make


def _replaced_step() -> Made:
    optimizer = torch.optim.Adam([weight()])
    optimizer.step = lambda *_: None  # type: ignore[method-assign,assignment]
    return optimizer


REFUSED: dict[str, Callable[[], Made]] = {
    "step-pre-hook": hooked("register_step_pre_hook"),
    "step-post-hook": hooked("register_step_post_hook"),
    "state-dict-hook": hooked("register_state_dict_post_hook"),
    "load-state-dict-hook": hooked("register_load_state_dict_pre_hook"),
    "subclass": lambda: Halved([weight()], lr=0.1),
    "subclass-of-ours": lambda: FurtherAdamWSF([weight()]),
    "replaced-step": _replaced_step,
    "other-type": lambda: torch.optim.RMSprop([weight()]),
    "needs-a-closure": lambda: torch.optim.LBFGS([weight()]),
    "foreach": lambda: torch.optim.Adam([weight()], foreach=True),
    "amsgrad": lambda: torch.optim.Adam([weight()], amsgrad=True),
    "maximize": lambda: torch.optim.SGD([weight()], lr=0.1, maximize=True),
    "differentiable": lambda: torch.optim.SGD([weight()], lr=0.1, differentiable=True),
    "dampening": lambda: torch.optim.SGD([weight()], lr=0.1, momentum=0.9, dampening=0.5),
    "tensor-lr": lambda: torch.optim.SGD([weight()], lr=torch.tensor(0.1)),
    "one-group-of-two": lambda: torch.optim.Adam([{"params": [weight()]}, {"params": [weight()], "amsgrad": True}]),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_honoured_stays_with_the_library(
    make: Callable[[], Made], from_torch: Callable[[Any], Any]
) -> None:
    optimizer = make()
    assert kind_of(optimizer) is None
    assert from_torch(optimizer) is None


@pytest.fixture
def hook_for_all() -> Iterator[None]:
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    yield
    handle.remove()


@pytest.mark.usefixtures("hook_for_all")
def test_a_hook_of_all_optimizers_counts(from_torch: Callable[[Any], Any]) -> None:
    assert from_torch(torch.optim.Adam([weight()])) is None


def test_a_clipping_hook_clips(from_torch: Callable[[Any], Any]) -> None:
    """As a layer chooses its optimizer: the fused one, or else the library's, whose hook turns a gradient of 10 into
    0.0005."""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_value_([parameter], 0.0005))
    parameter.grad = torch.full((1,), 10.0)
    (from_torch(optimizer) or optimizer).step()
    assert parameter.item() == pytest.approx(0.9995)


def test_the_learning_rate_of_equal_groups_is_scaled(from_torch: Callable[[Any], Any]) -> None:
    """Also where the fused optimizer makes one group of them."""

    def two_groups(params: Any) -> torch.optim.Adam:
        first, *others = params
        return torch.optim.Adam([{"params": [first]}, {"params": others}], lr=0.25)

    def fused(layer: Layer) -> AutogradStep:
        layer.optimizer = from_torch(layer.optimizer) or layer.optimizer
        return AutogradStep(layer)

    info = LayerInfo(
        name="layer",
        index=0,
        activation_shape=(4,),
        num_classes=3,
        latent_size=4,
        hidden=8,
        reduced_rank=2,
        seed=0,
    )
    block = Block("layer", nn.Linear(5, 4), latent_size=4)
    layer = Layer(block, LLS()(info), info, two_groups, device=torch.device("cpu"), step=fused)
    layer.set_lr_factor(0.5)
    assert {float(group["lr"]) for group in layer.optimizer.param_groups} == {0.125}
