"""Runs of language models that the tests share: a GPT whose parts carry scores on, and a Llama with adapters."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from hugging_face_models import llama
from peft import LoraConfig, get_peft_model
from torch import Tensor

from unlocked.models import from_transformers, frozen_head, gpt
from unlocked.rules import FrozenHeadConsistency, TaskAndConsistency
from unlocked.runtime import RunResult, Trainer
from unlocked.runtime.job import Engine

__all__ = ["CASES", "train"]

TOKENS = 12


def _text(count: int, seed: int) -> dict[str, Tensor]:
    """Sequences whose every third is padded."""
    mask = torch.ones(count, TOKENS, dtype=torch.int64)
    mask[::3, 7:] = 0
    ids = torch.randint(1, 40, (count, TOKENS), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": mask}


def _gpt() -> dict[str, Any]:
    network = gpt(num_classes=40, image_size=TOKENS, width=16, depth=3, dropout=0.1, local_module_num=3, seed=4)
    return {"model": network, "rule": TaskAndConsistency}


def _lora() -> dict[str, Any]:
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    network = get_peft_model(llama(), config)
    rule = partial(FrozenHeadConsistency, head=frozen_head(network), alpha=0.7)
    return {"model": from_transformers(network, 1), "rule": rule, "output_rule": partial(rule, on_scores=True)}


CASES: Mapping[str, Callable[[], dict[str, Any]]] = {"gpt": _gpt, "lora": _lora}


def train(
    name: str, engine: Engine | str, *, max_steps: int | None = None, **options: Any
) -> tuple[Trainer, RunResult]:
    """Two epochs of 6 micro-batches, the last one smaller."""
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    trainer = Trainer(**CASES[name](), optimizer=optimizer, engine=engine, seed=4, threads=1, **options)
    data = {"batch_size": 8, "eval_data": _text(7, 2), "eval_batch_size": 4, "max_steps": max_steps}
    return trainer, trainer.fit(_text(43, 1), epochs=2, **data)
