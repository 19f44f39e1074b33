"""What the user constructed is where training starts, and what was frozen stays: on every engine."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import kept_weights_worker
import pytest
import torch
from kept_weights_worker import MODELS, data, digests, fit, trainer
from ranks import ranks
from torch import Tensor, nn

from unlocked.models import small_conv
from unlocked.rules import LLS_M
from unlocked.runtime import Streams

ENGINES = ["sequential", Streams(stages=2), Streams(stages=2, graph_ticks=2)]
engines = pytest.mark.parametrize("engine", ENGINES, ids=["sequential", "streams", "ticks"])


def _values(model: list[nn.Module]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in nn.ModuleList(model).state_dict().items()}


def _moved(model: list[nn.Module], before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in _values(model).items() if not torch.equal(value, before[name])}


def _images() -> tuple[Tensor, Tensor]:
    return torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 10


@pytest.fixture(scope="module")
def expected() -> dict[str, list[tuple[str, float | None]]]:
    return {name: digests(name, "sequential") for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_the_first_step_is_from_the_given_weights(name: str) -> None:
    """The output layer's, in which no rule has a part, against autograd through a copy of the model."""
    model = MODELS[name]()
    copied = copy.deepcopy(model)
    if name in ("norm_without_gradients", "frozen_backbone"):
        copied[0].get_submodule("1").eval()
    x, labels = data()
    trainer(model, "sequential").fit((x, labels), epochs=1, batch_size=len(x))
    output = copied[-1]
    with torch.no_grad():
        for module in copied[:-1]:
            x = module(x)
    weight = output.get_parameter("weight")
    (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(output(x), labels), weight)
    assert torch.allclose(model[-1].get_parameter("weight"), weight - 0.1 * grad, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stages", [2, 3])
def test_streams_train_from_there_twice(name: str, stages: int, expected: dict[str, Any]) -> None:
    layers = len(MODELS[name]())
    assert digests(name, Streams(stages=min(stages, layers), graph_ticks=2)) == expected[name]


@pytest.mark.alone
def test_processes_train_from_there_twice_and_compare_their_start(expected: dict[str, Any], tmp_path: Path) -> None:
    """The ranks bring each other what they trained in the first run. One that starts from other weights is refused."""
    out = tmp_path / "out.json"
    with ranks(2, [kept_weights_worker.__file__, str(out)]) as started:
        texts = [process.communicate(timeout=300)[1] for process in started]
        # 1: by the exception itself; 2: a user's mistake in another rank, heard of in set-up
        assert {process.returncode for process in started} <= {1, 2}, texts
    assert json.loads(out.read_text()) == {name: [list(pair) for pair in pairs] for name, pairs in expected.items()}
    for text in texts:
        assert "the start values of layer sequential2 are other ones in rank 1 than in rank 0; build the model" in text


@engines
def test_a_second_fit_goes_on_where_the_first_ended(engine: Any) -> None:
    """Two fits are a fit and one of a new model with the weights that it left, statistics included."""
    model = MODELS["constant"]()
    one = trainer(model, engine)
    fit(one)
    other = MODELS["constant"]()
    nn.ModuleList(other).load_state_dict(_values(model))
    assert fit(one).weights_sha256 == fit(trainer(other, engine)).weights_sha256


@engines
def test_a_frozen_backbone_keeps_its_weights(engine: Any) -> None:
    model = MODELS["frozen_backbone"]()
    before = _values(model)
    fit(trainer(model, engine))
    moved = _moved(model, before)
    assert not any(name.startswith("0.") for name in moved), moved
    assert {"1.0.weight", "2.weight"} <= moved


@engines
@pytest.mark.parametrize("name", ["norm_in_eval_mode", "norm_without_gradients"])
def test_a_frozen_norm_keeps_its_statistics(name: str, engine: Any) -> None:
    model = MODELS[name]()
    before, modes = _values(model), [m.training for m in nn.ModuleList(model).modules()][1:]
    for _ in range(2):
        fit(trainer(model, engine))
        moved = _moved(model, before)
        assert not moved & {"0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked"}
        assert "0.0.weight" in moved
        assert ("0.1.weight" in moved) == (name == "norm_in_eval_mode")
        assert [m.training for module in model for m in module.modules()] == modes


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_frozen_norm_of_a_network_of_ours(kernels: str) -> None:
    """The closed form knows micro-batch statistics alone, and must step aside."""
    found = []
    for engine in ("sequential", "streams"):
        model = small_conv(1, 10, 8)
        model[0].norm.eval()
        model[1].norm.requires_grad_(False)
        before = _values(list(model))
        one = trainer(model, engine, kernels=kernels)
        result = one.fit(_images(), epochs=1, batch_size=8, eval_data=_images())
        moved = _moved(list(model), before)
        assert not {name for name in moved if "running" in name and name[0] in "01"}
        assert "2.body.norm.running_mean" in moved
        found.append(result.weights_sha256)
    assert found[0] == found[1]


def test_a_model_in_eval_mode_as_a_whole_is_refused() -> None:
    model = [module.eval() for module in MODELS["constant"]()]
    with pytest.raises(ValueError, match=r"the whole model is in eval mode.*call train\(\)"):
        fit(trainer(model, "sequential"))


def test_networks_of_ours_follow_the_seed_whatever_the_global_generators_state() -> None:
    def digest(state: int, seed: int, made_by: int) -> str:
        torch.manual_seed(state)
        one = trainer(small_conv(1, 10, 8, seed=made_by), "sequential", seed=seed)
        return one.fit(_images(), epochs=1, batch_size=8).weights_sha256

    assert digest(1, 0, 0) == digest(2, 0, 0)
    assert digest(1, 4, 0) == digest(2, 4, 4)
    assert digest(1, 4, 0) != digest(1, 0, 0)


def test_redrawing_refuses_by_name_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match=r"layer scaled1 can't be drawn anew: .* sets scale of its Scaled \(body\)"):
        fit(trainer(MODELS["by_hand"](), "sequential", redraw=True))
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        found.append(fit(trainer(MODELS["frozen_backbone"](), "sequential", redraw=True)).weights_sha256)
    assert found[0] == found[1]


def test_the_rules_start_anew_in_a_second_fit() -> None:
    """As the documents say: a rule is built for every run."""
    model = MODELS["constant"]()
    one = trainer(model, "sequential", rule=LLS_M(), optimizer=partial(torch.optim.SGD, lr=0.0))
    first, second = fit(one), fit(one)
    rules = [name for name in first.weights if ".rule." in name]
    assert rules
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in rules)
