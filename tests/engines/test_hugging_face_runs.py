"""Networks of the transformers library by every engine: a plain loop over the library's own modules, bit for bit."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hugging_face_models import gpt2, llama, vit
from largest import Largest
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from unlocked.data.order import epoch_order
from unlocked.kernels import vocabulary
from unlocked.models import from_transformers, frozen_head
from unlocked.rules import LLS, FrozenHeadConsistency, LocalRule
from unlocked.runtime import Processes, RunResult, Streams, Trainer
from unlocked.runtime.job import Engine

STEPS, ROWS = 6, 16


class FirstTokens(LocalRule):
    """The class token's first features are the scores."""

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(activations[:, 0, :10], labels)


class Scores(LocalRule):
    """The output layer's loss by torch's own operation."""

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(activations, labels)


def data(count: int = STEPS * ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)


def start() -> Any:
    torch.manual_seed(3)
    return vit(attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.2)


def trained(engine: Engine | str, network: Any, **options: Any) -> tuple[Trainer, RunResult]:
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    trainer = Trainer(
        from_transformers(network, 1), rule=FirstTokens, optimizer=optimizer, engine=engine, seed=4, **options
    )
    return trainer, trainer.fit(data(), epochs=1, batch_size=ROWS, eval_data=data(20))


def test_the_loop_is_that_of_the_librarys_modules() -> None:
    torch.manual_seed(3)
    network = vit()  # without dropout, whose masks are keyed here
    again = copy.deepcopy(network).to(memory_format=torch.channels_last)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    blocks = from_transformers(network, [1, 2])
    trainer = Trainer(blocks, rule=FirstTokens, output_rule=Scores, optimizer=optimizer, seed=4)
    result = trainer.fit(data(), epochs=1, batch_size=ROWS)
    inner = again.vit
    parts = [[inner.embeddings, inner.layers[0]], [*inner.layers[1:], inner.layernorm, again.classifier]]
    optimizers = [torch.optim.SGD([p for m in part for p in m.parameters()], lr=0.1) for part in parts]
    images, labels = data()
    for rows in epoch_order(len(images), seed=4, epoch=0).split(ROWS):
        x = inner.layers[0](inner.embeddings(images[rows]))
        losses = [F.cross_entropy(x[:, 0, :10], labels[rows])]
        y = x.detach().contiguous()  # as an edge delivers it
        for layer in inner.layers[1:]:
            y = layer(y)
        losses.append(F.cross_entropy(again.classifier(inner.layernorm(y)[:, 0]), labels[rows]))
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for (name, kept), wanted in zip(network.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(kept, wanted), name
    assert result.steps == STEPS


@pytest.mark.alone
def test_every_engine_gives_the_same_bits_and_the_module_back(tmp_path: Path) -> None:
    engines: list[Engine | str] = ["sequential", Streams(stages=2), Processes(stages=2)]
    digests = []
    for number, engine in enumerate(engines):
        network = start()
        trainer, result = trained(engine, network)
        digests.append((result.weights_sha256, result.test_loss, tuple(result.local_losses.items())))
        images = data(5)[0]
        scores = network.eval()(images).logits
        assert torch.equal(trainer.predict(images), scores)
        assert trainer.module is network
        network.save_pretrained(tmp_path / str(number))
        loaded = type(network).from_pretrained(tmp_path / str(number))
        assert torch.equal(loaded(images).logits, scores)
        start().load_state_dict(result.state_dict(), strict=True)
    assert digests[0] == digests[1] == digests[2]


TOKENS = 12


def text(count: int = 24) -> dict[str, Tensor]:
    """Sequences whose every third is padded."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(count, TOKENS, dtype=torch.int64)
    mask[::3, 7:] = 0
    return {"input_ids": torch.randint(1, 40, (count, TOKENS), generator=generator), "attention_mask": mask}


def adapted() -> Any:
    """A Llama whose adapters alone are trained, with dropout before them."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    return get_peft_model(llama(num_hidden_layers=6), config)


def trained_on_text(engine: Engine | str, network: Any, hand_on: str = "scores") -> tuple[Trainer, RunResult]:
    """By ZeroLock's rule, in its three chunks."""
    rule = partial(FrozenHeadConsistency, head=frozen_head(network), alpha=0.7, hand_on=hand_on)
    trainer = Trainer(
        from_transformers(network, 2),
        rule=rule,
        output_rule=partial(rule, on_scores=True),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        engine=engine,
        seed=4,
    )
    return trainer, trainer.fit(text(), epochs=2, batch_size=8, eval_data=text(7), eval_batch_size=4)


def continued(network: Any) -> list[list[int]]:
    """What it writes on, greedily, after four tokens."""
    ids = text()["input_ids"][:3, :4]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written: Tensor = network.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return written.tolist()


@pytest.mark.alone
def test_adapters_are_trained_alike_by_every_engine(tmp_path: Path) -> None:
    found = []
    for engine in ("sequential", Streams(stages=3), Processes(stages=3)):
        network = adapted()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        _, result = trained_on_text(engine, network)
        changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == {name for name, p in network.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in changed)
        found.append((result.weights_sha256, result.test_loss, result.local_losses, continued(network)))
    assert found[0] == found[1] == found[2]
    _, other = trained_on_text("sequential", adapted(), "hidden")  # which makes the same scores again
    assert other.local_losses == pytest.approx(found[0][2], rel=1e-5)
    network.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    evaluated = text(7)
    with torch.no_grad():
        scores = network(**evaluated).logits[:, :-1]
    targets = evaluated["input_ids"].masked_fill(evaluated["attention_mask"] == 0, -100)[:, 1:]
    loss = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert found[0][1] == pytest.approx(float(loss), abs=1e-6)  # tokens are weighted alike, whatever their batch


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_scores_of_a_vocabulary_are_never_whole(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ZeroLock's rule, in training and evaluation, the output layer's as well."""
    monkeypatch.setattr(vocabulary, "PIECE", 64 * 3000)
    torch.manual_seed(3)
    network = get_peft_model(llama(vocab_size=3000), LoraConfig(r=2, target_modules=["q_proj"]))
    rule = partial(FrozenHeadConsistency, head=frozen_head(network), alpha=0.7)
    options: Any = {"rule": rule, "output_rule": partial(rule, on_scores=True), "kernels": kernels, "seed": 4}
    trainer = Trainer(from_transformers(network, 2), optimizer=partial(torch.optim.SGD, lr=0.1), **options)
    tokens = torch.randint(3000, (16, 16), generator=torch.Generator().manual_seed(1))
    with Largest() as largest:
        trainer.fit({"input_ids": tokens}, epochs=1, batch_size=16, eval_data={"input_ids": tokens})
    whole = 16 * 16 * 3000
    assert 64 * 3000 <= largest.most < whole / 2, largest.most


def test_optimizer_state_is_of_the_adapters_alone(tmp_path: Path) -> None:
    network = adapted()
    blocks = from_transformers(network, 2)
    optimizers: list[torch.optim.Optimizer] = []

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.Adam(parameters))
        return optimizers[-1]

    Trainer(blocks, rule=LLS(temperature=0.5), optimizer=make, seed=4).fit(text(), epochs=1, batch_size=8)
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    stepped = [p for one in optimizers for p, state in one.state.items() if state]
    assert {id(p) for p in stepped} == trained
    assert len(stepped) == len(trained) == 24


class Small(LocalRule):
    """Hidden states are drawn to zero."""

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        return activations.square().mean()


def test_the_loop_of_a_language_model_is_that_of_the_librarys_modules() -> None:
    torch.manual_seed(3)
    network = llama()
    again = copy.deepcopy(network)
    data = text(16)
    optimizer = partial(torch.optim.SGD, lr=0.5)
    trainer = Trainer(from_transformers(network, [1, 2]), rule=Small, optimizer=optimizer, seed=4)
    result = trainer.fit(data, epochs=1, batch_size=8)
    base = again.model
    parts = [[base.embed_tokens, base.layers[0]], [*base.layers[1:], base.norm, again.lm_head]]
    optimizers = [torch.optim.SGD([p for m in part for p in m.parameters()], lr=0.5) for part in parts]
    losses = []
    for rows in epoch_order(16, seed=4, epoch=0).split(8):
        ids, padding = data["input_ids"][rows], data["attention_mask"][rows]
        places = torch.arange(TOKENS)[None]
        x = base.embed_tokens(ids)
        mask = create_causal_mask(
            config=base.config, inputs_embeds=x, attention_mask=padding, cache=None, position_ids=places
        )
        turns = base.rotary_emb(x, position_ids=places)
        x = base.layers[0](x, attention_mask=mask, position_embeddings=turns, position_ids=places)
        y = x.detach()
        for layer in base.layers[1:]:
            y = layer(y, attention_mask=mask, position_embeddings=turns, position_ids=places)
        targets = ids.masked_fill(padding == 0, -100)[:, 1:].flatten()
        last = F.cross_entropy(again.lm_head(base.norm(y))[:, :-1].flatten(0, 1), targets, ignore_index=-100)
        losses.append((float(last.detach()), int((targets != -100).sum())))
        for loss, one in zip((x.square().mean(), last), optimizers, strict=True):
            one.zero_grad()
            loss.backward()
            one.step()
    own = dict(network.named_parameters())
    for name, parameter in again.named_parameters():
        if name.startswith(("model.embed", "model.layers.0")):
            assert torch.equal(own[name], parameter), name
        torch.testing.assert_close(own[name], parameter, rtol=0, atol=2e-6)  # the head's loss is taken in pieces
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert result.local_losses["layers1-2"] == pytest.approx(mean, abs=2e-6)


def test_dropout_of_gpt2_is_keyed() -> None:
    digests = set()
    for engine in ("sequential", Streams(stages=2)):
        torch.manual_seed(3)
        network = gpt2(attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2)
        trainer = Trainer(
            from_transformers(network, [2, 1]),
            rule=LLS(temperature=0.5),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            engine=engine,
            seed=4,
        )
        torch.manual_seed(len(digests) + 10)  # what the caller draws has no part in it
        digests.add(trainer.fit(text(16), epochs=1, batch_size=8).weights_sha256)
    assert len(digests) == 1
