"""Wan's denoiser, a diffusion transformer over the tokens of a video (arXiv 2503.20314), and VACE beside it.

One class serves the family: text to video, first and last pictures (clean latents as further channels, CLIP features
beside the text), control videos, camera paths, reference pictures, and TI2V-5B, whose first frame may be given clean.
VACE (arXiv 2503.07598) runs some blocks of its own on a condition; what they find is added to the denoiser's tokens.

Notable: the timestep gives six vectors that all blocks share, and each block adds its own. Text and picture are two
attentions of the same query. `forward` is three public steps, `embed`, `run_blocks` and `output`, so that a pipeline
can put VACE or a cache between them. Frames that are clean are told timestep 0 as one part of the sequence, not token
by token. Key names are those of the original files (`Wan-AI/Wan2.1-T2V-1.3B`, `iic/VACE-Wan2.1-1.3B-Preview`).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attention import attention
from .general_modules import RMSNorm, apply_rope, block_runner, by_part, timestep_frequencies

__all__ = ["CameraAdapter", "RMSNorm", "TimeModulation", "VaceWanModel", "VideoTokens", "WanModel"]

ROPE_THETA = 10000.0
CLIP_DIM = 1280  # CLIP ViT-H/14's penultimate layer
CLIP_TOKENS = 257  # of one picture: 16×16 patches and the class
REFERENCE_CHANNELS = 16  # latent channels of a reference picture
CAMERA_DOWNSCALE = 8  # pixels that the camera adapter packs into channels, as many as the autoencoder's factor

AfterBlock = Callable[[int, Tensor], Tensor | None]  # number of the block and all tokens → what is added to them


# ---- positions ------------------------------------------------------------------------------------------------------

@lru_cache(maxsize=4)  # all that changes the result is in the key; an entry takes 512 bytes a token at full size
def video_rotations(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Rotations (frames·rows·columns, head_dim/2, 2), float32, of a grid of tokens, all axes counting from 0.

    Rows and columns have a third of the head each, rounded down to whole pairs, frames the rest. Angles are computed in
    float64, as published.
    """
    with torch.inference_mode(False):  # cached for later calls, which may want gradients
        side = head_dim // 6 * 2
        parts = []
        for axis, (length, dim) in enumerate(zip(grid, (head_dim - 2 * side, side, side))):
            inverse = ROPE_THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles = torch.outer(torch.arange(length, dtype=torch.float64), inverse)
            rotations = torch.stack([angles.cos(), angles.sin()], dim=-1).float()  # (length, dim/2, 2)
            shape = [length if other == axis else 1 for other in range(3)]
            parts.append(rotations.view(*shape, -1, 2).expand(*grid, -1, -1))
        return torch.cat(parts, dim=3).flatten(0, 2).to(device)


# ---- a video as the blocks take it ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class TimeModulation:
    """What one timestep contributes: (B, dim) for the output, (B, 6, dim) for all blocks."""

    out: Tensor
    blocks: Tensor


@dataclass(frozen=True)
class VideoTokens:
    """Everything that the blocks need, as `WanModel.embed` gives it.

    tokens       (B, S, dim): the reference picture's, then the frames' one after the other
    text         (B, L, dim)
    picture      (B, P, dim) from CLIP, or None
    modulations  of all tokens; or of the first `clean_tokens` and of the rest
    rotations    (S, head_dim/2, 2)
    grid         frames, rows and columns of tokens, without the reference
    """

    tokens: Tensor
    text: Tensor
    picture: Tensor | None
    modulations: tuple[TimeModulation, ...]
    clean_tokens: int
    rotations: Tensor
    grid: tuple[int, int, int]

    @property
    def reference_tokens(self) -> int:
        return self.tokens.shape[1] - math.prod(self.grid)

    @property
    def block_inputs(self) -> tuple[object, ...]:
        """What every block gets besides the tokens."""
        of_blocks = tuple(modulation.blocks for modulation in self.modulations)
        return of_blocks, self.text, self.picture, self.rotations, self.clean_tokens


# ---- modules --------------------------------------------------------------------------------------------------------

def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer normalisation without weights of its own, then the timestep's scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class SelfAttention(nn.Module):
    """Every token sees every other. Queries and keys are normalised over all heads together."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, S, head_dim)

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        q = apply_rope(self.heads(self.norm_q(self.q(x))), rotations)
        k = apply_rope(self.heads(self.norm_k(self.k(x))), rotations)
        v = self.heads(self.v(x))
        return self.o(attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(SelfAttention):
    """Tokens see the text, and with keys and values of their own (`…_img`) the picture; both results are added."""

    def __init__(self, dim: int, num_heads: int, eps: float, has_image_input: bool) -> None:
        super().__init__(dim, num_heads, eps)
        if has_image_input:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, x: Tensor, text: Tensor, picture: Tensor | None) -> Tensor:
        q = self.heads(self.norm_q(self.q(x)))
        out = attention(q, self.heads(self.norm_k(self.k(text))), self.heads(self.v(text)))
        if picture is not None:
            k, v = self.heads(self.norm_k_img(self.k_img(picture))), self.heads(self.v_img(picture))
            out = out + attention(q, k, v)
        return self.o(out.transpose(1, 2).flatten(2))


class WanBlock(nn.Module):
    """Attention among the tokens, attention to the text, an MLP. The names of the norms are the checkpoint's."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, eps: float, has_image_input: bool) -> None:
        super().__init__()
        self.modulate = partial(modulate, eps=eps)
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps, has_image_input)
        self.norm3 = nn.LayerNorm(dim, eps=eps)  # before cross_attn; the other two have no weights
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, modulations: Sequence[Tensor], text: Tensor, picture: Tensor | None,
                rotations: Tensor, clean_tokens: int) -> Tensor:
        """x (B, S, dim); modulations (B, 6, dim) of all tokens, or of the first `clean_tokens` and of the rest."""
        own = self.modulation
        shift1, scale1, gate1, shift2, scale2, gate2 = zip(*((own + shared).chunk(6, dim=1) for shared in modulations))
        out = self.self_attn(by_part(self.modulate, x, clean_tokens, shift1, scale1), rotations)
        x = x + by_part(torch.mul, out, clean_tokens, gate1)
        x = x + self.cross_attn(self.norm3(x), text, picture)
        out = self.ffn(by_part(self.modulate, x, clean_tokens, shift2, scale2))
        return x + by_part(torch.mul, out, clean_tokens, gate2)


class PictureEmbedding(nn.Module):
    """CLIP features (B, P, 1280) → (B, P, dim). With a first and a last picture, each token has a learned position."""

    def __init__(self, dim: int, has_pos_emb: bool) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.LayerNorm(CLIP_DIM), nn.Linear(CLIP_DIM, CLIP_DIM), nn.GELU(),
                                  nn.Linear(CLIP_DIM, dim), nn.LayerNorm(dim))
        self.emb_pos = nn.Parameter(torch.zeros(1, 2 * CLIP_TOKENS, CLIP_DIM)) if has_pos_emb else None

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features if self.emb_pos is None else features + self.emb_pos)


class ResidualBlock(nn.Module):
    """Two convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class CameraAdapter(nn.Module):
    """The rays of a camera's path → what is added to the tokens. Depends on the path alone: run it once, not per step.

    Source: `PAI/Wan2.1-Fun-V1.1-1.3B-Control-Camera`; `wan_video_camera_controller.camera_control` makes its input.
    """

    def __init__(self, in_dim: int, dim: int, patch: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim * CAMERA_DOWNSCALE**2, dim, kernel_size=patch, stride=patch)
        self.residual_blocks = nn.Sequential(ResidualBlock(dim))

    def forward(self, control: Tensor) -> Tensor:
        """(B, in_dim, T, H, W) in pixels → (B, dim, T, H/8/p, W/8/p): frame by frame."""
        frames = control.transpose(1, 2)  # (B, T, in_dim, H, W)
        x = self.residual_blocks(self.conv(F.pixel_unshuffle(frames.flatten(0, 1), CAMERA_DOWNSCALE)))
        return x.unflatten(0, frames.shape[:2]).transpose(1, 2)


class Head(nn.Module):
    """Tokens → patches of velocity, scaled and shifted by the timestep."""

    def __init__(self, dim: int, patch_dim: int, eps: float) -> None:
        super().__init__()
        self.modulate = partial(modulate, eps=eps)
        self.head = nn.Linear(dim, patch_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, modulations: Sequence[Tensor], clean_tokens: int) -> Tensor:
        """x (B, S, dim); modulations (B, dim)."""
        shift, scale = zip(*((self.modulation + shared[:, None]).chunk(2, dim=1) for shared in modulations))
        return self.head(by_part(self.modulate, x, clean_tokens, shift, scale))


# ---- the denoiser ---------------------------------------------------------------------------------------------------

class WanModel(nn.Module):
    """Predicts the flow velocity (noise − video) of normalised latents.

    The registry has the arguments of each published file. What they switch on:
    has_image_input            CLIP features of a first picture
    has_image_pos_emb          … of a first and a last one, 514 tokens (FLF2V)
    has_ref_conv               a reference picture's latents as tokens before the first frame (Fun-Control)
    add_control_adapter, in_dim_control_adapter   `control_adapter` for camera paths (Fun-Control-Camera)
    seperated_timestep         frames may have timesteps of their own (TI2V-5B): `clean_frames`
    For pipelines, without effect here:
    require_vae_embedding      takes latents of the first picture as further channels, `y`
    require_clip_embedding     takes CLIP features, if it has the weights for them (`has_image_input`)
    fuse_vae_embedding_in_latents   the first picture's latents are the first frame, clean, in every step
    """

    timestep_call = "time_modulation"  # what it computes from the timestep alone

    def __init__(self, dim: int, in_dim: int, ffn_dim: int, out_dim: int, text_dim: int, freq_dim: int, eps: float,
                 patch_size: tuple[int, int, int], num_heads: int, num_layers: int, has_image_input: bool,
                 has_image_pos_emb: bool = False, has_ref_conv: bool = False, add_control_adapter: bool = False,
                 in_dim_control_adapter: int = 24, seperated_timestep: bool = False,
                 require_vae_embedding: bool = True, require_clip_embedding: bool = True,
                 fuse_vae_embedding_in_latents: bool = False) -> None:
        super().__init__()
        self.dim, self.in_dim, self.out_dim, self.ffn_dim, self.freq_dim = dim, in_dim, out_dim, ffn_dim, freq_dim
        self.patch_size = tuple(patch_size)
        self.head_dim = dim // num_heads
        self.has_image_input, self.has_image_pos_emb = has_image_input, has_image_pos_emb
        self.has_ref_conv = has_ref_conv
        self.seperated_timestep = seperated_timestep
        self.require_vae_embedding = require_vae_embedding
        self.require_clip_embedding = require_clip_embedding
        self.fuse_vae_embedding_in_latents = fuse_vae_embedding_in_latents
        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanBlock(dim, num_heads, ffn_dim, eps, has_image_input) for _ in range(num_layers))
        self.head = Head(dim, out_dim * math.prod(self.patch_size), eps)
        self.img_emb = PictureEmbedding(dim, has_image_pos_emb) if has_image_input else None
        side = self.patch_size[1:]
        self.ref_conv = nn.Conv2d(REFERENCE_CHANNELS, dim, kernel_size=side, stride=side) if has_ref_conv else None
        self.control_adapter = CameraAdapter(in_dim_control_adapter, dim, side) if add_control_adapter else None

    def activation_bytes(self, batch: int, frames: int, height: int, width: int, dtype: torch.dtype,
                         reference: bool = False) -> int:
        """Estimate of the memory that a forward pass takes besides weights; the latents' frames, height and width.

        A block holds at its peak 12 activations of the width of the model for each token (the streams, queries and keys
        and their rotation in float32), or 6 and the MLP's hidden values before and after their function; one to spare.
        """
        p_t, p_h, p_w = self.patch_size
        tokens = (frames // p_t + reference) * (height // p_h) * (width // p_w)
        return round((7 + max(6, 2 * self.ffn_dim / self.dim)) * batch * tokens * self.dim * dtype.itemsize)

    def time_modulation(self, timestep: Tensor, dtype: torch.dtype) -> TimeModulation:
        """Everything that depends on the timestep (B,), 0…1000, alone."""
        out = self.time_embedding(timestep_frequencies(timestep, self.freq_dim, scale=1.0).to(dtype))
        return TimeModulation(out, self.time_projection(out).unflatten(1, (6, -1)))

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor, *, y: Tensor | None = None,
                clip_features: Tensor | None = None, reference_latents: Tensor | None = None,
                camera: Tensor | None = None, motion: Tensor | None = None, clean_frames: int = 0,
                after_block: AfterBlock | None = None, use_gradient_checkpointing: bool = False,
                use_gradient_checkpointing_offload: bool = False) -> Tensor:
        """Velocity (B, out_dim, T, h, w) of `latents` at `timestep`; the arguments are those of the three steps."""
        video = self.embed(latents, timestep, context, y=y, clip_features=clip_features,
                           reference_latents=reference_latents, camera=camera, motion=motion,
                           clean_frames=clean_frames)
        tokens = self.run_blocks(video, after_block, use_gradient_checkpointing, use_gradient_checkpointing_offload)
        return self.output(tokens, video)

    def embed(self, latents: Tensor, timestep: Tensor, context: Tensor, *, y: Tensor | None = None,
              clip_features: Tensor | None = None, reference_latents: Tensor | None = None,
              camera: Tensor | None = None, motion: Tensor | None = None, clean_frames: int = 0) -> VideoTokens:
        """Everything before the blocks. All tensors are of the latents' dtype, but the timestep; what there is one of
        serves the whole batch.

        latents            (B, C, T, h, w), h and w multiples of the patch
        timestep           (B,), 0…1000
        context            (1 or B, L, text_dim): 512 tokens in training, zeros after the prompt's
        y                  (1 or B, in_dim − C, T, h, w): further channels of the input (mask and latents of the first
                           and last picture, control video), which follow the latents'
        clip_features      (1 or B, 257, 1280), of first and last picture (1 or B, 514, 1280); zeros: no picture
        reference_latents  (1 or B, 16, h, w): a clean picture before the first frame
        camera             (1 or B, dim, T, h/p, w/p): what `control_adapter` made of a path
        motion             (1 or B, 6·dim): what a motion controller made of a speed
        clean_frames       how many of the first frames are clean and told timestep 0 (needs `seperated_timestep`)

        Raises ValueError for what does not fit the model.
        """
        batch = len(latents)
        self._check(latents, y, clip_features, reference_latents, camera, clean_frames)
        x = latents if y is None else torch.cat([latents, _for_batch(y, batch)], dim=1)
        x = self.patch_embedding(x)  # (B, dim, T/p, h/p, w/p)
        if camera is not None:
            x = x + camera
        grid = tuple(x.shape[2:])
        tokens = x.flatten(2).transpose(1, 2)
        if reference_latents is not None:
            reference = self.ref_conv(reference_latents).flatten(2).transpose(1, 2)  # (1 or B, h/p·w/p, dim)
            tokens = torch.cat([_for_batch(reference, batch), tokens], dim=1)
        frames = grid[0] + (reference_latents is not None)
        return VideoTokens(tokens, _for_batch(self.text_embedding(context), batch),
                           None if clip_features is None else _for_batch(self.img_emb(clip_features), batch),
                           self._modulations(timestep, latents.dtype, motion, clean_frames),
                           clean_frames // self.patch_size[0] * grid[1] * grid[2],
                           video_rotations((frames, *grid[1:]), self.head_dim, latents.device), grid)

    def run_blocks(self, video: VideoTokens, after_block: AfterBlock | None = None,
                   use_gradient_checkpointing: bool = False,
                   use_gradient_checkpointing_offload: bool = False) -> Tensor:
        """Tokens (B, S, dim) after all blocks.

        `after_block` gets the number of a block and the tokens after it, the reference's too; what it returns is added
        to them (None: nothing). Checkpointing is for training: blocks are computed again in the backward pass; offload
        keeps what they start from in RAM.
        """
        run = block_runner(use_gradient_checkpointing, use_gradient_checkpointing_offload)
        tokens = video.tokens
        for i, block in enumerate(self.blocks):
            tokens = run(block, tokens, *video.block_inputs)
            correction = None if after_block is None else after_block(i, tokens)
            if correction is not None:
                tokens = tokens + correction
        return tokens

    def output(self, tokens: Tensor, video: VideoTokens) -> Tensor:
        """Tokens (B, S, dim) → velocity (B, out_dim, T, h, w)."""
        drawn = tokens[:, video.reference_tokens:]
        patches = self.head(drawn, [modulation.out for modulation in video.modulations], video.clean_tokens)
        return self.unpatchify(patches, video.grid)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, T·h·w, p·p·p·C), channels innermost → (B, C, frames, height, width)."""
        x = patches.unflatten(2, (*self.patch_size, -1)).unflatten(1, grid)  # (B, T, h, w, p, p, p, C)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _modulations(self, timestep: Tensor, dtype: torch.dtype, motion: Tensor | None,
                     clean_frames: int) -> tuple[TimeModulation, ...]:
        """Of all tokens, or of the clean frames' and the rest's; `motion` adds to what the blocks get."""
        timesteps = (torch.zeros_like(timestep), timestep) if clean_frames else (timestep,)
        modulations = tuple(self.time_modulation(each, dtype) for each in timesteps)
        if motion is None:
            return modulations
        added = motion.unflatten(1, (6, -1))
        return tuple(TimeModulation(modulation.out, modulation.blocks + added) for modulation in modulations)

    def _check(self, latents: Tensor, y: Tensor | None, clip_features: Tensor | None,
               reference_latents: Tensor | None, camera: Tensor | None, clean_frames: int) -> None:
        channels, sides = latents.shape[1] + (0 if y is None else y.shape[1]), latents.shape[2:]
        if channels != self.in_dim:
            raise ValueError(f"this model takes {self.in_dim} channels and got {channels}: {latents.shape[1]} of the "
                             f"latents and {channels - latents.shape[1]} of y (pictures and control videos)")
        if any(side % patch for side, patch in zip(sides, self.patch_size)):
            raise ValueError(f"latents have {tuple(sides)} frames, rows and columns; expected multiples of "
                             f"{self.patch_size}")
        self._check_picture(clip_features)
        _check_part("reference_latents", reference_latents, self.ref_conv, (REFERENCE_CHANNELS, *sides[1:]))
        grid = (side // patch for side, patch in zip(sides, self.patch_size))
        _check_part("camera", camera, self.control_adapter, (self.dim, *grid))
        if clean_frames and (not self.seperated_timestep or reference_latents is not None):
            raise ValueError("clean_frames needs a model whose frames have timesteps of their own "
                             "(seperated_timestep, as TI2V-5B) and no reference_latents: leave it 0")
        if clean_frames % self.patch_size[0] or not 0 <= clean_frames <= sides[0]:
            raise ValueError(f"clean_frames is {clean_frames}; expected 0…{sides[0]}, a multiple of "
                             f"{self.patch_size[0]}")

    def _check_picture(self, clip_features: Tensor | None) -> None:
        if self.has_image_input != (clip_features is not None):
            raise ValueError("this model was trained with CLIP features of a picture: give clip_features, zeros where "
                             "there is none" if self.has_image_input else
                             "this model has no weights for CLIP features of a picture: leave clip_features out")
        wanted = (CLIP_TOKENS * (2 if self.has_image_pos_emb else 1), CLIP_DIM)
        if clip_features is not None and clip_features.shape[1:] != wanted:
            raise ValueError(f"clip_features have shape {tuple(clip_features.shape)}; expected (batch, *{wanted}), "
                             f"{CLIP_TOKENS} tokens a picture")


def _check_part(name: str, value: Tensor | None, part: nn.Module | None, wanted: tuple[int, ...]) -> None:
    """Raises ValueError for a value that no part of the model takes, or of another shape than (batch, *wanted)."""
    if value is not None and part is None:
        raise ValueError(f"this model has no weights for {name}: leave it out, or load a model that has them")
    if value is not None and value.shape[1:] != wanted:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; expected (batch, *{wanted})")


# ---- VACE -----------------------------------------------------------------------------------------------------------

class VaceWanBlock(WanBlock):
    """A block on the condition's tokens; `after_proj` makes a hint of its result. The first takes in the video's."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, eps: float, has_image_input: bool, first: bool) -> None:
        super().__init__(dim, num_heads, ffn_dim, eps, has_image_input)
        if first:
            self.before_proj = nn.Linear(dim, dim)
        self.after_proj = nn.Linear(dim, dim)


class VaceWanModel(nn.Module):
    """Hints from a condition: what stays, what changes and where, and reference pictures (64 + 2·16 channels).

    Defaults: `iic/VACE-Wan2.1-1.3B-Preview`, whose file holds a `WanModel` too.
    """

    def __init__(self, vace_layers: Sequence[int] = tuple(range(0, 30, 2)), vace_in_dim: int = 96,
                 patch_size: tuple[int, int, int] = (1, 2, 2), has_image_input: bool = False, dim: int = 1536,
                 num_heads: int = 12, ffn_dim: int = 8960, eps: float = 1e-6) -> None:
        super().__init__()
        self.vace_layers = tuple(vace_layers)
        self.vace_in_dim = vace_in_dim
        self.has_image_input = has_image_input
        self.vace_blocks = nn.ModuleList(VaceWanBlock(dim, num_heads, ffn_dim, eps, has_image_input, first=i == 0)
                                         for i in range(len(self.vace_layers)))
        patch = tuple(patch_size)
        self.vace_patch_embedding = nn.Conv3d(vace_in_dim, dim, kernel_size=patch, stride=patch)

    def forward(self, video: VideoTokens, vace_context: Tensor, use_gradient_checkpointing: bool = False,
                use_gradient_checkpointing_offload: bool = False) -> tuple[Tensor, ...]:
        """A hint (B, S, dim) for each of `vace_layers`, from what `WanModel.embed` gave.

        vace_context (1 or B, vace_in_dim, T, h, w) may have fewer tokens than the video; the rest is zeros.
        Raises ValueError for other channels or more tokens, and for a denoiser with another kind of picture input.
        """
        control = self._control(video, vace_context)
        run = block_runner(use_gradient_checkpointing, use_gradient_checkpointing_offload)
        hints = []
        for block in self.vace_blocks:
            control = run(block, control, *video.block_inputs)
            hints.append(block.after_proj(control))
        return tuple(hints)

    def corrections(self, hints: Sequence[Tensor], scale: float = 1.0) -> AfterBlock:
        """`after_block` for `WanModel.run_blocks`: each hint, times `scale`, after its layer."""
        of_layer = dict(zip(self.vace_layers, hints, strict=True))

        def correction(i: int, tokens: Tensor) -> Tensor | None:
            return of_layer[i] * scale if i in of_layer else None

        return correction

    def _control(self, video: VideoTokens, vace_context: Tensor) -> Tensor:
        """(B, S, dim): the condition's tokens, to which the video's are added."""
        if self.has_image_input != (video.picture is not None):
            raise ValueError("VACE and the denoiser differ in has_image_input: use the two models of one set of files")
        if vace_context.shape[1] != self.vace_in_dim:
            raise ValueError(f"vace_context has {vace_context.shape[1]} channels; expected {self.vace_in_dim}")
        control = self.vace_patch_embedding(vace_context).flatten(2).transpose(1, 2)
        missing = video.tokens.shape[1] - control.shape[1]
        if missing < 0:
            raise ValueError(f"vace_context is {control.shape[1]} tokens and the video {video.tokens.shape[1]}: give "
                             "it the size and the frames of the latents")
        control = F.pad(control, (0, 0, 0, missing))
        return self.vace_blocks[0].before_proj(_for_batch(control, len(video.tokens))) + video.tokens


def _for_batch(tensor: Tensor, batch: int) -> Tensor:
    return tensor.expand(batch, *tensor.shape[1:])
