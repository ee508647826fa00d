"""Key names of the text encoder: the published files keep an older layout than transformers' classes have now."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Prefixes in the published files and in the class. No published prefix is the beginning of another.
PREFIXES = (("visual.", "model.visual."), ("model.", "model.language_model."))


def QwenImageTextEncoderStateDictConverter(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """`visual.*` → `model.visual.*`, `model.*` → `model.language_model.*`; `lm_head.weight` stays."""
    return {_renamed(key, PREFIXES): state_dict[key] for key in state_dict}


def published_text_encoder_keys(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `QwenImageTextEncoderStateDictConverter`: a state dict of the class under its published names."""
    inverse = tuple((new, published) for published, new in PREFIXES)
    return {_renamed(key, inverse): state_dict[key] for key in state_dict}


def _renamed(key: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for old, new in prefixes:
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key
