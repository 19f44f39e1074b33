"""Modules as users write them, of which the tests' blocks are made."""

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """What its branch gives, added to what came in, and an activation."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut, self.after = branch, shortcut or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(self.branch(x) + self.shortcut(x))
        return result


class Viewed(nn.Module):
    """A linear map of all that a convolution gives, in rows."""

    def __init__(self, conv: nn.Module, features: int) -> None:
        super().__init__()
        self.conv, self.map = conv, nn.Linear(features, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        result: Tensor = self.map(y.view(y.shape[0], -1))
        return result


class Placed(nn.Module):
    """Tokens, told where they stand."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.place, self.map = nn.Parameter(torch.randn(tokens, width)), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.map(x + self.place)
        return result


class Attending(nn.Module):
    """Self-attention, its heads by view and permute, or by chunk and transpose."""

    def __init__(self, width: int, heads: int, *, by_chunks: bool, causal: bool = False) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.by_chunks, self.causal = heads, by_chunks, causal

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        y = self.qkv(self.norm(x))
        if self.by_chunks:
            a, b, c = y.chunk(3, dim=-1)
            q, k, v = (part.reshape(batch, -1, self.heads, width // self.heads).transpose(1, 2) for part in (a, b, c))
        else:
            q, k, v = y.view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        result: Tensor = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return result


class Channels(nn.Module):
    """Attention between channels, in which a head's tokens are its width: its gradients lie across the tokens'."""

    def __init__(self, width: int, *, apart: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.apart = nn.Linear(width, 3 * width), nn.Linear(width, width), apart

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        y = self.qkv(x).view(batch, tokens, 3, 1, width)
        if self.apart:
            q, k, v = y.permute(2, 0, 3, 1, 4).unbind(0)
            q, k, v = q.transpose(-1, -2), k.transpose(-1, -2), v.transpose(-1, -2)
        else:
            q, k, v = y.permute(2, 0, 3, 4, 1).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(y.permute(0, 3, 1, 2).flatten(2))
        return result


class Turning(nn.Module):
    """Attention whose queries and keys are turned by float32 numbers, and are one part of two."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.kv, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.register_buffer("angles", torch.linspace(0.1, 3.0, tokens * width).view(1, tokens, width).cos())

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.kv(x).view(batch, tokens, 2, width).unbind(2)
        turned = (parts[0] * self.angles).unsqueeze(1)
        y = nn.functional.scaled_dot_product_attention(turned, turned, parts[1].unsqueeze(1))
        result: Tensor = self.out(y.squeeze(1))
        return result


class Twofold(nn.Module):
    """Attention to what asks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kv, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.kv(x).unflatten(-1, (2, 1, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(parts[0], parts[0], parts[1])
        result: Tensor = self.out(y.squeeze(1))
        return result


class Shifted(nn.Module):
    """A weight that is the sum of two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base, self.change = (nn.Parameter(0.3 * torch.randn(width, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.linear(x, self.base + self.change))


class Attended(nn.Module):
    """torch's own attention, of which the weights are of no interest."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        y, _ = self.attention(y, y, y)
        result: Tensor = x + y
        return result
