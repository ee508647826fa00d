"""Key names of Wan's autoencoders: the authors' own files and those of diffusers. Names differ, tensors are the same.

Notable: diffusers' layout of 2.1 is the published one of Qwen-Image's autoencoder. 2.2 has the same blocks, which both
layouts number level by level; without the levels they are named as in 2.1.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .qwen_image_vae import QwenImageVAERepackagedStateDictConverter, repackaged_vae_keys

PREFIX = "model."  # what our classes put before the authors' names
# Residual blocks of each level; a step down or up follows on all but the last.
ENCODER_BLOCKS, DECODER_BLOCKS = 2, 3


def WanVideoVAEStateDictConverter(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The authors' names → ours."""
    return {PREFIX + name: state_dict[name] for name in state_dict}


def published_vae_keys(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Our names → the authors', the inverse of `WanVideoVAEStateDictConverter`."""
    return {name.removeprefix(PREFIX): state_dict[name] for name in state_dict}


def WanVideoVAEFromDiffusers(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' names of 2.1 → ours; renames only."""
    return WanVideoVAEStateDictConverter(repackaged_vae_keys(state_dict))


def diffusers_vae_keys(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Our names → diffusers' of 2.1, the inverse of `WanVideoVAEFromDiffusers`."""
    return QwenImageVAERepackagedStateDictConverter(published_vae_keys(state_dict))


def WanVideoVAE38FromDiffusers(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' names of 2.2 → ours; renames only."""
    without_levels = repackaged_vae_keys(_renamed(state_dict, _without_levels))
    return WanVideoVAEStateDictConverter(_renamed(without_levels, _published_levels))


def diffusers_vae38_keys(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Our names → diffusers' of 2.2, the inverse of `WanVideoVAE38FromDiffusers`."""
    without_levels = _renamed(published_vae_keys(state_dict), _without_published_levels)
    return _renamed(QwenImageVAERepackagedStateDictConverter(without_levels), _levels)


def _renamed(state_dict: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    return {rename(name): state_dict[name] for name in state_dict}


# ---- 2.2's levels, in diffusers' names ------------------------------------------------------------------------------

def _without_levels(name: str) -> str:
    if match := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(?:resnets\.(\d+)|downsampler)\.(.*)", name):
        place = ENCODER_BLOCKS if match[2] is None else int(match[2])
        return f"encoder.down_blocks.{int(match[1]) * (ENCODER_BLOCKS + 1) + place}.{match[3]}"
    return re.sub(r"^(decoder\.up_blocks\.\d+\.)upsampler\.", r"\1upsamplers.0.", name)


def _levels(name: str) -> str:
    if match := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(.*)", name):
        level, place = divmod(int(match[1]), ENCODER_BLOCKS + 1)
        part = "downsampler" if place == ENCODER_BLOCKS else f"resnets.{place}"
        return f"encoder.down_blocks.{level}.{part}.{match[2]}"
    return re.sub(r"^(decoder\.up_blocks\.\d+\.)upsamplers\.0\.", r"\1upsampler.", name)


# ---- 2.2's levels, in the authors' names ----------------------------------------------------------------------------

_COUNTS = {"downsamples": ENCODER_BLOCKS + 1, "upsamples": DECODER_BLOCKS + 1}


def _published_levels(name: str) -> str:
    if match := re.fullmatch(r"(\w+)\.(downsamples|upsamples)\.(\d+)\.(.*)", name):
        level, place = divmod(int(match[3]), _COUNTS[match[2]])
        return f"{match[1]}.{match[2]}.{level}.{match[2]}.{place}.{match[4]}"
    return name


def _without_published_levels(name: str) -> str:
    if match := re.fullmatch(r"(\w+)\.(downsamples|upsamples)\.(\d+)\.\2\.(\d+)\.(.*)", name):
        number = int(match[3]) * _COUNTS[match[2]] + int(match[4])
        return f"{match[1]}.{match[2]}.{number}.{match[5]}"
    return name
