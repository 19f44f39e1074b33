"""Small networks of the transformers library, of random weights, that the tests share."""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# From where each is defined: the library's own face imports every one of its image processors, which takes seconds.
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertForSequenceClassification
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2ForSequenceClassification, GPT2LMHeadModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaForSequenceClassification
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTForImageClassification

WIDTH = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**WIDTH, "vocab_size": 40, "max_position_embeddings": 32}
GROUPED = {**TEXT, "num_key_value_heads": 1}


GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 40, "n_positions": 32}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}


def gpt2(**options: Any) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**{**GPT2, "tie_word_embeddings": False, **options}))


def llama(**options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**GROUPED, **options}))


def llama_classifier(**options: Any) -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(LlamaConfig(**{**GROUPED, "num_labels": 3, "pad_token_id": 0, **options}))


def gpt2_classifier(**options: Any) -> GPT2ForSequenceClassification:
    return GPT2ForSequenceClassification(GPT2Config(**{**GPT2, "num_labels": 3, "pad_token_id": 0, **options}))


def qwen2(**options: Any) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(Qwen2Config(**{**GROUPED, "tie_word_embeddings": False, **options}))


def qwen3(**options: Any) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**{**GROUPED, "head_dim": 8, "tie_word_embeddings": False, **options}))


def gemma2(**options: Any) -> Gemma2ForCausalLM:
    sizes = {**GROUPED, "head_dim": 8, "tie_word_embeddings": False}
    return Gemma2ForCausalLM(Gemma2Config(**{**sizes, **options}))


def bert(**options: Any) -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(**{**TEXT, "num_labels": 3, **options}))


def vit(**options: Any) -> ViTForImageClassification:
    images = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10}
    return ViTForImageClassification(ViTConfig(**{**WIDTH, **images, **options}))


FAMILIES: dict[str, Callable[..., Any]] = {
    "gpt2": gpt2,
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "llama classifier": llama_classifier,
    "gpt2 classifier": gpt2_classifier,
    "bert": bert,
    "vit": vit,
}
