"""The families of pipelines as data: what each is called, what it is made of, and where its class is.

Notable: classes are named, not imported, so that listing families costs nothing.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..core.lookup import find_object

if TYPE_CHECKING:
    from ..diffusion import BasePipeline

_PACKAGE = __name__.rpartition(".pipelines.")[0]


@dataclass(frozen=True)
class Family:
    """`models`: the registry's names of models that the pipeline uses, each with the attribute that holds it.

    `extras` are those that only some features need; of those named in `several` a pipeline takes any number, of those
    in `second` two, the second one held by the attribute that stands there. By attribute, `part_names` says how the
    names of a preset's parts begin where that is not the attribute, and `presets_with` what the names of presets have
    in them whose files hold that model beside another.
    """

    title: str
    pipeline: str  # dotted path below this package
    models: Mapping[str, str]
    extras: Mapping[str, str]
    several: frozenset[str]
    text_encoder: str  # the model that needs the tokenizer
    tokenizer_source: tuple[str, str]  # model id and pattern of the published tokenizer
    tokenizer_files: tuple[str, ...]
    token_tables: tuple[str, ...]  # how the text encoder's embeddings of tokens are called, the ends of their names
    typical_size: tuple[int, int]  # width and height (pixels) of what is drawn, where nothing else says it
    second: Mapping[str, str] = field(default_factory=dict)
    part_names: Mapping[str, str] = field(default_factory=dict)
    presets_with: Mapping[str, str] = field(default_factory=dict)
    instead_of_mask: str = ""  # for families that take no latent with a mask: how a part is changed there

    @property
    def attributes(self) -> dict[str, str]:
        """Registry's name → attribute, of all models that the pipeline has a place for."""
        return {**self.models, **self.extras}

    def attributes_of(self, model_name: str) -> tuple[str, ...]:
        """The attributes that hold models of that name."""
        second = [self.second[model_name]] if model_name in self.second else []
        return (self.attributes[model_name], *second)

    def model_of(self, attribute: str) -> str:
        """The registry's name of the model that an attribute holds."""
        return next(name for name in self.attributes if attribute in self.attributes_of(name))

    def most_of(self, model_name: str) -> int | None:
        """How many models of that name a pipeline has a place for; None: any number."""
        return None if model_name in self.several else len(self.attributes_of(model_name))


FAMILIES = {
    "qwen-image": Family(
        "Qwen-Image", "pipelines.qwen_image.QwenImagePipeline",
        {"qwen_image_text_encoder": "text_encoder", "qwen_image_dit": "dit", "qwen_image_vae": "vae"},
        {"qwen_image_blockwise_controlnet": "blockwise_controlnet",
         **{name: name.removeprefix("qwen_image_") for name in (
             "siglip2_image_encoder", "dinov3_image_encoder", "qwen_image_image2lora_style",
             "qwen_image_image2lora_coarse", "qwen_image_image2lora_fine")}},
        frozenset({"qwen_image_blockwise_controlnet"}),
        "qwen_image_text_encoder", ("Qwen/Qwen-Image", "tokenizer/"), ("vocab.json", "merges.txt"),
        ("embed_tokens.weight",), typical_size=(1328, 1328),
        part_names={"dit": "transformer", "blockwise_controlnet": "controlnet"}),
    "wan": Family(
        "Wan video", "pipelines.wan_video.WanVideoPipeline",
        {"wan_video_text_encoder": "text_encoder", "wan_video_dit": "dit", "wan_video_vae": "vae"},
        {"wan_video_image_encoder": "image_encoder", "wan_video_vace": "vace",
         "wan_video_motion_controller": "motion_controller"},
        frozenset(), "wan_video_text_encoder", ("Wan-AI/Wan2.1-T2V-1.3B", "google/umt5-xxl/"), ("tokenizer.json",),
        ("token_embedding.weight", "shared.weight"), typical_size=(832, 480),
        instead_of_mask="remove it; what changes a part of a video is VACE",
        second={"wan_video_dit": "dit2", "wan_video_vace": "vace2"},
        part_names={"dit": "transformer", "vace": "transformer"}, presets_with={"vace": "vace"}),
}


def family(name: str) -> Family:
    """Raises ValueError for a name that is not in FAMILIES."""
    if name not in FAMILIES:
        raise ValueError(f"unknown family of pipelines {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def pipeline_class(name: str) -> type[BasePipeline]:
    """The pipeline class of a family, imported now."""
    return find_object(family(name).pipeline, _PACKAGE)
