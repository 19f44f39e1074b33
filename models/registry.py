"""Networks by the authors' names."""

from collections.abc import Callable, Sequence

from unlocked.models.blocks import Block
from unlocked.models.networks import mobilenet_v1, mobilenet_v1_small, small_conv, small_conv_l, vgg8, vgg11

__all__ = ["MODELS", "find_model", "get_model"]

MODELS: dict[str, Callable[..., list[Block]]] = {
    "SmallConv": small_conv,
    "SmallConvL": small_conv_l,
    "VGG8": vgg8,
    "VGG11": vgg11,
    "MobileNetV1": mobilenet_v1,
    "MobileNetV1_small": mobilenet_v1_small,
}


def find_model(name: str) -> Callable[..., list[Block]]:
    """What makes the network called `name`, with or without the authors' prefix `LLS_`.

    Raises:
        ValueError: the name is not known (lists those that are).
    """
    factory = MODELS.get(name.removeprefix("LLS_"))
    if factory is None:
        raise ValueError(f"model {name!r} is not known; valid, also with the prefix LLS_: {', '.join(MODELS)}")
    return factory


def get_model(
    name: str,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: int | Sequence[int] = 32,
    dropout: float = 0.0,
    same_padding: bool = False,
    upsample: bool = True,
    seed: int = 0,
) -> list[Block]:
    """The blocks of the network called `name`, with or without the authors' prefix `LLS_`.

    Args:
        in_channels, num_classes, image_size, dropout, upsample, seed: see `unlocked.models.small_conv`.
        same_padding: for the MobileNets alone, see `unlocked.models.mobilenet_v1`.

    Raises:
        ValueError: the name is not known (lists those that are), or a size does not fit the network.
    """
    factory = find_model(name)
    if not same_padding:
        return factory(in_channels, num_classes, image_size, dropout, upsample=upsample, seed=seed)
    if not name.removeprefix("LLS_").startswith("MobileNet"):
        raise ValueError(f"same_padding is for the MobileNets; model {name!r} pads by 1 anyway, so leave it out")
    return factory(in_channels, num_classes, image_size, dropout, same_padding=True, upsample=upsample, seed=seed)
