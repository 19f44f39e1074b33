"""Networks as plain lists of blocks. Knows nothing of rules, optimizers or pipelines."""

from unlocked.models.blocks import (
    Block,
    ConvBlock,
    DepthwiseBlock,
    LinearBlock,
    OutputBlock,
    use_average_pools,
    use_tanh,
)
from unlocked.models.dropout import KeyedDropout, replace_dropout, set_dropout_keys
from unlocked.models.hugging_face import from_transformers, frozen_head
from unlocked.models.initialisation import initialise, key_start_values, keyed_generator
from unlocked.models.language import generate, gpt
from unlocked.models.networks import mobilenet_v1, mobilenet_v1_small, small_conv, small_conv_l, vgg8, vgg11
from unlocked.models.plain import architecture_of, plain_module, rebuild
from unlocked.models.predictive import mlp, vgg8b, vgg11b
from unlocked.models.registry import LANGUAGE_MODELS, MODELS, check_model_options, find_model, get_model, model_options
from unlocked.models.residual import resnet18, resnet32, resnet110
from unlocked.models.splitting import split
from unlocked.models.tokens import mlp_mixer, vit

__all__ = [
    "LANGUAGE_MODELS",
    "MODELS",
    "Block",
    "ConvBlock",
    "DepthwiseBlock",
    "KeyedDropout",
    "LinearBlock",
    "OutputBlock",
    "architecture_of",
    "check_model_options",
    "find_model",
    "from_transformers",
    "frozen_head",
    "generate",
    "get_model",
    "gpt",
    "initialise",
    "key_start_values",
    "keyed_generator",
    "mlp",
    "mlp_mixer",
    "mobilenet_v1",
    "mobilenet_v1_small",
    "model_options",
    "plain_module",
    "rebuild",
    "replace_dropout",
    "resnet18",
    "resnet32",
    "resnet110",
    "set_dropout_keys",
    "small_conv",
    "small_conv_l",
    "split",
    "use_average_pools",
    "use_tanh",
    "vgg8",
    "vgg8b",
    "vgg11",
    "vgg11b",
    "vit",
]
