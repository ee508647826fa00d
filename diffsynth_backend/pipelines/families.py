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
    """`models`: the registry's names of models that the pipeline uses, each with the attribute that holds it.

    `extras` are those that only some features need; of those named in `several` a pipeline takes any number.
    """

    title: str
    pipeline: str  # dotted path below this package
    models: Mapping[str, str]
    extras: Mapping[str, str]
    several: frozenset[str]
    text_encoder: str  # the model that needs the tokenizer
    tokenizer_source: tuple[str, str]  # model id and pattern of the published tokenizer
    tokenizer_files: tuple[str, ...]

    @property
    def attributes(self) -> dict[str, str]:
        """Registry's name → attribute, of all models that the pipeline has a place for."""
        return {**self.models, **self.extras}

    def model_of(self, attribute: str) -> str:
        """The registry's name of the model that an attribute holds."""
        return next(name for name, held_by in self.attributes.items() if held_by == attribute)


FAMILIES = {
    "qwen-image": Family(
        "Qwen-Image", "pipelines.qwen_image.QwenImagePipeline",
        {"qwen_image_text_encoder": "text_encoder", "qwen_image_dit": "dit", "qwen_image_vae": "vae"},
        {"qwen_image_blockwise_controlnet": "blockwise_controlnet",
         **{name: name.removeprefix("qwen_image_") for name in (
             "siglip2_image_encoder", "dinov3_image_encoder", "qwen_image_image2lora_style",
             "qwen_image_image2lora_coarse", "qwen_image_image2lora_fine")}},
        frozenset({"qwen_image_blockwise_controlnet"}),
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
