"""The embedded demo model, loaded once for all tests of this folder."""
from __future__ import annotations

import pytest
import torch

from diffsynth_backend.core.vram.presets import vram_preset
from diffsynth_backend.pipelines.presets import MODEL_PRESETS
from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline

DEMO = MODEL_PRESETS["demo"]


def load_demo(vram: str = "full", vram_limit: float | None = None) -> QwenImagePipeline:
    fields = vram_preset(vram, torch.bfloat16, "cpu")
    return QwenImagePipeline.from_pretrained(device="cpu", model_configs=DEMO.model_configs(**fields),
                                             tokenizer_config=DEMO.tokenizer_config(), vram_limit=vram_limit)


@pytest.fixture(scope="session")
def demo() -> QwenImagePipeline:
    return load_demo()
