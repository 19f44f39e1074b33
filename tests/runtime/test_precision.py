"""What is computed in which type, that every placement computes it alike, and how far bfloat16 is from the truth."""

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from engine_runs import figures, fit, trainer
from torch import Tensor, nn

from unlocked.kernels import cpp
from unlocked.kernels.dispatch import get_backend
from unlocked.kernels.precision import check_precision, float32_products, repeatable_kernels
from unlocked.models import Block, ConvBlock, DepthwiseBlock, LinearBlock, OutputBlock
from unlocked.rules import LLS, RULES, CrossEntropy, LayerInfo, LLS_MxM
from unlocked.runtime import Streams, Trainer
from unlocked.runtime.network import backpropagation_network, build_network
from unlocked.runtime.settings import Settings
from unlocked.workers.fused import FusedStep, choose_step
from unlocked.workers.layer import AutogradStep, Layer

CPU = torch.device("cpu")


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_is_alike_in_every_placement(rule: str) -> None:
    """Closed form and autograd, at 2 to 5 stages: evaluation, partial batches, dropout, augmentation."""
    index = list(RULES).index(rule)
    options = {"rule": RULES[rule](temperature=0.5), "precision": "bf16", "kernels": ("torch", "auto")[index % 2]}
    expected = fit(trainer(**options), max_steps=6)
    got = fit(trainer("streams", **options, stages=2 + index % 4, queue_depth=2), max_steps=6)
    assert got.weights_sha256 == expected.weights_sha256
    assert figures(got) == figures(expected)
    assert expected.weights_sha256 != fit(trainer(**{**options, "precision": "fp32"}), max_steps=6).weights_sha256
    assert all(not value.is_floating_point() or value.dtype == torch.float32 for value in expected.weights.values())


def test_blocks_of_ones_own_round_their_outputs_in_every_placement() -> None:
    """These leave autocast with float32 activations, which an edge would round: so must a stage of two layers."""

    class Scale(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor) -> Tensor:
            return x.float() * self.factor / 3

    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(nn.Linear(12, 16), Scale(16)), Scale(16), nn.Linear(16, 3))

    generator = torch.Generator().manual_seed(0)
    data = torch.randn(40, 12, generator=generator), torch.randint(3, (40,), generator=generator)
    results = [
        Trainer(net(), rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1), precision="bf16", **options).fit(
            data, epochs=2, batch_size=16, eval_data=data
        )
        for options in ({}, {"engine": "streams"}, {"engine": Streams(stages=2)})
    ]
    assert len({result.weights_sha256 for result in results}) == 1
    assert len({result.test_loss for result in results}) == 1


BLOCKS: dict[str, tuple[Callable[[], Block], tuple[int, ...]]] = {
    "conv": (lambda: ConvBlock(4, 8, pool="max", latent_size=2), (4, 8, 8)),
    "depthwise": (lambda: DepthwiseBlock(4, 8, latent_size=2), (4, 8, 8)),
    "linear": (lambda: LinearBlock(24, 16, latent_size=16), (24,)),
    "output": (lambda: OutputBlock(24, 5), (24,)),
}
LIMITS = {"conv": 0.06, "depthwise": 0.12, "linear": 0.01, "output": 0.004}


def layer(kind: str, precision: str, kernels: str, optimizer: type = torch.optim.SGD) -> Layer:
    make, shape = BLOCKS[kind]
    torch.manual_seed(1)
    block = make()
    activations = tuple(block.body(torch.zeros(2, *shape)).shape[1:])
    block.load_state_dict({k: v for k, v in block.state_dict().items() if "running" not in k}, strict=False)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
    info = LayerInfo(
        name=kind, index=0, activation_shape=activations, num_classes=5, latent_size=block.latent_size or 5,
        hidden=32, reduced_rank=3, seed=0,
    )  # fmt: skip
    rule = CrossEntropy() if block.is_output else LLS_MxM()(info)
    step = choose_step(kernels, CPU)
    return Layer(
        block,
        rule,
        info,
        optimizer if issubclass(optimizer, Descent) else partial(optimizer, lr=1.0),
        device=CPU,
        step=step,
        precision=precision,
    )


def inputs(kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, *BLOCKS[kind][1], generator=generator), torch.randint(5, (32,), generator=generator)


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_bfloat16_step_against_float64(kind: str, kernels: str) -> None:
    """The update of every parameter. Each product's inputs carry a relative error of 2**-9, and so do the results that
    are stored; they are independent, so a gradient's norm is off by a few times that. What BatchNorm's way back leaves
    is a difference of larger terms, once in a convolutional block and twice in a depthwise one: autograd's bfloat16 is
    off by as much as the closed form's."""
    x, labels = inputs(kind)
    truth, tested = layer(kind, "fp32", "torch"), layer(kind, "bf16", kernels)
    assert isinstance(tested.step, AutogradStep if kernels == "torch" else FusedStep)
    truth.block.double()
    truth.rule.double()
    before = [p.detach().clone() for p in tested.parameters]
    expected = truth.forward(x.double())
    truth.update(labels)
    output = tested.forward(x)
    tested.update(labels)
    assert output.dtype == (torch.float32 if kind == "output" else torch.bfloat16)
    torch.testing.assert_close(output.double(), expected, rtol=2**-6, atol=2**-6)
    for start, p, q in zip(before, tested.parameters, truth.parameters, strict=True):
        assert p.dtype == torch.float32
        change, wanted = p.detach().double() - start, q.detach() - start
        if float(wanted.norm()) > 1e-6:  # the bias before BatchNorm has none
            assert float((change - wanted).norm() / wanted.norm()) < LIMITS[kind]
    torch.testing.assert_close(tested.totals[0], truth.totals[0], rtol=1e-2, atol=0)


@pytest.mark.parametrize("kind", BLOCKS)
def test_weights_statistics_and_optimizer_stay_float32(kind: str) -> None:
    x, labels = inputs(kind)
    tested = layer(kind, "bf16", "auto", torch.optim.Adam)
    assert isinstance(tested.step, FusedStep)
    tested.forward(x)
    (first,) = [call.operation for call in tested.step.body.calls if hasattr(call.operation, "_x")][:1]
    assert first._x.dtype == (torch.float32 if kind == "output" else torch.bfloat16)
    if kind == "conv":
        rest = tested.step.body.end
        types = {name: getattr(rest.result, name).dtype for name in rest.result._fields}
        assert types == {
            **dict.fromkeys(("latents", "output"), torch.bfloat16),
            **dict.fromkeys(("mean", "rstd", "mask_sums", "mask_xhat_sums"), torch.float32),
        }
    tested.update(labels)
    state = tested.state_dict()
    tensors = [*state["block"].values(), *state["rule"].values()]
    tensors += [t for s in state["optimizer"]["state"].values() for t in s.values()]
    assert {t.dtype for t in tensors if isinstance(t, Tensor)} <= {torch.float32, torch.int64}
    assert tested.infer(x, "evaluate").dtype == (torch.float32 if kind == "output" else torch.bfloat16)


class Descent:
    """Schedule-free like: in evaluation the weights are elsewhere."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(params), "lr": 0.1}]
        self._trains = True

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor]) -> None:
        for p, grad in zip(self.param_groups[0]["params"], grads, strict=True):
            p.sub_(0.1 * grad.float())

    def train(self) -> None:
        self._switch(True)

    def eval(self) -> None:
        self._switch(False)

    @torch.no_grad()
    def _switch(self, trains: bool) -> None:
        for p in self.param_groups[0]["params"] if trains != self._trains else ():
            p.mul_(0.5 if trains else 2.0)
        self._trains = trains

    def state_dict(self) -> dict[str, Any]:
        return {"trains": self._trains}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._trains = state["trains"]


class DescentWithCopies(Descent):
    """As Triton's, whose kernel writes them on the way."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params)
        self._copies: dict[Tensor, Tensor] = {}

    def bfloat16_of(self, param: Tensor) -> Tensor:
        if param not in self._copies:
            self._copies[param] = param.detach().to(torch.bfloat16, copy=True)
        return self._copies[param]

    def renew_bfloat16(self) -> None:
        for param, half in self._copies.items():
            half.copy_(param.detach())

    def step(self, grads: Sequence[Tensor]) -> None:
        assert any(grad.dtype == torch.bfloat16 for grad in grads)
        super().step(grads)
        self.renew_bfloat16()


@pytest.mark.parametrize("kind", ["conv", "depthwise", "linear"])
def test_weights_that_the_optimizer_casts_are_those_that_a_step_would(kind: str) -> None:
    """After steps, after an evaluation, and after other weights were loaded."""
    x, labels = inputs(kind)
    plain, kept = (layer(kind, "bf16", "auto", optimizer) for optimizer in (Descent, DescentWithCopies))

    def assert_equal() -> None:
        for tested in (plain, kept):
            tested.forward(x)
            tested.update(labels)
        for a, b in zip(plain.parameters, kept.parameters, strict=True):
            assert torch.equal(a, b)

    start = copy.deepcopy(plain.state_dict())
    assert_equal()
    assert_equal()
    assert torch.equal(plain.infer(x, "evaluate"), kept.infer(x, "evaluate"))
    assert_equal()
    for tested in (plain, kept):
        tested.load_state_dict(copy.deepcopy(start))
    assert_equal()
    assert kept.step.body.casts.bfloat16_of is not None


def test_backpropagation_in_bfloat16() -> None:
    result = fit(trainer(rule="BP", precision="bf16"), epochs=8)
    assert result.epochs[-1].train_loss < result.epochs[0].train_loss
    torch.manual_seed(0)
    network = backpropagation_network(
        build_network([ConvBlock(3, 4), OutputBlock(256, 5)], input_shape=(3, 8, 8), num_classes=5, seed=0)
    )
    (block,) = network.blocks
    whole = Layer(
        block, CrossEntropy(), network.infos[0], partial(torch.optim.SGD, lr=0.1), device=CPU, precision="bf16"
    )
    seen = []
    block.get_submodule("body.output.body.linear").register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    logits = whole.forward(torch.randn(8, 3, 8, 8))
    assert seen == [torch.bfloat16]
    assert logits.dtype == torch.float32


def test_an_unknown_or_impossible_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision 'fp16' is not known; valid: fp32, tf32, bf16"):
        trainer(precision="fp16")
    with pytest.raises(ValueError, match=r"'tf32' is for the tensor cores of a CUDA device, .*; use fp32 or bf16"):
        trainer(precision="tf32")
    check_precision("bf16", CPU)


@pytest.mark.parametrize(("precision", "inside"), [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")])
def test_what_float32_products_mean_is_said_and_put_back(precision: str, inside: str) -> None:
    """By torch's newer switches and by its older ones, which raise where the two do not agree."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)  # type: ignore[attr-defined]

    def older() -> tuple[str, bool, bool]:
        products = torch.get_float32_matmul_precision()
        return products, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before, before_older = [setting.fp32_precision for setting in settings], older()

    def fail() -> None:
        tf32 = inside == "tf32"
        assert [setting.fp32_precision for setting in settings] == [inside] * 3
        assert older() == ("high" if tf32 else "highest", tf32, tf32)
        raise KeyError

    with pytest.raises(KeyError), float32_products(precision):
        fail()
    assert [setting.fp32_precision for setting in settings] == before
    assert older() == before_older


def test_repeatable_kernels_are_asked_for_inside_and_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark

    def fail(wanted: bool) -> None:
        assert cudnn.deterministic == wanted
        assert not (wanted and cudnn.benchmark)
        raise KeyError

    with pytest.raises(KeyError), repeatable_kernels("cpu"):
        fail(before[0])
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    cudnn.benchmark = True
    try:
        with pytest.raises(KeyError), repeatable_kernels("cuda:1"):
            fail(True)
        assert (cudnn.deterministic, cudnn.benchmark) == (before[0], True)
    finally:
        cudnn.benchmark = before[1]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    for wanted in (False, True):
        with Settings(device="cuda", deterministic=wanted).library_kernels():
            assert cudnn.deterministic == (wanted or before[0])


def test_switches_that_disagree_already_are_put_back_as_they_were() -> None:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"  # which the older switches can't tell
    try:
        with float32_products("fp32"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_backend_of_this_test_is_compiled() -> None:
    """Else the closed forms above would not have been those of the product."""
    assert get_backend("auto", "cpu") is cpp
