"""A folder of models as ComfyUI's users have it, made of the tiny files."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffsynth_backend.configs.demo_model import CONTROLNET as CONTROLNET_SIZES
from diffsynth_backend.core import hash_model_file
from diffsynth_backend.models.qwen_image_controlnet import QwenImageBlockWiseControlNet
from diffsynth_backend.pipelines.presets import DEMO_WEIGHTS

from .tiny import TinyFiles

TEXT_ENCODER = "text_encoders/tiny_text_encoder.safetensors"
DIT = "diffusion_models/tiny_dit.safetensors"
VAE = "vae/tiny_vae.safetensors"
FILES = (TEXT_ENCODER, DIT, VAE)
OTHER_DIT = "diffusion_models/other_dit.safetensors"
CONTROLNET = "diffusion_models/tiny_controlnet.safetensors"
WAN_FILES = ("text_encoders/wan/tiny_text_encoder.safetensors", "diffusion_models/wan/tiny_dit.safetensors",
             "vae/wan/tiny_vae.safetensors")
# Wan's relatives, by the names that `wan_tiny` has for them.
WAN_RELATIVES = {
    "image_encoder": "text_encoders/wan/tiny_clip.safetensors", "vae_2.2": "vae/wan/tiny_vae_2.2.safetensors",
    "experts/high_noise_model/dit": "diffusion_models/wan/high_noise_model/tiny.safetensors",
    "experts/low_noise_model/dit": "diffusion_models/wan/low_noise_model/tiny.safetensors",
    **{name: f"diffusion_models/wan/tiny_{name}.safetensors" for name in ("i2v", "ti2v", "vace", "control", "camera")}}
LORA, LIGHTNING_LORA = "loras/tiny.safetensors", "loras/Tiny-Lightning-4steps.safetensors"


def fill_models_folder(folder: Path, tiny: TinyFiles) -> Path:
    """Three files in ComfyUI's folders, the tokenizer beside the text encoder, and what else there may be: a second
    denoiser, a ControlNet, LoRAs.

    The autoencoder is the demo's, which is trained, so that pictures can be compared with a native node's.
    """
    sources = (tiny.file("text_encoder"), tiny.file("transformer"),
               DEMO_WEIGHTS / "vae/diffusion_pytorch_model.safetensors")
    for source, name in zip(sources, FILES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
    shutil.copytree(tiny.tokenizer, (folder / TEXT_ENCODER).parent / "tokenizer")
    save_file({key: value * 0.9 for key, value in load_file(folder / DIT).items()}, folder / OTHER_DIT)
    _save_controlnet(folder / CONTROLNET)
    for seed, name in enumerate((LORA, LIGHTNING_LORA)):
        save_lora(folder / name, seed)
    return folder


def _save_controlnet(path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = QwenImageBlockWiseControlNet(**CONTROLNET_SIZES)
    save_file(net.state_dict(), path)


def save_lora(path: Path, seed: int = 0, scale: float = 0.3) -> None:
    """A LoRA for two layers of the denoiser, with a key besides that fits no layer."""
    generator, width = torch.Generator().manual_seed(seed), 128
    tensors = {f"transformer_blocks.{block}.attn.to_q.lora_{matrix}.default.weight":
               scale * torch.randn(shape, generator=generator)
               for block in (0, 1) for matrix, shape in (("A", (2, width)), ("B", (width, 2)))}
    tensors |= {name.replace("blocks.0", "blocks.99"): tensor.clone() for name, tensor in tensors.items()
                if "blocks.0" in name}
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)


def fill_wan_folder(folder: Path, work: Path) -> Path:
    """Wan's files and its relatives' in ComfyUI's folders, with the tokenizer; gives a registry that knows them."""
    from .wan_tiny import write_wan_files  # needs diffusers, as the tests that ask for it

    written = write_wan_files(work)
    names = {**dict(zip(("text_encoder", "t2v", "vae"), WAN_FILES)), **WAN_RELATIVES}
    for source, name in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(written.files[source], folder / name)
    shutil.copy(Path(written.tokenizer) / "tokenizer.json", (folder / WAN_FILES[0]).parent)
    hashes = {hash_model_file(str(folder / name)) for name in names.values()}
    registry = work / "registry.json"
    registry.write_text(json.dumps({"models": [row for row in written.named_rows() if row["model_hash"] in hashes]}),
                        encoding="utf-8")
    return registry
