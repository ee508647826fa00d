"""Key names of Wan's image encoder in its two layouts, the original file's and transformers'.

Both files hold more than is used: the last layer and what follows it, and the original one the text half besides. The
converters leave that out. Their inverses, which show a file's layout, put it back without values, on "meta".
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_EMBEDDINGS = ("patch_embedding.weight", "cls_embedding", "pos_embedding")
# The class's ↔ transformers', behind `vision_model.`.
_NAMES = {"embeddings.patch_embedding.weight": "embeddings.patch_embedding.weight",
          "embeddings.cls_embedding": "embeddings.class_embedding",
          "embeddings.pos_embedding": "embeddings.position_embedding.weight",
          "pre_norm.weight": "pre_layrnorm.weight", "pre_norm.bias": "pre_layrnorm.bias"}
# The same of a block, behind `transformer.N.` and `encoder.layers.N.`, before `weight` and `bias`.
_BLOCK_NAMES = {"norm1": "layer_norm1", "attn.proj": "self_attn.out_proj", "norm2": "layer_norm2",
                "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
_QKV, _SEPARATE_QKV = "attn.to_qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

# Sizes of what the class lacks: both halves end in vectors of 1024.
_PROJECTED_DIM = 1024
_TEXT_DIM, _TEXT_HIDDEN_DIM, _TEXT_LAYERS, _TEXT_VOCAB, _TEXT_POSITIONS = 1024, 4096, 24, 250002, 514  # XLM-RoBERTa


# ---- the original layout --------------------------------------------------------------------------------------------

def WanImageEncoderStateDictConverter(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The picture half of the original file without its last layer; renames only."""
    visual = {key.removeprefix("visual."): state_dict[key] for key in state_dict if key.startswith("visual.")}
    unused = ("post_norm.", "head", f"transformer.{_last_layer(visual)}.")
    return {f"embeddings.{key}" if key in _EMBEDDINGS else key: visual[key]
            for key in visual if not key.startswith(unused)}


def published_image_encoder_keys(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `WanImageEncoderStateDictConverter`; what that leaves out is on "meta"."""
    visual = {key.removeprefix("embeddings."): tensor for key, tensor in _with_last_layer(state_dict).items()}
    dim = len(state_dict["pre_norm.weight"])
    visual |= {"post_norm.weight": _meta(dim), "post_norm.bias": _meta(dim), "head": _meta(dim, _PROJECTED_DIM)}
    return {**{f"visual.{key}": tensor for key, tensor in visual.items()},
            **{f"textual.{key}": _meta(*shape) for key, shape in _text_half()}, "log_scale": _meta()}


def _text_half() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of the text half."""
    yield "token_embedding.weight", (_TEXT_VOCAB, _TEXT_DIM)
    yield "type_embedding.weight", (1, _TEXT_DIM)
    yield "pos_embedding.weight", (_TEXT_POSITIONS, _TEXT_DIM)
    for layer in range(_TEXT_LAYERS):
        linear = {**dict.fromkeys(("attn.q", "attn.k", "attn.v", "attn.o"), (_TEXT_DIM, _TEXT_DIM)),
                  "ffn.0": (_TEXT_HIDDEN_DIM, _TEXT_DIM), "ffn.2": (_TEXT_DIM, _TEXT_HIDDEN_DIM)}
        for name, shape in {**linear, "norm1": (_TEXT_DIM,), "norm2": (_TEXT_DIM,)}.items():
            yield f"blocks.{layer}.{name}.weight", shape
            yield f"blocks.{layer}.{name}.bias", shape[:1]
    yield "norm.weight", (_TEXT_DIM,)
    yield "norm.bias", (_TEXT_DIM,)
    yield "head.0.weight", (_PROJECTED_DIM, _TEXT_DIM)
    yield "head.2.weight", (_PROJECTED_DIM, _PROJECTED_DIM)


# ---- the Diffusers layout -------------------------------------------------------------------------------------------

def WanImageEncoderFromDiffusers(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' names (`CLIPVisionModel`) → the class's, without the last layer; queries, keys and values, which
    are separate there, become one weight."""
    theirs = {key.removeprefix("vision_model."): state_dict[key] for key in state_dict}
    ours = {name: theirs[key] for name, key in _NAMES.items()}
    ours["embeddings.cls_embedding"] = ours["embeddings.cls_embedding"][None, None]
    ours["embeddings.pos_embedding"] = ours["embeddings.pos_embedding"][None]
    for layer in range(_last_layer(theirs)):
        for part in ("weight", "bias"):
            prefix = f"encoder.layers.{layer}"
            ours[f"transformer.{layer}.{_QKV}.{part}"] = torch.cat(
                [theirs[f"{prefix}.{name}.{part}"] for name in _SEPARATE_QKV])
            ours |= {f"transformer.{layer}.{name}.{part}": theirs[f"{prefix}.{key}.{part}"]
                     for name, key in _BLOCK_NAMES.items()}
    return ours


def diffusers_image_encoder_keys(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `WanImageEncoderFromDiffusers`; what that leaves out is on "meta"."""
    dim = len(state_dict["pre_norm.weight"])
    theirs = {"post_layernorm.weight": _meta(dim), "post_layernorm.bias": _meta(dim)}
    for key, tensor in _with_last_layer(state_dict).items():
        theirs |= _to_diffusers(key, tensor)
    return {f"vision_model.{key}": tensor for key, tensor in theirs.items()}


def _to_diffusers(key: str, tensor: Tensor) -> dict[str, Tensor]:
    match = re.fullmatch(r"transformer\.(\d+)\.(.+)\.(weight|bias)", key)
    if match is None:
        return {_NAMES[key]: tensor[0, 0] if key.endswith("cls_embedding") else
                tensor[0] if key.endswith("pos_embedding") else tensor}
    prefix, name, part = f"encoder.layers.{match[1]}", match[2], match[3]
    if name == _QKV:
        return {f"{prefix}.{separate}.{part}": chunk for separate, chunk in zip(_SEPARATE_QKV, tensor.chunk(3))}
    return {f"{prefix}.{_BLOCK_NAMES[name]}.{part}": tensor}


# ---- both -----------------------------------------------------------------------------------------------------------

def _last_layer(keys: Mapping[str, Any]) -> int:
    """The highest number of a layer, in either layout."""
    return max(int(match[1]) for key in keys if (match := re.match(r"(?:transformer|encoder\.layers)\.(\d+)\.", key)))


def _with_last_layer(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The class's state dict with one layer more, which has the shapes of the last one."""
    last = _last_layer(state_dict)
    prefix = f"transformer.{last}."
    return {**state_dict, **{key.replace(prefix, f"transformer.{last + 1}."): tensor.to("meta")
                             for key, tensor in state_dict.items() if key.startswith(prefix)}}


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
