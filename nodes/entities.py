"""Nodes that give regions of a picture prompts of their own (EliGen)."""
from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io
from torch import Tensor

from ..diffsynth_backend.pipelines.qwen_image_steps import Entity, give_entities
from ..diffsynth_backend.pipelines.steps import Conditioning
from . import types
from .values import every, one_mask

MAX_ENTITIES = 16


class EntityNode(io.ComfyNode):
    """A prompt and where it applies."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffSynthBackend_Entity",
            display_name="Entity (DiffSynth)",
            category=types.CATEGORY,
            description="A thing and its place: a prompt for one region of the picture, for the node Entities.",
            search_aliases=["diffsynth", "eligen", "regional prompt", "conditioning set mask", "area", "region",
                            "regional", "区域", "区域提示词", "分区"],
            inputs=[
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, default="", tooltip=(
                    "What to draw in the region.")),
                io.Mask.Input("mask", tooltip="The region in white, of any size. Regions may overlap."),
            ],
            outputs=[types.Entity.Output(display_name="entity", tooltip="For the node Entities.")],
        )

    @classmethod
    def execute(cls, prompt: str, mask: Tensor) -> io.NodeOutput:
        return io.NodeOutput(Entity(prompt, one_mask("mask", mask)))


class Entities(io.ComfyNode):
    """All the regions of a picture at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        entities = io.Autogrow.Input(
            "entities", tooltip="The things, each with its place.", template=io.Autogrow.TemplatePrefix(
                types.Entity.Input("entity", tooltip="From an Entity node."), prefix="entity", min=1,
                max=MAX_ENTITIES))
        return io.Schema(
            node_id="DiffSynthBackend_Entities",
            display_name="Entities (DiffSynth)",
            category=types.CATEGORY,
            description="Prompts for regions of the picture, beside the prompt for the whole (EliGen). It needs one of "
                        "the LoRAs Qwen-Image-EliGen.",
            search_aliases=["diffsynth", "eligen", "regional prompt", "entity control", "conditioning combine",
                            "area composition", "layout", "regional", "区域提示词", "区域控制", "分区"],
            inputs=[
                types.Conditioning.Input("conditioning", tooltip="The prompt for the whole, from Prompt Encode."),
                entities,
                io.Boolean.Input("on_negative", default=False, tooltip=(
                    "Let the negative prompt know of the regions, too: it then stands for each of them.")),
            ],
            outputs=[types.Conditioning.Output(display_name="conditioning", tooltip="With the regions, for Denoise.")],
        )

    @classmethod
    def execute(cls, conditioning: Conditioning, entities: dict[str, Any], on_negative: bool) -> io.NodeOutput:
        return io.NodeOutput(give_entities(conditioning, every(entities), on_negative))
