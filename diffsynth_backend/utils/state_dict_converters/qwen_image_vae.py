"""Key names of the autoencoder: the layout of Wan 2.1's own code, in which ComfyUI's users know this VAE.

`Comfy-Org/Qwen-Image_ComfyUI` repackages it so, and ComfyUI's native VAE loader reads only this layout; the embedded
demo VAE is stored in it for that reason. The names differ, the tensors are the same.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

RES_BLOCKS = 3  # of each decoder level; an upsampler follows on all but the last

# repackaged ↔ published, tried in this order.
_PREFIXES = (
    ("conv1.", "quant_conv."), ("conv2.", "post_quant_conv."),
    ("encoder.conv1.", "encoder.conv_in."), ("decoder.conv1.", "decoder.conv_in."),
    ("encoder.head.0.", "encoder.norm_out."), ("decoder.head.0.", "decoder.norm_out."),
    ("encoder.head.2.", "encoder.conv_out."), ("decoder.head.2.", "decoder.conv_out."),
    ("encoder.middle.0.", "encoder.mid_block.resnets.0."), ("decoder.middle.0.", "decoder.mid_block.resnets.0."),
    ("encoder.middle.1.", "encoder.mid_block.attentions.0."), ("decoder.middle.1.", "decoder.mid_block.attentions.0."),
    ("encoder.middle.2.", "encoder.mid_block.resnets.1."), ("decoder.middle.2.", "decoder.mid_block.resnets.1."),
    ("encoder.downsamples.", "encoder.down_blocks."),
)
_PARTS = (("residual.0.", "norm1."), ("residual.2.", "conv1."), ("residual.3.", "norm2."), ("residual.6.", "conv2."),
          ("shortcut.", "conv_shortcut."))


def QwenImageVAERepackagedStateDictConverter(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Repackaged names → published names; renames only."""
    return {_published(key): state_dict[key] for key in state_dict}


def repackaged_vae_keys(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Published names → repackaged names, the inverse of the converter."""
    return {_repackaged(key): state_dict[key] for key in state_dict}


def _published(key: str) -> str:
    key = _swap(key, _PREFIXES)
    if match := re.match(r"decoder\.upsamples\.(\d+)\.(.*)", key):
        level, place = divmod(int(match[1]), RES_BLOCKS + 1)
        part = f"resnets.{place}" if place < RES_BLOCKS else "upsamplers.0"
        key = f"decoder.up_blocks.{level}.{part}.{match[2]}"
    return _swap_part(key, _PARTS)


def _repackaged(key: str) -> str:
    if match := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.*)", key):
        place = int(match[3]) if match[2] == "resnets" else RES_BLOCKS
        key = f"decoder.upsamples.{int(match[1]) * (RES_BLOCKS + 1) + place}.{match[4]}"
    key = _swap(key, [(published, repackaged) for repackaged, published in _PREFIXES])
    return _swap_part(key, [(published, repackaged) for repackaged, published in _PARTS])


def _swap(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Replace the first prefix that fits."""
    return next((new + key.removeprefix(old) for old, new in pairs if key.startswith(old)), key)


def _swap_part(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Replace the name of a part of a residual block: what follows the block's number, before `weight` and the like."""
    for old, new in pairs:
        if match := re.fullmatch(rf"(.*\.\d+\.){re.escape(old)}(\w+)", key):
            return match[1] + new + match[2]
    return key
