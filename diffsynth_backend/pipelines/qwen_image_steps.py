"""The steps of a graph that only Qwen-Image has: prompts for regions, pictures that control, LoRAs out of pictures."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.loader.file import load_state_dict
from ..utils.pictures import Picture
from .handle import PipelineHandle
from .owner import WeightsOwner, owner
from .qwen_image_control import ControlNetInput
from .steps import Conditioning, Progress, borrowed, give

BIASED_NETS = tuple(f"qwen_image_image2lora_{net}" for net in ("coarse", "fine"))


@dataclass(frozen=True, eq=False)
class Entity:
    """A prompt for a region: where the mask, a picture of any size, is white."""

    prompt: str
    mask: Picture


def give_entities(conditioning: Conditioning, entities: Sequence[Entity], on_negative: bool,
                  weights: WeightsOwner = owner) -> Conditioning:
    """A conditioning with prompts for regions; with `on_negative` the negative prompt is told of the regions, too."""
    return give(conditioning.handle, {"eligen_entity_prompts": [entity.prompt for entity in entities],
                                      "eligen_entity_masks": [entity.mask for entity in entities],
                                      "eligen_enable_on_negative": on_negative}, weights, conditioning)


def give_controls(conditioning: Conditioning, controls: Sequence[ControlNetInput],
                  weights: WeightsOwner = owner) -> Conditioning:
    """A conditioning with pictures that control.

    Raises ValueError if the pipeline has a denoiser and no ControlNet, or ControlNets that the controls do not fit; one
    without a denoiser has only encoded the prompt, and `sample` asks the one that draws.
    """
    return give(conditioning.handle, {"blockwise_controlnet_inputs": tuple(controls)}, weights, conditioning)


def needs_bias(handle: PipelineHandle) -> bool:
    """Whether the pipeline's image-to-LoRA nets are those that are meant to be given a bias: the coarse and the fine.
    """
    return all(map(handle.files_of, BIASED_NETS))


def save_lora_of(handle: PipelineHandle, pictures: Sequence[Picture], file: str, bias: str | None = None,
                 progress: Progress = iter, weights: WeightsOwner = owner) -> None:
    """Make a LoRA that draws like the pictures, and save it as a new safetensors file; `bias` is a LoRA's file.

    Raises ValueError for missing models, and for too many pictures, before anything runs.
    """
    from safetensors.torch import save_file

    from .qwen_image_image_to_lora import images_to_lora  # its encoders are for this alone

    with borrowed(handle, weights) as pipe:
        lora = images_to_lora(pipe, pictures, None if bias is None else load_state_dict(bias), progress)
    save_file({name: tensor.contiguous() for name, tensor in lora.items()}, file)
