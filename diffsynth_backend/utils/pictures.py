"""Pictures as pipelines take them: a Pillow image, or a float tensor as ComfyUI has it.

Notable: a tensor is never rounded to 8 bits on its way. Both kinds are resized by a bicubic filter that averages when
it shrinks, so that they differ by no more than Pillow's rounding.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# A tensor is (H, W, C) in 0…1, C = 3 or 4; a mask may be (H, W).
Picture = Image.Image | Tensor

MODES = {3: "RGB", 4: "RGBA"}
UNFILTERED = ("1", "P")  # Pillow resizes these by picking pixels


def check_picture(what: str, value: Any) -> Picture:
    """The picture. Raises TypeError for what is none, ValueError for a tensor of another shape."""
    if isinstance(value, Image.Image):
        return value
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a PIL image or a tensor (height, width, channels), got {type(value).__name__}")
    colours = value.ndim == 3 and value.shape[-1] in MODES
    if not (colours or value.ndim == 2) or not value.numel() or not value.is_floating_point():
        raise ValueError(f"{what} is a {value.dtype} tensor of shape {tuple(value.shape)}; expected floats in 0…1 of "
                         "shape (height, width, 3 or 4), or (height, width) for a mask")
    return value


def size_of(picture: Picture) -> tuple[int, int]:
    """Width and height in pixels."""
    if isinstance(picture, Image.Image):
        return picture.size
    return picture.shape[1], picture.shape[0]


def resized(picture: Picture, width: int, height: int) -> Picture:
    """The picture at another size, of its own kind; itself if it has that size. Palettes and single bits become RGB."""
    if size_of(picture) == (width, height):
        return picture
    if isinstance(picture, Image.Image):
        if picture.mode in UNFILTERED:
            picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
        return picture.resize((width, height), Image.Resampling.BICUBIC)
    channels = picture[None, None] if picture.ndim == 2 else picture.movedim(-1, 0)[None]
    scaled = F.interpolate(channels.float(), (height, width), mode="bicubic", antialias=True).clamp(0, 1)[0]
    return scaled[0] if picture.ndim == 2 else scaled.movedim(0, -1)


def pixels(picture: Picture, channels: int = 3) -> Tensor:
    """(1, channels, H, W), float32 in 0…1. 3: colours, without alpha; 4: alpha is 1 where there is none; 1: grey, the
    mean of the colours."""
    if channels == 1:
        return (picture[None, None].float() if isinstance(picture, Tensor) and picture.ndim == 2
                else pixels(picture).mean(dim=1, keepdim=True))
    if isinstance(picture, Image.Image):
        array = np.asarray(picture.convert(MODES[channels]), dtype=np.float32)
        return torch.from_numpy(array / 255).movedim(-1, 0)[None]
    colours = picture[..., None].expand(-1, -1, 3) if picture.ndim == 2 else picture
    if colours.shape[-1] < channels:
        colours = torch.cat([colours, torch.ones_like(colours[..., :1])], dim=-1)
    return colours[..., :channels].movedim(-1, 0)[None].float()


def to_image(pixels: Tensor) -> Image.Image:
    """(3 or 4, H, W) in −1…1 → picture, clipped and rounded to 8 bits."""
    bytes_ = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(bytes_.permute(1, 2, 0).cpu().numpy())
