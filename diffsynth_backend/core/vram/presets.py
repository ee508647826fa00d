"""Named VRAM settings: what a person chooses instead of eight fields.

Notable: each preset is a row of data over two placeholders, the dtype and device that the pipeline computes with. Two
names more are choices and no rows: `auto` becomes one of the rows when a machine and files are known, and `custom`
starts from nothing.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

COMPUTE = "compute"  # the pipeline's dtype or device
FP8 = torch.float8_e4m3fn
STATES = ("offload", "onload", "preparing", "computation")
AUTO, CUSTOM = "auto", "custom"


@dataclass(frozen=True)
class VramPreset:
    """Placements (dtype, device) of the four states; none means that everything stays on the computation device."""

    summary: str
    states: tuple[tuple[Any, Any], ...] = ()
    dynamic: bool = False  # whether `vram_limit` decides how much is kept on the device


_HERE, _RAM, _DISK = (COMPUTE, COMPUTE), (COMPUTE, "cpu"), ("disk", "disk")

VRAM_PRESETS = {
    "full": VramPreset("every model stays on the device: fastest, needs room for all of them"),
    "balanced": VramPreset("models wait in RAM and are on the device one at a time", (_RAM, _HERE, _HERE, _HERE)),
    "low": VramPreset("layers wait in RAM; as many as vram_limit allows stay on the device, the others are copied when "
                      "they compute", (_RAM, _RAM, _HERE, _HERE), dynamic=True),
    "fp8": VramPreset("as balanced with weights stored in fp8: half the memory, slightly different pictures",
                      ((FP8, "cpu"), (FP8, COMPUTE), (FP8, COMPUTE), _HERE)),
    "disk": VramPreset("layers are read from their files when they compute; as many as vram_limit allows stay on the "
                       "device", (_DISK, _DISK, _HERE, _HERE), dynamic=True),
}

# What may be chosen, with its summary. Lists show it in this order, which saved workflows do not depend on.
VRAM_CHOICES = {
    **{name: preset.summary for name, preset in VRAM_PRESETS.items()},
    AUTO: "full if all models fit the device beside the computation, else low if they fit the RAM, else disk",
    CUSTOM: "the eight fields say everything; nothing moves unless both offload fields are set",
}


def vram_preset(name: str, torch_dtype: torch.dtype, device: torch.device | str) -> dict[str, Any]:
    """The eight VRAM fields of `ModelConfig` for a preset or `custom`; computing in `torch_dtype` on `device`.

    Raises ValueError for another name.
    """
    if name not in VRAM_PRESETS and name != CUSTOM:
        raise ValueError(f"unknown VRAM preset {name!r}; known: {', '.join(VRAM_PRESETS)}, {CUSTOM} "
                         f"({AUTO} has to be decided first: pipelines.handle.decide)")
    fields: dict[str, Any] = {"computation_dtype": torch_dtype, "computation_device": device}
    for state, (dtype, place) in zip(STATES, () if name == CUSTOM else VRAM_PRESETS[name].states):
        fields[f"{state}_dtype"] = torch_dtype if dtype == COMPUTE else dtype
        fields[f"{state}_device"] = device if place == COMPUTE else place
    return fields
