"""The node that turns prompts into a pipeline's conditioning."""
from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..diffsynth_backend.pipelines.handle import PipelineHandle
from ..diffsynth_backend.pipelines.steps import Conditioning, encode_prompts
from . import types


class PromptEncode(io.ComfyNode):
    """Both prompts through the pipeline's text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffSynthBackend_PromptEncode",
            display_name="Prompt Encode (DiffSynth)",
            category=types.CATEGORY,
            description="Encodes what to draw and what to avoid. Both are always encoded; how strongly they act is "
                        "cfg's business, in Denoise.",
            search_aliases=["diffsynth", "clip text encode", "prompt", "conditioning", "negative prompt", "text",
                            "提示词", "文本编码", "负面提示词"],
            inputs=[
                types.Pipeline.Input("pipeline", tooltip="The pipeline whose text encoder reads the prompts."),
                io.String.Input("positive", multiline=True, dynamic_prompts=True, default="", tooltip="What to draw."),
                io.String.Input("negative", multiline=True, dynamic_prompts=True, default="", tooltip=(
                    "What to keep away from. May be empty; without effect when cfg is 1.")),
                types.Conditioning.Input("conditioning", optional=True, tooltip=(
                    "Pictures from Edit Images, which the text encoder then sees, or other things to draw by.")),
            ],
            outputs=[types.Conditioning.Output(display_name="conditioning", tooltip="Both prompts, for Denoise.")],
        )

    @classmethod
    def execute(cls, pipeline: PipelineHandle, positive: str, negative: str,
                conditioning: Conditioning | None = None) -> io.NodeOutput:
        return io.NodeOutput(encode_prompts(pipeline, positive, negative, conditioning=conditioning))
