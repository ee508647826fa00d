"""A Qwen-Image that draws noise in a moment: random weights in the demo model's sizes, and a small tokenizer."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffsynth_backend.configs import demo_model as sizes
from diffsynth_backend.core import ModelConfig
from diffsynth_backend.demo.train import train_tokenizer
from diffsynth_backend.models.qwen_image_dit import QwenImageDiT
from diffsynth_backend.models.qwen_image_text_encoder import QwenImageTextEncoder
from diffsynth_backend.models.qwen_image_vae import QwenImageVAE
from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline
from diffsynth_backend.utils.state_dict_converters.qwen_image_text_encoder import published_text_encoder_keys
from diffsynth_backend.utils.state_dict_converters.qwen_image_vae import repackaged_vae_keys

MODELS = ("text_encoder", "transformer", "vae")


@dataclass(frozen=True)
class TinyFiles:
    """The folder with the files, which the registry takes for the demo model's."""

    folder: Path

    @property
    def tokenizer(self) -> str:
        return str(self.folder / "tokenizer")

    def file(self, model: str) -> str:
        """The file of one of MODELS."""
        return str(self.folder / model / "model.safetensors")

    def load(self, models: tuple[str, ...] = MODELS, tokenizer: str | None = None, vram_limit: float | None = None,
             ram_limit: float | None = None, **fields: Any) -> QwenImagePipeline:
        """A pipeline on the CPU in float32, of these models; `fields` are those of each ModelConfig."""
        return QwenImagePipeline.from_pretrained(
            torch_dtype=torch.float32, device="cpu", vram_limit=vram_limit, ram_limit=ram_limit,
            model_configs=[ModelConfig(path=self.file(model), **fields) for model in models],
            tokenizer_config=ModelConfig(path=tokenizer or self.tokenizer))


def write_tiny_files(folder: Path) -> TinyFiles:
    """Random weights, the same each time, and a tokenizer trained on the demo's prompts."""
    train_tokenizer(folder)
    files = TinyFiles(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder, dit = QwenImageTextEncoder(**sizes.TEXT_ENCODER), QwenImageDiT(**sizes.DIT)
        vae = QwenImageVAE(**sizes.VAE)
    _save(published_text_encoder_keys(text_encoder.state_dict()), files.file("text_encoder"))
    _save(dit.state_dict(), files.file("transformer"))
    _save(repackaged_vae_keys(vae.state_dict()), files.file("vae"))
    return files


def _save(state_dict: dict[str, Tensor], path: str) -> None:
    Path(path).parent.mkdir(parents=True)
    save_file({name: tensor.detach().bfloat16().contiguous() for name, tensor in state_dict.items()}, path)
