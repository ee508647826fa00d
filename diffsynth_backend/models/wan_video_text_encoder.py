"""Wan's text encoder: the encoder of umT5-XXL (arXiv 2304.09151), token ids → hidden states.

Notable: each layer has relative positions of its own, where T5's share the first layer's. Attention scores are not
divided by the root of the head's size. Key names are those of `models_t5_umt5-xxl-enc-bf16.pth` (242 tensors) of
`Wan-AI/Wan2.1-T2V-14B` and all later ones; the default sizes are its.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..core.attention import attention
from .general_modules import RMSNorm

MAX_DISTANCE = 128  # tokens from here on are equally far away


def bucket_of_distance(distance: int, num_buckets: int) -> int:
    """The bucket of a distance in tokens: one each for the near half, then wider ones, by the logarithm."""
    exact = num_buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(MAX_DISTANCE / exact)
    return min(exact + int(share * (num_buckets - exact)), num_buckets - 1)


def relative_buckets(length: int, num_buckets: int, device: torch.device) -> Tensor:
    """(length, length) int64, of query i and key j: the first half of the buckets is for keys up to the query, the
    second for those after it."""
    half = num_buckets // 2
    position = torch.arange(length, device=device)
    offset = position[None] - position[:, None]
    buckets = torch.tensor([bucket_of_distance(distance, half) for distance in range(length)], device=device)
    return buckets[offset.abs()] + half * (offset > 0)


def saturate(x: Tensor) -> Tensor:
    """Keeps float16, whose range the sums of the residual path leave, finite. Other dtypes have the range."""
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(x.dtype).max
    return x.clamp(-limit, limit)


class RelativeEmbedding(nn.Module):
    """A learned addition to the scores for each bucket of relative positions and each head."""

    def __init__(self, num_buckets: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, buckets: Tensor) -> Tensor:
        """(T, T) → (1, heads, T, T)."""
        return self.embedding(buckets).permute(2, 0, 1).contiguous()[None]


class SelfAttention(nn.Module):
    """Attention without biases in its projections and without a scale."""

    def __init__(self, dim: int, attention_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(dim, attention_dim, bias=False) for _ in range(3))
        self.o = nn.Linear(attention_dim, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, head_dim)
                   for project in (self.q, self.k, self.v))
        q = q * math.sqrt(q.shape[-1])  # undoes the scale; 8 in the published size, so it rounds nothing
        return self.o(attention(q, k, v, bias).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """GEGLU (Shazeer, 2020) with the tanh form of GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(dim, hidden_dim, bias=False), nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(dim, hidden_dim, bias=False)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class Block(nn.Module):
    """A transformer layer, normalised before each of its two parts."""

    def __init__(self, dim: int, attention_dim: int, hidden_dim: int, num_heads: int, num_buckets: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.attn = SelfAttention(dim, attention_dim, num_heads)
        self.ffn = FeedForward(dim, hidden_dim)
        self.pos_embedding = RelativeEmbedding(num_buckets, num_heads)

    def forward(self, x: Tensor, buckets: Tensor, padding: Tensor | None) -> Tensor:
        bias = self.pos_embedding(buckets)
        if padding is not None:
            bias = bias.masked_fill(padding, torch.finfo(bias.dtype).min)
        x = saturate(x + self.attn(self.norm1(x), bias))
        return saturate(x + self.ffn(self.norm2(x)))


class WanTextEncoder(nn.Module):
    """Token ids → hidden states of the last layer, after its final norm. The default sizes are umT5-XXL's."""

    def __init__(self, vocab: int = 256384, dim: int = 4096, dim_attn: int = 4096, dim_ffn: int = 10240,
                 num_heads: int = 64, num_layers: int = 24, num_buckets: int = 32) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.token_embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim, dim_attn, dim_ffn, num_heads, num_buckets) for _ in range(num_layers))
        self.norm = RMSNorm(dim)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Tokens → hidden states (B, T, dim) in the weights' dtype.

        input_ids        (B, T) int64
        attention_mask   (B, T), zero for padding, which no token then sees; all take part if there is none
        """
        buckets = relative_buckets(input_ids.shape[1], self.num_buckets, input_ids.device)
        padding = None if attention_mask is None else (attention_mask == 0)[:, None, None]  # (B, 1, 1, T)
        x = self.token_embedding(input_ids)
        for block in self.blocks:
            x = block(x, buckets, padding)
        return self.norm(x)
