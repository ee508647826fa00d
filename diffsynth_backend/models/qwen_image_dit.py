"""Qwen-Image's denoiser: a double-stream diffusion transformer (Qwen-Image technical report, arXiv 2508.02324).

Notable: text and image keep weights of their own in every block and meet in one joint attention. Everything that
depends on the timestep alone comes from one call, `modulation`: a third of the weights, needed once per timestep.
Key names are the published ones (`Qwen/Qwen-Image`, `transformer/`); the default arguments are that checkpoint's.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attention import attention
from .general_modules import FeedForward, RMSNorm, TimestepEmbedding, timestep_frequencies

__all__ = ["Modulation", "QwenImageDiT", "QwenImageTransformerBlock", "RMSNorm"]

ROPE_THETA = 10000.0


# ---- rotary position embedding --------------------------------------------------------------------------------------

def _rotations(positions: Tensor, dim: int) -> Tensor:
    """Cosines and sines (len(positions), dim/2, 2), float32."""
    inverse = 1.0 / torch.pow(ROPE_THETA, torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.outer(positions.float(), inverse)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def _centred(length: int) -> Tensor:
    """Positions with 0 in the middle: the model was trained to grow resolution outwards from the centre."""
    return torch.arange(length) - (length - length // 2)


@lru_cache(maxsize=16)
def rope_frequencies(height: int, width: int, text_length: int, axes: tuple[int, int, int],
                     device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotations of the image tokens (height·width, sum(axes)/2, 2) and the text tokens (text_length, sum(axes)/2, 2).

    `height`, `width` count tokens. The axes are frame, row, column; text continues on the diagonal after the image.
    """
    with torch.inference_mode(False):  # cached for later calls, which may want gradients
        grid = (height, width, -1, -1)
        frame = _rotations(torch.zeros(1), axes[0]).expand(*grid)
        row = _rotations(_centred(height), axes[1])[:, None].expand(*grid)
        column = _rotations(_centred(width), axes[2])[None].expand(*grid)
        image = torch.cat([frame, row, column], dim=2).flatten(0, 1)
        first = max(height // 2, width // 2)
        diagonal = torch.arange(first, first + text_length)
        text = torch.cat([_rotations(diagonal, dim) for dim in axes], dim=1)
        return image.to(device), text.to(device)


def apply_rope(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn neighbouring pairs of x (B, heads, S, D) by `rotations` (S, D/2, 2); computed in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotations.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


# ---- modules --------------------------------------------------------------------------------------------------------

class TimeTextEmbed(nn.Module):
    """Timestep → conditioning vector. The name is the checkpoint's: text takes no part in it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, dim)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        return self.timestep_embedder(timestep_frequencies(timestep, 256).to(dtype))


class JointAttention(nn.Module):
    """One attention over text and image tokens, with projections of its own for each stream (`add_…` is text)."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(head_dim), RMSNorm(head_dim)
        self.norm_added_q, self.norm_added_k = RMSNorm(head_dim), RMSNorm(head_dim)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        self.to_add_out = nn.Linear(dim, dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, S, head_dim)

    def forward(self, image: Tensor, text: Tensor, rotations: tuple[Tensor, Tensor],
                mask: Tensor | None) -> tuple[Tensor, Tensor]:
        image_rotations, text_rotations = rotations
        q = apply_rope(self.norm_q(self._heads(self.to_q(image))), image_rotations)
        k = apply_rope(self.norm_k(self._heads(self.to_k(image))), image_rotations)
        v = self._heads(self.to_v(image))
        text_q = apply_rope(self.norm_added_q(self._heads(self.add_q_proj(text))), text_rotations)
        text_k = apply_rope(self.norm_added_k(self._heads(self.add_k_proj(text))), text_rotations)
        text_v = self._heads(self.add_v_proj(text))
        out = attention(torch.cat([text_q, q], dim=2), torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2),
                        mask=mask)
        text_out, image_out = out.transpose(1, 2).flatten(2).split([text.shape[1], image.shape[1]], dim=1)
        return self.to_out(image_out), self.to_add_out(text_out)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer normalisation without weights of its own, then the timestep's scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class QwenImageTransformerBlock(nn.Module):
    """Joint attention, then an MLP, on each stream; both gated and shifted by the timestep."""

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.attn = JointAttention(dim, num_heads, head_dim)
        self.img_mlp = FeedForward(dim)
        self.txt_mod = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.txt_mlp = FeedForward(dim)

    def forward(self, image: Tensor, text: Tensor, image_mod: Tensor, text_mod: Tensor,
                rotations: tuple[Tensor, Tensor], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """image (B, S, dim), text (B, T, dim), …_mod (B, 6·dim) as `QwenImageDiT.modulation` gives them."""
        i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2 = image_mod[:, None].chunk(6, dim=-1)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = text_mod[:, None].chunk(6, dim=-1)

        image_out, text_out = self.attn(modulate(image, i_shift1, i_scale1), modulate(text, t_shift1, t_scale1),
                                        rotations, mask)
        image = image + i_gate1 * image_out
        text = text + t_gate1 * text_out

        image = image + i_gate2 * self.img_mlp(modulate(image, i_shift2, i_scale2))
        text = text + t_gate2 * self.txt_mlp(modulate(text, t_shift2, t_scale2))
        return image, text


class AdaLayerNormOut(nn.Module):
    """Holds the last modulation's projection: scale first, then shift, unlike the blocks."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, conditioning: Tensor) -> Tensor:
        return self.linear(F.silu(conditioning))


@dataclass(frozen=True)
class Modulation:
    """What one timestep contributes: per block (B, 6·dim) for each stream, and (B, 2·dim) for the output."""

    image: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    out: Tensor


class QwenImageDiT(nn.Module):
    """Predicts the flow velocity (noise − image) of normalised latents.

    Defaults: `Qwen/Qwen-Image`, 20.4 billion parameters in 1933 tensors.
    """

    timestep_call = "modulation"  # what it computes from the timestep alone

    def __init__(self, num_layers: int = 60, num_attention_heads: int = 24, attention_head_dim: int = 128,
                 joint_attention_dim: int = 3584, latent_channels: int = 16, patch_size: int = 2,
                 axes_dims_rope: tuple[int, int, int] = (16, 56, 56)) -> None:
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim:
            raise ValueError(f"axes_dims_rope {tuple(axes_dims_rope)} must add up to attention_head_dim "
                             f"{attention_head_dim}")
        dim = num_attention_heads * attention_head_dim
        self.patch_size = patch_size
        self.latent_channels = latent_channels
        self.axes_dims_rope = tuple(axes_dims_rope)
        patch_dim = latent_channels * patch_size**2
        self.time_text_embed = TimeTextEmbed(dim)
        self.txt_norm = RMSNorm(joint_attention_dim)
        self.img_in = nn.Linear(patch_dim, dim)
        self.txt_in = nn.Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            QwenImageTransformerBlock(dim, num_attention_heads, attention_head_dim) for _ in range(num_layers))
        self.norm_out = AdaLayerNormOut(dim)
        self.proj_out = nn.Linear(dim, patch_dim)

    def activation_bytes(self, batch: int, height: int, width: int, text_length: int, dtype: torch.dtype) -> int:
        """Estimate of the memory that a forward pass takes besides weights; height and width in latent pixels.

        A block holds about 24 activations of the width of the model for each token at its peak: the streams, three
        projections, their rotations in float32, and an MLP four times as wide before and after its activation.
        """
        tokens = height // self.patch_size * (width // self.patch_size) + text_length
        return 24 * batch * tokens * self.img_in.out_features * dtype.itemsize

    def patchify(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) → tokens (B, H/p·W/p, C·p·p)."""
        p = self.patch_size
        x = latents.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, H/p, p, W/p, p)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The inverse of `patchify`; height and width in latent pixels."""
        p = self.patch_size
        x = tokens.unflatten(2, (-1, p, p)).unflatten(1, (height // p, width // p))  # (B, H/p, W/p, C, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def modulation(self, timestep: Tensor, dtype: torch.dtype) -> Modulation:
        """Everything that depends on the timestep (B,), 0…1000, alone."""
        conditioning = self.time_text_embed(timestep.float() / 1000, dtype)
        return Modulation(image=tuple(block.img_mod(conditioning) for block in self.transformer_blocks),
                          text=tuple(block.txt_mod(conditioning) for block in self.transformer_blocks),
                          out=self.norm_out(conditioning))

    def forward(self, latents: Tensor, timestep: Tensor, prompt_emb: Tensor,
                prompt_emb_mask: Tensor | None = None) -> Tensor:
        """Velocity (B, C, H, W) of `latents` (B, C, H, W; H and W even) at `timestep` (B,), 0…1000.

        `prompt_emb` (B, T, joint_attention_dim), of the latents' dtype; `prompt_emb_mask` (B, T), nonzero where a
        token counts. All-ones masks cost nothing: the attention then runs without a mask.
        """
        height, width = latents.shape[-2:]
        modulation = self.modulation(timestep, latents.dtype)
        rotations = rope_frequencies(height // self.patch_size, width // self.patch_size, prompt_emb.shape[1],
                                     self.axes_dims_rope, latents.device)
        image = self.img_in(self.patchify(latents))  # (B, S, dim)
        text = self.txt_in(self.txt_norm(prompt_emb))  # (B, T, dim)
        mask = joint_mask(prompt_emb_mask, image.shape[1])
        for block, image_mod, text_mod in zip(self.transformer_blocks, modulation.image, modulation.text, strict=True):
            image, text = block(image, text, image_mod, text_mod, rotations, mask)
        scale, shift = modulation.out[:, None].chunk(2, dim=-1)
        return self.unpatchify(self.proj_out(modulate(image, shift, scale)), height, width)


def joint_mask(text_mask: Tensor | None, image_length: int) -> Tensor | None:
    """(B, T) → boolean (B, 1, 1, T + image_length) for the joint attention; None when nothing is masked."""
    if text_mask is None or bool(text_mask.all()):
        return None
    keep = text_mask.bool()
    return torch.cat([keep, keep.new_ones(keep.shape[0], image_length)], dim=1)[:, None, None]
