"""Qwen-Image's denoiser: a double-stream diffusion transformer (Qwen-Image technical report, arXiv 2508.02324).

One class serves the family: text to image, editing (clean pictures as further tokens), layers (several pictures drawn
together), and prompts for regions (EliGen, arXiv 2501.01097).

Notable: text and image keep weights of their own in every block and meet in one joint attention. Everything that
depends on the timestep alone comes from one call, `modulation`: a third of the weights, needed once per timestep.
Prompts for regions need no mask: tokens that see the same others are one group, and each group is an attention.
Key names are the published ones (`Qwen/Qwen-Image`, `transformer/`); the default arguments are that checkpoint's.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attention import attention
from ..core.attention.groups import Group, grouped_attention, region_groups
from .general_modules import (
    FeedForward,
    RMSNorm,
    TimestepEmbedding,
    apply_rope,
    block_runner,
    by_part,
    timestep_frequencies,
)

__all__ = ["Entities", "Modulation", "QwenImageDiT", "QwenImageTransformerBlock", "RMSNorm", "Regions"]

ROPE_THETA = 10000.0

AfterBlock = Callable[[int, Tensor], Tensor | None]  # number of the block and the noise's tokens → their correction
KeysValues = tuple[Tensor, Tensor]  # (1 or B, heads, S', head_dim) each


@dataclass(frozen=True)
class Entities:
    """Prompts that only a region of the picture sees, and that see only that region; at least one.

    `prompt_embs`: for each (1 or B, T_i, joint_attention_dim), without padding; `regions` in the same order.
    """

    prompt_embs: tuple[Tensor, ...]
    regions: Regions


# ---- rotary position embedding --------------------------------------------------------------------------------------

def _rotations(positions: Tensor, dim: int) -> Tensor:
    """Cosines and sines (len(positions), dim/2, 2), float32."""
    inverse = 1.0 / torch.pow(ROPE_THETA, torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.outer(positions.float(), inverse)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def _centred(length: int) -> Tensor:
    """Positions with 0 in the middle: the model was trained to grow resolution outwards from the centre."""
    return torch.arange(length) - (length - length // 2)


@dataclass(frozen=True)
class Grid:
    """Where a picture's tokens are: its number on the frame axis, and its height and width in tokens."""

    frame: int
    height: int
    width: int


def _sampled(length: int, of: int) -> Tensor:
    """`length` positions spread over an axis of `of` tokens, from its first to its last."""
    return _centred(of)[torch.linspace(0, of - 1, length).long()]


@lru_cache(maxsize=4)  # all that changes the result is in the key; an entry takes 512 bytes a token at full size
def image_rotations(grids: tuple[Grid, ...], axes: tuple[int, int, int], device: torch.device,
                    interpolate: bool = False) -> Tensor:
    """Rotations (S, sum(axes)/2, 2) of the tokens of all pictures in their order; the axes are frame, row, column.

    `interpolate`: pictures whose size differs from the first one's lie over the same area, at positions of its grid.
    """
    with torch.inference_mode(False):  # cached for later calls, which may want gradients
        drawn = grids[0]
        parts = []
        for grid in grids:
            rows, columns = _centred(grid.height), _centred(grid.width)
            if interpolate and (grid.height, grid.width) != (drawn.height, drawn.width):
                rows, columns = _sampled(grid.height, drawn.height), _sampled(grid.width, drawn.width)
            shape = (grid.height, grid.width, -1, -1)
            frame = _rotations(torch.tensor([grid.frame]), axes[0]).expand(*shape)
            row = _rotations(rows, axes[1])[:, None].expand(*shape)
            column = _rotations(columns, axes[2])[None].expand(*shape)
            parts.append(torch.cat([frame, row, column], dim=2).flatten(0, 1))
        return torch.cat(parts).to(device)


@lru_cache(maxsize=32)
def text_rotations(first: int, length: int, axes: tuple[int, int, int], device: torch.device) -> Tensor:
    """Rotations (length, sum(axes)/2, 2) of a prompt: on the diagonal from `first`, which is beyond all pictures."""
    with torch.inference_mode(False):
        diagonal = torch.arange(first, first + length)
        return torch.cat([_rotations(diagonal, dim) for dim in axes], dim=1).to(device)


# ---- the joint sequence ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class JointSequence:
    """Where everything lies: text, then image; of the image the noise comes first, then the conditions."""

    grids: tuple[Grid, ...]  # the pictures
    prompts: tuple[int, ...]  # tokens of each; the last one is for the whole picture
    noise_tokens: int
    rotations: tuple[Tensor, Tensor]  # of image and text, (S, head_dim/2, 2) and (T, head_dim/2, 2)


# ---- who sees whom --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sight:
    """Who sees whom: everyone everyone, but for a mask as for `attention`, or the groups of `grouped_attention`."""

    mask: Tensor | None = None
    groups: tuple[Group, ...] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self.mask) if self.groups is None else grouped_attention(q, k, v, self.groups)


def keys_kept(text_mask: Tensor | None, before: int, after: int) -> Tensor | None:
    """(B, T) → boolean (B, before + T + after), which keys count; None when all do."""
    if text_mask is None or bool(text_mask.all()):
        return None
    keep = text_mask.bool()
    return torch.cat([keep.new_ones(len(keep), before), keep, keep.new_ones(len(keep), after)], dim=1)


def token_regions(masks: Tensor, grids: Sequence[Grid], patch_size: int) -> Tensor:
    """Masks (N, h, w) of the drawn picture → bool (N, S): which tokens of all pictures lie in which region.

    Every picture has the regions in the same place, as the published masks repeat them for each.
    """
    of_tokens = F.max_pool2d(masks.float(), patch_size)
    return torch.cat([F.adaptive_max_pool2d(of_tokens, (grid.height, grid.width)).flatten(1) for grid in grids],
                     dim=1) > 0


class Regions:
    """Regions of a picture, whose `masks` bool (number, h, w) lie on the latent grid and do not change.

    A token belongs to a region that any of its latent pixels belongs to. Who sees whom is worked out once for each kind
    of sequence, not in every pass: it needs the masks' values, for which the host would wait for the device.
    """

    def __init__(self, masks: Tensor) -> None:
        self.masks = masks
        self._groups: dict[tuple, tuple[Group, ...]] = {}

    def groups(self, sequence: JointSequence, patch_size: int, cached: int, keep: Tensor | None) -> tuple[Group, ...]:
        """See `region_groups`, with so many cached tokens behind the sequence."""
        if keep is not None:  # known in its own pass only
            return self._make_groups(sequence, patch_size, cached, keep)
        kind = sequence.grids, sequence.prompts, patch_size, cached
        if kind not in self._groups:
            with torch.inference_mode(False):
                self._groups[kind] = self._make_groups(sequence, patch_size, cached, None)
        return self._groups[kind]

    def _make_groups(self, sequence: JointSequence, patch_size: int, cached: int,
                     keep: Tensor | None) -> tuple[Group, ...]:
        of_tokens = token_regions(self.masks, sequence.grids, patch_size)
        return region_groups(sequence.prompts, of_tokens, cached, keep)


# ---- modules --------------------------------------------------------------------------------------------------------

class TimeTextEmbed(nn.Module):
    """Timestep → conditioning vector. The name is the checkpoint's: text takes no part in it.

    The layered model adds the embedding of a class: 0, pictures with transparency. Its other class is never used.
    """

    def __init__(self, dim: int, use_additional_t_cond: bool) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, dim)
        self.addition_t_embedding = nn.Embedding(2, dim) if use_additional_t_cond else None

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        conditioning = self.timestep_embedder(timestep_frequencies(timestep, 256).to(dtype))
        if self.addition_t_embedding is None:
            return conditioning
        picture_class = torch.zeros(1, dtype=torch.long, device=timestep.device)
        return conditioning + self.addition_t_embedding(picture_class).to(dtype)


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

    def forward(self, image: Tensor, text: Tensor, rotations: tuple[Tensor, Tensor], sight: Sight,
                cached: KeysValues | None) -> tuple[Tensor, Tensor]:
        image_rotations, text_rotations = rotations
        q = apply_rope(self.norm_q(self._heads(self.to_q(image))), image_rotations)
        k = apply_rope(self.norm_k(self._heads(self.to_k(image))), image_rotations)
        v = self._heads(self.to_v(image))
        text_q = apply_rope(self.norm_added_q(self._heads(self.add_q_proj(text))), text_rotations)
        text_k = apply_rope(self.norm_added_k(self._heads(self.add_k_proj(text))), text_rotations)
        text_v = self._heads(self.add_v_proj(text))
        more_k, more_v = ([], []) if cached is None else ([part.to(k).expand(len(k), -1, -1, -1)] for part in cached)
        q = torch.cat([text_q, q], dim=2)
        k = torch.cat([text_k, k, *more_k], dim=2)
        v = torch.cat([text_v, v, *more_v], dim=2)
        out = sight.attend(q, k, v)
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

    def forward(self, image: Tensor, text: Tensor, image_mod: Tensor, condition_mod: Tensor | None, text_mod: Tensor,
                sequence: JointSequence, sight: Sight, cached: KeysValues | None) -> tuple[Tensor, Tensor]:
        """image (B, S, dim), text (B, T, dim), …_mod (B, 6·dim) as `QwenImageDiT.modulation` gives them.

        `condition_mod` is for those image tokens that are conditions', None: as for the others. `cached` keys and
        values are seen by all.
        """
        mods = [mod[:, None].chunk(6, dim=-1) for mod in (image_mod, condition_mod) if mod is not None]
        i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2 = zip(*mods)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = text_mod[:, None].chunk(6, dim=-1)
        noise = sequence.noise_tokens

        image_out, text_out = self.attn(by_part(modulate, image, noise, i_shift1, i_scale1),
                                        modulate(text, t_shift1, t_scale1), sequence.rotations, sight, cached)
        image = image + by_part(torch.mul, image_out, noise, i_gate1)
        text = text + t_gate1 * text_out

        image_out = self.img_mlp(by_part(modulate, image, noise, i_shift2, i_scale2))
        image = image + by_part(torch.mul, image_out, noise, i_gate2)
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

    Defaults: `Qwen/Qwen-Image`, 20.4 billion parameters in 1933 tensors. `Qwen/Qwen-Image-Layered` has both switches:
    `use_layer3d_rope` gives the last picture of the sequence, its source, the frame −1, and `use_additional_t_cond`
    adds a class to the timestep.
    """

    timestep_call = "modulation"  # what it computes from the timestep alone

    def __init__(self, num_layers: int = 60, num_attention_heads: int = 24, attention_head_dim: int = 128,
                 joint_attention_dim: int = 3584, latent_channels: int = 16, patch_size: int = 2,
                 axes_dims_rope: tuple[int, int, int] = (16, 56, 56), use_layer3d_rope: bool = False,
                 use_additional_t_cond: bool = False) -> None:
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim:
            raise ValueError(f"axes_dims_rope {tuple(axes_dims_rope)} must add up to attention_head_dim "
                             f"{attention_head_dim}")
        dim = num_attention_heads * attention_head_dim
        self.patch_size = patch_size
        self.latent_channels = latent_channels
        self.axes_dims_rope = tuple(axes_dims_rope)
        self.use_layer3d_rope = use_layer3d_rope
        patch_dim = latent_channels * patch_size**2
        self.time_text_embed = TimeTextEmbed(dim, use_additional_t_cond)
        self.txt_norm = RMSNorm(joint_attention_dim)
        self.img_in = nn.Linear(patch_dim, dim)
        self.txt_in = nn.Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            QwenImageTransformerBlock(dim, num_attention_heads, attention_head_dim) for _ in range(num_layers))
        self.norm_out = AdaLayerNormOut(dim)
        self.proj_out = nn.Linear(dim, patch_dim)

    def activation_bytes(self, batch: int, height: int, width: int, text_length: int, dtype: torch.dtype,
                         layers: int = 1, condition_tokens: int = 0) -> int:
        """Estimate of the memory that a forward pass takes besides weights; height and width in latent pixels.

        `text_length` is of all prompts together, entities' too; `condition_tokens` as `token_count` counts them.
        A block holds about 24 activations of the width of the model for each token at its peak: the streams, three
        projections, their rotations in float32, and an MLP four times as wide before and after its activation.
        """
        drawn = layers * (height // self.patch_size) * (width // self.patch_size)
        tokens = drawn + condition_tokens + text_length
        return 24 * batch * tokens * self.img_in.out_features * dtype.itemsize

    def token_count(self, latents: Tensor) -> int:
        """How many tokens one picture of latents (…, h, w) is."""
        height, width = latents.shape[-2:]
        return height // self.patch_size * (width // self.patch_size)

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

    def forward(self, latents: Tensor, timestep: Tensor, prompt_emb: Tensor, prompt_emb_mask: Tensor | None = None, *,
                conditions: Sequence[Tensor] = (), zero_cond_t: bool = False, interpolate_rope: bool = False,
                entities: Entities | None = None, after_block: AfterBlock | None = None,
                kv_cache: Sequence[KeysValues | None] | None = None, use_gradient_checkpointing: bool = False,
                use_gradient_checkpointing_offload: bool = False) -> Tensor:
        """Velocity of `latents` (B, C, H, W), or (B, C, layers, H, W), at `timestep` (B,), 0…1000; H and W even.

        prompt_emb         (B, T, joint_attention_dim), of the latents' dtype
        prompt_emb_mask    (B, T), nonzero where a token counts. All ones cost nothing: attention runs without a mask
        conditions         clean latents (1 or B, C, H_i, W_i), even sides, whose tokens follow the picture's
        zero_cond_t        conditions are told timestep 0, as `Qwen-Image-Edit-2511` was trained
        interpolate_rope   conditions of another size lie over the picture's area, instead of around its centre
        entities           prompts for regions
        after_block        gets the number of a block and the noise's tokens (B, S, dim) after it; what it returns is
                           added to them (None: nothing)
        kv_cache           for each block keys and values that all tokens see besides their own, already rotated
        use_gradient_checkpointing, …_offload   for training: blocks are computed again in the backward pass; offload
                           keeps what they start from in RAM

        Raises ValueError for `interpolate_rope` in the layered model, whose positions are not defined so.
        """
        batch, (height, width) = len(latents), latents.shape[-2:]
        layers = [latents] if latents.ndim == 4 else list(latents.unbind(2))
        pictures = layers + [condition.expand(batch, -1, -1, -1) for condition in conditions]
        prompts = [] if entities is None else [embedding.expand(batch, -1, -1) for embedding in entities.prompt_embs]
        prompts.append(prompt_emb)

        modulation = self.modulation(timestep, latents.dtype)
        at_zero = self.modulation(torch.zeros_like(timestep), latents.dtype) if zero_cond_t and conditions else None
        image = self.img_in(torch.cat([self.patchify(picture) for picture in pictures], dim=1))  # (B, S, dim)
        text = self.txt_in(self.txt_norm(torch.cat(prompts, dim=1)))  # (B, T, dim)
        sequence = self._sequence(pictures, len(layers), prompts, interpolate_rope)
        caches = [None] * len(self.transformer_blocks) if kv_cache is None else kv_cache
        sights = {size: self._sight(sequence, size, prompt_emb_mask, entities)
                  for size in {_cached_tokens(cached) for cached in caches}}
        run = block_runner(use_gradient_checkpointing, use_gradient_checkpointing_offload)
        for i, (block, cached) in enumerate(zip(self.transformer_blocks, caches, strict=True)):
            image, text = run(block, image, text, modulation.image[i], None if at_zero is None else at_zero.image[i],
                              modulation.text[i], sequence, sights[_cached_tokens(cached)], cached)
            if after_block is not None:
                image = _corrected(image, sequence.noise_tokens, after_block(i, image[:, :sequence.noise_tokens]))

        scale, shift = modulation.out[:, None].chunk(2, dim=-1)
        noise = self.proj_out(modulate(image[:, :sequence.noise_tokens], shift, scale))  # (B, noise tokens, C·p·p)
        drawn = [self.unpatchify(layer, height, width) for layer in noise.chunk(len(layers), dim=1)]
        return drawn[0] if latents.ndim == 4 else torch.stack(drawn, dim=2)

    def _sequence(self, pictures: Sequence[Tensor], layers: int, prompts: Sequence[Tensor],
                  interpolate: bool) -> JointSequence:
        """Pictures count along the frame axis; in the layered model the last one is −1."""
        if interpolate and self.use_layer3d_rope:
            raise ValueError("interpolate_rope is not defined for a model with use_layer3d_rope: leave it off")
        frames = [*range(len(pictures) - 1), -1] if self.use_layer3d_rope else range(len(pictures))
        grids = tuple(Grid(frame, *(side // self.patch_size for side in picture.shape[-2:]))
                      for frame, picture in zip(frames, pictures))
        first = max(max(grid.height, grid.width) // 2 for grid in grids)
        if self.use_layer3d_rope:
            first = max(first, len(grids) - 1)
        lengths, device = tuple(prompt.shape[1] for prompt in prompts), pictures[0].device
        text = torch.cat([text_rotations(first, length, self.axes_dims_rope, device) for length in lengths])
        image = image_rotations(grids, self.axes_dims_rope, device, interpolate)
        return JointSequence(grids, lengths, sum(map(self.token_count, pictures[:layers])), (image, text))

    def _sight(self, sequence: JointSequence, cached: int, text_mask: Tensor | None,
               entities: Entities | None) -> Sight:
        """With so many cached tokens after the sequence."""
        image_tokens = len(sequence.rotations[0])
        keep = keys_kept(text_mask, sum(sequence.prompts[:-1]), image_tokens + cached)
        if entities is None:
            return Sight(mask=None if keep is None else keep[:, None, None])
        return Sight(groups=entities.regions.groups(sequence, self.patch_size, cached, keep))


def _cached_tokens(cached: KeysValues | None) -> int:
    return 0 if cached is None else cached[0].shape[2]


def _corrected(image: Tensor, noise_tokens: int, correction: Tensor | None) -> Tensor:
    """The image tokens with the noise's corrected."""
    if correction is None:
        return image
    return torch.cat([image[:, :noise_tokens] + correction, image[:, noise_tokens:]], dim=1)
