"""EliGen for Qwen-Image: prompts of their own for regions of the picture (arXiv 2501.01097).

Notable: the unit makes embeddings and regions; which token sees which is the denoiser's matter. Made for the LoRAs
DiffSynth-Studio/Qwen-Image-EliGen, -V2 and -Poster, without which the model does not know what to do with regions.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion import PipelineUnit
from ..diffusion.pipeline_unit import Inputs
from ..models.qwen_image_dit import Regions
from ..utils.pictures import Picture, check_picture, pixels
from .prompts import check_prompt

if TYPE_CHECKING:
    from .qwen_image import QwenImagePipeline

MAX_ENTITIES = 64


class QwenImageUnit_EntityChecker(PipelineUnit):
    """Refuses entities that cannot be honoured."""

    def __init__(self) -> None:
        super().__init__(input_params=("eligen_entity_prompts", "eligen_entity_masks", "eligen_enable_on_negative"))

    def process(self, pipe: QwenImagePipeline, eligen_entity_prompts: object, eligen_entity_masks: object,
                eligen_enable_on_negative: bool | None) -> dict:
        check_entities(eligen_entity_prompts, eligen_entity_masks, bool(eligen_enable_on_negative))
        return {}


class QwenImageUnit_EntityControl(PipelineUnit):
    """Entities' prompts as embeddings (1, T, D) each. On the negative side, if wanted, its prompt stands for each."""

    def __init__(self) -> None:
        super().__init__(take_over=True, onload_model_names=("text_encoder",),
                         input_params=("eligen_entity_prompts", "eligen_enable_on_negative", "prompt_emb"),
                         output_params=("entity_prompt_emb",))

    def process(self, pipe: QwenImagePipeline, inputs_shared: Inputs, inputs_posi: Inputs,
                inputs_nega: Inputs) -> tuple[Inputs, Inputs, Inputs]:
        prompts = inputs_shared.get("eligen_entity_prompts")
        if prompts:
            inputs_posi["entity_prompt_emb"] = _embedded(pipe, prompts)
            if inputs_shared.get("eligen_enable_on_negative"):
                inputs_nega["entity_prompt_emb"] = (inputs_nega["prompt_emb"],) * len(prompts)
        return inputs_shared, inputs_posi, inputs_nega


class QwenImageUnit_EntityRegions(PipelineUnit):
    """Entities' masks as regions on the latent grid (H/8, W/8), white is inside; for each side that has entities.

    Apart from the embeddings, since only this has to wait for the size of the picture.
    """

    def __init__(self) -> None:
        super().__init__(take_over=True, output_params=("entity_masks",),
                         input_params=("eligen_entity_prompts", "eligen_entity_masks", "height", "width",
                                       "entity_prompt_emb"))

    def process(self, pipe: QwenImagePipeline, inputs_shared: Inputs, inputs_posi: Inputs,
                inputs_nega: Inputs) -> tuple[Inputs, Inputs, Inputs]:
        prompts = inputs_shared.get("eligen_entity_prompts")
        if prompts:
            grid = (inputs_shared["height"] // pipe.vae_factor, inputs_shared["width"] // pipe.vae_factor)
            masks = entity_regions(prompts, inputs_shared["eligen_entity_masks"], *grid)
            regions = Regions(masks.to(pipe.device))  # which both sides' passes share
            for side in (inputs_posi, inputs_nega):
                if side.get("entity_prompt_emb") is not None:
                    side["entity_masks"] = regions
        return inputs_shared, inputs_posi, inputs_nega


def _embedded(pipe: QwenImagePipeline, prompts: Sequence[str]) -> tuple[Tensor, ...]:
    """One by one: they differ in length, and nothing here is padded."""
    pipe.load_models_to_device(("text_encoder",))
    return tuple(pipe.prompts.embed(pipe.text_encoder, [prompt], pipe.device)[0].to(pipe.torch_dtype)
                 for prompt in prompts)


def check_entities(prompts: Any, masks: Any, on_negative: bool) -> None:
    """Raises TypeError or ValueError unless there are as many masks as prompts, MAX_ENTITIES at most."""
    for name, value in (("eligen_entity_prompts", prompts), ("eligen_entity_masks", masks)):
        if value is not None and not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list with one entry for each entity, got {type(value).__name__}")
    counts = len(prompts or ()), len(masks or ())
    if counts[0] != counts[1]:
        raise ValueError(f"there are {counts[0]} eligen_entity_prompts and {counts[1]} eligen_entity_masks: each "
                         "entity has one of both")
    if counts[0] > MAX_ENTITIES:
        raise ValueError(f"{counts[0]} entities are given, at most {MAX_ENTITIES} are taken")
    if on_negative and not counts[0]:
        raise ValueError("eligen_enable_on_negative is set and there are no eligen_entity_prompts")
    for index, (prompt, mask) in enumerate(zip(prompts or (), masks or ())):
        check_prompt(prompt)
        check_picture(f"eligen_entity_masks[{index}]", mask)


def entity_regions(prompts: Sequence[str], masks: Sequence[Picture], height: int, width: int) -> Tensor:
    """Masks of any size → bool (N, height, width) on the latent grid: where the mean of the colours exceeds a half.

    The nearest pixel decides. Raises TypeError for what is no picture, ValueError for a mask of which nothing is left.
    """
    regions = []
    for index, (prompt, mask) in enumerate(zip(prompts, masks, strict=True)):
        check_picture(f"eligen_entity_masks[{index}]", mask)
        region = F.interpolate(pixels(mask, channels=1), (height, width), mode="nearest-exact")[0, 0] > 0.5
        if not region.any():
            raise ValueError(f"the mask of entity {index} ({prompt!r}) is empty on the grid of {width}×{height} "
                             "latents (8 pixels each): paint a larger region in white")
        regions.append(region)
    return torch.stack(regions)
