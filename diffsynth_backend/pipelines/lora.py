"""LoRAs of a handle: put on its pipeline, said in words, and compared with the schedule that they are meant for."""
from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..core.loader.file import check_model_files, fingerprint
from ..diffusion import BasePipeline
from ..utils.lora.files import lora_metadata, read_lora
from ..utils.lora.formats import LoraFile
from .handle import LoraChoice

LIGHTNING = "lightning"  # in the names of LoRAs that were distilled to few steps, and of the schedules made for them
NAMES_IN_METADATA = ("modelspec.title", "ss_output_name")
STEPS = re.compile(r"(\d{1,3})[ _-]?steps?", re.IGNORECASE | re.ASCII)

# What decides about the effect of a handle's LoRAs: the choices, and the state of their files.
LoraState = tuple[tuple[LoraChoice, tuple[int, ...]], ...]


def lora_state(choices: Sequence[LoraChoice]) -> LoraState:
    """Equal as long as neither the choices nor their files change. Raises MissingFile."""
    return tuple((choice, fingerprint(Path(check_model_files(choice.file)[0]).stat())) for choice in choices)


def put_loras(pipe: BasePipeline, choices: Sequence[LoraChoice]) -> None:
    """Have exactly these LoRAs on the pipeline. Raises as `check`, and what `BasePipeline.set_loras` raises."""
    pipe.set_loras([(_read(choice), choice.strength) for choice in choices if choice.strength])


def check(pipe: BasePipeline, choice: LoraChoice) -> str:
    """What a LoRA would change in a loaded pipeline, in a line: how many of its keys fit which models, and which none.

    Raises LoraError for a file that fits nothing or contradicts itself, ModelFileError for one that cannot be read.
    """
    return f"{pipe.match_lora(_read(choice)).describe()}; strength {choice.strength:g}"


def _read(choice: LoraChoice) -> LoraFile:
    return read_lora(choice.file, safetensors_only=True)  # a handle may come from a stranger's graph


def schedule_hint(loras: Sequence[LoraChoice], template: str, steps: int, cfg_scale: float) -> str | None:
    """What to change where LoRAs and schedule do not fit, None if they do.

    Lightning LoRAs, told by their names, want the Lightning schedule (a template of `flow_match`), the number of steps
    that their name says, and no guidance. The files are only looked at for the names in their metadata.
    """
    found = [name for choice in loras if choice.strength for name in _names(choice) if LIGHTNING in name.lower()]
    is_for_few_steps = LIGHTNING in template.lower()
    if not found:
        return ("the Lightning schedule is for Lightning LoRAs, and there is none: choose the model's own schedule, or "
                "add the LoRA") if is_for_few_steps else None
    wanted = STEPS.search(found[0])
    changes = [] if is_for_few_steps else ["choose the Lightning schedule"]
    if wanted and int(wanted[1]) != steps:
        changes.append(f"set steps to {int(wanted[1])} (now {steps})")
    if cfg_scale != 1:
        changes.append(f"set cfg to 1 (now {cfg_scale:g})")
    return f"{found[0]} is a Lightning LoRA, made for few steps: {', '.join(changes)}" if changes else None


def _names(choice: LoraChoice) -> list[str]:
    """Those that tell what a LoRA is."""
    file = Path(choice.file)
    metadata = lora_metadata(choice.file) if file.is_file() else {}
    return [choice.title, file.name,
            *(metadata[name] for name in NAMES_IN_METADATA if name in metadata)]
