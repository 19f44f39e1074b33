"""What a cell's inspection finds: layers that are local and layers that only seem so, memory, and bytes over edges."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unlocked.comparison.leaderboard.inspection import audited_cuts, find_leaks, inspect
from unlocked.rules import LOCAL_RULES, LayerInfo, LocalRule
from unlocked.runtime import recipe as recipes
from unlocked.runtime.recipe import Recipe

RECIPE = Recipe(plain=True, print_freq=1_000_000, threads=1)


def _inspected(rule: str, model: str = "SmallConv") -> Any:
    width = 32 if model == "MLP" else None
    recipe = Recipe(training_mode=rule, model=model, width=width, plain=True, print_freq=1_000_000, threads=1)
    return inspect(recipe, recipe.load_data()[0])


@pytest.mark.parametrize("rule", LOCAL_RULES)
def test_no_local_rule_leaks(rule: str) -> None:
    found = _inspected(rule, "MLP")
    assert (found.leaks, found.is_local, found.cuts, found.notes) == ((), True, 3, ())


@pytest.mark.parametrize("rule", ["BP", "DFA"])
def test_what_waits_for_the_output_is_found(rule: str) -> None:
    found = _inspected(rule)
    assert found.leaks == ("conv1", "conv2", "conv3", "linear1")
    assert found.is_local is False
    assert found.edge_bytes == ()


class Gossip(LocalRule):
    """Layer conv2 learns by what conv3 computed in the step before, which no edge has carried."""

    heard = torch.zeros(())

    def __init__(self, layer: LayerInfo) -> None:
        super().__init__()
        self.layer = layer
        self.centres = nn.Parameter(torch.zeros(layer.num_classes, layer.num_features))
        Gossip.heard = torch.zeros(())

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        loss = -torch.cdist(activations.flatten(1), self.centres).log_softmax(1).gather(1, labels[:, None]).mean()
        if self.layer.name == "conv3":
            Gossip.heard = activations.detach().mean()
        return loss + (Gossip.heard * activations.mean() if self.layer.name == "conv2" else 0.0)


def test_a_rule_that_leaks_is_found_by_the_layer_that_it_leaks_to(monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = RECIPE.load_data()
    assert find_leaks(RECIPE, train, [1, 2, 3, 4]) == ()
    monkeypatch.setattr(recipes, "make_rule", lambda recipe: Gossip)
    assert find_leaks(RECIPE, train, [1, 2, 3, 4]) == ("conv2",)
    # Cuts behind conv3, whose start weights stay as they are, say nothing of it.
    assert find_leaks(RECIPE, train, [3, 4]) == ()


def test_an_audit_that_changes_nothing_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from unlocked.comparison.leaderboard import inspection

    monkeypatch.setattr(inspection, "_change", lambda blocks: None)
    train, _ = RECIPE.load_data()
    with pytest.raises(RuntimeError, match=r"other start weights from layer conv2 on changed only \[\]"):
        find_leaks(RECIPE, train, [1])
    found = inspect(RECIPE, train)
    assert (found.leaks, found.is_local) == (None, None)
    assert len(found.notes) == 1
    assert found.notes[0].startswith("locality: RuntimeError: other start weights")
    assert found.activation_bytes  # the rest is still told


def test_deep_networks_are_cut_at_a_few_places() -> None:
    assert audited_cuts(1) == []
    assert audited_cuts(5) == [1, 2, 3, 4]
    many = audited_cuts(56)
    assert (len(many), many[0], many[-1]) == (8, 1, 55)
    assert many == sorted(set(many))


def test_memory_and_traffic() -> None:
    local, whole = _inspected("LLS"), _inspected("BP")
    # A message of 64 images: labels of 8 bytes, and float32 activations after their pools.
    shapes = [(32, 4, 4), (64, 2, 2), (128, 2, 2), (512,)]
    assert local.edge_bytes == tuple(8 + 4 * torch.Size(shape).numel() for shape in shapes)
    assert local.parameters == whole.parameters
    # What autograd keeps of the first convolution, its normalisation and its LeakyReLU alone.
    saved = 3 * 64 * 32 * 8 * 8 * 4
    assert local.activation_bytes < whole.activation_bytes
    assert whole.activation_bytes > saved
