"""Finding a known model's files and its tokenizer on this machine. Nothing is downloaded, nobody is contacted.

Notable: every search says where it looked and what to get from where, since "not found" is the first thing that a new
user sees.
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from ..core import ModelConfig
from ..core.loader.file import SHARD_NAME, MissingFile, MissingShards
from .families import Family, family
from .handle import LoraChoice, ModelSource
from .presets import DEMO_WEIGHTS, EXTRA_MODELS, LORA_PRESETS, MODEL_PRESETS, QWEN_I2L, ModelPreset, Source

DEMO_LORAS = DEMO_WEIGHTS / "loras"
# What the two general image-to-LoRA nets' LoRA is to be added to; no model, so no part of their preset.
IMAGE_TO_LORA_BIAS: Source = {"model_id": QWEN_I2L, "origin_file_pattern": "Qwen-Image-i2L-Bias.safetensors"}
# How the names of parts begin where that is not the attribute that holds them.
PARTS = {"dit": "transformer", "blockwise_controlnet": "controlnet", "vace": "transformer"}
PRESETS_WITH = {"vace": "vace"}  # a model in one file set with another: what the names of such presets have in them


def model_preset(name: str) -> ModelPreset:
    """Raises ValueError for a name that is not in MODEL_PRESETS."""
    if name not in MODEL_PRESETS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODEL_PRESETS)}")
    return MODEL_PRESETS[name]


def preset_parts() -> dict[str, Source]:
    """Every known model: those of every preset as "preset/part", and those that a pipeline may have besides."""
    return {**{f"{name}/{part}": source for name, preset in MODEL_PRESETS.items()
               for part, source in preset.parts.items()}, **EXTRA_MODELS}


def parts_for(attribute: str, family_name: str) -> list[str]:
    """The known models that an attribute of a family's pipeline may hold."""
    kind = family(family_name)
    held = kind.attributes[kind.model_of(attribute)]
    begins, within = PARTS.get(held, held), PRESETS_WITH.get(held, "")
    of_family = {name for name, preset in MODEL_PRESETS.items() if preset.family == family_name and within in name}
    return [title for title in preset_parts()
            if title.split("/")[1].startswith(begins) and title.split("/")[0] in of_family]


def known_loras() -> dict[str, Source]:
    """Every known LoRA: the published ones, and those of the embedded demo as "demo/name"."""
    return {**{name: preset.source for name, preset in LORA_PRESETS.items()},
            **{f"demo/{path.stem}": {"path": str(path)} for path in sorted(DEMO_LORAS.glob("*.safetensors"))}}


def locate_lora(name: str, bases: Sequence[str], strength: float = 1.0) -> LoraChoice:
    """A known LoRA's file. Raises MissingFile that says what to get and where to put it, ValueError for another name.
    """
    loras = known_loras()
    if name not in loras:
        raise ValueError(f"unknown LoRA {name!r}; known: {', '.join(loras)}")
    return LoraChoice(name, locate_source(name, loras[name], bases).files[0], strength)


def locate_preset(name: str, bases: Sequence[str]) -> tuple[ModelSource, ...]:
    """The files of a preset's models. Raises MissingFile that lists everything that is missing."""
    preset = model_preset(name)
    found, missing = [], []
    for part, source in preset.parts.items():
        try:
            found.append(locate_source(f"{name}/{part}", source, bases))
        except MissingFile as error:
            missing.append(str(error))
    if missing:
        raise MissingFile(f"{preset.title} is not complete on this machine (about {preset.gigabytes:g} GB in all). "
                          + "\n".join(missing))
    return tuple(found)


def locate_source(title: str, source: Source, bases: Sequence[str]) -> ModelSource:
    """The files of one source, from the first of the base folders that has them all.

    Raises MissingFile that says what to get and where to put it.
    """
    if "model_id" not in source:
        if not os.path.isfile(source["path"]):
            raise MissingFile(f"{source['path']} is missing: it is part of this package, so install it again")
        return ModelSource(title, (source["path"],))
    for base in bases:
        try:
            return ModelSource(title, _resolve(source, base))
        except MissingShards as error:
            raise MissingShards(f"{title}: {error}") from error
        except MissingFile:
            continue
    raise MissingFile(_what_to_get(source, bases))


def _resolve(source: Source, base: str) -> tuple[str, ...]:
    config = ModelConfig(**source, local_model_path=base, skip_download=True)
    config.download_if_necessary()
    paths = [config.path] if isinstance(config.path, str) else config.path
    return tuple(os.path.abspath(path) for path in paths)


def _what_to_get(source: Source, bases: Sequence[str]) -> str:
    model_id, pattern = source["model_id"], source["origin_file_pattern"]
    folders = " or ".join(os.path.join(base, *model_id.split("/")) for base in bases)
    return (f"missing: {pattern} of https://huggingface.co/{model_id} (or https://modelscope.cn/models/{model_id}); "
            f"put it, in its own subfolder, into {folders}")


def whole_set(path: str) -> tuple[str, ...]:
    """The file, or all files of the shard set that it belongs to, as far as they are there."""
    folder, name = os.path.split(path)
    match = SHARD_NAME.fullmatch(name)
    if not match:
        return (path,)
    shards = (SHARD_NAME.fullmatch(other) for other in sorted(os.listdir(folder)))
    return tuple(os.path.join(folder, shard.string) for shard in shards
                 if shard and shard.group("prefix", "count", "suffix") == match.group("prefix", "count", "suffix"))


def is_later_shard(name: str) -> bool:
    """Whether a file is a shard other than the first that exporters write: a list shows one entry for each set."""
    match = SHARD_NAME.fullmatch(os.path.basename(name))
    return bool(match) and int(match["index"]) > 1


# ---- tokenizer ------------------------------------------------------------------------------------------------------

def find_tokenizer(family_name: str, sources: Iterable[ModelSource], bases: Sequence[str],
                   others: Sequence[str] = ()) -> str | None:
    """The tokenizer's folder: beside the text encoder, in a base folder, or one of `others`. None without an encoder.

    Raises MissingFile that names the files to get when no folder has them.
    """
    kind = family(family_name)
    encoder = [file for source in sources if kind.text_encoder in source.model_names(family_name)
               for file in source.files]
    if not encoder:
        return None
    model_id, pattern = kind.tokenizer_source
    beside = os.path.dirname(encoder[0])
    inside = pattern.rstrip("/")
    candidates = list(dict.fromkeys([
        beside, os.path.join(beside, inside), os.path.join(os.path.dirname(beside), "tokenizer"),
        *(os.path.join(base, *model_id.split("/"), inside) for base in bases), *others]))
    for folder in candidates:
        if _holds_tokenizer(folder, kind):
            return folder
    raise MissingFile(f"no tokenizer for {encoder[0]}: get {' and '.join(kind.tokenizer_files)} from {pattern} of "
                      f"https://huggingface.co/{model_id} and put them into one of {', '.join(candidates)}")


def _holds_tokenizer(folder: str, kind: Family) -> bool:
    return os.path.isfile(os.path.join(folder, "tokenizer.json")) or all(
        os.path.isfile(os.path.join(folder, name)) for name in kind.tokenizer_files)
