"""A pipeline as a value: which files, in which dtype, where, under which VRAM settings. No weights.

Notable: handles are frozen, hashable and picklable, so a graph may keep, compare and pass them on for ever. What they
stand for is loaded, kept and freed by `owner`. A changed setting is a new handle (`dataclasses.replace`).
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..configs.model_configs import find_configs
from ..core.loader.config import VRAM_FIELDS
from ..core.loader.file import hash_model_file
from ..core.vram.presets import VRAM_PRESETS, vram_preset
from .families import family

AUTOMATIC = "automatic"


@dataclass(frozen=True)
class ModelSource:
    """The files (absolute paths) of one model, or of several that share them; `title` is what people chose."""

    title: str
    files: tuple[str, ...]

    def model_names(self) -> tuple[str, ...]:
        """The registry's names of the models in the files, read from their headers; none if the layout is unknown.

        Raises ModelFileError for files that are missing, incomplete or no model files.
        """
        return tuple(row["model_name"] for row in find_configs(hash_model_file(self.files)))


@dataclass(frozen=True)
class VramSettings:
    """The eight fields of `ModelConfig` and the limit (GiB) that all models share; None means unset, no limit."""

    offload_dtype: torch.dtype | str | None = None
    offload_device: str | None = None
    onload_dtype: torch.dtype | str | None = None
    onload_device: str | None = None
    preparing_dtype: torch.dtype | str | None = None
    preparing_device: str | None = None
    computation_dtype: torch.dtype | None = None
    computation_device: str | None = None
    vram_limit: float | None = None

    def fields(self) -> dict[str, torch.dtype | str | None]:
        """The eight fields, as arguments of `ModelConfig`."""
        return {name: getattr(self, name) for name in VRAM_FIELDS}

    @property
    def managed(self) -> bool:
        """Whether layers move, so that a limit has something to act on."""
        return self.offload_dtype is not None and self.offload_device is not None


@dataclass(frozen=True)
class VramChoice:
    """What a person chose: a preset, a limit (GiB, None or AUTOMATIC), and fields that replace the preset's.

    `overrides` are pairs of field and value; a device of "compute" is the pipeline's.
    """

    preset: str
    vram_limit: float | str | None = AUTOMATIC
    overrides: tuple[tuple[str, torch.dtype | str], ...] = ()

    def settings(self, torch_dtype: torch.dtype, device: str, total_gib: float) -> VramSettings:
        """The settings for a pipeline that computes in `torch_dtype` on `device`, which has `total_gib` of memory.

        Raises ValueError for an unknown preset or field, and for a limit where nothing moves.
        """
        fields = vram_preset(self.preset, torch_dtype, device)
        if unknown := sorted(name for name, _ in self.overrides if name not in VRAM_FIELDS):
            raise ValueError(f"unknown VRAM field(s) {', '.join(unknown)}; known: {', '.join(VRAM_FIELDS)}")
        fields.update((name, device if value == "compute" else value) for name, value in self.overrides)
        settings = VramSettings(**fields)
        limit = self._limit(device, total_gib) if settings.managed else None
        if limit is None and isinstance(self.vram_limit, (int, float)):
            raise ValueError(f"vram_limit is {self.vram_limit} GiB, but with the preset {self.preset!r} every model "
                             f"stays on {device} as a whole: choose a preset whose layers move "
                             f"({', '.join(_dynamic_presets())}), or no limit")
        return replace(settings, vram_limit=limit)

    def _limit(self, device: str, total_gib: float) -> float | None:
        if self.vram_limit != AUTOMATIC:
            return self.vram_limit
        if not VRAM_PRESETS[self.preset].dynamic or torch.device(device).type == "cpu":
            return None
        return max(0.0, round(total_gib - computation_gib(total_gib), 2))


def computation_gib(total_gib: float) -> float:
    """What of an accelerator's memory is best kept free for the computation: a fifth, at least 2 GiB."""
    return max(2.0, 0.2 * total_gib)


def _dynamic_presets() -> list[str]:
    return [name for name, preset in VRAM_PRESETS.items() if preset.dynamic]


@dataclass(frozen=True)
class PipelineHandle:
    """Everything that is needed to load a pipeline.

    `tokenizer` is a folder. `slot` names the place in a graph that the weights are for: a slot has one set of weights
    at a time. Two handles that differ in nothing but the slot share their weights.
    """

    family: str
    sources: tuple[ModelSource, ...]
    tokenizer: str | None
    torch_dtype: torch.dtype
    device: str
    vram: VramSettings = VramSettings()
    slot: str = ""

    @property
    def weights(self) -> PipelineHandle:
        """The handle without its slot: equal for handles that can share weights."""
        return replace(self, slot="")

    def files_of(self, model_name: str) -> tuple[str, ...]:
        """The files that hold a model of the registry's name, none if there is no such model."""
        return tuple(file for source in self.sources if model_name in source.model_names() for file in source.files)

    @property
    def text_encoder_files(self) -> tuple[str, ...]:
        return self.files_of(family(self.family).text_encoder)

    def titles(self) -> str:
        """The sources, for messages."""
        return ", ".join(source.title for source in self.sources)
