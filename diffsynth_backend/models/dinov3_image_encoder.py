"""DINOv3's image encoder with 7 billion weights (arXiv 2508.10104): one vector for a picture, from its class token.

Notable: written out here because transformers' class has existed only since 4.56 and nested its layers differently
later. These are the file's names (`DiffSynth-Studio/General-Image-Encoders`, `DINOv3-7B/`), so it loads without a
converter. Positions are rotary over −1…1 whatever the size of the picture; class and register tokens have none.
"""
from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attention import attention

# Pictures enter with these mean and standard deviation per channel (ImageNet's; preprocessor_config.json).
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SIZE = 224  # in its preprocessor_config.json; the model itself takes any multiple of a patch
ROPE_THETA = 100.0
NORM_EPS = 1e-5


# ---- rotary position embedding --------------------------------------------------------------------------------------

def _centres(count: int) -> Tensor:
    """Centres of `count` patches side by side, which together reach from −1 to 1."""
    return (torch.arange(count, dtype=torch.float32) + 0.5) / count * 2 - 1


@lru_cache(maxsize=16)
def rope_rotations(rows: int, columns: int, num_prefix: int, head_dim: int,
                   device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (num_prefix + rows·columns, head_dim/2), float32.

    A quarter of a head turns with the row, a quarter with the column. Tokens in front of the patches are not turned.
    """
    with torch.inference_mode(False):  # cached for later calls, which may want gradients
        quarter = head_dim // 4
        frequencies = 2 * math.pi * ROPE_THETA ** -(torch.arange(quarter, dtype=torch.float32) / quarter)
        row = torch.outer(_centres(rows), frequencies)[:, None].expand(-1, columns, -1)
        column = torch.outer(_centres(columns), frequencies)[None].expand(rows, -1, -1)
        angles = torch.cat([row, column], dim=-1).flatten(0, 1)
        angles = F.pad(angles, (0, 0, num_prefix, 0)).to(device)
        return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
    """Turn x (B, heads, S, D), number i of the first half of D together with number i of the second; in float32."""
    cos, sin = rotations
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# ---- modules --------------------------------------------------------------------------------------------------------

class Embeddings(nn.Module):
    """Pictures → class token, register tokens, patches (B, 1 + registers + S, dim).

    `mask_token` replaced hidden patches in training; it is part of the file.
    """

    def __init__(self, dim: int, num_register_tokens: int, patch_size: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.randn(1, num_register_tokens, dim))
        self.patch_embeddings = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
        prefix = torch.cat([self.cls_token, self.register_tokens], dim=1).expand(len(patches), -1, -1)
        return torch.cat([prefix, patches], dim=1)


class Attention(nn.Module):
    """Self-attention; only the output projection has a bias."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(dim, dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, S, head_dim)

    def forward(self, x: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
        q = apply_rope(self._heads(self.q_proj(x)), rotations)
        k = apply_rope(self._heads(self.k_proj(x)), rotations)
        v = self._heads(self.v_proj(x))
        return self.o_proj(attention(q, k, v).transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden_dim), nn.Linear(dim, hidden_dim)
        self.down_proj = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LayerScale(nn.Module):
    """A learned factor per channel (Touvron et al. 2021)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class Layer(nn.Module):
    """A transformer layer, normalised before each of its two parts and scaled after."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, NORM_EPS), nn.LayerNorm(dim, NORM_EPS)
        self.attention = Attention(dim, num_heads)
        self.layer_scale1, self.layer_scale2 = LayerScale(dim), LayerScale(dim)
        self.mlp = GatedMLP(dim, hidden_dim)

    def forward(self, x: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.layer_scale1(self.attention(self.norm1(x), rotations))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class DINOv3ImageEncoder(nn.Module):
    """Pictures → vectors. The default sizes are the published checkpoint's."""

    def __init__(self, hidden_size: int = 4096, num_layers: int = 40, num_heads: int = 32,
                 intermediate_size: int = 8192, num_register_tokens: int = 4, patch_size: int = 16) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_prefix = 1 + num_register_tokens
        self.head_dim = hidden_size // num_heads
        self.embeddings = Embeddings(hidden_size, num_register_tokens, patch_size)
        self.layer = nn.ModuleList(Layer(hidden_size, num_heads, intermediate_size) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size, NORM_EPS)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), normalised by IMAGE_MEAN and IMAGE_STD, in the weights' dtype → (B, hidden_size).

        Raises ValueError unless H and W are multiples of a patch.
        """
        shape = pixel_values.shape
        if len(shape) != 4 or shape[1] != 3 or any(side < 1 or side % self.patch_size for side in shape[2:]):
            raise ValueError(f"pictures of shape {tuple(shape)}; expected (batch, 3, height, width) with sides that "
                             f"are multiples of {self.patch_size}: resize them first")
        rows, columns = (side // self.patch_size for side in shape[2:])
        rotations = rope_rotations(rows, columns, self.num_prefix, self.head_dim, pixel_values.device)
        x = self.embeddings(pixel_values)
        for layer in self.layer:
            x = layer(x, rotations)
        return self.norm(x)[:, 0]
