"""Files of tiny Wan models with random weights, in the authors' layouts and in diffusers', and rows of a registry."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth_backend.core import ModelConfig, hash_model_file
from diffsynth_backend.models.qwen_image_vae import QwenImageVAE
from diffsynth_backend.models.wan_video_dit import VaceWanModel, WanModel
from diffsynth_backend.models.wan_video_image_encoder import WanImageEncoder
from diffsynth_backend.models.wan_video_motion_controller import WanMotionControllerModel
from diffsynth_backend.models.wan_video_text_encoder import WanTextEncoder
from diffsynth_backend.models.wan_video_vae import WanVideoVAE, WanVideoVAE38
from diffsynth_backend.pipelines.wan_video import WanVideoPipeline
from diffsynth_backend.utils.state_dict_converters.wan_video_dit import diffusers_keys
from diffsynth_backend.utils.state_dict_converters.wan_video_text_encoder import diffusers_text_encoder_keys
from diffsynth_backend.utils.state_dict_converters.wan_video_vae import diffusers_vae_keys, published_vae_keys
from tests.helpers.wan_denoiser import IMAGE, SIZES, TI2V, VACE_SIZES
from tests.helpers.wan_pipeline import IMAGE_ENCODER, TEXT_ENCODER, VAE, VAE_38, write_tokenizer

CONVERTERS = "utils.state_dict_converters.wan_video_"
MOTION = {"freq_dim": 16, "dim": SIZES["dim"]}
CONTROL = {**SIZES, "in_dim": 48, "has_image_input": True, "has_ref_conv": True}
CAMERA = {**SIZES, "in_dim": 32, "has_image_input": True, "add_control_adapter": True}
TI2V_SIZES = {**SIZES, **TI2V, "fuse_vae_embedding_in_latents": True}
FOUR_BLOCKS = {**SIZES, "num_layers": 4}

Row = dict[str, Any]
Keys = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass
class WanFiles:
    """By the name of each: its file. `rows` make the registry know them all."""

    folder: Path
    tokenizer: str = ""
    files: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def load(self, *names: str, vram_limit: float | None = None, experts: tuple[str, ...] | None = None,
             **fields: Any) -> WanVideoPipeline:
        """A pipeline on the CPU in float32, of these models; `fields` are those of each ModelConfig."""
        return WanVideoPipeline.from_pretrained(
            torch_dtype=torch.float32, device="cpu", vram_limit=vram_limit, experts=experts,
            model_configs=[ModelConfig(path=self.files[name], **fields) for name in names],
            tokenizer_config=ModelConfig(path=self.tokenizer))

    def named_rows(self) -> list[Row]:
        """The rows with classes by their paths below the package, for a copy of it under another name, or for a file.
        """
        return [{**row, "model_class": f"{row['model_class'].__module__.partition('.')[2]}."
                                       f"{row['model_class'].__name__}"} for row in self.rows]

    def save(self, name: str, state_dict: Mapping[str, Tensor], *rows: Row) -> None:
        path = self.folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.detach().bfloat16().contiguous() for key, tensor in state_dict.items()}, path)
        self.files[name] = str(path)
        model_hash = hash_model_file(str(path))
        if not any(row["model_hash"] == model_hash for row in self.rows):
            self.rows += [{"model_hash": model_hash, **row} for row in rows]


def row(name: str, model_class: type[nn.Module], sizes: Row, converter: str | None = None) -> Row:
    found = {"model_name": name, "model_class": model_class, "extra_kwargs": sizes}
    return found if converter is None else {**found, "state_dict_converter": CONVERTERS + converter}


def write_wan_files(folder: Path) -> WanFiles:
    """Random weights, the same each time, and a tokenizer."""
    files = WanFiles(folder, str(write_tokenizer(folder / "tokenizer")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _text_encoder(files, _random(WanTextEncoder(**TEXT_ENCODER)))
        _autoencoders(files)
        for name, sizes in {"t2v": SIZES, "i2v": {**SIZES, **IMAGE}, "ti2v": TI2V_SIZES, "control": CONTROL,
                            "camera": CAMERA, "experts/high_noise_model/dit": SIZES,
                            "experts/low_noise_model/dit": SIZES, "unnamed": SIZES}.items():
            weights = _random(WanModel(**sizes))
            files.save(name, weights, row("wan_video_dit", WanModel, sizes))
            if name == "t2v":
                files.save("t2v_diffusers", diffusers_keys(weights),
                           row("wan_video_dit", WanModel, sizes, "dit.WanVideoDiTFromDiffusers"))
        _vace(files)
        files.save("image_encoder", _random(WanImageEncoder(**IMAGE_ENCODER)),
                   row("wan_video_image_encoder", WanImageEncoder, IMAGE_ENCODER))
        files.save("motion_controller", _random(WanMotionControllerModel(**MOTION)),
                   row("wan_video_motion_controller", WanMotionControllerModel, MOTION))
    return files


def _random(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor * 0.5 + 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}


def _text_encoder(files: WanFiles, weights: dict[str, Tensor]) -> None:
    name = "wan_video_text_encoder"
    files.save("text_encoder", weights, row(name, WanTextEncoder, TEXT_ENCODER))
    files.save("text_encoder_diffusers", diffusers_text_encoder_keys(weights),
               row(name, WanTextEncoder, TEXT_ENCODER, "text_encoder.WanTextEncoderFromDiffusers"))


def _autoencoders(files: WanFiles) -> None:
    weights = _random(WanVideoVAE(**VAE))
    files.save("vae", published_vae_keys(weights),
               row("wan_video_vae", WanVideoVAE, VAE, "vae.WanVideoVAEStateDictConverter"))
    # The same layout is Qwen-Image's.
    files.save("vae_diffusers", diffusers_vae_keys(weights), row("qwen_image_vae", QwenImageVAE, VAE),
               row("wan_video_vae", WanVideoVAE, VAE, "vae.WanVideoVAEFromDiffusers"))
    files.save("vae_2.2", published_vae_keys(_random(WanVideoVAE38(**VAE_38))),
               row("wan_video_vae", WanVideoVAE38, VAE_38, "vae.WanVideoVAEStateDictConverter"))


def _vace(files: WanFiles) -> None:
    """Denoiser and VACE in one file."""
    weights = {**_random(WanModel(**FOUR_BLOCKS)), **_random(VaceWanModel(**VACE_SIZES))}
    files.save("vace", weights,
               row("wan_video_dit", WanModel, FOUR_BLOCKS, "dit.WanVideoDiTStateDictConverter"),
               row("wan_video_vace", VaceWanModel, VACE_SIZES, "dit.VaceWanModelDictConverter"))
    files.save("vace_diffusers", diffusers_keys(weights),
               row("wan_video_dit", WanModel, FOUR_BLOCKS, "dit.WanVideoVaceDiTFromDiffusers"),
               row("wan_video_vace", VaceWanModel, VACE_SIZES, "dit.VaceWanModelFromDiffusers"))
