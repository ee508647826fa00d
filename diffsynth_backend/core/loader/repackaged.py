"""What others add to a published layout when they pack it again, and how to undo it.

Two things are in use, alone or together. A prefix on every name, by which one file holds several models ("checkpoints"
of ComfyUI: `model.diffusion_model.`, `text_encoders.…`, `vae.`). And 8-bit weights with a scale of their own: of
`layer.weight` in float8 there is a `layer.scale_weight` (or `layer.weight_scale`), a factor or one for each row, in
`Comfy-Org/Qwen-Image_ComfyUI` for the 358 linear layers of the text encoder; what goes with it describes the inputs of
layers (`scale_input`), the format (`comfy_quant`, `scaled_fp8`), or the use of the model (`__index_timestep_zero__`).

So a layout is known if what is left without these is. Sources: ComfyUI's loaders; key counts of published files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .model_files import ModelFileError

Converter = Callable[[dict[str, Any]], dict[str, Any]]

# Longer ones before those that they begin with.
PREFIXES = ("model.diffusion_model.", "text_encoders.qwen25_7b.transformer.", "text_encoders.", "first_stage_model.",
            "diffusion_model.", "transformer.", "module.", "vae.")
SCALES = (".scale_weight", ".weight_scale")
_COMPANIONS = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant")
_MARKERS = ("scaled_fp8", "__index_timestep_zero__")
_SCALED_DTYPES = tuple(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name))


def prefixes_of(names: Mapping[str, Any]) -> list[str]:
    """The known prefixes that occur, and "" if some name has none; in the order of the names."""
    return list(dict.fromkeys(_prefix(name) for name in names))


def _prefix(name: str) -> str:
    return next((prefix for prefix in PREFIXES if name.startswith(prefix)), "") if isinstance(name, str) else ""


def part(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries with that prefix, without it; "" gives those that have none of PREFIXES."""
    return {name[len(prefix):] if prefix else name: value
            for name, value in state_dict.items() if _prefix(name) == prefix}


def without_companions(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that the model has in its published layout."""
    return {name: value for name, value in state_dict.items() if not _is_companion(name)}


def _is_companion(name: Any) -> bool:
    return isinstance(name, str) and (name.endswith(_COMPANIONS) or name in _MARKERS)


@dataclass(frozen=True)
class Unpack:
    """The converter of a repackaged model: its part, weights multiplied by their scales, then the layout's converter.

    Scaled weights become bfloat16, the others stay what they are. Raises ModelFileError for weights that are quantised
    otherwise than to float8 with one scale or one for each row.
    """

    prefix: str = ""
    then: Converter | None = None

    def __call__(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        packed = part(state_dict, self.prefix)
        plain = {name: _unscaled(name, value, packed) for name, value in without_companions(packed).items()}
        return self.then(plain) if self.then else plain


def _unscaled(name: str, weight: Any, packed: Mapping[str, Any]) -> Any:
    layer, _, kind = name.rpartition(".")
    scale = next((packed[layer + suffix] for suffix in SCALES if layer + suffix in packed), None)
    if kind != "weight" or scale is None:
        return weight
    rows = weight.shape[0] if weight.ndim else 1
    if weight.dtype not in _SCALED_DTYPES or scale.numel() not in (1, rows):
        raise ModelFileError(f"{name!r:.200} is {weight.dtype} {list(weight.shape)} with scales {list(scale.shape)}; "
                             "only float8 with one scale, or one for each row, can be read: get the model in bfloat16 "
                             "or as fp8_scaled")
    shape = [rows] + [1] * (weight.ndim - 1) if scale.numel() > 1 else []
    return weight.to(torch.float32).mul(scale.to(torch.float32).reshape(shape)).to(torch.bfloat16)


@dataclass(frozen=True)
class Only:
    """The converter `first`, of whose results those that no name of a model fits are left out."""

    names: frozenset[str]
    first: Converter | None = None

    def __call__(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        converted = self.first(state_dict) if self.first else state_dict
        return {name: value for name, value in converted.items() if name in self.names}
