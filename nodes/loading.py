"""What the Model Loader and VRAM Config do behind their inputs: words on widgets → values of the backend."""
from __future__ import annotations

from collections.abc import Mapping

import torch

from ..diffsynth_backend.pipelines.handle import ModelSource, PipelineHandle, VramChoice
from ..diffsynth_backend.pipelines.locate import find_tokenizer
from ..diffsynth_backend.pipelines.owner import owner
from ..diffsynth_backend.pipelines.report import describe
from . import host

AUTOMATIC_DTYPE = "automatic"
COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPES = [AUTOMATIC_DTYPE, *COMPUTE_DTYPES]

FROM_PRESET = "from preset"
STORAGE_DTYPES = {**COMPUTE_DTYPES, "float8_e4m3fn": torch.float8_e4m3fn, "disk": "disk"}
DEVICES = {"compute device": "compute", "cpu": "cpu", "disk": "disk"}


def field_choices(name: str) -> list[str]:
    """What the widget of one of the eight VRAM fields offers."""
    computes = name.startswith("computation_")
    if name.endswith("_dtype"):
        return [FROM_PRESET, *(COMPUTE_DTYPES if computes else STORAGE_DTYPES)]
    return [FROM_PRESET, *(place for place in DEVICES if not (computes and place == "disk"))]


def overrides(fields: Mapping[str, str]) -> tuple[tuple[str, torch.dtype | str], ...]:
    """The fields whose widget is not left to the preset, as values."""
    return tuple((name, (STORAGE_DTYPES if name.endswith("_dtype") else DEVICES)[word])
                 for name, word in fields.items() if word != FROM_PRESET)


def load(family: str, sources: tuple[ModelSource, ...], dtype: str, vram: VramChoice | None,
         slot: str) -> tuple[PipelineHandle, str]:
    """Load a pipeline into a slot; returns its handle and what it is in words."""
    device = host.compute_device()
    automatic = torch.bfloat16 if host.prefers_bfloat16(device) else torch.float32
    torch_dtype = COMPUTE_DTYPES.get(dtype, automatic)
    choice = vram or VramChoice("full" if device == "cpu" else "low")
    handle = PipelineHandle(
        family, sources, find_tokenizer(family, sources, host.model_bases(), host.native_tokenizers(family)),
        torch_dtype, device, choice.settings(torch_dtype, device, host.device_gib(device)), slot)
    with owner.use(handle) as pipe:
        return handle, describe(handle, pipe)
