"""A vision transformer of the transformers library by every engine: the bits of a plain loop over its own modules."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hugging_face_models import vit
from torch import Tensor

from unlocked.data.order import epoch_order
from unlocked.models import from_transformers
from unlocked.rules import LocalRule
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
