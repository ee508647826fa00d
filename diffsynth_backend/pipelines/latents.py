"""Latents that come from other programs: which shapes pipelines take, and what is wrong with the others.

Notable: every refusal names the likely cause, since a latent of the wrong kind is a wiring mistake that happened
several nodes earlier.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def image_latents(latents: Tensor, channels: int, multiple: int = 1, vae_factor: int = 8,
                  layered: bool = False) -> Tensor:
    """(B, channels, h, w) from that shape or (B, channels, 1, h, w), with h and w multiples of `multiple`.

    With `layered` (B, channels, layers, h, w) from either, and from more than one layer too.
    Raises ValueError for other numbers of axes or channels, for several frames, and for sides that do not fit.
    """
    shape = "×".join(map(str, latents.shape))
    if latents.ndim not in (4, 5):
        raise ValueError(f"the latent has shape {shape}; expected batch×{channels}×height×width, "
                         f"or batch×{channels}×1×height×width")
    if latents.shape[1] != channels:
        raise ValueError(f"the latent has {latents.shape[1]} channels (shape {shape}) and this model works with "
                         f"{channels}: use this pack's Empty Latent, Empty SD3 Latent Image, or encode a picture with "
                         "this model's VAE")
    if latents.ndim == 5 and latents.shape[2] != 1 and not layered:
        raise ValueError(f"the latent has {latents.shape[2]} frames (shape {shape}) and this is an image model. "
                         "ComfyUI's own VAE Encode turns a batch of pictures into frames of one video: encode them "
                         "with this pack's VAE Encode, or one by one and join them with Latent Batch")
    if layered:
        latents = latents if latents.ndim == 5 else latents[:, :, None]
    elif latents.ndim == 5:
        latents = latents[:, :, 0]
    height, width = latents.shape[-2:]
    if 0 in latents.shape or height % multiple or width % multiple:
        raise ValueError(f"the latent is {height}×{width}; both sides must be multiples of {multiple} and not 0 "
                         f"({vae_factor * multiple} pixels): scale or crop the picture before encoding it")
    return latents


def video_latents(latents: Tensor, channels: int, multiple: int, vae_factor: int) -> Tensor:
    """(B, channels, frames, h, w) from that shape or (B, channels, h, w), one frame, with h and w multiples of
    `multiple`.

    Raises ValueError for other numbers of axes or channels, and for sides that do not fit.
    """
    shape = "×".join(map(str, latents.shape))
    if latents.ndim not in (4, 5):
        raise ValueError(f"the latent has shape {shape}; expected batch×{channels}×frames×height×width")
    if latents.shape[1] != channels:
        raise ValueError(f"the latent has {latents.shape[1]} channels (shape {shape}) and this model works with "
                         f"{channels}: use this pack's Empty Latent, or encode frames with this model's VAE")
    height, width = latents.shape[-2:]
    if 0 in latents.shape or height % multiple or width % multiple:
        raise ValueError(f"the latent is {height}×{width}; both sides must be multiples of {multiple} and not 0 "
                         f"({vae_factor * multiple} pixels): scale or crop the video before encoding it")
    return latents if latents.ndim == 5 else latents[:, :, None]


def pictures_of(latents: Tensor) -> Sequence[Tensor]:
    """(B, C, h, w) for each layer of (B, C, layers, h, w); the latents themselves, alone, if they have none."""
    return [latents] if latents.ndim == 4 else latents.unbind(2)


def empty_latents(width: int, height: int, batch_size: int = 1, channels: int = 16, vae_factor: int = 8,
                  layers: int = 1) -> Tensor:
    """Zeros (batch_size, channels, layers, height/vae_factor, width/vae_factor), float32, CPU; sizes in pixels."""
    return torch.zeros(batch_size, channels, layers, height // vae_factor, width // vae_factor)


def empty_video_latents(width: int, height: int, frames: int, batch_size: int = 1, channels: int = 16,
                        vae_factor: int = 8) -> Tensor:
    """Zeros (batch_size, channels, (frames − 1)/4 + 1, height/vae_factor, width/vae_factor), float32, CPU.

    Sizes in pixels. Raises ValueError for sides that are no multiples of 2·vae_factor, and frames other than 4·n + 1.
    """
    multiple = 2 * vae_factor
    if width % multiple or height % multiple or width < 1 or height < 1:
        raise ValueError(f"the video is {width}×{height} pixels (width × height); multiples of {multiple} expected: "
                         f"{_nearest(width, multiple)}×{_nearest(height, multiple)} would do")
    if frames < 1 or (frames - 1) % 4:
        raise ValueError(f"{frames} frames; a multiple of 4, plus 1, expected: {_nearest(frames - 1, 4) + 1} would do")
    return torch.zeros(batch_size, channels, (frames - 1) // 4 + 1, height // vae_factor, width // vae_factor)


def _nearest(value: int, multiple: int) -> int:
    return max(1, round(value / multiple)) * multiple
