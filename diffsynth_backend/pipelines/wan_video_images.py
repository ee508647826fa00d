"""Pictures that a Wan video begins or ends with: as latents and a mask beside the noise, as CLIP features, and as a
clean first frame.

Notable: which further channels a denoiser takes follows from their number, as all published ones differ in it. Each
kind of picture is a unit of its own output; `WanVideoUnit_ConditionChannels` puts the channels together.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..diffusion import PipelineUnit
from ..models.wan_video_dit import CLIP_DIM, CLIP_TOKENS, WanModel
from ..utils.pictures import Picture, check_picture
from .wan_prompts import clip_pixels

if TYPE_CHECKING:
    from .wan_video import WanVideoPipeline

TILE_SIZE, TILE_STRIDE = (30, 52), (15, 26)  # latent pixels
MASK_CHANNELS = 4  # of a latent frame: which of its frames are given
TILE_PARAMS = ("tiled", "tile_size", "tile_stride")


@dataclass(frozen=True)
class Channels:
    """The further channels of a denoiser's input.

    `control`: a control video's latents. `picture`: latents of a video that has the given pictures and is grey
    elsewhere ("video"), the same after a mask ("masked"), or the latents of the first picture alone, followed by zeros
    ("frame"); None: no picture.
    """

    control: bool = False
    picture: str | None = None


_KINDS = {0: Channels(), 16: Channels(picture="frame"), 20: Channels(picture="masked"),
          32: Channels(control=True, picture="video"), 36: Channels(control=True, picture="masked")}


def channels_of(dit: WanModel) -> Channels:
    """Which channels a denoiser takes beside the noise. Raises ValueError for a number that no published one has."""
    further = dit.in_dim - dit.out_dim
    if further not in _KINDS:
        raise ValueError(f"the denoiser takes {further} channels beside the {dit.out_dim} of the latents; known: "
                         f"{', '.join(map(str, _KINDS))}")
    return _KINDS[further]


def tile_options(tiled: bool | None, tile_size: Any, tile_stride: Any) -> dict[str, Any]:
    """Arguments of `encode_image` and `decode_latents`; tiles are on unless something else is said, as published."""
    return {"tiled": True if tiled is None else tiled, "tile_size": tile_size or TILE_SIZE,
            "tile_stride": tile_stride or TILE_STRIDE}


class WanVideoUnit_ImageEmbedderCLIP(PipelineUnit):
    """CLIP features of the reference picture, or else of the first one; with first and last picture of both.

    A denoiser that takes features gets zeros if there is no picture.
    """

    def __init__(self) -> None:
        super().__init__(input_params=("input_image", "end_image", "reference_image", "height", "width"),
                         output_params=("clip_feature",), onload_model_names=("image_encoder",))

    def process(self, pipe: WanVideoPipeline, input_image: Picture | None, end_image: Picture | None,
                reference_image: Picture | None, height: int, width: int) -> dict:
        if not pipe.dit.has_image_input:
            return {}
        count = 2 if pipe.dit.has_image_pos_emb else 1
        pictures = [reference_image] if reference_image is not None else [input_image, end_image][:count]
        if pictures[0] is None:
            zeros = torch.zeros(1, count * CLIP_TOKENS, CLIP_DIM)
            return {"clip_feature": zeros.to(pipe.device, pipe.torch_dtype)}
        pipe.load_models_to_device(self.onload_model_names)
        side = pipe.image_encoder.image_size
        features = [pipe.image_encoder(clip_pixels(picture, width, height, side).to(pipe.device, pipe.torch_dtype))
                    for picture in pictures]
        return {"clip_feature": torch.cat(features, dim=1)}


class WanVideoUnit_ImageEmbedderVAE(PipelineUnit):
    """First and last picture as the channels that the denoiser takes, normalised (1, 16 or 20, T, h, w)."""

    def __init__(self) -> None:
        super().__init__(input_params=("input_image", "end_image", "num_frames", "height", "width", *TILE_PARAMS),
                         output_params=("image_latents",), onload_model_names=("vae",))

    def process(self, pipe: WanVideoPipeline, input_image: Picture | None, end_image: Picture | None, num_frames: int,
                height: int, width: int, tiled: bool | None, tile_size: Any, tile_stride: Any) -> dict:
        kind = channels_of(pipe.dit).picture
        if input_image is None or kind is None:
            return {}
        tiles = tile_options(tiled, tile_size, tile_stride)
        first = pipe.preprocess_video([check_picture("input_image", input_image)], width, height)
        if kind == "frame":
            latents = pipe.encode_image(first, **tiles)
            later = latents.new_zeros(*latents.shape[:2], pipe.latent_frames(num_frames) - 1, *latents.shape[3:])
            return {"image_latents": torch.cat([latents, later], dim=2)}
        video = first.new_zeros(1, 3, num_frames, height, width)
        video[:, :, :1] = first
        if end_image is not None:
            video[:, :, -1:] = pipe.preprocess_video([check_picture("end_image", end_image)], width, height)
        latents = pipe.encode_image(video, **tiles)
        if kind == "masked":
            latents = torch.cat([given_frames(latents, end_image is not None), latents], dim=1)
        return {"image_latents": latents}


def given_frames(latents: Tensor, last: bool) -> Tensor:
    """(1, 4, T, h, w): 1 for the first frame, which is all four of its latent frame, and for the last, if it is given.
    """
    mask = latents.new_zeros(1, MASK_CHANNELS, *latents.shape[2:])
    mask[:, :, 0] = 1
    if last:
        mask[:, -1, -1] = 1
    return mask


class WanVideoUnit_ImageEmbedderFused(PipelineUnit):
    """The first picture as the clean first frame of the latents (TI2V-5B), normalised (1, 48, 1, h, w)."""

    def __init__(self) -> None:
        super().__init__(input_params=("input_image", "height", "width", *TILE_PARAMS),
                         output_params=("first_frame_latents",), onload_model_names=("vae",))

    def process(self, pipe: WanVideoPipeline, input_image: Picture | None, height: int, width: int,
                tiled: bool | None, tile_size: Any, tile_stride: Any) -> dict:
        if input_image is None or not pipe.dit.fuse_vae_embedding_in_latents:
            return {}
        first = pipe.preprocess_video([check_picture("input_image", input_image)], width, height)
        return {"first_frame_latents": pipe.encode_image(first, **tile_options(tiled, tile_size, tile_stride))}


class WanVideoUnit_ConditionChannels(PipelineUnit):
    """All channels beside the noise: the control video's, then the pictures', zeros where there are none."""

    def __init__(self) -> None:
        super().__init__(input_params=("control_latents", "image_latents"), output_params=("y",))

    def process(self, pipe: WanVideoPipeline, control_latents: Tensor | None, image_latents: Tensor | None) -> dict:
        if control_latents is None and image_latents is None:
            return {}
        if control_latents is None:
            return {"y": image_latents}
        if image_latents is None:
            batch, channels, *sizes = control_latents.shape
            image_latents = control_latents.new_zeros(batch, pipe.dit.in_dim - pipe.dit.out_dim - channels, *sizes)
        return {"y": torch.cat([control_latents, image_latents], dim=1)}
