"""Finding a known model's files and its tokenizer on this machine. Nothing is downloaded, nobody is contacted.

Notable: every search says where it looked and what to get from where, since "not found" is the first thing that a new
user sees.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..core import ModelConfig
from ..core.loader.file import SHARD_NAME, MissingFile, MissingShards, read_tensor_infos
from .families import Family, family
from .handle import LoraChoice, ModelSource
from .presets import DEMO_WEIGHTS, EXTRA_MODELS, LORA_PRESETS, MODEL_PRESETS, QWEN_I2L, ModelPreset, Source
from .tokenizer_files import fits, tokens_known

DEMO_LORAS = DEMO_WEIGHTS / "loras"
# What the two general image-to-LoRA nets' LoRA is to be added to; no model, so no part of their preset.
IMAGE_TO_LORA_BIAS: Source = {"model_id": QWEN_I2L, "origin_file_pattern": "Qwen-Image-i2L-Bias.safetensors"}


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
    begins, within = kind.part_names.get(held, held), kind.presets_with.get(held, "")
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
        if not Path(source["path"]).is_file():
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
    return tuple(str(Path(path).absolute()) for path in paths)


def _what_to_get(source: Source, bases: Sequence[str]) -> str:
    model_id, pattern = source["model_id"], source["origin_file_pattern"]
    folders = " or ".join(str(Path(base, *model_id.split("/"))) for base in bases)
    return (f"missing: {pattern} of https://huggingface.co/{model_id} (or https://modelscope.cn/models/{model_id}); "
            f"put it, in its own subfolder, into {folders}")


def whole_set(path: str) -> tuple[str, ...]:
    """The file, or all files of the shard set that it belongs to, as far as they are there."""
    file = Path(path)
    match = SHARD_NAME.fullmatch(file.name)
    if not match:
        return (path,)
    shards = (SHARD_NAME.fullmatch(name) for name in sorted(other.name for other in file.parent.iterdir()))
    return tuple(str(file.with_name(shard.string)) for shard in shards
                 if shard and shard.group("prefix", "count", "suffix") == match.group("prefix", "count", "suffix"))


def is_later_shard(name: str) -> bool:
    """Whether a file is a shard other than the first that exporters write: a list shows one entry for each set."""
    match = SHARD_NAME.fullmatch(Path(name).name)
    return bool(match) and int(match["index"]) > 1


# ---- tokenizer ------------------------------------------------------------------------------------------------------

def find_tokenizer(family_name: str, sources: Iterable[ModelSource], bases: Sequence[str],
                   others: Sequence[str] = ()) -> str | None:
    """The tokenizer's folder: beside the text encoder, in a base folder, or one of `others`. None without an encoder.

    A tokenizer of another model is passed over: its vocabulary does not fill the text encoder's table.
    Raises MissingFile that names the folders, what they hold, and the files to get, when none has what fits.
    """
    kind = family(family_name)
    encoder = [file for source in sources if kind.text_encoder in source.model_names(family_name)
               for file in source.files]
    if not encoder:
        return None
    table = _table_of(encoder, kind)
    folders = _tokenizer_folders(kind, Path(encoder[0]).parent, bases, others)
    found = {folder: tokens_known(folder, kind.tokenizer_files) for folder in folders}
    for folder, tokens in found.items():
        if tokens is not None and (table is None or fits(tokens, table)):
            return str(folder)
    model_id, pattern = kind.tokenizer_source
    raise MissingFile(f"no tokenizer for {encoder[0]}{_of_others(found, table)}: get "
                      f"{' and '.join(kind.tokenizer_files)} from {pattern} of https://huggingface.co/{model_id} and "
                      f"put them into one of {', '.join(map(str, folders))}")


def _tokenizer_folders(kind: Family, beside: Path, bases: Sequence[str], others: Sequence[str]) -> list[Path]:
    model_id, pattern = kind.tokenizer_source
    inside = pattern.rstrip("/")
    return list(dict.fromkeys([beside, beside / inside, beside.parent / "tokenizer",
                               *(Path(base, *model_id.split("/"), inside) for base in bases), *map(Path, others)]))


def _table_of(encoder: Sequence[str], kind: Family) -> int | None:
    """How many tokens the text encoder has embeddings for, by its files' headers; None if they have another name."""
    infos = read_tensor_infos(encoder)
    return next((infos[key].shape[0] for key in infos if key.endswith(kind.token_tables)), None)


def _of_others(found: dict[Path, int | None], table: int | None) -> str:
    """What is wrong with the tokenizers that are there, for a message."""
    wrong = [f"the one in {folder} knows {tokens}" for folder, tokens in found.items() if tokens is not None]
    return f", which is for {table} tokens ({', '.join(wrong)}: another model's)" if wrong else ""
