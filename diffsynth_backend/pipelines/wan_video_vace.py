"""VACE for Wan: a video to change, a mask of what changes, and reference pictures, as one condition.

Notable: references are frames before the first one, in the condition and in the latents; after the loop they are cut
off. The video is split by the mask, white or not (0.5): what stays and what changes are encoded apart, grey in place of
the other. The mask itself goes in with its values, 8×8 pixels as 64 channels, one of four frames.
Source: arXiv 2503.07598 and the authors' code for the border of 0.5 and for how references are fitted.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..diffusion import PipelineUnit
from ..utils.pictures import Picture, check_picture, pixels, resized, size_of
from ..utils.videos import Video, frames_of, video_pixels
from .wan_video_images import TILE_PARAMS, tile_options

if TYPE_CHECKING:
    from .wan_video import WanVideoPipeline

MAX_REFERENCES = 16
VACE_PARAMS = ("vace_video", "vace_video_mask", "vace_reference_image")


class WanVideoUnit_VACE(PipelineUnit):
    """The condition (1, 96, references + T, h, w), and the references' normalised latents (1, 16, references, h, w)."""

    def __init__(self) -> None:
        super().__init__(input_params=(*VACE_PARAMS, "num_frames", "height", "width", *TILE_PARAMS),
                         output_params=("vace_context", "vace_references", "vace_reference_latents"),
                         onload_model_names=("vae",))

    def process(self, pipe: WanVideoPipeline, vace_video: Video | None, vace_video_mask: Video | Picture | None,
                vace_reference_image: Picture | Sequence[Picture] | None, num_frames: int, height: int, width: int,
                tiled: bool | None, tile_size: Any, tile_stride: Any) -> dict:
        if vace_video is vace_video_mask is vace_reference_image is None:
            return {}
        tiles = tile_options(tiled, tile_size, tile_stride)
        mask = _mask(vace_video_mask, num_frames, width, height).to(pipe.torch_dtype)
        if vace_video is None:
            video = mask.new_zeros(1, 3, num_frames, height, width)
        else:
            video = pipe.preprocess_video(frames_of("vace_video", vace_video, num_frames), width, height)
        changes = mask > 0.5
        latents = torch.cat([pipe.encode_image(video.masked_fill(where, 0), **tiles) for where in (changes, ~changes)],
                            dim=1)
        context = torch.cat([latents, mask_channels(mask, pipe.vae_factor, latents.shape[2]).to(latents)], dim=1)
        references = [pipe.encode_image(pipe.preprocess_video([on_white(picture, width, height)], width, height),
                                        **tiles) for picture in references_of(vace_reference_image)]
        if not references:
            return {"vace_context": context, "vace_references": 0}
        reference = torch.cat(references, dim=2)
        empty = reference.new_zeros(1, context.shape[1] - reference.shape[1], *reference.shape[2:])
        return {"vace_context": torch.cat([torch.cat([reference, empty], dim=1), context], dim=2),
                "vace_references": len(references), "vace_reference_latents": reference}


def references_of(value: Picture | Sequence[Picture] | None) -> list[Picture]:
    """The reference pictures, in their order. Raises TypeError or ValueError for what is none, and for too many."""
    if value is None:
        return []
    if isinstance(value, Tensor) and value.ndim == 4:
        value = list(value)
    if not isinstance(value, list | tuple):
        return [check_picture("vace_reference_image", value)]
    if not 0 < len(value) <= MAX_REFERENCES:
        raise ValueError(f"vace_reference_image has {len(value)} pictures; 1 to {MAX_REFERENCES} are taken")
    return [check_picture(f"vace_reference_image[{index}]", picture) for index, picture in enumerate(value)]


def on_white(picture: Picture, width: int, height: int) -> Picture:
    """The whole picture, as large as it fits, in the middle of a white one of that size."""
    old_width, old_height = size_of(picture)
    scale = min(width / old_width, height / old_height)
    new_width, new_height = max(1, int(old_width * scale)), max(1, int(old_height * scale))
    if (new_width, new_height) == (width, height):
        return picture
    fitted = resized(picture, new_width, new_height)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    if isinstance(fitted, Image.Image):
        canvas = Image.new("RGB", (width, height), "white")
        canvas.paste(fitted.convert("RGB"), (left, top))
        return canvas
    around = (left, width - new_width - left, top, height - new_height - top)
    return F.pad(pixels(fitted)[0], around, value=1.0).movedim(0, -1)


def _mask(mask: Video | Picture | None, num_frames: int, width: int, height: int) -> Tensor:
    """(1, 1, num_frames, height, width), float32 in 0…1: 1 changes. One picture is for all frames, none changes all."""
    if mask is None:
        return torch.ones(1, 1, num_frames, height, width)
    single = isinstance(mask, Image.Image) or isinstance(mask, Tensor) and mask.ndim < 4
    frames = [check_picture("vace_video_mask", mask)] if single else frames_of("vace_video_mask", mask, num_frames)
    grey = video_pixels([_opaque(frame) for frame in frames], width, height, channels=1).clamp(0, 1)
    return grey.expand(-1, -1, num_frames, -1, -1)


def _opaque(picture: Picture) -> Picture:
    """Without alpha, which would weigh the colours when a picture is resized."""
    return picture.convert("RGB") if isinstance(picture, Image.Image) else picture


def mask_channels(mask: Tensor, factor: int, frames: int) -> Tensor:
    """A mask (1, 1, F, H, W) as channels (1, factor², frames, H/factor, W/factor): the pixels of each latent pixel."""
    channels = F.pixel_unshuffle(mask[0].movedim(0, 1), factor)  # (F, factor², h, w)
    channels = channels.movedim(0, 1)[None]
    return F.interpolate(channels, size=(frames, *channels.shape[3:]), mode="nearest-exact")
