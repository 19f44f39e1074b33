"""Networks by their names: the LLS authors', and those of other local rules' papers."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unlocked.models.blocks import Block
from unlocked.models.language import gpt
from unlocked.models.networks import mobilenet_v1, mobilenet_v1_small, small_conv, small_conv_l, vgg8, vgg11
from unlocked.models.predictive import mlp, vgg8b, vgg11b
from unlocked.models.residual import resnet18, resnet32, resnet110
from unlocked.models.tokens import mlp_mixer, vit

__all__ = ["LANGUAGE_MODELS", "MODELS", "check_model_options", "find_model", "get_model", "model_options"]

MODELS: dict[str, Callable[..., list[Block]]] = {
    "SmallConv": small_conv,
    "SmallConvL": small_conv_l,
    "VGG8": vgg8,
    "VGG11": vgg11,
    "MobileNetV1": mobilenet_v1,
    "MobileNetV1_small": mobilenet_v1_small,
    "MLP": mlp,
    "VGG8B": vgg8b,
    "VGG11B": vgg11b,
    "ResNet18": resnet18,
    "ResNet32": resnet32,
    "ResNet110": resnet110,
    "ViT": vit,
    "MLPMixer": mlp_mixer,
}
_COMMON = ("in_channels", "num_classes", "image_size", "dropout", "seed")
LANGUAGE_MODELS: dict[str, Callable[..., list[Block]]] = {"gpt-mini": gpt}
"""Those that read tokens [T]: `image_size` is (T,), `num_classes` the vocabulary's size, `in_channels` not used."""
_NOT_GIVEN = {"same_padding": False, "upsample": True, "cut_blocks": False}
"""Options that are not None where nobody gives them."""


def find_model(name: str) -> Callable[..., list[Block]]:
    """What makes the network called `name`, with or without the authors' prefix `LLS_`.

    Raises:
        ValueError: the name is not known (lists those that are).
    """
    known = MODELS | LANGUAGE_MODELS
    factory = known.get(name.removeprefix("LLS_"))
    if factory is None:
        raise ValueError(f"model {name!r} is not known; valid, also with the prefix LLS_: {', '.join(known)}")
    return factory


def model_options(name: str) -> list[str]:
    """What the network called `name` takes beside the sizes of images, their classes, dropout and seed.

    Raises:
        ValueError: as `find_model`.
    """
    return [option for option in inspect.signature(find_model(name)).parameters if option not in _COMMON]


def check_model_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are given: not None, and for the switches not what they are anyway.

    Raises:
        ValueError: the name is not known, or an option that the network does not take; says which do.
    """
    known = model_options(name)
    given = {option: value for option, value in options.items() if value != _NOT_GIVEN.get(option)}
    for option in given:
        if option not in known:
            takers = [other for other in (*MODELS, *LANGUAGE_MODELS) if option in model_options(other)]
            raise ValueError(
                f"model {name!r} takes no {option}, but {', '.join(known) or 'no options'}; "
                + (f"it is for {', '.join(takers)}" if takers else "no model takes it")
            )
    return given


def get_model(
    name: str,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> list[Block]:
    """The blocks of the network called `name`, with or without the authors' prefix `LLS_`.

    Args:
        in_channels, num_classes, image_size, dropout, seed: see `unlocked.models.small_conv`.
        options: the network's own (`model_options`), by the names that its function has for them; None is not given.

    Raises:
        ValueError: the name is not known (lists those that are), an option that the network does not take, or a size
            that does not fit it.
    """
    given = check_model_options(name, options)
    return find_model(name)(in_channels, num_classes, image_size, dropout, seed=seed, **given)
