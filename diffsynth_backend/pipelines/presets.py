"""Known sets of model files: the embedded demo and the published ones, with their authors' settings."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import ModelConfig

DEMO_WEIGHTS = Path(__file__).parent.parent / "demo" / "weights"

Source = Mapping[str, str]  # arguments of `ModelConfig`


@dataclass(frozen=True)
class ModelPreset:
    """The models of a pipeline, by the name of the part that each is; sizes in pixels.

    `frames` of a video, 1: a picture. `shift` replaces the schedule's own, `boundary` where the second denoiser takes
    over.
    """

    title: str
    family: str
    parts: Mapping[str, Source]
    tokenizer: Source
    width: int
    height: int
    steps: int
    cfg_scale: float
    gigabytes: float  # of files
    frames: int = 1
    shift: float | None = None
    boundary: float | None = None

    def model_configs(self, **vram_fields: Any) -> list[ModelConfig]:
        """One config per model, each with the given VRAM fields."""
        return [ModelConfig(**source, **vram_fields) for source in self.parts.values()]

    def tokenizer_config(self) -> ModelConfig:
        return ModelConfig(**self.tokenizer)


def _demo(*parts: str) -> Source:
    return {"path": str(DEMO_WEIGHTS.joinpath(*parts))}


def _hub(model_id: str, pattern: str) -> Source:
    return {"model_id": model_id, "origin_file_pattern": pattern}


# Beginning of model ids → the licence that their authors name on the model's page. Others are not known here.
LICENCES = {"Qwen/Qwen-Image": "Apache-2.0", "Wan-AI/Wan2": "Apache-2.0"}


# ---- Qwen-Image -----------------------------------------------------------------------------------------------------

SHARDS = "diffusion_pytorch_model*.safetensors"
QWEN_IMAGE = "Qwen/Qwen-Image"
LAYERED = "Qwen/Qwen-Image-Layered"
QWEN_TOKENIZER = _hub(QWEN_IMAGE, "tokenizer/")
QWEN_ENCODERS = "DiffSynth-Studio/General-Image-Encoders"
QWEN_I2L = "DiffSynth-Studio/Qwen-Image-i2L"
QWEN_ENCODER = _hub(QWEN_IMAGE, "text_encoder/model*.safetensors")


def _qwen(title: str, model_id: str = QWEN_IMAGE, vae_id: str = QWEN_IMAGE, pattern: str = f"transformer/{SHARDS}",
          side: int = 1328, steps: int = 40, cfg_scale: float = 4.0) -> ModelPreset:
    """A denoiser of the family with the text encoder that all of them share."""
    parts = {"text_encoder": QWEN_ENCODER, "transformer": _hub(model_id, pattern),
             "vae": _hub(vae_id, "vae/diffusion_pytorch_model.safetensors")}
    return ModelPreset(title, "qwen-image", parts, QWEN_TOKENIZER, side, side, steps, cfg_scale, gigabytes=57.7)


def _qwen_i2l(title: str, gigabytes: float, **parts: Source) -> ModelPreset:
    """Nets that turn pictures into a LoRA, and the encoders that they read; there is no denoiser."""
    encoders = {"siglip2_image_encoder": _hub(QWEN_ENCODERS, "SigLIP2-G384/model.safetensors"),
                "dinov3_image_encoder": _hub(QWEN_ENCODERS, "DINOv3-7B/model.safetensors")}
    return ModelPreset(title, "qwen-image", {**encoders, **parts}, QWEN_TOKENIZER, 1024, 1024, 50, 4.0, gigabytes)


# ---- Wan ------------------------------------------------------------------------------------------------------------

# One repository has what many models share, as safetensors.
WAN_SHARED = "DiffSynth-Studio/Wan-Series-Converted-Safetensors"
WAN_TOKENIZER = _hub("Wan-AI/Wan2.1-T2V-1.3B", "google/umt5-xxl/")
WAN_ENCODER = _hub(WAN_SHARED, "models_t5_umt5-xxl-enc-bf16.safetensors")
WAN_CLIP = _hub(WAN_SHARED, "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors")
WAN_EXPERTS = ("high_noise", "low_noise")
# Gigabytes of what comes with each denoiser: text encoder and autoencoder, and the picture half of CLIP.
WAN_SHARED_SIZE, WAN_CLIP_SIZE = 11.9, 4.8


def _wan(title: str, model_id: str, gigabytes: float, clip: bool = False, experts: bool = False,
         pattern: str = SHARDS, vae: str = "Wan2.1_VAE", width: int = 832, height: int = 480, frames: int = 81,
         **settings: Any) -> ModelPreset:
    """One denoiser or two experts, of `gigabytes`, with the encoders and the autoencoder that the family shares."""
    denoisers = {f"transformer_{noise}": _hub(model_id, f"{noise}_model/{pattern}") for noise in WAN_EXPERTS} \
        if experts else {"transformer": _hub(model_id, pattern)}
    parts = {"text_encoder": WAN_ENCODER, **({"image_encoder": WAN_CLIP} if clip else {}), **denoisers,
             "vae": _hub(WAN_SHARED, f"{vae}.safetensors")}
    size = gigabytes + WAN_SHARED_SIZE + (WAN_CLIP_SIZE if clip else 0)
    return ModelPreset(title, "wan", parts, WAN_TOKENIZER, width, height, gigabytes=round(size, 1), frames=frames,
                       **{"steps": 50, "cfg_scale": 5.0, **settings})


def _wan_diffusers(title: str, model_id: str, gigabytes: float, **settings: Any) -> ModelPreset:
    """The layout of diffusers, all from one repository."""
    parts = {"text_encoder": _hub(model_id, "text_encoder/model*.safetensors"),
             "transformer": _hub(model_id, f"transformer/{SHARDS}"),
             "vae": _hub(model_id, "vae/diffusion_pytorch_model.safetensors")}
    return ModelPreset(title, "wan", parts, _hub(model_id, "tokenizer/"), 832, 480, steps=50, cfg_scale=5.0,
                       gigabytes=gigabytes, frames=81, **settings)


HD = {"width": 1280, "height": 720}
PORTRAIT = {"width": 576, "height": 832, "frames": 49}
WAN_PRESETS = {
    "wan2.1-t2v-1.3b": _wan("Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-T2V-1.3B", 5.7),
    "wan2.1-t2v-1.3b-diffusers": _wan_diffusers("Wan2.1-T2V-1.3B (Diffusers)", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 29),
    "wan2.1-t2v-14b": _wan("Wan2.1-T2V-14B", "Wan-AI/Wan2.1-T2V-14B", 57.2),
    "wan2.1-i2v-14b-480p": _wan("Wan2.1-I2V-14B-480P", "Wan-AI/Wan2.1-I2V-14B-480P", 65.6, clip=True),
    "wan2.1-i2v-14b-720p": _wan("Wan2.1-I2V-14B-720P", "Wan-AI/Wan2.1-I2V-14B-720P", 65.6, clip=True, **HD),
    "wan2.1-flf2v-14b-720p": _wan("Wan2.1-FLF2V-14B-720P", "Wan-AI/Wan2.1-FLF2V-14B-720P", 65.6, clip=True, width=960,
                                  height=960, frames=33, shift=16.0),
    "wan2.1-vace-1.3b": _wan("Wan2.1-VACE-1.3B", "Wan-AI/Wan2.1-VACE-1.3B", 7.2),
    "wan2.1-vace-14b": _wan("Wan2.1-VACE-14B", "Wan-AI/Wan2.1-VACE-14B", 69.4),
    "wan2.2-ti2v-5b": _wan("Wan2.2-TI2V-5B", "Wan-AI/Wan2.2-TI2V-5B", 22.4, vae="Wan2.2_VAE", width=1248, height=704,
                           frames=121),
    "wan2.2-t2v-a14b": _wan("Wan2.2-T2V-A14B", "Wan-AI/Wan2.2-T2V-A14B", 114.4, experts=True, boundary=0.875),
    "wan2.2-i2v-a14b": _wan("Wan2.2-I2V-A14B", "Wan-AI/Wan2.2-I2V-A14B", 114.4, experts=True, boundary=0.9),
    "wan2.2-vace-fun-a14b": _wan("Wan2.2-VACE-Fun-A14B", "PAI/Wan2.2-VACE-Fun-A14B", 69.4, experts=True,
                                 boundary=0.875),
    **{f"wan2.1-fun-{name.lower()}": _wan(f"Wan2.1-Fun-{name}", f"PAI/Wan2.1-Fun-{name}", 3.3 if "1.3B" in name else 33,
                                          clip=True, **(PORTRAIT if name.endswith("Control") else {}))
       for name in ("1.3B-InP", "14B-InP", "1.3B-Control", "14B-Control", "V1.1-1.3B-InP", "V1.1-14B-InP",
                    "V1.1-1.3B-Control", "V1.1-14B-Control", "V1.1-1.3B-Control-Camera", "V1.1-14B-Control-Camera")},
    **{f"wan2.2-fun-a14b-{name.lower()}": _wan(f"Wan2.2-Fun-A14B-{name}", f"PAI/Wan2.2-Fun-A14B-{name}", 57.8,
                                               experts=True, boundary=0.875,
                                               **(PORTRAIT if name == "Control" else {}))
       for name in ("InP", "Control", "Control-Camera")},
    "krea-realtime-video": _wan("Krea Realtime Video", "krea/krea-realtime-video", 28.6,
                                pattern="krea-realtime-video-14b.safetensors", steps=6, cfg_scale=1.0, shift=20.0),
}


# ---- all ------------------------------------------------------------------------------------------------------------

MODEL_PRESETS = {
    "demo": ModelPreset(
        "Demo (embedded): coloured shapes, 128×128", "qwen-image",
        {"text_encoder": _demo("text_encoder", "model.safetensors"),
         "transformer": _demo("transformer", "diffusion_pytorch_model.safetensors"),
         "vae": _demo("vae", "diffusion_pytorch_model.safetensors")},
        _demo("tokenizer"), 128, 128, steps=20, cfg_scale=4.0, gigabytes=0.02),
    "qwen-image": _qwen("Qwen-Image"),
    "qwen-image-2512": _qwen("Qwen-Image-2512", "Qwen/Qwen-Image-2512"),
    "qwen-image-edit": _qwen("Qwen-Image-Edit", "Qwen/Qwen-Image-Edit"),
    "qwen-image-edit-2509": _qwen("Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit-2509"),
    "qwen-image-edit-2511": _qwen("Qwen-Image-Edit-2511", "Qwen/Qwen-Image-Edit-2511"),
    "firered-image-edit-1.1": _qwen("FireRed-Image-Edit 1.1", "FireRedTeam/FireRed-Image-Edit-1.1"),
    "qwen-image-layered": _qwen("Qwen-Image-Layered", LAYERED, LAYERED, side=640, steps=50),
    "qwen-image-layered-control": _qwen("Qwen-Image-Layered-Control", "DiffSynth-Studio/Qwen-Image-Layered-Control",
                                        LAYERED, side=1024, steps=30),
    "qwen-image-distill-full": _qwen("Qwen-Image-Distill-Full", "DiffSynth-Studio/Qwen-Image-Distill-Full",
                                     pattern=SHARDS, steps=15, cfg_scale=1.0),
    "qwen-image-i2l-style": _qwen_i2l("Qwen-Image-i2L, style", 20.6, image2lora_style=_hub(
        QWEN_I2L, "Qwen-Image-i2L-Style.safetensors")),
    "qwen-image-i2l": _qwen_i2l("Qwen-Image-i2L, coarse and fine", 63, text_encoder=QWEN_ENCODER,
                                image2lora_coarse=_hub(QWEN_I2L, "Qwen-Image-i2L-Coarse.safetensors"),
                                image2lora_fine=_hub(QWEN_I2L, "Qwen-Image-i2L-Fine.safetensors")),
    **WAN_PRESETS,
    "demo-video": ModelPreset(
        "Demo (embedded): a coloured shape that moves, 64×64", "wan",
        {"text_encoder": _demo("video", "text_encoder", "model.safetensors"),
         "transformer": _demo("video", "transformer", "diffusion_pytorch_model.safetensors"),
         "vae": _demo("video", "vae", "diffusion_pytorch_model.safetensors")},
        _demo("video", "tokenizer"), 64, 64, steps=20, cfg_scale=3.0, gigabytes=0.006, frames=17, shift=3.0),
}

# Models that a pipeline may have besides those of its preset, by the name that people choose.
EXTRA_MODELS: dict[str, Source] = {
    "demo/controlnet": _demo("controlnet", "model.safetensors"),
    **{f"qwen-image/controlnet-{kind.lower()}": _hub(f"DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-{kind}",
                                                     "model.safetensors")
       for kind in ("Canny", "Depth", "Inpaint")},
    "wan2.1-t2v-1.3b/motion_controller": _hub("DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1", "model.safetensors")}


# ---- LoRAs ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class LoraPreset:
    """A published LoRA, with the settings that it was made for where they differ from its model's.

    `template` is one of the scheduler's, `mu` the shift that replaces its own.
    """

    title: str
    family: str
    source: Source
    model: str  # the preset that it is for
    template: str | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    mu: float | None = None


def _qwen_lora(title: str, model_id: str, file: str = "model.safetensors", model: str = "qwen-image",
               **settings: Any) -> LoraPreset:
    return LoraPreset(title, "qwen-image", _hub(model_id, file), model, **settings)


LORA_PRESETS = {
    "qwen-image-edit-2511-lightning": _qwen_lora(
        "Edit-2511 in 4 steps", "lightx2v/Qwen-Image-Edit-2511-Lightning",
        "Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16.safetensors", "qwen-image-edit-2511",
        template="Qwen-Image-Lightning", steps=4, cfg_scale=1.0),
    "qwen-image-distill": _qwen_lora("Qwen-Image in 15 steps", "DiffSynth-Studio/Qwen-Image-Distill-LoRA",
                                     steps=15, cfg_scale=1.0),
    "qwen-image-distill-dmd2": _qwen_lora("Qwen-Image in 3 steps", "MusePublic/Qwen-Image-Distill",
                                          "qwen_image_distill_3step.safetensors", steps=3, cfg_scale=1.0,
                                          mu=math.log(2.5)),
    "qwen-image-eligen": _qwen_lora("Entities", "DiffSynth-Studio/Qwen-Image-EliGen"),
    "qwen-image-eligen-v2": _qwen_lora("Entities, second version", "DiffSynth-Studio/Qwen-Image-EliGen-V2"),
    "qwen-image-eligen-poster": _qwen_lora("Entities, posters", "DiffSynth-Studio/Qwen-Image-EliGen-Poster"),
    "qwen-image-in-context-control": _qwen_lora("In-context control",
                                                "DiffSynth-Studio/Qwen-Image-In-Context-Control-Union"),
    "qwen-image-edit-lowres-fix": _qwen_lora("Edit of small pictures", "DiffSynth-Studio/Qwen-Image-Edit-Lowres-Fix",
                                             model="qwen-image-edit"),
    "qwen-image-edit-2511-icedit": _qwen_lora("Edit as in an example",
                                              "DiffSynth-Studio/Qwen-Image-Edit-2511-ICEdit-LoRA",
                                              model="qwen-image-edit-2511"),
    "qwen-image-layered-control-v2": _qwen_lora("Layered-Control, second version",
                                                "DiffSynth-Studio/Qwen-Image-Layered-Control-V2",
                                                model="qwen-image-layered-control"),
}
