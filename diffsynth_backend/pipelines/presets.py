"""Known sets of files that make a pipeline: the demo model and published ones, with their authors' settings."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import ModelConfig

DEMO_WEIGHTS = Path(__file__).parent.parent / "demo" / "weights"


@dataclass(frozen=True)
class ModelPreset:
    """Sources are arguments of `ModelConfig`; sizes in pixels."""

    title: str
    family: str
    sources: tuple[dict[str, str], ...]
    tokenizer: dict[str, str]
    width: int
    height: int
    steps: int
    cfg_scale: float
    gigabytes: float  # of files

    def model_configs(self, **vram_fields: Any) -> list[ModelConfig]:
        """One config per model, each with the given VRAM fields."""
        return [ModelConfig(**source, **vram_fields) for source in self.sources]

    def tokenizer_config(self) -> ModelConfig:
        return ModelConfig(**self.tokenizer)


def _demo(*parts: str) -> dict[str, str]:
    return {"path": str(DEMO_WEIGHTS.joinpath(*parts))}


def _hub(model_id: str, pattern: str) -> dict[str, str]:
    return {"model_id": model_id, "origin_file_pattern": pattern}


MODEL_PRESETS = {
    "demo": ModelPreset(
        "Demo (embedded): coloured shapes, 128×128", "qwen-image",
        (_demo("text_encoder", "model.safetensors"), _demo("transformer", "diffusion_pytorch_model.safetensors"),
         _demo("vae", "diffusion_pytorch_model.safetensors")),
        _demo("tokenizer"), 128, 128, steps=20, cfg_scale=4.0, gigabytes=0.02),
    "qwen-image": ModelPreset(
        "Qwen-Image", "qwen-image",
        (_hub("Qwen/Qwen-Image", "text_encoder/model*.safetensors"),
         _hub("Qwen/Qwen-Image", "transformer/diffusion_pytorch_model*.safetensors"),
         _hub("Qwen/Qwen-Image", "vae/diffusion_pytorch_model.safetensors")),
        _hub("Qwen/Qwen-Image", "tokenizer/"), 1328, 1328, steps=40, cfg_scale=4.0, gigabytes=57.7),
}
