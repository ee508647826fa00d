"""Parts that several architectures share: normalisation, timestep embedding, feed-forward, rotation, tiling.

Parameter names are those of the published checkpoints (`net.0.proj`, `linear_1`, …), so files load without renaming.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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


# ---- transformer blocks ---------------------------------------------------------------------------------------------

def apply_rope(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn neighbouring pairs of x (B, heads, S, D) by `rotations` (S, D/2, 2), cosines and sines; in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotations.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def by_part(function: Callable[..., Tensor], x: Tensor, first: int, *values: Sequence[Tensor]) -> Tensor:
    """`function` of x (B, S, dim) and `values`: one of each for all tokens, or one for the first and one for the rest.

    Values stay (B, 1, dim): with one for each token they would take more memory than the tokens.
    """
    if len(values[0]) == 1:
        return function(x, *(value for value, in values))
    parts = x[:, :first], x[:, first:]
    return torch.cat([function(part, *own) for part, *own in zip(parts, *values, strict=True)], dim=1)


def block_runner(checkpointing: bool, offload: bool) -> Callable[..., Any]:
    """Calls a block with its inputs; with `checkpointing` (or `offload`, which includes it and keeps what the block
    starts from in RAM) so that its backward pass computes it again."""
    def plain(block: nn.Module, *inputs: Any) -> Any:
        return block(*inputs)

    def checkpointed(block: nn.Module, *inputs: Any) -> Any:
        with torch.autograd.graph.save_on_cpu() if offload else nullcontext():
            return checkpoint(block, *inputs, use_reentrant=False)

    return checkpointed if checkpointing or offload else plain


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


def _axis_weights(length: int, size: int, stride: int, scale: float) -> dict[int, Tensor]:
    """Where tiles begin along one axis → their weights at the places of their output; those of a place sum to 1."""
    out_length, overlap = int(length * scale), max(1, int((size - stride) * scale))
    count = min(int(size * scale), out_length)
    total, ramps = torch.zeros(out_length), {}
    for start in tile_starts(length, size, stride):
        begin = int(start * scale)
        ramps[start] = _ramp(count, min(overlap, count), begin > 0, begin + count < out_length)
        total[begin:begin + count] += ramps[start]
    return {start: ramp / total[int(start * scale):int(start * scale) + count] for start, ramp in ramps.items()}


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


class Tiles:
    """Overlapping tiles that cover the last two axes of a tensor (…, height, width), and the way back to a whole.

    `size` and `stride` are in pixels, one number or (vertical, horizontal); `scale` is output pixels per input pixel.
    Raises ValueError when a stride is not in 1..size or an edge does not fall on whole output pixels.
    """

    def __init__(self, height: int, width: int, size: int | tuple[int, int], stride: int | tuple[int, int],
                 scale: float) -> None:
        self.size, self.scale = _pair(size), scale
        for tile_size, tile_stride in zip(self.size, _pair(stride)):
            check_tiles(tile_size, tile_stride)
        self._rows, self._columns = (_axis_weights(*axis, scale)
                                     for axis in zip((height, width), self.size, _pair(stride)))
        if any((edge * scale) % 1 for edge in (*self._rows, *self._columns, *self.size)):
            raise ValueError(f"tile_size {size}, tile_stride {stride} and the size {height}×{width} must be "
                             f"multiples of {round(1 / scale)}")
        self.corners = list(itertools.product(self._rows, self._columns))  # (top, left), in pixels of the input
        self.out_size = int(height * scale), int(width * scale)

    def cut(self, x: Tensor, corner: tuple[int, int]) -> Tensor:
        """A tile of x (…, height, width), a view."""
        (top, left), (height, width) = corner, self.size
        return x[..., top:top + height, left:left + width]

    def add(self, total: Tensor, part: Tensor, corner: tuple[int, int]) -> None:
        """Blend a tile's output into `total` (…, *out_size), which starts as zeros and is whole after the last tile."""
        (top, left), (height, width) = (int(edge * self.scale) for edge in corner), part.shape[-2:]
        weights = self._rows[corner[0]][:, None] * self._columns[corner[1]]
        total[..., top:top + height, left:left + width].addcmul_(part.to(total), weights.to(total))


def tiled_apply(function: Callable[[Tensor], Tensor], x: Tensor, tile_size: int | tuple[int, int],
                tile_stride: int | tuple[int, int], scale: float,
                progress_bar_cmd: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """Run `function` on overlapping tiles of x (…, H, W) and blend the results.

    `tile_size` and `tile_stride` are in pixels of x; `scale` is output pixels per input pixel (8 for a VAE decoder,
    1/8 for its encoder). `progress_bar_cmd` wraps the list of tiles, as in a pipeline's loop: it shows progress, and an
    exception that it raises stops the work between two tiles. Peak memory is that of one tile plus the whole output,
    which is gathered in float32 on x's device. Returns x's dtype. Raises as `Tiles` does.
    """
    tiles, total = Tiles(*x.shape[-2:], tile_size, tile_stride, scale), None
    for corner in progress_bar_cmd(tiles.corners):
        out = function(tiles.cut(x, corner))
        if total is None:
            total = x.new_zeros(*out.shape[:-2], *tiles.out_size, dtype=torch.float32)
        tiles.add(total, out, corner)
    return total.to(x.dtype)
