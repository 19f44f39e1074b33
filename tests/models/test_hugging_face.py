"""Networks of the transformers library as blocks: the same function, the same parameters, and cuts that can't be."""

import gc
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face_models import FAMILIES, TEXT, bert, gemma2, gpt2, llama, llama_classifier, vit
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.albert.configuration_albert import AlbertConfig
from transformers.models.albert.modeling_albert import AlbertForSequenceClassification
from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration

from unlocked.models import Block, from_transformers, plain_module
from unlocked.rules import LLS
from unlocked.runtime import Trainer
from unlocked.workers.errors import StageError


def batch(network: Any) -> dict[str, Tensor]:
    """Other values and another length than those that the cut was tried with."""
    if network.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(3, 1, 8, 8)}
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[0, 7:] = 0
    given = {"input_ids": torch.randint(1, 40, (3, 11)).masked_fill(mask == 0, 0), "attention_mask": mask}
    if type(network).__name__.startswith("Bert"):
        given["token_type_ids"] = torch.randint(0, 2, (3, 11))
    elif type(network).__name__.startswith("Llama"):
        given["position_ids"] = torch.arange(11).expand(3, 11) + torch.tensor([[0], [3], [5]])
    return given


def chain(blocks: list[Block], inputs: dict[str, Tensor]) -> Tensor:
    main, *_ = inputs
    x = inputs[main]
    for block in blocks:
        takes = block.body.forward.__kwdefaults__ or {}
        x = block.body(x, **{name: value for name, value in inputs.items() if name in takes})
    return x


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", [1, [2, 1], [1, 2, 0]])
def test_the_blocks_are_the_network(family: str, cut: Any) -> None:
    network = FAMILIES[family]().eval()
    inputs = batch(network)
    expected = network(**inputs).logits
    named = dict(network.named_parameters())
    blocks = from_transformers(network, cut)
    assert torch.equal(chain([block.eval() for block in blocks], inputs), expected)
    assert torch.equal(network(**inputs).logits, expected)
    found = {
        name.removeprefix("body.whole."): parameter for block in blocks for name, parameter in block.named_parameters()
    }
    assert found.keys() == named.keys()
    assert all(found[name] is parameter for name, parameter in named.items())
    assert sum(len(list(block.parameters())) for block in blocks) == len(named)
    assert plain_module(blocks) is network


def test_the_last_token_is_the_networks_or_refused() -> None:
    network = llama_classifier()
    torch.manual_seed(0)
    data = batch(network) | {"labels": torch.tensor([0, 1, 2])}
    del data["position_ids"]

    def fit(given: Any) -> Any:
        optimizer = partial(torch.optim.SGD, lr=0.0)
        trainer = Trainer(from_transformers(network, 1), rule=LLS(temperature=0.5), optimizer=optimizer)
        return trainer.fit(given, epochs=1, batch_size=3, eval_data=given).test_loss

    with torch.no_grad():
        expected = float(network.eval()(**data).loss)
    network.train()
    assert fit(data) == pytest.approx(expected, rel=1e-6)
    otherwise = {**data, "input_ids": data["input_ids"].index_fill(1, torch.tensor([10]), 0)}
    message = r"sample 1 ends at token 9 by its padding \(pad_token_id 0\), and at 10 by its attention_mask"
    with pytest.raises(ValueError, match=message):
        fit(otherwise)
    with pytest.raises(StageError, match=message):
        fit([data, otherwise])
    alone = {name: value for name, value in data.items() if name != "attention_mask"}
    with pytest.raises(ValueError, match=r"sample 0 ends at token 6 .* at 10 by the lack of an attention_mask"):
        fit(alone)


def test_gradients_are_the_networks_own() -> None:
    network = llama()
    inputs = batch(network)
    network(**inputs).logits.square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    network.zero_grad()
    chain(from_transformers(network, 2), inputs).square().mean().backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in network.named_parameters())


@pytest.mark.parametrize(
    ("cut", "names"),
    [
        (1, ["layers0", "layers1", "layers2"]),
        (2, ["layers0-1", "layers2"]),
        (7, ["layers0-2"]),
        ([1, 2], ["layers0", "layers1-2"]),
        ([3, 0], ["layers0-2", "head"]),
    ],
)
def test_layers_per_stage(cut: Any, names: list[str]) -> None:
    assert [block.name for block in from_transformers(llama(), cut)] == names


@pytest.mark.parametrize("cut", [0, -1, True, 1.5, [], [1, 1], [0, 3], [1, 0, 2], [4, -1], [1.0, 2.0], "12", None])
def test_numbers_that_do_not_add_up(cut: Any) -> None:
    with pytest.raises(ValueError, match="layers_per_stage is "):
        from_transformers(llama(), cut)


def test_modes_and_configs_stay() -> None:
    network = gpt2()
    network.transformer.h[1].eval()
    modes = [module.training for module in network.modules()]
    config = network.config.to_dict()
    from_transformers(network)
    assert [module.training for module in network.modules()] == modes
    assert network.config.to_dict() == config


def test_no_cache_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = from_transformers(llama(), 2)

    def written(*_: Any, **__: Any) -> None:
        raise AssertionError("a cache was written")

    monkeypatch.setattr(Cache, "update", written)
    chain(blocks, {"input_ids": torch.ones(2, 4, dtype=torch.int64)})


def test_nothing_outlives_a_forward() -> None:
    """Where a part ends, forward() is left by an exception, whose traceback could hold every activation."""
    blocks = from_transformers(llama(), 1)
    gc.collect()
    gc.disable()
    try:
        x = torch.randn(2, 4, 16)
        output = blocks[1].body(x)
        held = weakref.ref(x)
        del x, output
        assert held() is None
    finally:
        gc.enable()


def test_the_head_apart() -> None:
    network = llama().eval()
    inputs = batch(network)
    first, last = from_transformers(network, [2, 1])
    x = first.body(inputs["input_ids"])
    assert last.body.head is network.lm_head
    hidden = last.body.hidden(x)
    assert hidden.shape == (3, 11, 16)
    assert torch.equal(network.lm_head(hidden), last.body(x))
    assert sorted(last.state_dict()) == sorted(set(last.state_dict()))
    capped = from_transformers(gemma2(final_logit_softcapping=0.01), [2, 1])
    assert capped[-1].body.head is None  # the scores are squashed after the head
    assert from_transformers(bert(), [2, 1])[-1].body.head is None


def test_tied_weights_are_refused_or_untied(tmp_path: Path) -> None:
    network = gpt2(tie_word_embeddings=True).eval()
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to transformer\.wte\.weight.*untie=True"):
        from_transformers(network, 1)
    inputs = batch(network)
    expected = network(**inputs).logits
    assert torch.equal(chain(from_transformers(network, 3), inputs), expected)  # one block may hold both
    blocks = from_transformers(network, 1, untie=True)
    assert torch.equal(chain(blocks, inputs), expected)
    assert network.lm_head.weight is not network.transformer.wte.weight
    with torch.no_grad():
        network.lm_head.weight.mul_(2)
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path).eval()
    assert network.config.tie_word_embeddings is again.config.tie_word_embeddings is False
    assert torch.equal(again(**inputs).logits, network(**inputs).logits)
    assert not torch.equal(again(**inputs).logits, expected)


def test_only_adapters_are_trained_of_a_tied_frozen_network() -> None:
    network = get_peft_model(gpt2(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["c_attn"]))
    network.eval()
    inputs = batch(network.get_base_model())
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    expected = network(**inputs).logits
    blocks = from_transformers(network, [1, 2])
    assert torch.equal(chain(blocks, inputs), expected)
    trained = [(name, p) for block in blocks for name, p in block.named_parameters() if p.requires_grad]
    assert len(trained) == 6
    assert all("lora_" in name for name, _ in trained)
    assert {id(p) for _, p in trained} == {id(p) for p in network.parameters() if p.requires_grad}
    assert plain_module(blocks) is network


REFUSED = {
    "a plain module": (lambda: nn.Linear(2, 2), r"model is a Linear; it must be a PreTrainedModel.*split"),
    "an encoder with a decoder": (
        lambda: T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=9)),
        "T5ForConditionalGeneration is an encoder with a decoder",
    ),
    "a layer that is run again": (
        lambda: AlbertForSequenceClassification(AlbertConfig(**{**TEXT, "embedding_size": 8})),
        r"in the order \[0, 0, 0\]",
    ),
    "prompts": (
        lambda: get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        "the adapters are prompts",
    ),
    "a block without adapters": (
        lambda: get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 2])),
        "block layers1 has no adapters to train",
    ),
    "layers of nobody": (
        lambda: _undeclared(vit()),
        r"declares no plan for pipelines.*\(none\) it holds no list of them",
    ),
}


def _undeclared(network: Any) -> Any:
    for one in (network, network.vit):
        one._no_split_modules = None
        one._can_record_outputs = None
    return network


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        from_transformers(make(), 1)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'unlocked\[transformers\]'"):
        from_transformers(nn.Linear(2, 2))


def test_the_import_is_left_to_those_who_need_it() -> None:
    code = "import sys, unlocked.runtime; assert not {'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_network_whose_layers_read_more_is_refused() -> None:
    network = llama()

    class Reading(type(network.model)):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **named: Any) -> Any:
            x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            output = super().forward(inputs_embeds=x, **named)
            output.last_hidden_state = output.last_hidden_state + x
            return output

    network.model.__class__ = Reading
    assert len(from_transformers(network, 3)) == 1
    with pytest.raises(ValueError, match="the chain of its blocks gives other values than itself"):
        from_transformers(network, 1)
