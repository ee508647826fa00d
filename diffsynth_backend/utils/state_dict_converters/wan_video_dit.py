"""Key names of Wan's denoiser and of VACE: what the files say, and what the models say, which is the original layout.

Notable: nothing is computed; some files hold two models, of which each converter takes its own. diffusers' norm2 is the
original norm3: both have weights before the attention to the text only. The image models that Wan-AI published for
diffusers in spring 2025 carry a `norm_added_q` in each block that no program uses.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PREFIX = "model."
_UNUSED = re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight")

# diffusers → original: names of modules and parameters at the top that differ.
_TOP = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
}
# The same inside of a block, `blocks.N` or `vace_blocks.N`.
_IN_BLOCK = {
    "scale_shift_table": "modulation",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_in": "before_proj",
    "proj_out": "after_proj",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
} | {f"{theirs}.{name}": f"{ours}.{own}" for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
     for name, own in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"),
                       ("norm_q", "norm_q"), ("norm_k", "norm_k"))}


# ---- the original layout --------------------------------------------------------------------------------------------

def WanVideoDiTStateDictConverter(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The denoiser out of a file that holds VACE, too."""
    return {key: state_dict[key] for key in state_dict if not _is_vace(key)}


def VaceWanModelDictConverter(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """VACE out of a file that holds the denoiser, too."""
    return {key: state_dict[key] for key in state_dict if _is_vace(key)}


def WanVideoDiTPrefixedStateDictConverter(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """`model.*` → `*`, as `krea/krea-realtime-video` needs it."""
    return {key.removeprefix(PREFIX): state_dict[key] for key in state_dict}


def prefixed_dit_keys(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `WanVideoDiTPrefixedStateDictConverter`."""
    return {PREFIX + key: state_dict[key] for key in state_dict}


# ---- diffusers' layout ----------------------------------------------------------------------------------------------

def WanVideoDiTFromDiffusers(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Names of diffusers' WanTransformer3DModel → original ones; a name that it does not have stays."""
    return _renamed(state_dict, _TOP, _IN_BLOCK)


def WanVideoImageDiTFromDiffusers(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """As `WanVideoDiTFromDiffusers`, without the unused `norm_added_q`."""
    return WanVideoDiTFromDiffusers({key: state_dict[key] for key in state_dict if not _UNUSED.fullmatch(key)})


def WanVideoVaceDiTFromDiffusers(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The denoiser out of diffusers' WanVACETransformer3DModel."""
    return WanVideoDiTFromDiffusers(WanVideoDiTStateDictConverter(state_dict))


def VaceWanModelFromDiffusers(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """VACE out of diffusers' WanVACETransformer3DModel."""
    return _renamed(VaceWanModelDictConverter(state_dict), _TOP, _IN_BLOCK)


def diffusers_keys(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `WanVideoDiTFromDiffusers`, and of each half of a file with VACE."""
    return _renamed(state_dict, _swapped(_TOP), _swapped(_IN_BLOCK))


def diffusers_image_keys(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `WanVideoImageDiTFromDiffusers`; the unused tensors are those of the keys."""
    renamed = diffusers_keys(state_dict)
    return renamed | {key.replace("norm_added_k", "norm_added_q"): tensor for key, tensor in renamed.items()
                      if key.endswith("attn2.norm_added_k.weight")}


# ---- common ---------------------------------------------------------------------------------------------------------

def _is_vace(key: str) -> bool:
    return key.startswith("vace_")


def _swapped(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


def _renamed(state_dict: Mapping[str, Any], top: Mapping[str, str], in_block: Mapping[str, str]) -> dict[str, Any]:
    return {_new_name(key, top, in_block): state_dict[key] for key in state_dict}


def _new_name(key: str, top: Mapping[str, str], in_block: Mapping[str, str]) -> str:
    """The module's or parameter's name replaced, what is before and behind it kept."""
    block, rest = re.fullmatch(r"((?:vace_)?blocks\.\d+\.)?(.*)", key).groups(default="")
    names = in_block if block else top
    for name in (rest, rest.rpartition(".")[0]):
        if name in names:
            return block + names[name] + rest.removeprefix(name)
    return key
