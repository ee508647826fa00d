"""Files that hold Wan's denoiser and VACE together, from the state dict of either one."""
from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from diffsynth_backend.configs.model_configs import MODEL_CONFIGS, resolve
from diffsynth_backend.core.loader.model import build_on_meta
from diffsynth_backend.utils.state_dict_converters.wan_video_dit import diffusers_keys

VACE_SETS = ("a61453409b67cd3246cf0c3bebad47ba", "7a513e1f257a861512b1afd387a8ecd9")  # 1.3B, 14B


def original_vace_set(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both models of the published size that this one is of; the other one's tensors are on meta."""
    for model_hash in VACE_SETS:
        models = _models(model_hash)
        if any(_layout(model.state_dict()) == _layout(state_dict) for model in models):
            return {name: tensor for model in models for name, tensor in model.state_dict().items()} | dict(state_dict)
    raise ValueError("neither the denoiser nor VACE of a published set")


def diffusers_vace_set(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`original_vace_set` under diffusers' names."""
    return diffusers_keys(original_vace_set(state_dict))


@cache
def _models(model_hash: str) -> list[nn.Module]:
    return [build_on_meta(resolve(row["model_class"]), row.get("extra_kwargs"))
            for row in MODEL_CONFIGS if row["model_hash"] == model_hash]


def _layout(state_dict: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state_dict.items()}
