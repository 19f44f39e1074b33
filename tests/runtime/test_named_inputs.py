"""Every tensor that the data brings beside its samples reaches a layer, or is refused by name."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.rules import LLS
from unlocked.runtime import Trainer


class MaskedMean(nn.Module):
    """The example of docs/tasks.md, whose mask has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 2)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            return self.linear(x.mean(1))
        counts = attention_mask[..., None].float()
        return self.linear((x * counts).sum(1) / counts.sum(1))


class TakesAnything(MaskedMean):
    def forward(self, x: Tensor, **named: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, **named)


def data(**more: Tensor) -> dict[str, Tensor]:
    ids = torch.randint(1, 8, (64, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < 4).expand(64, 6)
    return {"input_ids": ids, "attention_mask": mask, "labels": (ids[:, :4] == 3).any(1).long(), **more}


def fit(last: nn.Module, given: dict[str, Tensor], rule: Any = None) -> Trainer:
    trainer = Trainer(
        [nn.Embedding(8, 16), last], rule=rule or LLS(), optimizer=partial(torch.optim.SGD, lr=0.5), threads=1
    )
    trainer.fit(given, epochs=2, batch_size=16, eval_data=given)
    return trainer


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_with_a_default_reaches_its_layer(compiled: bool) -> None:
    torch.manual_seed(0)
    plain = MaskedMean()
    module = torch.compile(plain, backend="eager") if compiled else plain
    trainer = fit(module, data())
    given = {name: value for name, value in data().items() if name != "labels"}
    embedding = trainer.model[0]
    with torch.no_grad():
        expected = plain(embedding(given["input_ids"]), given["attention_mask"])
        without = plain(embedding(given["input_ids"]))
    assert torch.allclose(trainer.predict(given), expected, atol=1e-6)
    assert not torch.allclose(expected, without, atol=1e-3)


def test_the_mask_counts_in_training() -> None:
    """One step of the output layer, by hand."""
    torch.manual_seed(0)
    module, embedding = MaskedMean(), nn.Embedding(8, 16)
    start = {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}
    given = data()
    x = embedding.weight.detach()[given["input_ids"]]
    scores = torch.func.functional_call(module, start, (x, given["attention_mask"]))
    F.cross_entropy(scores, given["labels"]).backward()
    expected = {name: value.detach() - 0.5 * value.grad for name, value in start.items() if value.grad is not None}
    model = [embedding, torch.compile(module, backend="eager")]
    trainer = Trainer(model, rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.5), threads=1)
    trainer.fit(given, epochs=1, batch_size=64)
    for name, value in module.named_parameters():
        assert torch.allclose(value, expected[name], atol=1e-6), name


REFUSED = {
    "a Sequential around it": (
        lambda: nn.Sequential(MaskedMean()),
        data(),
        "layer sequential2 holds a MaskedMean that reads attention_mask in an nn.Sequential, which hands on its input "
        r"alone; make it a layer by itself, or .* forward\(x, attention_mask\)",
    ),
    "two Sequentials around a compiled one": (
        lambda: nn.Sequential(nn.Identity(), nn.Sequential(torch.compile(MaskedMean(), backend="eager"))),
        data(),
        "layer sequential2 holds a MaskedMean that reads attention_mask in an nn.Sequential",
    ),
    "a key that is spelt otherwise": (
        MaskedMean,
        {("attention_msk" if name == "attention_mask" else name): value for name, value in data().items()},
        "the data brings attention_msk, which no layer reads; beside their input the layers read attention_mask: give",
    ),
    "one more key": (
        MaskedMean,
        data(weights=torch.ones(64), places=torch.ones(64, 6)),
        r"the data brings weights, places, which no layer reads; beside their input the layers read attention_mask: "
        r"give a layer's forward\(\) a parameter of that name, or leave the key out",
    ),
    "a forward that takes anything": (
        TakesAnything,
        data(),
        "the data brings attention_mask, which no layer reads; beside their input the layers read nothing: give",
    ),
}


@pytest.mark.parametrize(("last", "given", "told"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("rule", [LLS(), "BP"], ids=["LLS", "BP"])
def test_a_tensor_without_a_reader_is_refused(last: Any, given: dict[str, Tensor], told: str, rule: Any) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        fit(last(), given, rule)
    assert "\n" not in str(caught.value)


def test_the_task_reads_the_mask_of_tokens() -> None:
    """Without targets of its own a language model's are the tokens that the mask shows."""
    ids = data()["input_ids"]
    model = [nn.Embedding(8, 16), nn.Linear(16, 8)]
    trainer = Trainer(model, rule=LLS(), optimizer=partial(torch.optim.SGD, lr=0.1))
    trainer.fit({"input_ids": ids, "attention_mask": data()["attention_mask"]}, epochs=1, batch_size=16)
