"""The files behind a name: which a known model or LoRA has, which of them are on this machine, and getting the others.

A name is a model's ("qwen-image"), a part's ("qwen-image/vae") or a LoRA's, as people choose them.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core import ModelConfig
from ..core.loader.containment import PathRefused
from ..core.loader.download import Progress
from ..core.loader.file import ModelFileError
from .locate import IMAGE_TO_LORA_BIAS, known_loras, locate_source, preset_parts
from .presets import LICENCES, MODEL_PRESETS, Source

TOKENIZER = "tokenizer"
# What a feature of a model needs besides, by the model's name.
BESIDES: Mapping[str, Mapping[str, Source]] = {"qwen-image-i2l": {"bias": IMAGE_TO_LORA_BIAS}}


@dataclass(frozen=True)
class KnownFiles:
    """The files of one source. size: their bytes on this machine; None if they are not all here."""

    title: str
    source: Source
    size: int | None

    @property
    def pair(self) -> tuple[str, str]:
        """Model id and pattern."""
        return self.source["model_id"], self.source["origin_file_pattern"]


def known_sources() -> dict[str, dict[str, Source]]:
    """Everything that can be had from a hub: name → title of a part → source."""
    models = {name: {**preset.parts, **BESIDES.get(name, {}),
                     **({TOKENIZER: preset.tokenizer} if "text_encoder" in preset.parts else {})}
              for name, preset in MODEL_PRESETS.items()}
    parts = {**preset_parts(), **known_loras(),
             **{f"{name}/{part}": source for name, more in BESIDES.items() for part, source in more.items()}}
    every = {**models, **{name: {name.rpartition("/")[2]: source} for name, source in parts.items()}}
    return {name: sources for name, sources in every.items()
            if all("model_id" in source for source in sources.values())}


def known_pairs() -> frozenset[tuple[str, str]]:
    """Every pair of model id and pattern among those."""
    return frozenset((source["model_id"], source["origin_file_pattern"])
                     for sources in known_sources().values() for source in sources.values())


def files_of(name: str, bases: Sequence[str], has_tokenizer: bool = False) -> list[KnownFiles]:
    """The files of a name, looked for in the base folders; `has_tokenizer`: the program around us brings it.

    Raises KeyError for a name that is not known. A file that is broken or refused counts as missing.
    """
    sources = known_sources()[name]
    return [KnownFiles(title, source, _size(source, bases)) for title, source in sources.items()
            if not (title == TOKENIZER and has_tokenizer)]


def _size(source: Source, bases: Sequence[str]) -> int | None:
    try:
        paths = [Path(path) for path in locate_source("", source, bases).files]
    except (ModelFileError, PathRefused):
        return None
    inside = [path for folder in paths if folder.is_dir() for path in folder.rglob("*")]
    return sum(path.stat().st_size for path in [*paths, *inside] if path.is_file())


def licences(files: Sequence[KnownFiles]) -> list[str]:
    """The licences that the files are published under; where they are not known here, the address of the model's page.
    """
    ids = [known.source["model_id"] for known in files]
    return sorted({licence for start, licence in LICENCES.items() if any(name.startswith(start) for name in ids)}
                  | {f"huggingface.co/{name}" for name in ids if not name.startswith(tuple(LICENCES))})


def bring(files: Sequence[KnownFiles], base: str, progress: Callable[[Progress], None],
          cancelled: Callable[[], bool]) -> None:
    """Download what is missing of `files` to the folder `base`, one repository after the other.

    progress, cancelled, errors: see `core.loader.download.download`.
    """
    wanted: dict[str, list[str]] = {}
    for known in files:
        if known.size is None:
            model_id, pattern = known.pair
            wanted.setdefault(model_id, []).append(pattern)
    for model_id, patterns in wanted.items():
        config = ModelConfig(model_id=model_id, origin_file_pattern=patterns, local_model_path=base)
        config.download_if_necessary(progress, cancelled)
