"""Nodes that add LoRAs to a pipeline, and the one that makes a LoRA out of pictures.

Notable: a LoRA is part of the pipeline's description and acts while the layers compute, so no weight is changed, and a
changed strength loads nothing.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..diffsynth_backend.pipelines.handle import LoraChoice, PipelineHandle
from ..diffsynth_backend.pipelines.locate import IMAGE_TO_LORA_BIAS, known_loras, locate_lora, locate_source
from ..diffsynth_backend.pipelines.presets import LORA_PRESETS
from ..diffsynth_backend.pipelines.qwen_image_steps import needs_bias, save_lora_of
from ..diffsynth_backend.pipelines.steps import add_loras
from . import host, types
from .downloading import missing_files_can_be_had

MAX_STACK = 8
BIAS = "qwen-image-i2l/bias"
LORA_TOOLTIP = ("A known LoRA (looked for in models/diffsynth/<owner>/<name>), one of the embedded demo's, or a "
                "safetensors file from ComfyUI's folder loras.")
STRENGTH_TOOLTIP = "How strongly it acts. 0: not at all; below 0: the other way."


def lora_options() -> list[str]:
    """What may be chosen."""
    return [*known_loras(), *host.lora_files()]


def lora_choice(name: str, strength: float = 1.0) -> LoraChoice:
    """The file of an option. Raises MissingFile for one that is not there, PathRefused for one that leads elsewhere."""
    if name in known_loras():
        with missing_files_can_be_had(name):
            return locate_lora(name, host.model_bases(), strength)
    return LoraChoice(name, host.lora_path(name), strength)


def file_state(name: str | None) -> tuple[int, int] | None:
    """Size and time of a LoRA's file, which tell whether it was replaced; None if it is not there."""
    try:
        status = Path(lora_choice(name).file).stat()
    except (OSError, ValueError):  # the run says what is wrong with it
        return None
    return status.st_size, status.st_mtime_ns


def lora_input(id: str) -> io.Combo.Input:
    return io.Combo.Input(id, options=lora_options(), tooltip=LORA_TOOLTIP)


def strength_input(id: str) -> io.Float.Input:
    return io.Float.Input(id, default=1.0, min=-10.0, max=10.0, step=0.05, tooltip=STRENGTH_TOOLTIP)


def with_loras(pipeline: PipelineHandle, choices: list[LoraChoice]) -> io.NodeOutput:
    """The pipeline with more LoRAs; below the node, what each changes, and what its authors say about the schedule."""
    added, lines = add_loras(pipeline, choices)
    words = [line for choice, line in zip(choices, lines) for line in (line, *author_settings(choice.title))]
    return io.NodeOutput(added, ui=ui.PreviewText("\n".join(words)))


def author_settings(title: str) -> list[str]:
    """In the words of Denoise, how a known LoRA's authors use it, where that differs from its model."""
    preset = LORA_PRESETS.get(title)
    if preset is None or preset.steps is None:
        return []
    schedule = "lightning" if preset.template else "steps" if preset.mu is None else f"fixed shift, mu {preset.mu:.3f}"
    return [f"Its authors use it with {preset.model} and, in Denoise, schedule {schedule}, steps {preset.steps}, "
            f"cfg {preset.cfg_scale:g}"]


class LoraLoader(io.ComfyNode):
    """One LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="DiffSynthBackend_LoraLoader",
            display_name="LoRA Loader (DiffSynth)",
            category=types.CATEGORY,
            description="Adds a LoRA to a pipeline. Every usual spelling is recognised; how many of its keys fit "
                        "which model is written below the node.",
            search_aliases=["diffsynth", "load lora", "lora", "lightning", "lokr", "loha", "dora", "adapter",
                            "加载lora", "风格", "加速"],
            inputs=[
                types.Pipeline.Input("pipeline", tooltip="The pipeline to add it to, which itself stays as it is."),
                lora_input("lora"),
                strength_input("strength"),
            ],
            outputs=[types.Pipeline.Output(display_name="pipeline", tooltip="The pipeline with the LoRA.")],
        )
        schema.has_intermediate_output = True  # as an argument, ComfyUI before 0.18 would refuse it
        return schema

    @classmethod
    def validate_inputs(cls, lora: str) -> bool | str:
        if lora in lora_options():
            return True
        return (f"{lora!r} is not among the LoRAs that this ComfyUI has: put the file into models/loras and press R to "
                "refresh the list, or choose another entry")

    @classmethod
    def fingerprint_inputs(cls, pipeline: None = None, lora: str | None = None,
                           strength: float | None = None) -> tuple[int, int] | None:
        return file_state(lora)

    @classmethod
    def execute(cls, pipeline: PipelineHandle, lora: str, strength: float) -> io.NodeOutput:
        return with_loras(pipeline, [lora_choice(lora, strength)])


class LoraStack(io.ComfyNode):
    """Several LoRAs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="DiffSynthBackend_LoraStack",
            display_name="LoRA Stack (DiffSynth)",
            category=types.CATEGORY,
            description="Adds several LoRAs to a pipeline, each at its own strength. Their order makes no difference.",
            search_aliases=["diffsynth", "lora stack", "multi lora", "load lora", "loras", "lora stacker",
                            "several loras", "多个lora", "lora堆"],
            inputs=[
                types.Pipeline.Input("pipeline", tooltip="The pipeline to add them to, which itself stays as it is."),
                io.DynamicCombo.Input("count", options=[
                    io.DynamicCombo.Option(str(count), [
                        entry for i in range(1, count + 1)
                        for entry in (lora_input(f"lora_{i}"), strength_input(f"strength_{i}"))])
                    for count in range(1, MAX_STACK + 1)], tooltip="How many LoRAs."),
            ],
            outputs=[types.Pipeline.Output(display_name="pipeline", tooltip="The pipeline with the LoRAs.")],
        )
        schema.has_intermediate_output = True  # as an argument, ComfyUI before 0.18 would refuse it
        return schema

    @classmethod
    def fingerprint_inputs(cls, pipeline: None = None,
                           count: dict[str, Any] | None = None) -> list[tuple[int, int] | None]:
        return [file_state(name) for key, name in (count or {}).items() if key.startswith("lora_")]

    @classmethod
    def execute(cls, pipeline: PipelineHandle, count: dict[str, Any]) -> io.NodeOutput:
        numbers = range(1, int(count["count"]) + 1)
        return with_loras(pipeline, [lora_choice(count[f"lora_{i}"], count[f"strength_{i}"]) for i in numbers])


class ImageToLora(io.ComfyNode):
    """Pictures → LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="DiffSynthBackend_ImageToLora",
            display_name="Image to LoRA (DiffSynth)",
            category=types.CATEGORY,
            description="Makes a LoRA for Qwen-Image out of a few pictures, without training, and saves it into "
                        "ComfyUI's output folder.",
            search_aliases=["diffsynth", "i2l", "image to lora", "style transfer", "ipadapter", "train lora",
                            "style lora", "风格迁移", "图像转lora"],
            inputs=[
                types.Pipeline.Input("pipeline", tooltip=(
                    "A pipeline with image encoders and nets that write LoRAs: qwen-image-i2l-style or "
                    "qwen-image-i2l in a Model Loader of its own.")),
                io.Image.Input("images", tooltip=(
                    "The pictures, 1 to 32: their style, or with qwen-image-i2l also what they show. The square in "
                    "the middle of each is looked at.")),
                io.String.Input("filename_prefix", default="loras/image_to_lora", tooltip=(
                    "Where in ComfyUI's output folder to save it; a number is added.")),
            ],
            outputs=[types.Lora.Output(display_name="lora", tooltip="The saved LoRA, for Apply LoRA.")],
            is_output_node=True,
        )
        schema.has_intermediate_output = True  # as an argument, ComfyUI before 0.18 would refuse it
        return schema

    @classmethod
    def execute(cls, pipeline: PipelineHandle, images: Tensor, filename_prefix: str) -> io.NodeOutput:
        bias = None
        if needs_bias(pipeline):
            with missing_files_can_be_had(BIAS):
                bias = locate_source(BIAS, IMAGE_TO_LORA_BIAS, host.model_bases()).files[0]
        path, name = host.output_file(filename_prefix, ".safetensors")
        save_lora_of(pipeline, list(images), path, bias, host.each)
        return io.NodeOutput(LoraChoice(name, path), ui=ui.PreviewText(f"saved as {name} in the output folder"))


class ApplyLora(io.ComfyNode):
    """A LoRA that another node has made."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="DiffSynthBackend_ApplyLora",
            display_name="Apply LoRA (DiffSynth)",
            category=types.CATEGORY,
            description="Adds a LoRA from Image to LoRA to a pipeline. For a LoRA that lies in a folder take the LoRA "
                        "Loader.",
            search_aliases=["diffsynth", "apply lora", "image to lora", "i2l", "lora", "use lora", "应用lora"],
            inputs=[
                types.Pipeline.Input("pipeline", tooltip="The pipeline that is to draw, such as qwen-image."),
                types.Lora.Input("lora", tooltip="The LoRA, from Image to LoRA."),
                strength_input("strength"),
            ],
            outputs=[types.Pipeline.Output(display_name="pipeline", tooltip="The pipeline with the LoRA.")],
        )
        schema.has_intermediate_output = True  # as an argument, ComfyUI before 0.18 would refuse it
        return schema

    @classmethod
    def execute(cls, pipeline: PipelineHandle, lora: LoraChoice, strength: float) -> io.NodeOutput:
        return with_loras(pipeline, [LoraChoice(lora.title, lora.file, strength)])
