"""Tiny Wan denoisers with equal weights here and in diffusers, from which ours come through the converters."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import nn

from diffsynth_backend.models.wan_video_dit import VaceWanModel, WanModel
from diffsynth_backend.utils.state_dict_converters.wan_video_dit import (
    VaceWanModelFromDiffusers,
    WanVideoDiTFromDiffusers,
    WanVideoVaceDiTFromDiffusers,
)

TOLERANCE = 1e-5
CLIP_DIM = 1280
SIZES = {"dim": 64, "in_dim": 16, "ffn_dim": 96, "out_dim": 16, "text_dim": 24, "freq_dim": 32, "eps": 1e-6,
         "patch_size": (1, 2, 2), "num_heads": 2, "num_layers": 2, "has_image_input": False}
VACE_SIZES = {"dim": 64, "num_heads": 2, "ffn_dim": 96, "vace_layers": (0, 2)}
IMAGE = {"in_dim": 36, "has_image_input": True}
FIRST_AND_LAST = {**IMAGE, "has_image_pos_emb": True}
TI2V = {"in_dim": 48, "out_dim": 48, "seperated_timestep": True}


def their_config(config: dict[str, Any]) -> dict[str, Any]:
    """diffusers' arguments for ours."""
    image = config["has_image_input"]
    return {"num_attention_heads": config["num_heads"], "attention_head_dim": config["dim"] // config["num_heads"],
            "in_channels": config["in_dim"], "out_channels": config["out_dim"], "ffn_dim": config["ffn_dim"],
            "text_dim": config["text_dim"], "freq_dim": config["freq_dim"], "num_layers": config["num_layers"],
            "eps": config["eps"], "patch_size": tuple(config["patch_size"]), "image_dim": CLIP_DIM if image else None,
            "added_kv_proj_dim": config["dim"] if image else None,
            "pos_embed_seq_len": 514 if config.get("has_image_pos_emb") else None}


def make_pair(randomized: Callable[[nn.Module], nn.Module], **changes: Any) -> tuple[WanModel, WanTransformer3DModel]:
    """Ours and theirs with the same random weights; `changes` to SIZES."""
    config = {**SIZES, **changes}
    theirs = randomized(WanTransformer3DModel(**their_config(config)))
    ours = WanModel(**config).eval().requires_grad_(False)
    ours.load_state_dict(WanVideoDiTFromDiffusers(theirs.state_dict()), strict=True)
    return ours, theirs


def make_vace_pair(randomized: Callable[[nn.Module], nn.Module]
                   ) -> tuple[WanModel, VaceWanModel, WanVACETransformer3DModel]:
    """Our two models, of four and two blocks, and their one."""
    config = {**SIZES, "num_layers": 4}
    theirs = randomized(WanVACETransformer3DModel(**their_config(config), vace_layers=[0, 2]))
    dit = WanModel(**config).eval().requires_grad_(False)
    vace = VaceWanModel(**VACE_SIZES).eval().requires_grad_(False)
    dit.load_state_dict(WanVideoVaceDiTFromDiffusers(theirs.state_dict()), strict=True)
    vace.load_state_dict(VaceWanModelFromDiffusers(theirs.state_dict()), strict=True)
    return dit, vace, theirs
