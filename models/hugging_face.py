"""Networks of the transformers library as lists of blocks, cut by what the library itself declares."""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from unlocked.models.blocks import Block, Origin
from unlocked.models.errors import first_line
from unlocked.models.parts import MaskedPart, Part, Skeleton, TokenPart, accepted, check_last_tokens, run_whole

__all__ = ["from_transformers", "frozen_head"]

_PROBE_TOKENS = 8


def from_transformers(
    model: nn.Module,
    layers_per_stage: int | Sequence[int] = 1,
    *,
    untie: bool = False,
    example: Mapping[str, Tensor] | None = None,
) -> list[Block]:
    """The blocks of a network of the transformers library, or of one with adapters by peft.

        blocks = from_transformers(LlamaForCausalLM(config), layers_per_stage=2)

    Where the layers are comes from the library's own plan for pipelines (`base_model_pp_plan`), or from the modules
    that it says may not be split (`_no_split_modules`). Every block runs the network's own forward(), in which the
    other blocks' modules are passed over, without caches: masks and positions are made as the network makes them, and
    the chain of the blocks gives what the network gives, bit for bit, which is tried here with a small micro-batch. The
    embedding is the first block's, the last norm and the head are the last one's.

    The blocks share the network's modules, as no copy is made: training leaves the weights in `model`, whose
    `save_pretrained` and `generate` go on working. What requires no gradient stays frozen; with LoRA the adapters alone
    are trained.

    Args:
        model: a `PreTrainedModel` with a head, or a `PeftModel` around one.
        layers_per_stage: transformer layers in each block: one number (the last block may have fewer), or one for each
            block, such as [4, 4, 3]. A last 0 makes the norm and the head a block of their own.
        untie: gives a head that is tied to the embedding weights of its own, with the same values, and says so in the
            network's config (`tie_word_embeddings`).
        example: a micro-batch to try the network with, by the names of its arguments. Default: tokens, or an image as
            the config describes it.

    Raises:
        ValueError: no such network, or one that can't be cut: no list of layers that the library declares, an encoder
            with a decoder, layers that read more than what the one before gives, weights that two blocks share
            (names them); numbers that don't add up to the layers; a block without adapters where others have some.
    """
    network = _network(model)
    name = type(network).__name__
    layers = _layers(network)
    micro_batch = _example(network) if example is None else dict(example)
    try:
        with _evaluating(network):
            skeleton = Skeleton(network, layers, micro_batch)
    except (RuntimeError, TypeError, IndexError, AttributeError, KeyError, AssertionError) as error:
        raise ValueError(f"{name} can't be run on {_told(micro_batch)}: {first_line(error)}; give example") from error
    ranges = _ranges(layers_per_stage, len(skeleton.layers), f"{name}.{layers}")
    if len(ranges) > 1:
        skeleton.check()
    copies = _handle_ties(network, skeleton, ranges, untie)
    blocks = []
    for number, (begin, end) in enumerate(ranges, start=1):
        whole, entrance = skeleton.part(begin, end, number == len(ranges), copies)
        kind = _kind_of_part(network, first=begin == 0)
        part = kind(whole, entrance, _reads(network, first=begin == 0))
        block = Block.wrap(part, _name(layers, begin, end, len(skeleton.layers)), layout="tokens")
        block.origin = Origin(module=model)
        blocks.append(block)
    with _evaluating(network, *blocks):
        try:
            _check_chain(network, blocks, micro_batch)
        except ValueError:
            if not _find_last_tokens(network, blocks):
                raise
            _check_chain(network, blocks, micro_batch)
        _offer_head(network, blocks, micro_batch)
    _check_adapters(model, blocks)
    return blocks


def frozen_head(model: nn.Module) -> Part:
    """A copy of what follows a language model's layers, the last norm and the head, frozen: [B, T, D] -> [B, T, V].

    What every layer may be read out by (`unlocked.rules.FrozenHeadConsistency`). Its `hidden` is the norm, its `head`
    the linear map.

    Raises:
        ValueError: as `from_transformers`; or the scores are not what one linear map gives.
    """
    network = _network(model)
    with _evaluating(network):
        skeleton = Skeleton(network, _layers(network), _example(network))
    count = len(skeleton.layers)
    whole, entrance = skeleton.part(count, count, last=True)
    part = copy.deepcopy(_kind_of_part(network, first=False)(whole, entrance, _reads(network, first=False)))
    part.requires_grad_(False).eval()
    hidden = torch.linspace(-1, 1, 2 * network.config.get_text_config().hidden_size).view(1, 2, -1)
    if not _has_head(part, network, hidden):
        raise ValueError(
            f"{type(network).__name__} has no head that is one linear map of the last norm's hidden states"
        )
    return part


def _network(model: nn.Module) -> Any:
    """The network itself, without what peft wraps around it."""
    try:
        from transformers import PreTrainedModel
    except ImportError:
        raise ValueError(
            "from_transformers needs the transformers library: pip install 'unlocked[transformers]'"
        ) from None
    network: Any = model
    if hasattr(network, "peft_config") and hasattr(network, "get_base_model"):
        if any(getattr(config, "is_prompt_learning", False) for config in network.peft_config.values()):
            raise ValueError(
                "the adapters are prompts, which are put before the layers by a forward() of peft's own; adapters "
                "inside the layers (LoRA and its kin) can be cut"
            )
        network = network.get_base_model()
    if not isinstance(network, PreTrainedModel):
        raise ValueError(
            f"model is a {type(network).__name__}; it must be a PreTrainedModel of transformers, or a PeftModel around "
            "one. Other networks in one module are cut by unlocked.models.split(model, at=[...])"
        )
    if getattr(network.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(network).__name__} is an encoder with a decoder, whose every layer reads the encoder's output; a "
            "layer reads what the one before it gives"
        )
    return network


def _layers(network: nn.Module) -> str:
    """The name of the one nn.ModuleList of the network's layers."""
    base = getattr(network, "base_model", network)
    prefix = next((name for name, module in network.named_modules() if module is base and name), "")
    plan = getattr(getattr(network, "config", None), "base_model_pp_plan", None) or {}
    for name, (_, gives) in plan.items():
        module = _submodule(base, name)
        if isinstance(module, nn.ModuleList):
            if len(gives) != 1:
                raise ValueError(
                    f"the layers {name} of {type(network).__name__} hand {', '.join(gives)} on, by the library's plan "
                    "for pipelines; a layer hands one tensor on"
                )
            return f"{prefix}.{name}" if prefix else str(name)
    kinds = set(_whole_modules(base)) | set(_whole_modules(network))
    lists = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(type(one).__name__ in kinds for one in module)
    ]
    if len(lists) != 1:
        found = f"{len(lists)} lists of them ({', '.join(lists)})" if lists else "no list of them"
        raise ValueError(
            f"{type(network).__name__} declares no plan for pipelines, and of the modules that it says may not be "
            f"split ({', '.join(sorted(kinds)) or 'none'}) it holds {found}; one is needed to cut it. Write the list "
            "of blocks by hand (unlocked.models.Block)"
        )
    return lists[0]


def _whole_modules(network: nn.Module) -> Iterator[str]:
    """The names of the classes that may not be split, and of those whose outputs are the hidden states."""
    yield from getattr(network, "_no_split_modules", None) or ()
    recorded = (getattr(network, "_can_record_outputs", None) or {}).get("hidden_states")
    for one in recorded if isinstance(recorded, list) else [recorded]:
        kind = getattr(one, "target_class", one)
        if isinstance(kind, type):
            yield kind.__name__


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _example(network: Any) -> dict[str, Tensor]:
    """A micro-batch of two by the config: tokens, the second row's end padded, or images."""
    main, config = network.main_input_name, network.config
    if main == "input_ids":
        text = config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None) or _PROBE_TOKENS
        tokens = min(_PROBE_TOKENS, longest)
        ids = (torch.arange(2 * tokens).view(2, tokens) * 7 + 1) % text.vocab_size
        padding = getattr(text, "pad_token_id", None)
        given = {"input_ids": ids}
        if "attention_mask" in accepted(network):
            given["attention_mask"] = torch.ones_like(ids)
            given["attention_mask"][1, tokens // 2 :] = 0
            if padding is not None:
                ids[ids == padding] = (padding + 1) % text.vocab_size
                ids[1, tokens // 2 :] = padding
        return given
    sizes = getattr(config, "image_size", None)
    if main == "pixel_values" and sizes is not None:
        height, width = (sizes, sizes) if isinstance(sizes, int) else sizes
        channels = getattr(config, "num_channels", 3)
        shape = (2, channels, height, width)
        return {"pixel_values": torch.linspace(-1, 1, 2 * channels * height * width).view(shape)}
    raise ValueError(
        f"{type(network).__name__} reads {main}, and its config does not tell what they are; give example={{{main!r}: "
        "a tensor [B, ...]}"
    )


def _ranges(layers_per_stage: int | Sequence[int], count: int, where: str) -> list[tuple[int, int]]:
    """(first layer, one after the last) of every block."""
    if isinstance(layers_per_stage, int) and not isinstance(layers_per_stage, bool):
        if layers_per_stage < 1:
            raise ValueError(f"layers_per_stage is {layers_per_stage}; it must be positive, at most {count}")
        return [(i, min(i + layers_per_stage, count)) for i in range(0, count, layers_per_stage)]
    sizes = list(layers_per_stage) if isinstance(layers_per_stage, Sequence) else [layers_per_stage]
    whole = bool(sizes) and all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    if not whole or min(sizes[:-1], default=1) < 1 or sizes[-1] < 0 or sum(sizes) != count:
        raise ValueError(
            f"layers_per_stage is {layers_per_stage!r}, but {where} are {count} layers; give a number, or positive "
            f"numbers that add up to {count}, such as {_even(count)} (a last 0 is a block of the head alone)"
        )
    ends = list(accumulate(sizes))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _even(count: int) -> list[int]:
    return [count - count // 2, count // 2] if count > 1 else [count]


def _name(layers: str, begin: int, end: int, count: int) -> str:
    kind = layers.rpartition(".")[2]
    if begin == end:
        return "head"
    return f"{kind}{begin}" if end == begin + 1 else f"{kind}{begin}-{end - 1}"


def _kind_of_part(network: Any, *, first: bool) -> type[Part]:
    if network.main_input_name != "input_ids" or "attention_mask" not in accepted(network):
        return Part
    return TokenPart if first and "token_type_ids" in accepted(network) else MaskedPart


def _reads(network: Any, *, first: bool) -> str:
    if first or "inputs_embeds" not in accepted(network):
        return str(network.main_input_name)
    return "inputs_embeds"


def _handle_ties(network: Any, skeleton: Skeleton, ranges: Sequence[tuple[int, int]], untie: bool) -> list[str]:
    """Weights that lie on both sides of the layers: untied, or copied where they are frozen, or refused.

    Returns: the modules after the layers of which the last block needs a copy.
    """
    if len(ranges) == 1:
        return []
    before = dict(_held(network, skeleton.around("before")))
    owners = {id(parameter): name for name, parameter in before.items()}
    copies = []
    for outer in skeleton.around("after"):
        for name, parameter in list(_held(network, [outer])):
            if (first := owners.get(id(parameter))) is None:
                continue
            module = network.get_submodule(outer)
            if untie:
                _untie(network, name)
            elif not any(one.requires_grad for one in module.parameters()):
                copies.append(outer)
            else:
                raise ValueError(
                    f"{type(network).__name__} ties {name} to {first}, which lies in another block, and every block "
                    "trains its weights alone; give untie=True (the head then has weights of its own, with the same "
                    "values), a config with tie_word_embeddings=False, or one block"
                )
    return copies


def _held(network: nn.Module, modules: Iterable[str]) -> Iterator[tuple[str, nn.Parameter]]:
    for outer in modules:
        for name, parameter in network.get_submodule(outer).named_parameters(remove_duplicate=False):
            yield f"{outer}.{name}", parameter


def _untie(network: Any, name: str) -> None:
    path, _, key = name.rpartition(".")
    module = network.get_submodule(path)
    old = getattr(module, key)
    setattr(module, key, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    for config in (network.config, network.config.get_text_config()):
        config.tie_word_embeddings = False
    tied = getattr(network, "all_tied_weights_keys", None)
    if isinstance(tied, dict):
        tied.pop(name, None)


def _check_chain(network: nn.Module, blocks: Sequence[Block], example: Mapping[str, Tensor]) -> None:
    """Raises: ValueError: the chain of the blocks gives other bits than the network."""
    main, *_ = example
    x = example[main]
    named = {name: value for name, value in example.items() if name != main}
    with torch.no_grad():
        expected = run_whole(network, example)
        for block in blocks:
            takes = accepted(block.body)
            try:
                x = block.body(x, **{name: value for name, value in named.items() if name in takes})
            except (RuntimeError, TypeError, IndexError, AttributeError, KeyError, AssertionError) as error:
                raise ValueError(_apart(network, block, first_line(error))) from error
    if x.shape != expected.shape or not torch.equal(x, expected):
        raise ValueError(_apart(network, blocks[-1], "the chain of its blocks gives other values than itself"))


def _find_last_tokens(network: Any, blocks: Sequence[Block]) -> bool:
    """A classifier that reads the last token of each sequence finds it by the padding among the tokens, which its last
    block does not see: it finds it by the mask, and samples in which the two differ are refused."""
    padding = getattr(network.config.get_text_config(), "pad_token_id", None)
    first, last = blocks[0].body, blocks[-1].body
    if padding is None or len(blocks) == 1 or not isinstance(last, MaskedPart) or not isinstance(first, Part):
        return False
    last.find_padding_by(padding)
    first.check_samples = partial(check_last_tokens, padding)
    return True


def _apart(network: nn.Module, block: Block, why: str) -> str:
    return (
        f"{type(network).__name__} can't be cut: its layers read more than the hidden states and the mask, or what "
        f"follows them reads the tokens themselves (block {block.name}: {why})"
    )


def _offer_head(network: Any, blocks: Sequence[Block], example: Mapping[str, Tensor]) -> None:
    """Lets the last block give its hidden states and its head apart, where nothing follows the head."""
    part = blocks[-1].body
    x = next(iter(example.values()))
    with torch.no_grad():
        for block in blocks[:-1]:
            x = block.body(x)
    assert isinstance(part, Part)
    _has_head(part, network, x)


@torch.no_grad()
def _has_head(part: Part, network: Any, x: Tensor) -> bool:
    """Whether the network's scores are one linear map of hidden states; the part then offers it. x: its input."""
    head = network.get_output_embeddings() if hasattr(network, "get_output_embeddings") else None
    name = next((name for name, module in network.named_modules() if module is head), None)
    if type(head) is nn.Linear and name is not None:
        part.use_head(name)
        with contextlib.suppress(RuntimeError, TypeError, AttributeError):
            if isinstance(part.head, nn.Linear) and torch.equal(part.head(part.hidden(x)), part(x)):
                return True
    part.use_head(None)
    return False


def _check_adapters(model: nn.Module, blocks: Sequence[Block]) -> None:
    if not hasattr(model, "peft_config"):
        return
    without = [block.name for block in blocks if not any(p.requires_grad for p in block.parameters())]
    if without:
        raise ValueError(
            f"block {', '.join(without)} has no adapters to train; let layers_per_stage put a layer with adapters into "
            "every block, or give LoraConfig target_modules (and layers_to_transform) that every block has"
        )


def _told(example: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in example.items())


class _evaluating:
    """Inside, all modules are in eval mode; afterwards each is as it was."""

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = {id(one): one for module in modules for one in module.modules()}.values()

    def __enter__(self) -> None:
        self._modes = [(module, module.training) for module in self._modules]
        for module in self._modules:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module, mode in self._modes:
            module.training = mode
