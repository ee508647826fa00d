"""Nodes that let a picture control what is drawn: ControlNets, and in-context control."""
from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io
from torch import Tensor

from ..diffsynth_backend.pipelines.qwen_image_control import ControlNetInput
from ..diffsynth_backend.pipelines.qwen_image_steps import give_controls
from ..diffsynth_backend.pipelines.steps import Conditioning, give
from . import types
from .values import every, one, one_mask

MAX_CONTROLS = 8


class Control(io.ComfyNode):
    """One picture for one ControlNet."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffSynthBackend_Control",
            display_name="Control (DiffSynth)",
            category=types.CATEGORY,
            description="A picture for a ControlNet, and when and how strongly it acts. The net itself is a Model "
                        "Config at the Model Loader.",
            search_aliases=["diffsynth", "controlnet", "canny", "depth", "blockwise controlnet", "inpaint controlnet",
                            "control image", "edges", "pose", "控制图", "边缘", "深度图", "线稿"],
            inputs=[
                io.Image.Input("image", tooltip=(
                    "What the net was trained on: edges for Canny, a depth map for Depth, the picture itself for "
                    "Inpaint. It is resized to the picture that is drawn.")),
                io.Mask.Input("mask", optional=True, tooltip=(
                    "For an inpainting net, and for no other: white is what to redraw.")),
                io.Int.Input("net", default=0, min=0, max=63, tooltip=(
                    "Which of the loader's ControlNets, in the order of its Model Configs: 0 is the first.")),
                io.Float.Input("scale", default=1.0, min=-10.0, max=10.0, step=0.05, tooltip=(
                    "How strongly it controls. 0: not at all.")),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, tooltip=(
                    "From where on it controls: 0 is the first step, 1 the last.")),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=(
                    "Up to where it controls: 0 is the first step, 1 the last.")),
            ],
            outputs=[types.Control.Output(display_name="control", tooltip="For ControlNet Apply.")],
        )

    @classmethod
    def execute(cls, image: Tensor, net: int, scale: float, start_percent: float, end_percent: float,
                mask: Tensor | None = None) -> io.NodeOutput:
        if start_percent > end_percent:
            raise ValueError(f"start_percent is {start_percent:g} and end_percent {end_percent:g}: it must not end "
                             "before it starts")
        return io.NodeOutput(ControlNetInput(  # whose progress runs from 1 down to 0
            net, scale, start=1 - start_percent, end=1 - end_percent, image=one("image", image),
            inpaint_mask=None if mask is None else one_mask("mask", mask)))


class ControlNetApply(io.ComfyNode):
    """All the pictures for ControlNets at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        controls = io.Autogrow.Input(
            "controls", tooltip="Pictures that control, one after the other.", template=io.Autogrow.TemplatePrefix(
                types.Control.Input("control", tooltip="From a Control node."), prefix="control", min=1,
                max=MAX_CONTROLS))
        return io.Schema(
            node_id="DiffSynthBackend_ControlNetApply",
            display_name="ControlNet Apply (DiffSynth)",
            category=types.CATEGORY,
            description="Lets pictures control what is drawn, each through a ControlNet of the pipeline. What several "
                        "of them say is added.",
            search_aliases=["diffsynth", "apply controlnet", "controlnet", "canny", "depth", "blockwise controlnet",
                            "use controlnet", "应用controlnet", "控制"],
            inputs=[types.Conditioning.Input("conditioning", tooltip="What to draw, from Prompt Encode."), controls],
            outputs=[types.Conditioning.Output(display_name="conditioning", tooltip=(
                "With the pictures that control, for Denoise."))],
        )

    @classmethod
    def execute(cls, conditioning: Conditioning, controls: dict[str, Any]) -> io.NodeOutput:
        return io.NodeOutput(give_controls(conditioning, every(controls)))


class InContextControl(io.ComfyNode):
    """A picture that controls without a net of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffSynthBackend_InContextControl",
            display_name="In-Context Control (DiffSynth)",
            category=types.CATEGORY,
            description="A picture (edges, depth, pose …) that the denoiser itself reads beside the one it draws. It "
                        "needs the LoRA Qwen-Image-In-Context-Control-Union.",
            search_aliases=["diffsynth", "in context control", "context image", "control lora", "canny", "depth",
                            "openpose", "union control", "pose", "姿态", "上下文控制", "线稿"],
            inputs=[
                types.Conditioning.Input("conditioning", tooltip=(
                    "What to draw, from Prompt Encode. Begin the prompt with \"Context_Control. \": that is how the "
                    "LoRA was trained.")),
                io.Image.Input("image", tooltip="The picture that controls. It is resized to the one that is drawn."),
            ],
            outputs=[types.Conditioning.Output(display_name="conditioning", tooltip=(
                "With the picture that controls, for Denoise."))],
        )

    @classmethod
    def execute(cls, conditioning: Conditioning, image: Tensor) -> io.NodeOutput:
        return io.NodeOutput(give(conditioning.handle, {"context_image": one("image", image)},
                                  conditioning=conditioning))
