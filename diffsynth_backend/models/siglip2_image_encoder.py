"""SigLIP 2's image encoder, giant size at 384 pixels (arXiv 2502.14786): one vector for a picture.

Notable: written out here because the names in transformers' class changed between its versions; these are the file's,
`DiffSynth-Studio/General-Image-Encoders`, `SigLIP2-G384/` (656 tensors), so it loads without a converter. A learned
probe attends to all patches and makes the vector (Zhai et al. 2022, "Scaling Vision Transformers").
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attention import attention

# Pictures enter with these mean and standard deviation per channel (preprocessor_config.json of the checkpoint).
IMAGE_MEAN, IMAGE_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
NORM_EPS = 1e-6


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, heads, S, head_dim)


class VisionEmbeddings(nn.Module):
    """Pictures (B, 3, image_size, image_size) → one token per patch, each with a learned position (B, S, dim)."""

    def __init__(self, dim: int, image_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.position_embedding = nn.Embedding((image_size // patch_size) ** 2, dim)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return patches + self.position_embedding(torch.arange(patches.shape[1], device=patches.device))


class SelfAttention(nn.Module):
    """Every patch attends to every patch."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_heads(project(x), self.num_heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with the tanh form of GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    """A transformer layer, normalised before each of its two parts."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim, NORM_EPS), nn.LayerNorm(dim, NORM_EPS)
        self.self_attn = SelfAttention(dim, num_heads)
        self.mlp = MLP(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, dim: int, num_layers: int, num_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, num_heads, hidden_dim) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ProbeAttention(nn.Module):
    """Attention with the three projections packed into one weight, in the layout of `nn.MultiheadAttention`."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, probe: Tensor, x: Tensor) -> Tensor:
        """Queries from `probe` (B, 1, dim), keys and values from x (B, S, dim) → (B, 1, dim)."""
        projections = zip((probe, x, x), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3))
        q, k, v = (_heads(F.linear(source, weight, bias), self.num_heads) for source, weight, bias in projections)
        return self.out_proj(attention(q, k, v).transpose(1, 2).flatten(2))


class AttentionPoolingHead(nn.Module):
    """All patches (B, S, dim) → one vector (B, dim)."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, dim))
        self.attention = ProbeAttention(dim, num_heads)
        self.layernorm = nn.LayerNorm(dim, NORM_EPS)
        self.mlp = MLP(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.attention(self.probe.expand(len(x), -1, -1), x)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class Siglip2ImageEncoder(nn.Module):
    """Pictures → pooled vectors. The default sizes are the published checkpoint's."""

    def __init__(self, hidden_size: int = 1536, num_layers: int = 40, num_heads: int = 16,
                 intermediate_size: int = 6144, image_size: int = 384, patch_size: int = 16) -> None:
        super().__init__()
        self.image_size = image_size
        self.embeddings = VisionEmbeddings(hidden_size, image_size, patch_size)
        self.encoder = Encoder(hidden_size, num_layers, num_heads, intermediate_size)
        self.post_layernorm = nn.LayerNorm(hidden_size, NORM_EPS)
        self.head = AttentionPoolingHead(hidden_size, num_heads, intermediate_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pictures (B, 3, image_size, image_size), normalised by IMAGE_MEAN and IMAGE_STD, in the weights' dtype
        → (B, hidden_size). Raises ValueError for another shape: positions are learned for this one.
        """
        side = self.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, side, side):
            raise ValueError(f"pictures of shape {tuple(pixel_values.shape)}; expected (batch, 3, {side}, {side}): "
                             "resize them first")
        return self.head(self.post_layernorm(self.encoder(self.embeddings(pixel_values))))
