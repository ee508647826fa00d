"""What a loaded pipeline is, in words: which models were recognised, in which dtype, how large, and where they live."""
from __future__ import annotations

import os

import torch
from torch import nn

from ..core.device import GIB
from ..core.vram.placement import DISK
from ..diffusion import BasePipeline
from .families import family
from .handle import PipelineHandle, VramSettings

MIB = 1024**2


def describe(handle: PipelineHandle, pipe: BasePipeline) -> str:
    """A few lines of text for people."""
    kind = family(handle.family)
    lines = [f"{kind.title} · computes in {dtype_name(handle.torch_dtype)} on {handle.device}"]
    for model_name, attribute in kind.models.items():
        model = getattr(pipe, attribute)
        lines.append(f"{attribute}: not loaded" if model is None
                     else f"{attribute}: {_describe_model(model, handle, handle.files_of(model_name))}")
    if handle.tokenizer is not None:
        lines.append(f"tokenizer: {os.path.join(*handle.tokenizer.replace(os.sep, '/').split('/')[-2:])}")
    if handle.vram.vram_limit is not None:
        lines.append(f"limit: {handle.vram.vram_limit:g} GiB of weights stay on {handle.device}")
    return "\n".join(lines)


def _describe_model(model: nn.Module, handle: PipelineHandle, files: tuple[str, ...]) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    stored = handle.vram.offload_dtype if handle.vram.managed else handle.torch_dtype
    dtype = handle.torch_dtype if stored == DISK else stored
    size = _size(count * dtype.itemsize)
    names = os.path.basename(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    return f"{type(model).__name__}, {_count(count)} parameters, {size} {dtype_name(dtype)}, " \
           f"{placement_words(handle.vram, handle.device)} ({names})"


def placement_words(vram: VramSettings, device: str) -> str:
    """Where weights rest, and where they are while their model works."""
    if not vram.managed:
        return f"on {device}"
    rest = "on disk" if vram.offload_device == DISK else f"rests on {vram.offload_device}"
    work = vram.onload_device or device
    return rest if work == vram.offload_device else f"{rest}, works from {work}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(number: int) -> str:
    return f"{number / 10**9:.1f} billion" if number >= 10**9 else f"{number / 10**6:.1f} million"


def _size(number: int) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / MIB:.1f} MiB"
