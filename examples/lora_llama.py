"""A Llama of random weights with LoRA adapters, trained by local losses: in one process, or in three.

    python examples/lora_llama.py
    python examples/lora_llama.py --processes 3

Three chunks of two layers. The network's weights are frozen; every chunk trains its own adapters, on cross-entropy
through the network's frozen head and on agreement with the chunk before (ZeroLock's rule). Both commands end in the
same weights, to the last bit, and the network then writes the same text. The text to learn from is bytes of Python's
own textwrap module. Needs transformers and peft: pip install 'unlocked[transformers]'.
"""

import argparse
import inspect
import textwrap
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from unlocked.models import from_transformers, frozen_head
from unlocked.rules import FrozenHeadConsistency
from unlocked.runtime import Processes, Sequential, Trainer

TOKENS = 64


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    adapters = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
    return get_peft_model(LlamaForCausalLM(config), adapters)


def text() -> dict[str, torch.Tensor]:
    """Sequences of bytes, whose next ones are to be told."""
    ids = torch.tensor(list(inspect.getsource(textwrap).encode("ascii")))
    return {"input_ids": ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    processes = parser.parse_args().processes
    model, data = llama(), text()
    rule = partial(FrozenHeadConsistency, head=frozen_head(model), alpha=0.7)
    trainer = Trainer(
        from_transformers(model, layers_per_stage=2),
        rule=rule,
        output_rule=partial(rule, on_scores=True),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        engine=Processes(stages=processes) if processes > 1 else Sequential(),
        seed=0,
    )
    before = trainer.evaluate(data, batch_size=32)
    result = trainer.fit(data, epochs=2, batch_size=8, eval_data=data)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} weights trained, in {len(result.stages)} stages"
    )
    print(f"loss {before.loss:.3f} -> {result.test_loss:.3f} nats per byte, weights_sha256 {result.weights_sha256}")
    start = torch.tensor([list(b"    def ")])
    options = {"attention_mask": torch.ones_like(start), "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    written = model.eval().generate(input_ids=start, **options)
    print(f"text {bytes(written[0].tolist())!r}")


if __name__ == "__main__":
    main()
