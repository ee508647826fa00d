"""Key names of Wan's text encoder: transformers' names for the tensors that the original file has under its own.

`text_encoder/` of the repositories in the Diffusers layout; the tensors are the same.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The class's ↔ transformers', those of a block without `blocks.N.` and `encoder.block.N.layer.`.
_NAMES = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
_BLOCK_NAMES = {
    "norm1.weight": "0.layer_norm.weight",
    **{f"attn.{name}.weight": f"0.SelfAttention.{name}.weight" for name in "qkvo"},
    "pos_embedding.embedding.weight": "0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "1.layer_norm.weight",
    "ffn.gate.0.weight": "1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "1.DenseReluDense.wo.weight",
}
_FROM_DIFFUSERS = {theirs: ours for ours, theirs in (*_NAMES.items(), *_BLOCK_NAMES.items())}


def WanTextEncoderFromDiffusers(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' names (`UMT5EncoderModel`) → the class's; renames only. Unknown names stay."""
    return {_from_diffusers(key): state_dict[key] for key in state_dict}


def diffusers_text_encoder_keys(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The class's names → transformers', the inverse of the converter."""
    return {_to_diffusers(key): state_dict[key] for key in state_dict}


def _from_diffusers(key: str) -> str:
    if key.startswith("encoder.block."):
        number, _, name = key.removeprefix("encoder.block.").partition(".layer.")
        return f"blocks.{number}.{_FROM_DIFFUSERS.get(name, name)}"
    return _FROM_DIFFUSERS.get(key, key)


def _to_diffusers(key: str) -> str:
    if key.startswith("blocks."):
        number, _, name = key.removeprefix("blocks.").partition(".")
        return f"encoder.block.{number}.layer.{_BLOCK_NAMES[name]}"
    return _NAMES[key]
