"""Tiny denoisers of the Qwen-Image family with equal weights here and in diffusers, and a forward pass written plainly.

Notable: `plain_forward` knows nothing of parts, groups and caches: every token has its own modulation, every pair of
tokens an entry in one mask, and positions are rotated as complex numbers. It takes what the model is made of, the
weights, and nothing that it computes.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn

from diffsynth_backend.models.qwen_image_dit import QwenImageDiT

SIZES = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "joint_attention_dim": 24,
         "axes_dims_rope": (8, 12, 12)}
LAYERED = {"use_layer3d_rope": True, "use_additional_t_cond": True}
TOLERANCE = 1e-5


def make_pair(randomized: Callable[[nn.Module], nn.Module], zero_cond_t: bool = False,
              **switches: bool) -> tuple[QwenImageDiT, QwenImageTransformer2DModel]:
    """Ours and theirs with the same random weights."""
    theirs = randomized(QwenImageTransformer2DModel(in_channels=64, out_channels=16, zero_cond_t=zero_cond_t, **SIZES,
                                                    **switches))
    ours = QwenImageDiT(**SIZES, **switches).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def pack(latents: Tensor) -> Tensor:
    return QwenImagePipeline._pack_latents(latents, *latents.shape)


def diffusers_forward(model: QwenImageTransformer2DModel, latents: Tensor, timestep: Tensor, prompt_emb: Tensor,
                      mask: Tensor | None = None, conditions: Sequence[Tensor] = ()) -> Tensor:
    """Their forward on (B, 16, H, W) or (B, 16, layers, H, W), with the packing and units that their pipelines use."""
    layers = [latents] if latents.ndim == 4 else list(latents.unbind(2))
    pictures = layers + [condition.expand(len(latents), -1, -1, -1) for condition in conditions]
    shapes = [(1, picture.shape[2] // 2, picture.shape[3] // 2) for picture in pictures]
    layered = model.time_text_embed.use_additional_t_cond
    out = model(hidden_states=torch.cat([pack(picture) for picture in pictures], dim=1), timestep=timestep / 1000,
                encoder_hidden_states=prompt_emb, encoder_hidden_states_mask=mask, img_shapes=[shapes] * len(latents),
                additional_t_cond=torch.zeros(len(latents), dtype=torch.long) if layered else None).sample
    height, width = latents.shape[-2:]
    size = shapes[0][1] * shapes[0][2]
    drawn = [QwenImagePipeline._unpack_latents(out[:, i * size:(i + 1) * size], height * 8, width * 8, 8)[:, :, 0]
             for i in range(len(layers))]
    return drawn[0] if latents.ndim == 4 else torch.stack(drawn, dim=2)


# ---- the plain forward pass -----------------------------------------------------------------------------------------

def centred(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float64) - (length - length // 2)


def grid_positions(frame: int, rows: Tensor, columns: Tensor) -> Tensor:
    """(rows·columns, 3)."""
    return torch.cartesian_prod(torch.tensor([frame], dtype=torch.float64), rows, columns)


def text_positions(first: int, lengths: Sequence[int]) -> Tensor:
    """(T, 3): each prompt begins at the same place."""
    return torch.cat([first + torch.arange(length, dtype=torch.float64) for length in lengths])[:, None].expand(-1, 3)


def picture_positions(sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Of pictures of these heights and widths in tokens, each around its centre."""
    return torch.cat([grid_positions(frame, centred(h), centred(w)) for frame, (h, w) in enumerate(sizes)])


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, heads, S, D) at positions (S, 3)."""
    angles = [positions[:, axis, None] * 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
              for axis, dim in enumerate(SIZES["axes_dims_rope"])]
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.exp(1j * torch.cat(angles, dim=1))
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def plain_forward(model: QwenImageDiT, image: Tensor, text: Tensor, at: Tensor, positions: tuple[Tensor, Tensor],
                  visible: Tensor | None = None, timestep: float = 500.0,
                  after_block: Callable[[int, Tensor], Tensor] | None = None,
                  more: Sequence[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """Image tokens (B, S, 64) and prompts (B, T, 24) → the prediction (B, S, 64) for all image tokens.

    `at` (S,): the timestep of each token; `positions` of image and text; `visible` bool (T + S, T + S + more): row sees
    column; `more`: keys and values for each block behind all others. `after_block` sees and corrects all image tokens.
    """
    count, heads = text.shape[1], SIZES["num_attention_heads"]
    x, y = model.img_in(image), model.txt_in(model.txt_norm(text))
    conditioning = F.silu(torch.cat([model.time_text_embed(t[None] / 1000, x.dtype) for t in at]))[None]  # (1, S, dim)
    of_text = F.silu(model.time_text_embed(torch.tensor([timestep]) / 1000, x.dtype))[None]

    def norm(z: Tensor) -> Tensor:
        return F.layer_norm(z, z.shape[-1:], eps=1e-6)

    def split(z: Tensor) -> Tensor:
        return z.unflatten(2, (heads, -1)).transpose(1, 2)

    for i, block in enumerate(model.transformer_blocks):
        a = block.img_mod[1](conditioning).chunk(6, dim=-1)
        b = block.txt_mod[1](of_text).chunk(6, dim=-1)
        u, w, attn = norm(x) * (1 + a[1]) + a[0], norm(y) * (1 + b[1]) + b[0], block.attn
        q = torch.cat([rotate(attn.norm_added_q(split(attn.add_q_proj(w))), positions[1]),
                       rotate(attn.norm_q(split(attn.to_q(u))), positions[0])], dim=2)
        k = torch.cat([rotate(attn.norm_added_k(split(attn.add_k_proj(w))), positions[1]),
                       rotate(attn.norm_k(split(attn.to_k(u))), positions[0])], dim=2)
        v = torch.cat([split(attn.add_v_proj(w)), split(attn.to_v(u))], dim=2)
        if more is not None:
            k, v = (torch.cat([z, m.expand(len(z), -1, -1, -1)], dim=2) for z, m in zip((k, v), more[i]))
        scores = q @ k.transpose(2, 3) / q.shape[-1]**0.5
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        out = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
        x, y = x + a[2] * attn.to_out[0](out[:, count:]), y + b[2] * attn.to_add_out(out[:, :count])
        x = x + a[5] * block.img_mlp(norm(x) * (1 + a[4]) + a[3])
        y = y + b[5] * block.txt_mlp(norm(y) * (1 + b[4]) + b[3])
        if after_block is not None:
            x = x + after_block(i, x)
    scale, shift = model.norm_out.linear(of_text).chunk(2, dim=-1)
    return model.proj_out(norm(x) * (1 + scale) + shift)
