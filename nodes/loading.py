"""What the Model Loader and VRAM Config do behind their inputs: words on widgets → values of the backend."""
from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch

from ..diffsynth_backend.core.device import GIB
from ..diffsynth_backend.core.vram.presets import AUTO
from ..diffsynth_backend.pipelines.handle import Decision, ModelSource, PipelineHandle, VramChoice, decide
from ..diffsynth_backend.pipelines.locate import find_tokenizer, locate_preset, locate_source, preset_parts
from ..diffsynth_backend.pipelines.owner import owner
from ..diffsynth_backend.pipelines.report import describe
from . import host
from .pickles import admitted

logger = logging.getLogger(__name__)

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


def source_of(entry: str) -> ModelSource:
    """The files of what a Model Config offers: a part of a known model, or "folder/name" in ComfyUI's folders.

    Raises MissingFile for what is not there, PathRefused for what leads elsewhere, PickleRefused.
    """
    parts = preset_parts()
    return admitted(locate_source(entry, parts[entry], host.model_bases()) if entry in parts else
                    ModelSource(entry, host.model_path(entry)))


def sources_of(preset: str) -> tuple[ModelSource, ...]:
    """The files of a known model's parts. Raises MissingFile that lists everything that is missing, PickleRefused."""
    return tuple(map(admitted, locate_preset(preset, host.model_bases())))


def load(family: str, sources: tuple[ModelSource, ...], dtype: str, vram: VramChoice | None,
         slot: str, size: tuple[int, int] | None = None) -> tuple[PipelineHandle, str]:
    """Load a pipeline into a slot; returns its handle and what it is in words.

    Without `vram`, where weights are kept is decided here. `size`: width and height (pixels) that the words plan for.
    """
    tokenizer = find_tokenizer(family, sources, host.model_bases(), host.native_tokenizers(family))
    handle, decision = settle(family, sources, tokenizer, dtype, vram, slot)
    if decision is not None:
        logger.info("%s: %s", handle.titles(), decision.describe())
    with owner.use(handle) as pipe:
        owner.tie(handle)
        return handle, describe(handle, pipe, size, decision)


def settle(family: str, sources: tuple[ModelSource, ...], tokenizer: str | None, dtype: str, vram: VramChoice | None,
           slot: str = "") -> tuple[PipelineHandle, Decision | None]:
    """The handle that words on widgets stand for on this machine, and what `auto` came to if it was to decide.

    Raises ValueError for settings that contradict each other, ModelFileError for files that cannot be used.
    """
    device = host.compute_device()
    automatic = torch.bfloat16 if host.prefers_bfloat16(device) else torch.float32
    torch_dtype = COMPUTE_DTYPES.get(dtype, automatic)
    models = PipelineHandle(family, sources, tokenizer, torch_dtype, device, slot=slot)
    choice, decision = vram or VramChoice(AUTO), None
    if choice.preset == AUTO:
        decision = _decide(models, choice)
        choice = choice.decided(decision)
    return replace(models, vram=choice.settings(torch_dtype, device, host.device_gib(device))), decision


def _decide(models: PipelineHandle, choice: VramChoice) -> Decision:
    """What `auto` comes to for these models on this machine."""
    computes_on_cpu = torch.device(models.device).type == "cpu"
    device_bytes = None if computes_on_cpu else int(host.device_gib(models.device) * GIB)
    return decide(models.weight_bytes(), device_bytes, owner.ram_for(models), choice.given_limit,
                  choice.ram_limit)
