"""The published checkpoints in full size as sparse safetensors: the true header, and a hole where the data would be.

Notable: 60 GB of layouts take a few hundred KB on disk and a second to write. Keys and shapes come from our classes on
"meta", whose hashes are compared with the registered ones elsewhere; holes read as zeros.
"""
from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffsynth_backend.configs.model_configs import resolve
from diffsynth_backend.core.loader.model import build_on_meta
from diffsynth_backend.utils.state_dict_converters.qwen_image_text_encoder import published_text_encoder_keys

BF16_BYTES = 2


@dataclass(frozen=True)
class Checkpoint:
    """One model as its authors publish it: `stem` below `models/`, in `shards` files of bf16 tensors."""

    stem: str
    model_class: str
    model_hash: str
    shards: int = 1
    extra_kwargs: Mapping[str, Any] = field(default_factory=dict)
    published_keys: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict

    def layout(self) -> dict[str, Tensor]:
        """Published name → meta tensor."""
        return self.published_keys(build_on_meta(resolve(self.model_class), self.extra_kwargs).state_dict())

    @property
    def files(self) -> list[str]:
        """The files' paths, as a program writes them that runs in the folder above `models/`."""
        if self.shards == 1:
            return [f"models/{self.stem}.safetensors"]
        return [f"models/{self.stem}-{i:05d}-of-{self.shards:05d}.safetensors" for i in range(1, self.shards + 1)]

    def write(self, folder: Path, layout: Mapping[str, Tensor] | None = None,
              values: Mapping[str, Tensor] | None = None) -> list[str]:
        """Write the files below `folder`, of this layout or another one; `values` (bf16) fill some of the holes."""
        paths = [folder / file for file in self.files]
        for path, part in zip(paths, split(self.layout() if layout is None else layout, self.shards)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_sparse(path, part, values or {})
        return [str(path) for path in paths]


DIT = Checkpoint("Qwen/Qwen-Image/transformer/diffusion_pytorch_model", "models.qwen_image_dit.QwenImageDiT",
                 "0319a1cb19835fb510907dd3367c95ff", shards=9)
TEXT_ENCODER = Checkpoint("Qwen/Qwen-Image/text_encoder/model", "models.qwen_image_text_encoder.QwenImageTextEncoder",
                          "8004730443f55db63092006dd9f7110e", shards=4, published_keys=published_text_encoder_keys)
VAE = Checkpoint("Qwen/Qwen-Image/vae/diffusion_pytorch_model", "models.qwen_image_vae.QwenImageVAE",
                 "ed4ea5824d55ec3107b09815e318123a")
_CONTROLNET = "models.qwen_image_controlnet.QwenImageBlockWiseControlNet"
CANNY = Checkpoint("DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny/model", _CONTROLNET,
                   "073bce9cf969e317e5662cd570c3e79c")
DEPTH = Checkpoint("DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Depth/model", _CONTROLNET,
                   "073bce9cf969e317e5662cd570c3e79c")
INPAINT = Checkpoint("DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Inpaint/model", _CONTROLNET,
                     "a9e54e480a628f0b956a688a81c33bab", extra_kwargs={"additional_in_dim": 4})
LAYERED_DIT = Checkpoint("Qwen/Qwen-Image-Layered/transformer/diffusion_pytorch_model",
                         "models.qwen_image_dit.QwenImageDiT", "8dc8cda05de16c73afa755e2c1ce2839", shards=9,
                         extra_kwargs={"use_layer3d_rope": True, "use_additional_t_cond": True})
LAYERED_VAE = Checkpoint("Qwen/Qwen-Image-Layered/vae/diffusion_pytorch_model", "models.qwen_image_vae.QwenImageVAE",
                         "44b39ddc499e027cfb24f7878d7416b9", extra_kwargs={"image_channels": 4})
SIGLIP2 = Checkpoint("DiffSynth-Studio/General-Image-Encoders/SigLIP2-G384/model",
                     "models.siglip2_image_encoder.Siglip2ImageEncoder", "469c78b61e3e31bc9eec0d0af3d3f2f8")
DINOV3 = Checkpoint("DiffSynth-Studio/General-Image-Encoders/DINOv3-7B/model",
                    "models.dinov3_image_encoder.DINOv3ImageEncoder", "5722b5c873720009de96422993b15682")
_IMAGE_TO_LORA = "models.qwen_image_image2lora.QwenImageImage2LoRAModel"
STYLE = Checkpoint("DiffSynth-Studio/Qwen-Image-i2L/Qwen-Image-i2L-Style", _IMAGE_TO_LORA,
                   "0aad514690602ecaff932c701cb4b0bb", extra_kwargs={"compress_dim": 64, "use_residual": False})
COARSE = Checkpoint("DiffSynth-Studio/Qwen-Image-i2L/Qwen-Image-i2L-Coarse", _IMAGE_TO_LORA,
                    "a166c33455cdbd89c0888a3645ca5c0f")
FINE = Checkpoint("DiffSynth-Studio/Qwen-Image-i2L/Qwen-Image-i2L-Fine", _IMAGE_TO_LORA,
                  "a5476e691767a4da6d3a6634a10f7408",
                  extra_kwargs={"residual_length": 1376, "residual_mid_dim": 64})
CHECKPOINTS = (DIT, TEXT_ENCODER, VAE, CANNY, DEPTH, INPAINT, LAYERED_DIT, LAYERED_VAE, SIGLIP2, DINOV3, STYLE, COARSE,
               FINE)


def split(layout: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """The tensors in `count` parts of about equal size, none empty, in their order."""
    total = sum(tensor.numel() for tensor in layout.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    begin = 0
    for name, tensor in layout.items():
        parts[begin * count // total][name] = tensor
        begin += tensor.numel()
    return parts


def write_sparse(path: Path, layout: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """A safetensors file of bf16 tensors in which only the header and `values` take space. As the library writes it:
    sorted by name, without blanks."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(layout.items()):
        begin, end = end, end + tensor.numel() * BF16_BYTES
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in values.keys() & layout.keys():
            file.seek(8 + len(raw) + header[name]["data_offsets"][0])
            file.write(values[name].bfloat16().view(torch.uint8).numpy().tobytes())
        file.truncate(8 + len(raw) + end)


def makes_holes(folder: Path) -> bool:
    """Whether files there take no more space than what was written into them."""
    probe = folder / "probe"
    with open(probe, "wb") as file:
        file.truncate(1 << 24)
    allocated = getattr(probe.stat(), "st_blocks", None)  # unknown on Windows
    probe.unlink()
    return allocated is not None and allocated * 512 < 1 << 20


# ---- memory ---------------------------------------------------------------------------------------------------------

@dataclass
class Growth:
    """Bytes by which memory grew; None where the system does not say."""

    anonymous: int | None = None  # at the end of the block
    peak: int | None = None  # resident, mapped files included, at its highest within the block


@contextmanager
def memory_growth() -> Iterator[Growth]:
    """Measures this process over the block (Linux: /proc/self)."""
    growth = Growth()
    _reset_peak()
    before = _status()
    yield growth
    after = _status()
    if "RssAnon" in before:
        growth.anonymous = after["RssAnon"] - before["RssAnon"]
        growth.peak = after["VmHWM"] - before["VmRSS"]


def _status() -> dict[str, int]:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields}


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return
