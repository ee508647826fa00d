"""Parts that several architectures share: normalisation, timestep embedding, feed-forward, tiling.

Parameter names are those of the published checkpoints (`net.0.proj`, `linear_1`, …), so files load without renaming.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis (Zhang & Sennrich, 2019), with a learned scale.

    torch's fused operator accumulates in float32 whatever the input dtype.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def timestep_frequencies(timestep: Tensor, dim: int, scale: float = 1000.0, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features, cosines first (DDPM, Ho et al. 2020): timestep (B,) in 0..1 → (B, dim), always float32."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) * (-math.log(max_period) / half)
    angles = scale * (timestep.float()[:, None] * torch.exp(exponent)[None])
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ProjectedGELU(nn.Module):
    """A linear layer followed by the tanh form of GELU, which the authors' published code uses."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Transformer MLP, four times as wide inside. Index 1 held the dropout of training, so it carries no weights."""

    def __init__(self, dim: int, multiplier: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(ProjectedGELU(dim, dim * multiplier), nn.Identity(), nn.Linear(dim * multiplier, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


# ---- tiling ---------------------------------------------------------------------------------------------------------

def check_tiles(tile_size: int, tile_stride: int) -> None:
    """Raises ValueError when tiles of this size and stride would not cover everything."""
    if not 0 < tile_stride <= tile_size:
        raise ValueError(f"tile_stride must lie in 1..tile_size ({tile_size}), got {tile_stride}: "
                         "a larger stride would leave gaps between the tiles")


def tile_starts(length: int, size: int, stride: int) -> list[int]:
    """Where tiles begin along one axis: every `stride`, the last one moved back so that it ends at the border."""
    if length <= size:
        return [0]
    return [*range(0, length - size, stride), length - size]


def _ramp(length: int, overlap: int, fade_in: bool, fade_out: bool) -> Tensor:
    """Weights of a tile along one axis: 1 inside, falling linearly (never to 0) towards a neighbour."""
    weight = torch.ones(length)
    slope = (torch.arange(overlap) + 1) / (overlap + 1)
    if fade_in:
        weight[:overlap] = slope
    if fade_out:
        weight[length - overlap:] = torch.minimum(weight[length - overlap:], slope.flip(0))
    return weight


def tiled_apply(function: Callable[[Tensor], Tensor], x: Tensor, tile_size: int, tile_stride: int, scale: float,
                progress_bar_cmd: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """Run `function` on overlapping square tiles of x (B, C, H, W) and blend the results.

    `tile_size` and `tile_stride` are in pixels of x; `scale` is output pixels per input pixel (8 for a VAE decoder,
    1/8 for its encoder). `progress_bar_cmd` wraps the list of tiles, as in a pipeline's loop: it shows progress, and an
    exception that it raises stops the work between two tiles. Peak memory is that of one tile plus the whole output,
    which is gathered in float32 on x's device. Returns x's dtype.
    Raises ValueError when the stride is not in 1..tile_size or an edge does not fall on whole output pixels.
    """
    check_tiles(tile_size, tile_stride)
    height, width = x.shape[-2:]
    corners = [(top, left) for top in tile_starts(height, tile_size, tile_stride)
               for left in tile_starts(width, tile_size, tile_stride)]
    if any((edge * scale) % 1 for corner in corners for edge in (*corner, tile_size)):
        raise ValueError(f"tile_size {tile_size}, tile_stride {tile_stride} and the size {height}×{width} must be "
                         f"multiples of {round(1 / scale)}")
    overlap = max(1, int((tile_size - tile_stride) * scale))
    total = weights = None
    for top, left in progress_bar_cmd(corners):
        out = function(x[..., top:top + tile_size, left:left + tile_size]).float()
        if total is None:
            size = (int(height * scale), int(width * scale))
            total, weights = out.new_zeros(*out.shape[:2], *size), out.new_zeros(*size)
        h, w = out.shape[-2:]
        y, z = int(top * scale), int(left * scale)
        mask = torch.outer(_ramp(h, min(overlap, h), y > 0, y + h < total.shape[-2]),
                           _ramp(w, min(overlap, w), z > 0, z + w < total.shape[-1])).to(out.device)
        total[..., y:y + h, z:z + w] += out * mask
        weights[y:y + h, z:z + w] += mask
    return (total / weights).to(x.dtype)
