"""Blockwise ControlNets for Qwen-Image: what a user gives, the condition's latents, and the corrections of a step.

Notable: each net adds scale·net(x, condition) to the picture's tokens x after every block of the denoiser, between
`start` and `end` of the way from noise (1) to picture (0). The condition is projected anew in each pass: that is
1/5760 of a net's work, and it keeps a pass's visits of layers the same, which is what streaming is best at.
Published nets: DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-{Canny,Depth,Inpaint}.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion import PipelineUnit
from ..diffusion.base_pipeline import ModelNotLoaded
from ..models.qwen_image_controlnet import QwenImageBlockWiseControlNet
from ..models.qwen_image_dit import QwenImageDiT
from ..utils.masks import grey_mask
from ..utils.pictures import Picture, check_picture, resized

if TYPE_CHECKING:
    from .qwen_image import QwenImagePipeline

PUBLISHED = "DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny, -Depth or -Inpaint"
MAX_CONTROLS = 32
ROUNDING = 1e-4  # of a progress that is a quotient, at the borders


@dataclass(frozen=True, eq=False)
class ControlNetInput:
    """A picture that controls, and how.

    controlnet_id   which of the loaded nets, counted from 0 in the order of model_configs
    scale           how much of the correction is added; 0: none, and nothing is computed
    start, end      active while start ≥ progress ≥ end; progress is 1 at the first step and 0 at the last
    image           what the net was trained on (edges, depth); for inpainting, the picture to redraw in
    inpaint_mask    for an inpainting net: white is what to redraw
    inpaint_image, processor_id   other families' nets take them; Qwen-Image's do not

    Raises ValueError for a scale that is not finite and for borders outside 1 ≥ start ≥ end ≥ 0.
    """

    controlnet_id: int = 0
    scale: float = 1.0
    start: float = 1.0
    end: float = 0.0
    image: Picture | None = None
    inpaint_image: Picture | None = None
    inpaint_mask: Picture | None = None
    processor_id: str | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"a ControlNet's scale must be a finite number, got {self.scale!r}")
        if not 1 >= self.start >= self.end >= 0:
            raise ValueError(f"a ControlNet is active from start down to end, 1 ≥ start ≥ end ≥ 0, got start "
                             f"{self.start!r} and end {self.end!r}: 1 is the first step and 0 the last")


@dataclass(frozen=True, eq=False)
class ControlCondition:
    """A condition as the loop takes it. `latents` (1, 16, h, w), or (1, 17, h, w) with what to keep, 1, or redraw, 0.
    """

    controlnet_id: int
    scale: float
    start: float
    end: float
    latents: Tensor

    def active_at(self, progress: float) -> bool:
        return self.scale != 0 and self.end - ROUNDING <= progress <= self.start + ROUNDING


def progress_at(progress_id: int, num_inference_steps: int) -> float:
    """How far a step is from the end: 1 at the first step, 0 at the last; 0 if there is only one, as published.

    Raises ValueError for a step that the loop does not have.
    """
    if not 0 <= progress_id < num_inference_steps:
        raise ValueError(f"step {progress_id} of {num_inference_steps}: num_inference_steps must be the loop's number "
                         "of steps, and progress_id count them from 0")
    return (num_inference_steps - 1 - progress_id) / max(num_inference_steps - 1, 1)


# ---- the loop -------------------------------------------------------------------------------------------------------

def corrections(models: nn.ModuleList | None, conditions: Sequence[ControlCondition] | None, dit: QwenImageDiT,
                latents_shape: Sequence[int], progress: float) -> Callable[[int, Tensor], Tensor] | None:
    """What is to be added to the tokens (B, S, dim) of the picture after each block, as a function of both.

    `latents_shape` is that of the picture's latents, (B, 16, h, w); `progress` see `progress_at`. None when no
    condition is active. Raises ValueError for conditions or nets that do not fit the picture or the denoiser.
    """
    active = [condition for condition in conditions or () if condition.active_at(progress)]
    if not active:
        return None
    for condition in active:
        _check_fits(models, condition, dit, latents_shape)
    nets = [models[condition.controlnet_id] for condition in active]
    tokens = [net.process_controlnet_conditioning(dit.patchify(condition.latents))
              for net, condition in zip(nets, active)]  # each (1, S, dim)

    def correction(block_id: int, image: Tensor) -> Tensor:
        total = active[0].scale * nets[0](image, tokens[0], block_id)
        for net, condition, conditioning in zip(nets[1:], active[1:], tokens[1:]):
            total = total + condition.scale * net(image, conditioning, block_id)
        return total

    return correction


def _check_fits(models: nn.ModuleList | None, condition: ControlCondition, dit: QwenImageDiT,
                latents_shape: Sequence[int]) -> None:
    net = _net(models, "the condition", condition.controlnet_id)
    found, wanted = ((len(net.controlnet_blocks), net.img_in.out_features),
                     (len(dit.transformer_blocks), dit.img_in.out_features))
    if found != wanted:
        raise ValueError(f"ControlNet {condition.controlnet_id} has {found[0]} blocks of width {found[1]} and the "
                         f"denoiser {wanted[0]} of width {wanted[1]}: they are of different models")
    if len(latents_shape) != 4:
        raise ValueError("a blockwise ControlNet controls one picture and not layers: leave out layer_num or "
                         "blockwise_controlnet_inputs")
    if tuple(condition.latents.shape[-2:]) != tuple(latents_shape[-2:]):
        (height, width), (rows, columns) = condition.latents.shape[-2:], latents_shape[-2:]
        raise ValueError(f"the ControlNet's condition is {width}×{height} latents and the picture {columns}×{rows} "
                         "(width × height): prepare it for the size that is drawn")


def _net(models: nn.ModuleList | None, what: str, controlnet_id: int) -> QwenImageBlockWiseControlNet:
    """The net of that number. Raises ValueError when there is none."""
    if models is None or not len(models):
        raise ModelNotLoaded(f"{what} needs a blockwise ControlNet, and none is loaded: add the file of {PUBLISHED} to "
                             "model_configs", ("blockwise_controlnet",))
    if not isinstance(controlnet_id, int) or not 0 <= controlnet_id < len(models):
        numbers = "number 0" if len(models) == 1 else f"numbers 0…{len(models) - 1}"
        raise ValueError(f"{what} has controlnet_id {controlnet_id!r}, and {len(models)} ControlNet(s) are loaded, "
                         f"{numbers}: choose one of them, or add another's file to model_configs")
    return models[controlnet_id]


# ---- units ----------------------------------------------------------------------------------------------------------

class QwenImageUnit_ControlChecker(PipelineUnit):
    """Refuses inputs that the loaded nets cannot honour. In a graph the pipeline that draws says so: others have none.
    """

    def __init__(self) -> None:
        super().__init__(input_params=("blockwise_controlnet_inputs",), awaited_models=("dit",))

    def process(self, pipe: QwenImagePipeline, blockwise_controlnet_inputs: Sequence[ControlNetInput] | None) -> dict:
        if blockwise_controlnet_inputs is not None:
            check_controls(blockwise_controlnet_inputs, pipe.blockwise_controlnet)
        return {}


class QwenImageUnit_BlockwiseControlNet(PipelineUnit):
    """Control pictures as latents: resized to the picture that is drawn, encoded, for inpainting with the mask."""

    def __init__(self) -> None:
        super().__init__(
            input_params=("blockwise_controlnet_inputs", "height", "width", "tiled", "tile_size", "tile_stride"),
            output_params=("blockwise_controlnet_conditioning",), onload_model_names=("vae",))

    def process(self, pipe: QwenImagePipeline, blockwise_controlnet_inputs: Sequence[ControlNetInput] | None,
                height: int, width: int, tiled: bool | None, tile_size: int | None, tile_stride: int | None) -> dict:
        if blockwise_controlnet_inputs is None:
            return {}
        tiles = {"tile_size": tile_size, "tile_stride": tile_stride} if tiled else {}
        conditions = []
        for control in blockwise_controlnet_inputs:
            if control.scale != 0:
                image, keep = _picture_and_mask(pipe, control, height, width)
                latents = pipe.encode_image(image, bool(tiled), **tiles)
                if keep is not None:
                    latents = torch.cat([latents, F.interpolate(keep, latents.shape[-2:]).to(latents)], dim=1)
                conditions.append(ControlCondition(control.controlnet_id, control.scale, control.start, control.end,
                                                   latents))
        return {"blockwise_controlnet_conditioning": tuple(conditions)}


def _picture_and_mask(pipe: QwenImagePipeline, control: ControlNetInput, height: int,
                      width: int) -> tuple[Tensor, Tensor | None]:
    """The picture (1, 3, H, W) in −1…1, black where it is to be redrawn; with a mask, how much to keep (1, 1, H, W)."""
    image = pipe.preprocess_image(resized(control.image, width, height))
    if control.inpaint_mask is None:
        return image, None
    redraw = grey_mask("inpaint_mask", control.inpaint_mask, width, height).to(image.device)
    return image.masked_fill(redraw > 0.5, -1), 1 - redraw


def check_controls(controls: Any, models: nn.ModuleList | None) -> None:
    """Raises TypeError or ValueError for inputs that the loaded nets cannot honour."""
    if not isinstance(controls, (list, tuple)):
        raise TypeError(f"blockwise_controlnet_inputs must be a list of ControlNetInput, got {type(controls).__name__}")
    if len(controls) > MAX_CONTROLS:
        raise ValueError(f"blockwise_controlnet_inputs has {len(controls)} entries, at most {MAX_CONTROLS} are taken")
    for index, control in enumerate(controls):
        what = f"blockwise_controlnet_inputs[{index}]"
        if not isinstance(control, ControlNetInput):
            raise TypeError(f"{what} must be a ControlNetInput, got {type(control).__name__}")
        _check_fields(what, control, _net(models, what, control.controlnet_id))


def _check_fields(what: str, control: ControlNetInput, net: QwenImageBlockWiseControlNet) -> None:
    if control.inpaint_image is not None:
        raise ValueError(f"{what} has an inpaint_image, which Qwen-Image's nets do not take: give the picture as image")
    if control.processor_id is not None:
        raise ValueError(f"{what} has processor_id {control.processor_id!r}, which chooses a mode of nets that have "
                         "several; Qwen-Image's have one each: choose the net with controlnet_id")
    if control.image is None:
        raise ValueError(f"{what} has no image: it is what controls")
    check_picture(f"{what}.image", control.image)
    inpaints, number = net.additional_in_dim > 0, control.controlnet_id
    if inpaints and control.inpaint_mask is None:
        raise ValueError(f"{what}: ControlNet {number} is for inpainting and needs image and inpaint_mask, and the "
                         "inpaint_mask is missing")
    if not inpaints and control.inpaint_mask is not None:
        raise ValueError(f"{what}: ControlNet {number} is not for inpainting and takes an image alone: leave "
                         "inpaint_mask out, or name the number of an inpainting net in controlnet_id")
    if control.inpaint_mask is not None:
        check_picture(f"{what}.inpaint_mask", control.inpaint_mask)
