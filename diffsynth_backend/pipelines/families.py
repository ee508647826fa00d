"""The families of pipelines as data: what each is called, what it is made of, and where its class is.

Notable: classes are named, not imported, so that listing families costs nothing.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.lookup import find_object

if TYPE_CHECKING:
    from ..diffusion import BasePipeline

_PACKAGE = __name__.rpartition(".pipelines.")[0]


@dataclass(frozen=True)
class Family:
    """`models`: the registry's names of models that the pipeline uses, each with the attribute that holds it."""

    title: str
    pipeline: str  # dotted path below this package
    models: Mapping[str, str]
    text_encoder: str  # the model that needs the tokenizer
    tokenizer_source: tuple[str, str]  # model id and pattern of the published tokenizer
    tokenizer_files: tuple[str, ...]


FAMILIES = {
    "qwen-image": Family(
        "Qwen-Image", "pipelines.qwen_image.QwenImagePipeline",
        {"qwen_image_text_encoder": "text_encoder", "qwen_image_dit": "dit", "qwen_image_vae": "vae"},
        "qwen_image_text_encoder", ("Qwen/Qwen-Image", "tokenizer/"), ("vocab.json", "merges.txt")),
}


def family(name: str) -> Family:
    """Raises ValueError for a name that is not in FAMILIES."""
    if name not in FAMILIES:
        raise ValueError(f"unknown family of pipelines {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def pipeline_class(name: str) -> type[BasePipeline]:
    """The pipeline class of a family, imported now."""
    return find_object(family(name).pipeline, _PACKAGE)
