"""Wan's image encoder: the picture half of a CLIP (ViT-H/14, arXiv 2212.07143), up to its last layer but one.

Notable: Wan reads the hidden states before the last layer, so neither that layer nor the norm and the projection after
it are here, and the converter leaves them in the file
(`models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth` of `Wan-AI/Wan2.1-I2V-14B-480P`) with the text half.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.attention import attention

# Pictures enter with these mean and standard deviation per channel (preprocessor_config.json of the Diffusers layout).
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NORM_EPS = 1e-5


class Embeddings(nn.Module):
    """Pictures (B, 3, image_size, image_size) → class token and patches with learned positions (B, 1 + S, dim)."""

    def __init__(self, dim: int, image_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, dim, patch_size, stride=patch_size, bias=False)
        self.cls_embedding = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embedding = nn.Parameter(torch.randn(1, 1 + (image_size // patch_size) ** 2, dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_embedding.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embedding


class SelfAttention(nn.Module):
    """Every token attends to every token; the projections of queries, keys and values are one weight."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, S, head_dim)
                   for part in self.to_qkv(x).chunk(3, dim=-1))
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer layer, normalised before each of its two parts."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, NORM_EPS), nn.LayerNorm(dim, NORM_EPS)
        self.attn = SelfAttention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class WanImageEncoder(nn.Module):
    """Pictures → features of each patch. The default sizes are the published checkpoint's, whose 32nd layer is left
    out."""

    def __init__(self, dim: int = 1280, num_heads: int = 16, num_layers: int = 31, hidden_dim: int = 5120,
                 image_size: int = 224, patch_size: int = 14) -> None:
        super().__init__()
        self.image_size = image_size
        self.embeddings = Embeddings(dim, image_size, patch_size)
        self.pre_norm = nn.LayerNorm(dim, NORM_EPS)
        self.transformer = nn.ModuleList(Block(dim, num_heads, hidden_dim) for _ in range(num_layers))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pictures (B, 3, image_size, image_size), normalised by IMAGE_MEAN and IMAGE_STD, in the weights' dtype
        → (B, 1 + patches, dim), the class token first; (B, 257, 1280) in the default sizes.

        Raises ValueError for another shape: positions are learned for this one.
        """
        side = self.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, side, side):
            raise ValueError(f"pictures of shape {tuple(pixel_values.shape)}; expected (batch, 3, {side}, {side}): "
                             "resize them first")
        x = self.pre_norm(self.embeddings(pixel_values))
        for block in self.transformer:
            x = block(x)
        return x
