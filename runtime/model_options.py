"""What a network can be told beside its name and its sizes: the options of `unlocked.models`, as settings."""

from dataclasses import dataclass

from unlocked.runtime.fields import setting

__all__ = ["ModelOptions"]

_WIDEST = 16384  # features: a linear map of that width already has a gigabyte of weights


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Each is for some of the networks alone; `unlocked.models.check_model_options` refuses it elsewhere."""

    local_module_num: int | None = setting(
        None,
        "of the ResNets and gpt-mini: local modules to cut the network into, the last with the classifier (unless "
        "given: a layer for the stem, or embedding, for each block and for the classifier)",
        at_least=1,
        at_most=1024,
    )
    cut_blocks: bool = setting(
        False, "of the ResNets: residual blocks are two layers each, and what skips the first travels beside its output"
    )
    width: int | None = setting(
        None,
        "of MLP (1024), ViT (192), MLPMixer (128) and gpt-mini (256): features of a layer or of a token",
        flag="--model-width",
        at_least=1,
        at_most=_WIDEST,
    )
    depth: int | None = setting(
        None,
        "of MLP (3), ViT (6), MLPMixer (8) and gpt-mini (6): their layers, beside patches or embedding and output",
        flag="--model-depth",
        at_least=1,
        at_most=1024,
    )
    patch_size: int | None = setting(
        None,
        "of ViT and MLPMixer: side of a patch in pixels (unless given: 16, 8, 4, 2 or 1, by the image)",
        at_least=1,
        at_most=1024,
    )
    feat_mult: int | None = setting(
        None, "of VGG8B and VGG11B: factor of their convolutions' widths (1)", at_least=1, at_most=64
    )
    same_padding: bool = setting(False, "of the MobileNets: pad depthwise convolutions by 1, not by their stride")
    upsample: bool = setting(
        True, off="of the authors' networks: let no pool give more values than it is given, where images are small"
    )
