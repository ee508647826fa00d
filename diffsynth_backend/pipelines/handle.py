"""A pipeline as a value: which files, in which dtype, where, under which VRAM settings. No weights.

Notable: handles are frozen, hashable and picklable, so a graph may keep, compare and pass them on for ever. What they
stand for is loaded, kept and freed by `owner`. A changed setting is a new handle (`dataclasses.replace`). What depends
on the machine (`auto`, an automatic limit) is decided before a handle is made.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..core.device import GIB
from ..core.loader.config import VRAM_FIELDS
from ..core.loader.file import ModelFiles, read_tensor_infos
from ..core.vram.placement import ONLOAD, Placements
from ..core.vram.presets import AUTO, VRAM_PRESETS, vram_preset
from ..models.model_loader import find_models
from .families import family

AUTOMATIC = "automatic"
MIB = 1024**2
MAX_LORAS = 64
MAX_STRENGTH = 100.0
RESERVED_BYTES = 2 * GIB  # of RAM: left to the rest of the system
DYNAMIC_PRESETS = tuple(name for name, preset in VRAM_PRESETS.items() if preset.dynamic)


@dataclass(frozen=True)
class ModelSource:
    """The files (absolute paths) of one model, or of several that share them; `title` is what people chose."""

    title: str
    files: tuple[str, ...]

    def model_names(self, family_name: str) -> tuple[str, ...]:
        """The registry's names of the models in the files, read from their headers; none if the layout is unknown.

        Several families may know one layout: then these are the names of this one's models.
        Raises ModelFileError for files that are missing, incomplete or no model files.
        """
        names = tuple(found.row["model_name"] for found in find_models(self.files))
        return tuple(name for name in names if name in family(family_name).attributes) or names


@dataclass(frozen=True)
class VramSettings:
    """The eight fields of `ModelConfig` and the limits (GiB) that all models share; None means unset.

    Without a `vram_limit` nothing is limited; without a `ram_limit` no layer waits in RAM that is read from disk.
    """

    offload_dtype: torch.dtype | str | None = None
    offload_device: str | None = None
    onload_dtype: torch.dtype | str | None = None
    onload_device: str | None = None
    preparing_dtype: torch.dtype | str | None = None
    preparing_device: str | None = None
    computation_dtype: torch.dtype | None = None
    computation_device: str | None = None
    vram_limit: float | None = None
    ram_limit: float | None = None

    def fields(self) -> dict[str, torch.dtype | str | None]:
        """The eight fields, as arguments of `ModelConfig`."""
        return {name: getattr(self, name) for name in VRAM_FIELDS}

    @property
    def managed(self) -> bool:
        """Whether layers move, so that a limit has something to act on."""
        return self.offload_dtype is not None and self.offload_device is not None

    @property
    def layers_wait(self) -> bool:
        """Whether layers in use wait elsewhere than where they compute, so that some of them may stay there."""
        if not self.managed:
            return False
        placements = Placements.from_config(self.fields())
        onload = placements.states[ONLOAD]
        return onload.on_disk or onload.device.type != placements.computation.device.type

    @property
    def reads_disk_in_use(self) -> bool:
        """Whether layers in use are read from their files, so that some of them may wait in RAM instead."""
        return self.managed and Placements.from_config(self.fields()).states[ONLOAD].on_disk


class NothingMoves(ValueError):
    """A limit for models that stay where they are as a whole."""


class NothingRead(ValueError):
    """A limit of RAM for layers of the disk, where there are none."""


@dataclass(frozen=True)
class VramChoice:
    """What a person chose: one of VRAM_CHOICES, a limit (GiB, None or AUTOMATIC), and fields that replace the preset's.

    `overrides` are pairs of field and value; a device of "compute" is the pipeline's. `ram_limit` (GiB or None) is the
    RAM in which layers may wait that would be read from disk in each step.
    """

    preset: str
    vram_limit: float | str | None = AUTOMATIC
    overrides: tuple[tuple[str, torch.dtype | str], ...] = ()
    ram_limit: float | None = None

    @property
    def given_limit(self) -> float | None:
        """The limit in GiB, if it is a number."""
        return None if self.vram_limit == AUTOMATIC else self.vram_limit

    def settings(self, torch_dtype: torch.dtype, device: str, total_gib: float) -> VramSettings:
        """The settings for a pipeline that computes in `torch_dtype` on `device`, which has `total_gib` of memory.

        Raises ValueError for an unknown preset or field, for `auto`, which is to be replaced by what `decide` says (see
        `decided`), and for a limit of what does not happen: nothing moves, or nothing is read from disk.
        """
        fields = vram_preset(self.preset, torch_dtype, device)
        if unknown := sorted(name for name, _ in self.overrides if name not in VRAM_FIELDS):
            raise ValueError(f"unknown VRAM field(s) {', '.join(unknown)}; known: {', '.join(VRAM_FIELDS)}")
        fields.update((name, device if value == "compute" else value) for name, value in self.overrides)
        settings = VramSettings(**fields)
        if self.given_limit is not None and not settings.managed:
            raise NothingMoves(f"vram_limit is {self.vram_limit} GiB, but with the preset {self.preset!r} every model "
                               f"stays on {device} as a whole: choose a preset whose layers move "
                               f"({', '.join(DYNAMIC_PRESETS)}), or no limit")
        if self.ram_limit is not None and not settings.reads_disk_in_use:
            raise NothingRead(f"ram_limit is {self.ram_limit} GiB, but with the preset {self.preset!r} no layer is "
                              f"read from disk while its model is in use: choose the preset disk or {AUTO}, or no "
                              "limit")
        automatic = self.vram_limit == AUTOMATIC and settings.layers_wait and torch.device(device).type != "cpu"
        limit = automatic_limit_gib(total_gib) if automatic else self.given_limit
        return replace(settings, vram_limit=limit, ram_limit=self.ram_limit)

    def decided(self, decision: Decision) -> VramChoice:
        """What the choice becomes where `auto` was to decide. A limit of RAM that all weights fit has done its work."""
        return replace(self, preset=decision.preset, ram_limit=self.ram_limit if decision.preset == "disk" else None)


def automatic_limit_gib(total_gib: float) -> float:
    """The limit on an accelerator with `total_gib` of memory: a tenth, at least 1.5 GiB, is for all that is not ours.

    Not less, since allocators need more than what is counted, and the autoencoder's computation is not in a limit.
    """
    return max(0.0, round(total_gib - max(1.5, 0.1 * total_gib), 2))


def computation_gib(total_gib: float) -> float:
    """What of an accelerator is best kept free for the computation where no limit counts it: a fifth, at least 2 GiB.
    """
    return max(2.0, 0.2 * total_gib)


@dataclass(frozen=True)
class Decision:
    """What `auto` came to on a machine, and what it looked at: see `decide`. `fits_ram`: whether the weights do, beside
    what is left to the system; `computation_bytes`: what of the device is kept free for the computation. `ram_limit`:
    GiB, where that decided and not what is free."""

    preset: str
    weight_bytes: int
    ram_bytes: int
    fits_ram: bool
    device_bytes: int | None = None
    computation_bytes: int = 0
    limit: float | None = None
    ram_limit: float | None = None
    reserved_bytes: int = RESERVED_BYTES

    def describe(self) -> str:
        """One line for people."""
        return f"auto: {self.preset}, because {self._reason()}"

    def _reason(self) -> str:
        weights = f"{words(self.weight_bytes)} of weights"
        ram_says = f"{_fit(self.fits_ram)} " + (
            f"{words(self.ram_bytes)} of free RAM ({words(self.reserved_bytes)} are left to the system)"
            if self.ram_limit is None else f"the ram_limit of {self.ram_limit:g} GiB")
        if self.limit is not None:
            return f"vram_limit is {self.limit:g} GiB, and {weights} {ram_says}"
        if self.device_bytes is None:
            return f"{weights} {ram_says}"
        fits = self.preset == "full"
        device_says = (f"{weights} {_fit(fits)} the card's {words(self.device_bytes)} beside "
                       f"{words(self.computation_bytes)} for the computation")
        return device_says if fits else f"{device_says}; they {ram_says}"


def decide(weight_bytes: int, device_bytes: int | None, ram_bytes: int, limit: float | None = None,
           ram_limit: float | None = None) -> Decision:
    """The preset for weights of so many bytes in the dtype that they are computed in: the fastest that fits.

    `device_bytes` is all memory of the accelerator, None where the CPU computes; `ram_bytes` is what is available.
    A `limit` (GiB) rules `full` out, which looks at none; a `ram_limit` (GiB) is what of the RAM weights may take.
    It never comes to fp8, which changes pictures.
    """
    fits_ram = weight_bytes + RESERVED_BYTES <= ram_bytes
    decisive = ram_limit if fits_ram else None
    if decisive is not None:
        fits_ram = weight_bytes <= decisive * GIB
    computation = 0 if device_bytes is None else int(computation_gib(device_bytes / GIB) * GIB)
    fits_device = fits_ram if device_bytes is None else weight_bytes + computation <= device_bytes
    moving = "low" if fits_ram else "disk"
    preset = "full" if fits_device and limit is None else moving
    return Decision(preset, weight_bytes, ram_bytes, fits_ram, device_bytes, computation, limit, decisive)


def _fit(fits: bool) -> str:
    return "fit" if fits else "do not fit"


def words(nbytes: int) -> str:
    """A number of bytes for people."""
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.1f} MiB"


def weight_bytes_of(files: ModelFiles, torch_dtype: torch.dtype) -> int:
    """What the weights in files take once they are in a dtype, in bytes; only headers are read, and kept.

    Raises ModelFileError for files that are missing, incomplete or no model files.
    """
    return sum(math.prod(info.shape) * (torch_dtype if info.dtype.is_floating_point else info.dtype).itemsize
               for info in read_tensor_infos(files).values())


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA's file (safetensors, absolute path) at a strength, which may be negative; `title` is what people chose.

    Raises ValueError for a strength that is not a number in ±MAX_STRENGTH.
    """

    title: str
    file: str
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.strength, int | float) or not abs(self.strength) <= MAX_STRENGTH:
            raise ValueError(f"the strength of {self.title} must be a number from {-MAX_STRENGTH} to {MAX_STRENGTH}, "
                             f"got {self.strength!r}")


@dataclass(frozen=True)
class PipelineHandle:
    """Everything that is needed to load a pipeline.

    `tokenizer` is a folder. `loras` change what the models compute, not which weights are loaded. `slot` names the
    place in a graph that the weights are for: a slot has one set of weights at a time. Two handles that differ in
    nothing but slot and LoRAs share their weights.
    """

    family: str
    sources: tuple[ModelSource, ...]
    tokenizer: str | None
    torch_dtype: torch.dtype
    device: str
    vram: VramSettings = VramSettings()
    slot: str = ""
    loras: tuple[LoraChoice, ...] = ()

    @property
    def weights(self) -> PipelineHandle:
        """The handle without its slot and LoRAs: equal for handles that can share weights."""
        return replace(self, slot="", loras=())

    @property
    def models(self) -> PipelineHandle:
        """The same without where weights are kept, too: equal for the same models."""
        return replace(self.weights, vram=VramSettings())

    def with_lora(self, choice: LoraChoice) -> PipelineHandle:
        """The handle with one more LoRA. Raises ValueError for more than MAX_LORAS."""
        if len(self.loras) >= MAX_LORAS:
            raise ValueError(f"a pipeline takes {MAX_LORAS} LoRAs: leave some out, or merge them into one file")
        return replace(self, loras=(*self.loras, choice))

    def weight_bytes(self) -> int:
        """What all weights take in the dtype of the computation, in bytes; see `weight_bytes_of`."""
        return sum(weight_bytes_of(source.files, self.torch_dtype) for source in self.sources)

    def files_of(self, model_name: str) -> tuple[str, ...]:
        """The files that hold a model of the registry's name, none if there is no such model."""
        return tuple(file for source in self.sources if model_name in source.model_names(self.family)
                     for file in source.files)

    @property
    def text_encoder_files(self) -> tuple[str, ...]:
        return self.files_of(family(self.family).text_encoder)

    def titles(self) -> str:
        """The sources, for messages."""
        return ", ".join(source.title for source in self.sources)
