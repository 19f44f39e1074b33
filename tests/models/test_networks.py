"""The networks against the authors' own: parameter shapes and order, outputs, and a trajectory of plain backprop."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden import (
    Golden,
    check_samples,
    copy_into_blocks,
    golden_batches,
    golden_files,
    golden_parameters,
    load_golden,
    rule_parameters,
)
from torch import Tensor

from unlocked.kernels.reference import make_basis, pool_latents
from unlocked.models import MODELS, Block, get_model, model_options

AUTHORS = [name for name in MODELS if "upsample" in model_options(name)]
"""The networks of the LLS authors."""


def _network(golden: Golden) -> tuple[list[Block], dict[str, torch.nn.Parameter]]:
    meta = golden.meta
    blocks = get_model(
        meta["model"], in_channels=meta["in_channels"], num_classes=meta["n_classes"], image_size=meta["image"]
    )
    return blocks, copy_into_blocks(blocks, golden_parameters(meta))


def _forward(blocks: list[Block], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


@pytest.mark.parametrize("path", golden_files(), ids=lambda path: path.stem)
def test_first_logits_are_the_authors(path: Path) -> None:
    golden = load_golden(path)
    blocks, _ = _network(golden)
    images, _ = golden_batches(golden.meta)
    # The authors' float32 run of VGG8 is itself 1.5e-5 away from float64.
    torch.testing.assert_close(_forward(blocks, images[0]), golden.logits[0], rtol=0, atol=3e-5)


@pytest.mark.parametrize("path", golden_files("*SmallConv-*"), ids=lambda path: path.stem)
def test_local_head_sizes_are_the_authors(path: Path) -> None:
    golden = load_golden(path)
    mode = golden.meta["training_mode"]
    blocks, _ = _network(golden)
    parameters = rule_parameters(golden_parameters(golden.meta))
    for block, layer in zip(blocks, golden.meta["local_layers"], strict=False):
        if mode.endswith("_Random") or mode == "LocalLosses":
            assert parameters[layer]["feedback"].shape[1] == block.hidden
        elif mode == "LLS_MxM_reduced":
            assert parameters[layer]["feedback"].shape[0] == block.reduced_rank


@pytest.mark.parametrize("path", golden_files("*-BP-Adam-cosine"), ids=lambda path: path.stem)
def test_backprop_follows_the_authors_trajectory(path: Path) -> None:
    """Two steps: Adam moves weights whose gradient is rounding noise by the full rate, and from the third step on
    the authors' float32 run is as far from this one in float64 as from any other."""
    golden = load_golden(path)
    blocks, parameters = _network(golden)
    images, labels = golden_batches(golden.meta)
    optimizer = torch.optim.Adam(parameters.values(), lr=golden.meta["lr"])
    for step, tolerance in enumerate([1e-5, 5e-3]):
        logits = _forward(blocks, images[step])
        torch.testing.assert_close(logits, golden.logits[step], rtol=0, atol=tolerance)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[step]).backward()
        optimizer.step()


# Depth and the number of strided layers magnify rounding; the same loop in float64 is no closer to the golden run.
_TRAJECTORIES = {"*SmallConv-LLS-SGD-*": 2e-5, "*VGG8-LLS_MxM-SGD-*": 2e-4, "*MobileNetV1-LLS-SGD-*": 2e-3}


@pytest.mark.parametrize(
    ("path", "tolerance"), [(path, tol) for pattern, tol in _TRAJECTORIES.items() for path in golden_files(pattern)]
)
def test_local_learning_by_autograd_follows_the_authors_trajectory(path: Path, tolerance: float) -> None:
    """Every part of a block (body, tail, latent size) is where the authors have it: a plain loop over the blocks with
    the rule written out and torch's autograd gives their losses, parameters and running statistics."""
    golden = load_golden(path)
    meta = golden.meta
    blocks, parameters = _network(golden)
    rules = {
        f"{layer}.feedback": torch.nn.Parameter(own["feedback"])
        for layer, own in rule_parameters(golden_parameters(meta)).items()
    }
    images, labels = golden_batches(meta)
    trained = {**parameters, **rules}
    optimizer = torch.optim.SGD(trained.values(), lr=meta["lr"], momentum=meta["momentum"])
    for step in range(meta["steps"]):
        x, losses = images[step], []
        for block, layer in zip(blocks, [*meta["local_layers"], "output"], strict=True):
            activations = block.body(x.detach())
            scores = (
                activations if block.is_output else _scores(activations, block, rules.get(f"{layer}.feedback"), meta)
            )
            losses.append(F.cross_entropy(scores, labels[step]))
            x = block.tail(activations)
        torch.testing.assert_close(x, golden.logits[step], rtol=0, atol=tolerance)
        torch.testing.assert_close(torch.stack(losses[:-1]), golden.local_losses[step], rtol=0, atol=tolerance)
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    check_samples(golden, trained, rtol=tolerance, atol=tolerance / 10)
    buffers = [buffer.sum().item() for block in blocks for key, buffer in block.named_buffers() if "running" in key]
    assert buffers == pytest.approx(list(meta["buffer_sums"].values()), rel=tolerance, abs=tolerance)
    for block in blocks:
        block.eval()
    torch.testing.assert_close(_forward(blocks, images[0]), golden.eval_logits, rtol=0, atol=tolerance)


def _scores(activations: Tensor, block: Block, modulation: Tensor | None, meta: dict[str, Any]) -> Tensor:
    assert block.latent_size is not None
    latents = F.normalize(pool_latents(activations, block.latent_size))
    scores = latents @ make_basis(meta["n_classes"], latents.shape[1], meta["waveform"]).T
    return (scores if modulation is None else scores @ modulation) / meta["temperature"]


def _shapes(blocks: list[Block], x: Tensor) -> list[tuple[int, ...]]:
    shapes = []
    for block in blocks:
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    return shapes


def test_small_conv_on_digits() -> None:
    blocks = get_model("SmallConv", in_channels=1, image_size=8)
    assert [block.name for block in blocks] == ["conv1", "conv2", "conv3", "linear1", "output"]
    assert [block.latent_size for block in blocks] == [4, 2, 2, 512, None]
    assert _shapes(blocks, torch.zeros(2, 1, 8, 8)) == [(32, 4, 4), (64, 2, 2), (128, 2, 2), (512,), (10,)]
    assert [block.is_output for block in blocks] == [False] * 4 + [True]


@pytest.mark.parametrize(("name", "side"), [("SmallConv", 32), ("VGG8", 32), ("VGG11", 64), ("MobileNetV1", 64)])
def test_side_lengths(name: str, side: int) -> None:
    """What reaches the first linear layer, and that no layer before depends on a size that is not there."""
    expected = {"SmallConv": (128, 2, 2), "VGG8": (512, 2, 2), "VGG11": (512, 8, 8), "MobileNetV1": (1024, 1, 1)}
    blocks = get_model(name, image_size=side, num_classes=7).copy()
    last = max(i for i, block in enumerate(blocks) if block.name.startswith(("conv", "depthwise")))
    assert _shapes(blocks[: last + 1], torch.zeros(2, 3, side, side))[-1] == expected[name]


def test_mobilenet_padding() -> None:
    """The authors' stride-2 blocks grow a border; same_padding halves the side."""
    image = torch.zeros(2, 3, 32, 32)
    sides = [
        [shape[1] for shape in _shapes(get_model("MobileNetV1_small", same_padding=same)[:7], image)]
        for same in (False, True)
    ]
    assert sides == [[16, 16, 9, 9, 6, 6, 4], [16, 16, 8, 8, 4, 4, 2]]


@pytest.mark.parametrize(
    ("image_size", "channels"),
    [(28, 1), (33, 3), (45, 2), (64, 3), (96, 3), ((16, 40), 1), ((64, 17), 3), ((33, 100), 2)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("upsample", [True, False])
@pytest.mark.parametrize("name", AUTHORS)
def test_images_of_any_size_and_channels(
    name: str, upsample: bool, image_size: int | tuple[int, int], channels: int
) -> None:
    """Every layer's local step has what it needs: shapes that chain, and as many latents as the rule is told."""
    with torch.device("meta"):  # shapes alone; VGG11 has 150 million weights
        blocks = get_model(name, in_channels=channels, num_classes=7, image_size=image_size, upsample=upsample)
        x = torch.zeros(2, channels, *((image_size,) * 2 if isinstance(image_size, int) else image_size))
        for block in blocks[:-1]:
            activations = block.body(x)
            assert block.latent_size is not None
            most = activations.shape[1] if activations.dim() == 2 else min(activations.shape[2:])
            assert upsample or block.latent_size <= most
            latents = pool_latents(activations, block.latent_size)
            kept = block.latent_size if activations.dim() == 2 else activations.shape[1] * block.latent_size**2
            assert latents.shape == (2, kept)
            x = block.tail(activations)
        assert blocks[-1](x).shape == (2, 7)


@pytest.mark.parametrize("image_size", [160, 224])
@pytest.mark.parametrize("name", ["MobileNetV1", "MobileNetV1_small", "VGG11"])
def test_large_images(name: str, image_size: int) -> None:
    with torch.device("meta"):
        blocks = get_model(name, image_size=image_size, num_classes=100)
        assert _forward(blocks, torch.zeros(2, 3, image_size, image_size)).shape == (2, 100)


def test_pools_need_not_repeat_values() -> None:
    """The authors' default does; the switch shrinks what would repeat, and changes nothing where nothing does."""
    with torch.device("meta"):
        authors, sane = (get_model("SmallConvL", upsample=upsample) for upsample in (True, False))
        assert [b.latent_size for b in authors] == [4, 2, 2, 2048, None]
        assert [b.latent_size for b in sane] == [4, 2, 2, 1024, None]
        authors, sane = (get_model("VGG11", upsample=upsample) for upsample in (True, False))
        assert authors[8].linear.in_features == 512 * 8 * 8  # type: ignore[attr-defined]
        assert sane[8].linear.in_features == 512 * 2 * 2  # type: ignore[attr-defined]
        large = [get_model("VGG11", image_size=128, upsample=upsample) for upsample in (True, False)]
        shapes = [[p.shape for block in blocks for p in block.parameters()] for blocks in large]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("name", "smallest"), [("SmallConv", 4), ("VGG8", 8), ("VGG11", 16), ("MobileNetV1", 1)])
def test_the_smallest_image_that_fits(name: str, smallest: int) -> None:
    with torch.device("meta"):
        blocks = get_model(name, image_size=smallest)
        assert _forward(blocks, torch.zeros(2, 3, smallest, smallest)).shape == (2, 10)
    if smallest > 1:
        with pytest.raises(ValueError, match=f"got 1 x 1 from images of {smallest - 1} x"):
            get_model(name, image_size=smallest - 1)
        with pytest.raises(ValueError, match=f"got 16 x 1 from images of {8 * smallest} x {smallest - 1};"):
            get_model(name, image_size=(8 * smallest, smallest - 1))


def test_reduced_rank_of_mobilenet_depends_on_the_classes() -> None:
    assert [get_model("MobileNetV1", num_classes=n)[0].reduced_rank for n in (10, 200, 201)] == [20, 20, 100]


@pytest.mark.parametrize("prefix", ["", "LLS_"])
@pytest.mark.parametrize("name", AUTHORS)
def test_names_are_unique_and_dropout_follows_the_pools(name: str, prefix: str) -> None:
    with torch.device("meta"):  # VGG11 has a linear block of 134 million weights
        blocks = get_model(prefix + name, image_size=64, dropout=0.25)
    assert len({block.name for block in blocks}) == len(blocks)
    for block in blocks:
        pooled = getattr(block, "pool", "none") != "none"
        assert getattr(block, "dropout", 0.0) == (0.25 if pooled else 0.0)
        assert any("dropout" in key for key, _ in block.tail.named_modules()) == pooled


@pytest.mark.parametrize("name", ["smallconv", "VGG16", "LLS_", ""])
def test_unknown_names_list_the_known(name: str) -> None:
    with pytest.raises(ValueError, match="SmallConv, SmallConvL, VGG8, VGG11, MobileNetV1, MobileNetV1_small"):
        get_model(name)


def test_too_small_an_image_names_the_block_and_the_sizes() -> None:
    with pytest.raises(ValueError, match=r"block conv2: .*got 1 x 1 from images of 2 x 2"):
        get_model("SmallConv", image_size=2)


@pytest.mark.parametrize("word", ["in_channels", "num_classes", "image_size"])
def test_sizes_are_positive(word: str) -> None:
    with pytest.raises(ValueError, match=f"{word} is a positive integer.*, got 0"):
        get_model("VGG8", **{word: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(32, 0), (32, 32, 3), (), (32.0, 32), -3])
def test_an_image_has_one_side_or_two(size: object) -> None:
    with pytest.raises(ValueError, match=r"image_size is a positive integer, or two of them \(height and width\), got"):
        get_model("VGG8", image_size=size)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_a_square_is_two_equal_sides(name: str) -> None:
    with torch.device("meta"):
        one, two = (get_model(name, image_size=size) for size in (64, [64, 64]))
        assert str(one) == str(two)
        assert [b.latent_size for b in one] == [b.latent_size for b in two]


def test_same_padding_is_for_mobilenets() -> None:
    with pytest.raises(ValueError, match="same_padding"):
        get_model("VGG8", same_padding=True)
