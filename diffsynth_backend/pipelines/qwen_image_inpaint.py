"""Image to image and inpainting for Qwen-Image: the input's latents, the mask on their grid, and the blend of a step.

Notable: outside the mask a step follows the straight line to the input, (x − x_in)/σ, so it arrives there on every
schedule and no noise has to be kept. In a run that begins with the noised input that is the input noised again with the
same noise, as diffusers' inpainting does it; only within soft edges do the two differ, because there x has left the
line, and the noise taken is the one that x itself implies.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..diffusion import PipelineUnit
from ..utils.masks import Blur, grey_mask
from ..utils.pictures import Picture, check_picture, size_of

if TYPE_CHECKING:
    from .qwen_image import QwenImagePipeline


# ---- the step -------------------------------------------------------------------------------------------------------

def blended(noise_pred: Tensor, latents: Tensor, input_latents: Tensor, mask: Tensor, sigma: float) -> Tensor:
    """The velocity that redraws where `mask` is 1 and leads to `input_latents` where it is 0; float32.

    noise_pred, latents (B, 16, h, w), or (B, 16, L, h, w) for layers, which then share the mask; input_latents of the
    same shape; mask (B, 1, h, w) in 0…1. Input and mask may also be one for the whole batch. `sigma` is that of
    `latents`, above 0. Raises ValueError for input or mask of another shape.
    """
    batch, channels, *grid = latents.shape
    _check_shape("the input's latents are", input_latents, batch, (channels, *grid))
    _check_shape("the inpaint mask is", mask, batch, (1, *latents.shape[-2:]))
    if latents.ndim == 5:
        mask = mask[:, :, None]
    mask = mask.float()
    towards_input = (latents.float() - input_latents.float()) / sigma
    return mask * noise_pred.float() + (1 - mask) * towards_input


def check_same_batch(noise: Tensor, input_latents: Tensor) -> None:
    """Raises ValueError unless there is one input for the whole batch of noises, or one for each."""
    if len(input_latents) not in (1, len(noise)):
        raise ValueError(f"input_image is a batch of {len(input_latents)} pictures and {len(noise)} are to be drawn: "
                         "give one picture, or as many as the batch_size")


def _check_shape(what: str, tensor: Tensor, batch: int, rest: Sequence[int]) -> None:
    if tensor.ndim != len(rest) + 1 or tuple(tensor.shape[1:]) != tuple(rest) or len(tensor) not in (1, batch):
        one_or = "1" if batch == 1 else f"1 or {batch}"
        raise ValueError(f"{what} {'×'.join(map(str, tensor.shape))}; expected {one_or}×{'×'.join(map(str, rest))}, "
                         "as the latents have it")


def _blur(size: int | None, sigma: float | None) -> Blur | None:
    if (size is None) != (sigma is None):
        given, missing = ("size", "sigma") if sigma is None else ("sigma", "size")
        raise ValueError(f"inpaint_blur_{given} is given without inpaint_blur_{missing}: a blur takes both")
    return None if size is None else Blur(size, sigma)


# ---- units ----------------------------------------------------------------------------------------------------------

class QwenImageUnit_InputImageEmbedder(PipelineUnit):
    """Image to image: one picture, or a list of them for a batch, as normalised latents (B, 16, H/8, W/8)."""

    def __init__(self) -> None:
        super().__init__(input_params=("input_image", "height", "width", "tiled", "tile_size", "tile_stride"),
                         output_params=("input_latents",), onload_model_names=("vae",))

    def process(self, pipe: QwenImagePipeline, input_image: Picture | Sequence[Picture] | None, height: int, width: int,
                tiled: bool | None, tile_size: int | None, tile_stride: int | None) -> dict:
        if input_image is None:
            return {}
        pictures = _named_pictures("input_image", input_image)
        for name, picture in pictures.items():
            if size_of(picture) != (width, height):
                raise ValueError(f"{name} is {'×'.join(map(str, size_of(picture)))} but the picture to draw is "
                                 f"{width}×{height} (width × height): resize one of them")
        pipe.check_loaded(self.onload_model_names)
        tiles = {"tile_size": tile_size, "tile_stride": tile_stride} if tiled else {}
        latents = [pipe.encode_image(pipe.preprocess_image(picture, pipe.vae.image_channels), bool(tiled), **tiles)
                   for picture in pictures.values()]
        return {"input_latents": torch.cat(latents)}


def _named_pictures(what: str, value: Any) -> dict[str, Picture]:
    """The pictures by what messages call them. Raises TypeError or ValueError for what is none."""
    if not isinstance(value, (list, tuple)):
        return {what: check_picture(what, value)}
    if not value:
        raise ValueError(f"{what} is an empty list: give at least one picture, or None")
    return {f"{what}[{index}]": check_picture(f"{what}[{index}]", picture) for index, picture in enumerate(value)}


class QwenImageUnit_Inpaint(PipelineUnit):
    """The mask of what to redraw (1) and what to keep (0), on the latent grid.

    A picture of any size. A tensor (B, 1, H/8, W/8), as this unit and `latent_mask` make it, is on the grid already and
    stays as it is, also without blur, so that the unit may run again on its own output.
    """

    def __init__(self) -> None:
        super().__init__(input_params=("inpaint_mask", "inpaint_blur_size", "inpaint_blur_sigma", "input_latents",
                                       "height", "width"), output_params=("inpaint_mask",))

    def process(self, pipe: QwenImagePipeline, inpaint_mask: Picture | Tensor | None, inpaint_blur_size: int | None,
                inpaint_blur_sigma: float | None, input_latents: Tensor | None, height: int, width: int) -> dict:
        blur = _blur(inpaint_blur_size, inpaint_blur_sigma)
        if inpaint_mask is None:
            if blur is not None:
                raise ValueError("inpaint_blur_size and inpaint_blur_sigma are given without an inpaint_mask")
            return {}
        if input_latents is None:
            raise ValueError("inpaint_mask needs an input_image: what the mask leaves alone comes from there")
        rows, columns = height // pipe.vae_factor, width // pipe.vae_factor
        if isinstance(inpaint_mask, Tensor) and inpaint_mask.ndim == 4:
            mask = inpaint_mask
            _check_shape("inpaint_mask is", mask, max(len(mask), 1), (1, rows, columns))
        else:
            mask = grey_mask("inpaint_mask", inpaint_mask, columns, rows)
            mask = mask if blur is None else blur(mask)
        return {"inpaint_mask": mask.to(pipe.device, pipe.torch_dtype)}
