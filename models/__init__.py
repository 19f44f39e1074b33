"""Networks as plain lists of blocks. Knows nothing of rules, optimizers or pipelines."""

from unlocked.models.blocks import Block, ConvBlock, DepthwiseBlock, LinearBlock, OutputBlock, use_tanh
from unlocked.models.dropout import KeyedDropout, replace_dropout, set_dropout_keys
from unlocked.models.initialisation import initialise, key_start_values, keyed_generator
from unlocked.models.networks import mobilenet_v1, mobilenet_v1_small, small_conv, small_conv_l, vgg8, vgg11
from unlocked.models.plain import architecture_of, plain_module, rebuild
from unlocked.models.registry import MODELS, find_model, get_model
from unlocked.models.splitting import split

__all__ = [
    "MODELS",
    "Block",
    "ConvBlock",
    "DepthwiseBlock",
    "KeyedDropout",
    "LinearBlock",
    "OutputBlock",
    "architecture_of",
    "find_model",
    "get_model",
    "initialise",
    "key_start_values",
    "keyed_generator",
    "mobilenet_v1",
    "mobilenet_v1_small",
    "plain_module",
    "rebuild",
    "replace_dropout",
    "set_dropout_keys",
    "small_conv",
    "small_conv_l",
    "split",
    "use_tanh",
    "vgg8",
    "vgg11",
]
