"""A folder of models as ComfyUI's users have it, made of the tiny files."""
from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from diffsynth_backend.pipelines.presets import DEMO_WEIGHTS

from .tiny import TinyFiles

TEXT_ENCODER = "text_encoders/tiny_text_encoder.safetensors"
DIT = "diffusion_models/tiny_dit.safetensors"
VAE = "vae/tiny_vae.safetensors"
FILES = (TEXT_ENCODER, DIT, VAE)
OTHER_DIT = "diffusion_models/other_dit.safetensors"


def fill_models_folder(folder: Path, tiny: TinyFiles) -> Path:
    """Three files in ComfyUI's folders, the tokenizer beside the text encoder, and a second denoiser.

    The autoencoder is the demo's, which is trained, so that pictures can be compared with a native node's.
    """
    sources = (tiny.file("text_encoder"), tiny.file("transformer"),
               DEMO_WEIGHTS / "vae/diffusion_pytorch_model.safetensors")
    for source, name in zip(sources, FILES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
    shutil.copytree(tiny.tokenizer, (folder / TEXT_ENCODER).parent / "tokenizer")
    save_file({key: value * 0.9 for key, value in load_file(folder / DIT).items()}, folder / OTHER_DIT)
    return folder
