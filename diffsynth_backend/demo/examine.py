"""How good the demo model is: `python -m diffsynth_backend.demo.examine` prints what its acceptance is measured by.

Notable: scenes come from the held-out set, so the model has seen none of them in any wording.
"""
from __future__ import annotations

import random
import sys

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.vram.presets import vram_preset
from ..pipelines.presets import MODEL_PRESETS
from ..pipelines.qwen_image import QwenImagePipeline
from .judge import is_right
from .scenes import SIZE, Scene, draw, plain_prompt, sample_scene

DEMO = MODEL_PRESETS["demo"]
PICTURE = {"height": SIZE, "width": SIZE, "num_inference_steps": DEMO.steps, "progress_bar_cmd": list}


def load_demo(vram: str = "full", vram_limit: float | None = None) -> QwenImagePipeline:
    """The embedded model on the CPU in bf16, under a VRAM preset."""
    fields = vram_preset(vram, torch.bfloat16, "cpu")
    return QwenImagePipeline.from_pretrained(device="cpu", model_configs=DEMO.model_configs(**fields),
                                             tokenizer_config=DEMO.tokenizer_config(), vram_limit=vram_limit)


def pixels_of(image: Image.Image) -> Tensor:
    """(H, W, 3), 0…255, float32."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32).copy())


def held_out_prompts(count: int) -> list[tuple[Scene, str]]:
    """Scenes that training never saw, and the plain way of asking for them."""
    rng = random.Random(2026)
    scenes = [sample_scene(rng, held_out=True) for _ in range(count)]
    return [(scene, plain_prompt(scene)) for scene in scenes]


def wrong_pictures(pipe: QwenImagePipeline, count: int = 24, seeds: tuple[int, ...] = (0, 1)) -> list[tuple[str, int]]:
    """Prompt and seed of each picture that does not show what was asked for, of `count` prompts."""
    return [(prompt, seed) for scene, prompt in held_out_prompts(count) for seed in seeds
            if not is_right(pixels_of(pipe(prompt, seed=seed, cfg_scale=DEMO.cfg_scale, **PICTURE)), scene)]


@torch.no_grad()
def reconstruction_db(pipe: QwenImagePipeline, count: int = 16) -> Tensor:
    """Peak signal-to-noise ratio (dB) of each of `count` held-out pictures through encoder and decoder."""
    rng = random.Random(8)
    pictures = draw([sample_scene(rng, held_out=True) for _ in range(count)], torch.Generator().manual_seed(8))
    decoded = pipe.decode_latents(pipe.encode_image(pictures.to(pipe.torch_dtype))).float().clamp(-1, 1)
    return -10 * ((decoded - pictures) / 2).square().mean(dim=(1, 2, 3)).log10()


def main() -> None:
    pipe = load_demo()
    sys.stdout.write(f"autoencoder: {float(reconstruction_db(pipe).mean()):.1f} dB\n")
    sys.stdout.write(f"right pictures: {48 - len(wrong_pictures(pipe))} of 48\n")


if __name__ == "__main__":
    main()
