"""Networks that are not the LLS authors': sizes against papers, outputs against plain modules, options."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from residual import RESNET_LAYERS, ResNet
from torch import Tensor, nn

from unlocked.kernels.reference import pool_latents
from unlocked.models import MODELS, Block, architecture_of, get_model, model_options, rebuild, split
from unlocked.models.residual import local_module_sizes
from unlocked.rules import RULES, get_rule
from unlocked.runtime.network import build_network
from unlocked.runtime.rule_trial import check_rules

OTHERS = [name for name in MODELS if "upsample" not in model_options(name)]
TOKENS = ("ViT", "MLPMixer")


def _parameters(blocks: Sequence[nn.Module]) -> int:
    return sum(p.numel() for block in blocks for p in block.parameters())


def _forward(blocks: Sequence[Block], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


# Table 6 of He et al. (CVPR 2016) has 0.46 and 1.7 million without the two 1 x 1 convolutions; theirs for ImageNet is
# torchvision's documented number; "Training Neural Networks with Local Error Signals" has 8.9, 7.3 and 12 million.
FIGURES: list[tuple[str, dict[str, Any], float, float]] = [
    ("ResNet32", {}, 0.46e6, 0.01e6),
    ("ResNet110", {}, 1.7e6, 0.05e6),
    ("ResNet18", {"image_size": 224, "num_classes": 1000}, 11_689_512, 0),
    ("VGG8B", {}, 8.9e6, 0.05e6),
    ("VGG8B", {"in_channels": 1, "image_size": 28}, 7.3e6, 0.05e6),
    ("VGG11B", {}, 12e6, 0.5e6),
]


@pytest.mark.parametrize(("name", "sizes", "millions", "tolerance"), FIGURES)
def test_parameters_are_as_many_as_published(name: str, sizes: dict, millions: float, tolerance: float) -> None:
    with torch.device("meta"):
        assert abs(_parameters(get_model(name, **sizes)) - millions) <= tolerance


def test_parameters_are_as_many_as_counted_by_hand() -> None:
    with torch.device("meta"):
        expected = 3 * 16 * 9 + 2 * 16 + 64 * 10 + 10
        before = 16
        for width in (16, 32, 64):
            for number in range(5):
                entering = before if number == 0 else width
                expected += 9 * (entering * width + width * width) + 2 * 2 * width
                expected += entering * width + 2 * width if entering != width else 0
            before = width
        assert _parameters(get_model("ResNet32")) == expected
        d, t, n = 64, 16, 2
        layer = 4 * (d * d + d) + 2 * (d * 4 * d) + 5 * d + 4 * d
        vit = 3 * 4 * 4 * d + d + t * d + n * layer + 2 * d + d * 10 + 10
        assert _parameters(get_model("ViT", image_size=16, width=d, depth=n, patch_size=4)) == vit
        mixer = 2 * (t * d // 2) + d // 2 + t + 2 * d * 4 * d + 5 * d + 4 * d
        expected = 3 * 4 * 4 * d + d + n * mixer + 2 * d + d * 10 + 10
        assert _parameters(get_model("MLPMixer", image_size=16, width=d, depth=n, patch_size=4)) == expected
        mlp = 48 * 100 + 100 * 100 + 2 * (100 + 2 * 100) + 100 * 10 + 10
        assert _parameters(get_model("MLP", image_size=4, width=100, depth=2)) == mlp


@pytest.mark.parametrize("modules", [None, 1, 4, 9])
def test_resnet18_is_the_plain_module(modules: int | None) -> None:
    """With its parameters in its order, the outputs are equal to the bit, in training mode and afterwards in eval mode,
    however it is cut; and what `split` makes of it has the same numbers of parameters layer by layer."""
    plain = ResNet(num_classes=7, width=64)
    blocks = get_model("ResNet18", num_classes=7, image_size=96, local_module_num=modules)
    ours = [t for block in blocks for t in block.state_dict().values()]
    theirs = list(plain.state_dict().values())
    assert [t.shape for t in ours] == [t.shape for t in theirs]
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            mine.copy_(other)
        x = torch.randn(3, 3, 96, 96)
        torch.testing.assert_close(_forward(blocks, x), plain(x), rtol=0, atol=0)
        plain.eval()
        torch.testing.assert_close(_forward([block.eval() for block in blocks], x), plain(x), rtol=0, atol=0)
    if modules is None:
        cuts = [f"{layer}.{i}" for layer in RESNET_LAYERS[:4] for i in range(2)]
        parts = split(plain, at=[*cuts, "avgpool"])
        assert [_parameters([part]) for part in parts] == [_parameters([block]) for block in blocks]


# The blocks (stage, place) after which InfoPro's published configurations cut: github.com/blackfeather-wang/
# InfoPro-Pytorch, networks/configs.py for CIFAR. (0, 0) is the stem.
INFOPRO: dict[str, dict[int, list[tuple[int, int]]]] = {
    "ResNet32": {
        1: [],
        2: [(2, 1)],
        3: [(1, 4), (2, 4)],
        4: [(1, 2), (2, 1), (3, 0)],
        8: [(1, 0), (1, 2), (1, 4), (2, 1), (2, 3), (3, 0), (3, 2)],
        16: [(0, 0), *[(s, i) for s in (1, 2) for i in range(5)], *[(3, i) for i in range(4)]],
    },
    "ResNet110": {
        1: [],
        2: [(2, 8)],
        3: [(1, 17), (2, 17)],
        4: [(1, 11), (2, 7), (3, 3)],
        8: [(1, 4), (1, 11), (2, 0), (2, 7), (2, 14), (3, 3), (3, 10)],
        16: [
            *((1, i) for i in (1, 4, 7, 10, 13, 16)),
            *((2, i) for i in (1, 4, 7, 11, 15)),
            *((3, i) for i in (1, 5, 9, 13)),
        ],
    },
}


@pytest.mark.parametrize(("name", "depth"), [("ResNet32", 5), ("ResNet110", 18)])
def test_local_modules_are_cut_where_infopro_cuts(name: str, depth: int) -> None:
    for count, cuts in INFOPRO[name].items():
        sizes = local_module_sizes(3 * depth + 1, count)
        ends = [sum(sizes[: i + 1]) - 1 for i in range(count - 1)]
        assert ends == [0 if stage == 0 else (stage - 1) * depth + place + 1 for stage, place in cuts], count


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16])
def test_local_modules_are_the_same_network(count: int) -> None:
    """However it is cut, it has the same parameters in the same order, and K layers; the last one is the output."""
    with torch.device("meta"):
        whole, cut = (get_model("ResNet32", local_module_num=k) for k in (None, count))
        assert (len(whole), len(cut)) == (17, count)
        shapes = [[p.shape for block in blocks for p in block.parameters()] for blocks in (whole, cut)]
        assert shapes[0] == shapes[1]
        assert [block.is_output for block in cut] == [False] * (count - 1) + [True]
        assert [block.name for block in cut] == [f"module{i + 1}" for i in range(count)]
        assert _forward(cut, torch.zeros(2, 3, 20, 20)).shape == (2, 10)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_local_modules_of_a_language_model_are_the_same_network(count: int) -> None:
    sizes = {"num_classes": 11, "image_size": 6, "width": 8, "depth": 5, "seed": 1}
    whole, cut = (get_model("gpt-mini", local_module_num=k, **sizes) for k in (None, count))
    assert [block.name for block in cut] == [f"module{i + 1}" for i in range(count)]
    assert [block.is_output for block in cut] == [False] * (count - 1) + [True]
    sources = [p for block in whole for p in block.parameters()]
    for p, source in zip((p for block in cut for p in block.parameters()), sources, strict=True):
        p.data.copy_(source)
    tokens = torch.randint(11, (2, 6))
    assert torch.equal(_forward(cut, tokens), _forward(whole, tokens))
    with pytest.raises(ValueError, match="local_module_num is 6, but there are 5 layers; give 1 to 5"):
        get_model("gpt-mini", depth=5, local_module_num=6)


def test_too_many_local_modules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"local_module_num is 17, but the stem and 15 residual .* give 1 to 16"):
        get_model("ResNet32", local_module_num=17)
    with torch.device("meta"):
        assert len(get_model("ResNet110", local_module_num=55)) == 55


@pytest.mark.parametrize(
    ("image_size", "channels"), [(16, 1), (28, 1), (33, 3), (96, 3), ((16, 40), 1), ((100, 24), 2)], ids=str
)
@pytest.mark.parametrize("name", OTHERS)
def test_images_of_any_size_and_channels(name: str, image_size: int | tuple[int, int], channels: int) -> None:
    """Shapes chain, the tails have what the next layer reads, and latents are where the rule is told to find them."""
    with torch.device("meta"):
        small = {"depth": 2} if "depth" in model_options(name) else {}
        blocks = get_model(name, in_channels=channels, num_classes=7, image_size=image_size, **small)
        x = torch.zeros(2, channels, *((image_size,) * 2 if isinstance(image_size, int) else image_size))
        for block in blocks[:-1]:
            activations = block.body(x)
            if activations.dim() == 4:
                assert block.latent_size is not None
                assert block.latent_size <= min(activations.shape[2:])
                assert pool_latents(activations, block.latent_size).shape[1] <= 2048
            assert (activations.dim() == 3) == (name in TOKENS)
            x = block.tail(activations)
        assert x.dim() == 2 or x.shape[1] * math.prod(x.shape[2:]) == blocks[-1].body.linear.in_features  # type: ignore
        assert blocks[-1](x).shape == (2, 7)
        assert len({block.name for block in blocks}) == len(blocks)


@pytest.mark.parametrize("name", ["VGG8B", "VGG11B"])
def test_the_smallest_image_that_fits(name: str) -> None:
    with torch.device("meta"):
        assert _forward(get_model(name, image_size=16), torch.zeros(2, 3, 16, 16)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"block conv\d: .* got 1 x 1 from images of 15 x 15; use larger images"):
        get_model(name, image_size=15)


@pytest.mark.parametrize("name", TOKENS)
def test_patches_divide_the_image(name: str) -> None:
    with torch.device("meta"):
        patches = [get_model(name, image_size=side, depth=1)[0].body.project for side in (8, 28, 32, 33, 64, 224)]  # type: ignore
        assert [conv.kernel_size[0] for conv in patches] == [2, 4, 4, 1, 8, 16]
    with pytest.raises(ValueError, match="patch_size is 5, which does not divide images of 32 x 32 pixels; valid"):
        get_model(name, patch_size=5)
    with pytest.raises(ValueError, match="width is 100, which is no whole number of heads of 64"):
        get_model("ViT", width=100)


def test_wider_networks() -> None:
    with torch.device("meta"):
        widths = [[b.conv.out_channels for b in get_model("VGG8B", feat_mult=m)[:-2]] for m in (1, 3)]  # type: ignore
        assert widths[1] == [3 * width for width in widths[0]]
        assert [len(get_model("MLP", depth=depth)) for depth in (1, 5)] == [2, 6]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("option", ["width", "depth", "patch_size", "feat_mult", "local_module_num", "in_channels"])
def test_options_are_positive_and_for_networks_that_take_them(name: str, option: str) -> None:
    if option != "in_channels" and option not in model_options(name):
        with pytest.raises(ValueError, match=f"model '{name}' takes no {option}, but .*; it is for "):
            get_model(name, **{option: 2})
        return
    for bad in (0, -1, True):
        with pytest.raises(ValueError, match=f"{option} is a positive integer"):
            get_model(name, **{option: bad})


def test_an_option_that_no_network_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="takes no breadth, but width, depth; no model takes it"):
        get_model("MLP", breadth=3)


@pytest.mark.parametrize("name", OTHERS)
def test_dropout_is_keyed(name: str) -> None:
    """Every dropout module was replaced by a keyed one; what attention draws inside, a layer keys as a whole."""
    with torch.device("meta"):
        blocks = get_model(name, image_size=16, dropout=0.25)
    found = {type(m).__name__ for b in blocks for m in b.modules() if "Dropout" in type(m).__name__}
    assert found == {"KeyedDropout"}


@pytest.mark.parametrize("name", ["MLP", "ViT", "MLPMixer", "ResNet32"])
def test_start_values_depend_on_seed_and_layer_alone(name: str) -> None:
    small = {"depth": 2} if "depth" in model_options(name) else {"local_module_num": 3}
    found = []
    for disturbance, seed in ((0, 5), (1, 5), (0, 6)):
        torch.manual_seed(disturbance)
        state = torch.random.get_rng_state()
        blocks = get_model(name, image_size=8, seed=seed, **small)
        found.append([p for block in blocks for p in block.parameters()])
        assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, found[0], found[1]))
    assert not all(map(torch.equal, found[0], found[2]))


@pytest.mark.parametrize("rule", [*RULES, "DRTP"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MLP", {"width": 16}),
        ("ResNet32", {}),
        ("ResNet32", {"local_module_num": 3}),
        ("ViT", {"width": 32, "depth": 1}),
        ("MLPMixer", {"width": 32, "depth": 1}),
        ("VGG8B", {"image_size": 16}),
    ],
)
def test_every_rule_fits_every_layer(rule: str, name: str, options: dict[str, Any]) -> None:
    """On the smallest images, where there are few latents."""
    side = options.get("image_size", 8)
    blocks = get_model(name, in_channels=1, num_classes=10, **{"image_size": side, **options})
    network = build_network(blocks, input_shape=(1, side, side), num_classes=10, seed=0)
    check_rules(network, get_rule(rule, temperature=0.5, label_smoothing=0.0, waveform="cosine"))


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_is_rebuilt_from_what_is_kept_of_it(name: str) -> None:
    options: dict[str, Any] = {"image_size": (16, 32), "num_classes": 7, "dropout": 0.1}
    own = {"width": 64, "depth": 2, "patch_size": 8, "feat_mult": 2, "local_module_num": 3, "cut_blocks": False}
    options |= {option: own[option] for option in model_options(name)}
    with torch.device("meta"):
        blocks = get_model(name, **options)
        kept = architecture_of(blocks)
        assert kept is not None
        assert str(rebuild(kept)) == str(blocks)


@pytest.mark.parametrize(("name", "size"), [("ResNet18", 19), ("ResNet32", 17)])
def test_cut_blocks_compute_what_whole_ones_do(name: str, size: int) -> None:
    """With odd sides too: of what skips a halving block every second pixel travels, and no other is read. (Channels
    that lie beside others are summed in another order.)"""
    whole, cut = (get_model(name, image_size=size, cut_blocks=cut) for cut in (False, True))
    assert len(cut) == 2 * len(whole) - 2
    assert [block.name for block in cut[:4]] == ["stem", "block1_first", "block1_second", "block2_first"]
    by_name = {block.name: block.state_dict() for block in whole}
    with torch.no_grad():
        for block in cut:
            mine = by_name[block.name.removesuffix("_first").removesuffix("_second")]
            for key, tensor in block.state_dict().items():
                if block.name.endswith(("_first", "_second")):
                    key = key.replace("body.", "body.0.", 1)
                tensor.copy_(mine[key])
        torch.manual_seed(1)
        x = torch.randn(3, 3, size, size)
        torch.testing.assert_close(_forward(cut, x), _forward(whole, x), rtol=1e-4, atol=1e-5)
        for block in (*cut, *whole):
            block.eval()
        torch.testing.assert_close(_forward(cut, x), _forward(whole, x), rtol=1e-4, atol=1e-5)


def test_blocks_are_cut_in_one_way() -> None:
    with pytest.raises(ValueError, match="local_module_num is 4 and cut_blocks True, two ways to cut"):
        get_model("ResNet32", local_module_num=4, cut_blocks=True)
    with pytest.raises(ValueError, match="model 'MLP' takes no cut_blocks"):
        get_model("MLP", cut_blocks=True)
    assert [b.name for b in rebuild(architecture_of(get_model("ResNet18", cut_blocks=True)))][1] == "block1_first"
