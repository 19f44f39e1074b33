"""InfoPro (Wang, Ni, Song, Yang and Huang, "Revisiting locally supervised learning: an alternative to end-to-end
training", ICLR 2021).

A layer shall keep what it knows of the input and lose only what does not help the task: it minimises lambda1 [-I(h,
x)] + lambda2 [-I(h, y)]. I(h, x) is bounded by how well a small decoder reconstructs the network's input from the
activations, which therefore travels over the side channel. I(h, y) is a local classifier's cross-entropy, or in the
contrastive form a supervised contrastive loss of a local embedding.
"""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlocked.rules.base import LayerInfo, LocalRule
from unlocked.rules.passes import Carried, LayerPass
from unlocked.rules.reading import ConvOfEnlarged, read_latents

__all__ = ["InfoPro", "InfoProContrastive", "supervised_contrast"]

_DECODER_WIDTH = 12
_HIDDEN = 128
_ENOUGH = 64  # channels


class InfoPro(LocalRule):
    """Level 3: carries and receives the network's input, at most `side` pixels high and wide.

    The decoder enlarges the maps to the image's size and has two convolutions; the classifier has one convolution and
    two linear layers (on activations that are no maps, the linear layers alone): the "1c2f" of the paper's code.

    Args:
        reconstruction: lambda1, of the first layer.
        task: lambda2, of the first layer.
        last_reconstruction, last_task: of the last local layer, between which the others' lie evenly; None: the same.
        side: of the reconstructed image, where the input is one; larger ones are averaged down to it.
    """

    takes = ("classification",)

    receives = ("network_input",)

    def __init__(
        self,
        layer: LayerInfo,
        *,
        reconstruction: float = 1.0,
        task: float = 1.0,
        last_reconstruction: float | None = None,
        last_task: float | None = None,
        side: int = 32,
    ) -> None:
        super().__init__(layer)
        if side < 1:
            raise ValueError(f"side is {side}; the reconstructed image has at least 1 pixel")
        deep = layer.index / max(layer.index + len(layer.following_shapes), 1)
        self.reconstruction = _between(reconstruction, last_reconstruction, deep)
        self.task = _between(task, last_task, deep)
        self.latent_size, self.layout = layer.latent_size, layer.layout
        self.target_shape = _target_shape(layer.input_shape, side)
        self.carries = {"network_input": Carried(self.target_shape)}
        shape, target = layer.activation_shape, self.target_shape
        self.decoder: nn.Module
        if len(shape) == 3 and len(target) == 3:
            self.decoder = nn.Sequential(
                *_resized_conv(shape[0], (shape[1], shape[2]), (target[1], target[2])),
                nn.BatchNorm2d(_DECODER_WIDTH),
                nn.ReLU(inplace=True),
                nn.Conv2d(_DECODER_WIDTH, target[0], 3, padding=1),
            )
        else:
            inner = prod(target)
            self.decoder = nn.Sequential(nn.Flatten(), nn.Linear(layer.num_features, inner), nn.Unflatten(1, target))
        self._make_task(layer)

    def carry(self, layer_pass: LayerPass) -> dict[str, Tensor]:
        return {"network_input": self._target(layer_pass)}

    def step(self, layer_pass: LayerPass) -> Tensor:
        reconstructed = self.decoder(layer_pass.activations)
        loss = F.mse_loss(reconstructed, self._target(layer_pass))
        return self.reconstruction * loss + self.task * self._task(layer_pass.activations, layer_pass.labels)

    def _target(self, layer_pass: LayerPass) -> Tensor:
        """The network's input: at the first layer its own."""
        arrived = layer_pass.carried.get("network_input")
        if arrived is not None:
            return arrived
        x = layer_pass.input
        if x.shape[1:] == self.target_shape:
            return x
        _, height, width = self.target_shape
        return F.adaptive_avg_pool2d(x, (height, width))

    def _make_task(self, layer: LayerInfo) -> None:
        self.head = self._make_head(layer, layer.num_classes)

    def _make_head(self, layer: LayerInfo, outputs: int) -> nn.Module:
        shape = layer.activation_shape
        if len(shape) != 3:
            return nn.Sequential(
                nn.Linear(layer.num_latents, _HIDDEN), nn.ReLU(inplace=True), nn.Linear(_HIDDEN, outputs)
            )
        few = shape[0] < _ENOUGH  # narrow layers are wide maps: more channels, at half their sides
        width = 2 * shape[0] if few else shape[0]
        return nn.Sequential(
            nn.Conv2d(shape[0], width, 3, stride=2 if few else 1, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, _HIDDEN),
            nn.ReLU(inplace=True),
            nn.Linear(_HIDDEN, outputs),
        )

    def _read(self, activations: Tensor) -> Tensor:
        """The head's outputs."""
        maps = activations.dim() == 4
        read: Tensor = self.head(activations if maps else read_latents(activations, self.latent_size, self.layout))
        return read

    def _task(self, activations: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.scores(activations), labels)

    def scores(self, activations: Tensor) -> Tensor:
        """Of the local classifier, [B, n]."""
        return self._read(activations)


class InfoProContrastive(InfoPro):
    """Level 3: InfoPro with a supervised contrastive loss in the classifier's place. It makes no prediction of its own.

    Args:
        width: of the embedding.
        temperature: of its similarities.
    """

    scores = LocalRule.scores

    def __init__(self, layer: LayerInfo, *, width: int = 128, temperature: float = 0.07, **options: float) -> None:
        if width < 1 or not temperature > 0:
            raise ValueError(f"width is {width} and temperature {temperature}; both must be positive")
        self.width, self.temperature = width, temperature
        super().__init__(layer, **options)  # type: ignore[arg-type]

    def _make_task(self, layer: LayerInfo) -> None:
        self.head = self._make_head(layer, self.width)

    def _task(self, activations: Tensor, labels: Tensor) -> Tensor:
        return supervised_contrast(self._read(activations), labels, self.temperature)


def supervised_contrast(embedded: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The supervised contrastive loss (Khosla et al., NeurIPS 2020) of one view: the mean over samples i of -1/|P(i)|
    sum_p log exp(z_i z_p / T) / sum_(a != i) exp(z_i z_a / T), where P(i) are the others of its class in the
    micro-batch; a sample without any has loss 0. z are the rows [B, D], normalised."""
    z = F.normalize(embedded, dim=1)
    similar = z @ z.T / temperature
    self_mask = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_share = similar - similar.masked_fill(self_mask, float("-inf")).logsumexp(1, keepdim=True)
    partners = (labels[:, None] == labels) & ~self_mask
    count = partners.sum(1)
    each = -log_share.masked_fill(~partners, 0).sum(1) / count.clamp_min(1)
    return each.mean()


def _between(first: float, last: float | None, deep: float) -> float:
    return first if last is None else first * (1 - deep) + last * deep


def _resized_conv(channels: int, sides: tuple[int, int], size: tuple[int, int]) -> list[nn.Module]:
    """The decoder's first convolution, of the maps as they are resized to the image: always two modules."""
    if sides[0] <= size[0] and sides[1] <= size[1] and sides != size:
        return [nn.Identity(), ConvOfEnlarged(channels, _DECODER_WIDTH, sides, size)]
    conv = nn.Conv2d(channels, _DECODER_WIDTH, 3, padding=1)
    same = sides == size
    return [nn.Identity() if same else nn.Upsample(size, mode="bilinear", align_corners=True), conv]


def _target_shape(shape: tuple[int, ...], side: int) -> tuple[int, ...]:
    return (shape[0], min(shape[1], side), min(shape[2], side)) if len(shape) == 3 else shape
