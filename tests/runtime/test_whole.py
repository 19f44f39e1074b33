"""Direct feedback alignment against its formula in float64 numpy, and where it is refused."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from unlocked.rules import CrossEntropy
from unlocked.rules.drtp import random_projection
from unlocked.runtime import Streams, Trainer
from unlocked.runtime.job import Engine
from unlocked.runtime.network import build_layer, build_network
from unlocked.runtime.whole import feedback_alignment_network

LR = 0.3


def _blocks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 9), nn.Tanh()), nn.Sequential(nn.Linear(9, 6), nn.Tanh()), nn.Linear(6, 3)]


def test_a_step_is_the_formula() -> None:
    """delta_k = (softmax(logits) - one hot) B_k . f'(z_k); the output layer has the true gradient."""
    local = build_network(_blocks(), input_shape=(4,), num_classes=3, seed=2)
    network = feedback_alignment_network(local)
    for block in network.blocks:
        block.double()
    start = {name: p.detach().numpy().copy() for name, p in network.blocks[0].named_parameters()}
    layer = build_layer(
        network, 0, rule=[], optimizer=partial(torch.optim.SGD, lr=LR), device=torch.device("cpu"), step=None
    )
    assert isinstance(layer.rule, CrossEntropy)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 3, (7,), generator=generator)
    logits = layer.forward(x).numpy()
    layer.update(labels)

    weights = [start[f"body.{name}.body.{'0.' if k < 2 else ''}weight"] for k, name in enumerate(local.names)]
    biases = [start[f"body.{name}.body.{'0.' if k < 2 else ''}bias"] for k, name in enumerate(local.names)]
    inputs = [x.numpy()]
    for weight, bias in zip(weights[:2], biases[:2], strict=True):
        inputs.append(np.tanh(inputs[-1] @ weight.T + bias))
    np.testing.assert_allclose(logits, inputs[2] @ weights[2].T + biases[2], rtol=1e-12)
    e = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[labels.numpy()]
    deltas = [e @ random_projection(local.infos[k]).double().numpy() * (1 - inputs[k + 1] ** 2) for k in range(2)] + [e]
    found = dict(network.blocks[0].named_parameters())
    for k, name in enumerate(local.names):
        prefix = f"body.{name}.body.{'0.' if k < 2 else ''}"
        expected = weights[k] - LR * deltas[k].T @ inputs[k] / 7
        np.testing.assert_allclose(found[prefix + "weight"].detach().numpy(), expected, rtol=1e-10, atol=1e-13)
        expected = biases[k] - LR * deltas[k].mean(0)
        np.testing.assert_allclose(found[prefix + "bias"].detach().numpy(), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("rule", ["DFA", "BP"])
def test_it_learns_in_one_stage_only(rule: str) -> None:
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    labels = x[:, :3].argmax(1)

    def trainer(engine: Engine | str) -> Trainer:
        return Trainer(_blocks(), rule=rule, optimizer=partial(torch.optim.Adam, lr=1e-2), engine=engine)

    result = trainer("sequential").fit((x, labels), epochs=8, batch_size=32, eval_data=(x, labels))
    assert result.test_acc1 is not None
    assert result.test_acc1 > 85
    assert not any("projection" in name for name in result.weights)
    recorded = trainer(Streams(graph_ticks=2)).fit((x, labels), epochs=8, batch_size=32, eval_data=(x, labels))
    assert recorded.weights_sha256 == result.weights_sha256
    with pytest.raises(ValueError, match=f"{rule} is not local: .*engine 'processes'; use engine sequential"):
        trainer("processes")
    for stages in (2, "0-0,1"):
        with pytest.raises(ValueError, match=f"{rule} is not local: .*got stages={stages!r}; leave it out"):
            trainer(Streams(stages=stages))


@pytest.mark.parametrize("rule", ["FA", "LLS", ""])
def test_other_names_are_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="give a rule such as LLS\\(\\), or 'BP' or 'DFA'"):
        Trainer(_blocks(), rule=rule, optimizer=partial(torch.optim.SGD, lr=1.0))
