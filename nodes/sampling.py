"""Nodes of the loop: the empty latent that it may start from, and the loop itself."""
from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io, ui

from ..diffsynth_backend.pipelines.handle import PipelineHandle
from ..diffsynth_backend.pipelines.latents import empty_latents
from ..diffsynth_backend.pipelines.steps import MAX_BATCH, Conditioning, Sigmas, Steps, sample
from . import host, types

MAX_SIDE = 16384
MAX_STEPS = 10000
TEMPLATES = {"lightning": "Qwen-Image-Lightning"}  # of the scheduler, by the name of the choice
STEPS_TOOLTIP = "How many times the picture is refined. All of them are run, whatever denoise is."


def steps_inputs(steps: int) -> list:
    """How many steps, by default these, and from where on."""
    return [
        io.Int.Input("steps", default=steps, min=1, max=MAX_STEPS, tooltip=STEPS_TOOLTIP),
        io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip=(
            "How much of the latent to replace. 1: all, the latent gives only the size. Lower: image to image.")),
    ]


def plan(schedule: dict[str, Any]) -> Steps | Sigmas:
    """The choice as a schedule of the backend."""
    kind = schedule["schedule"]
    if kind == "sigmas":
        return Sigmas(tuple(map(float, schedule["sigmas"])), schedule["add_noise"])
    return Steps(schedule["steps"], schedule["denoise"], TEMPLATES.get(kind), schedule.get("mu"), schedule.get("shift"))


class EmptyLatent(io.ComfyNode):
    """Where a picture from nothing begins."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffSynthBackend_EmptyLatent",
            display_name="Empty Latent (DiffSynth)",
            category=types.CATEGORY,
            description="An empty latent for the size of the picture. Denoise fills it with noise.",
            search_aliases=["diffsynth", "empty latent image", "width", "height", "size", "resolution", "batch",
                            "潜空间", "潜变量", "空latent", "尺寸", "分辨率"],
            inputs=[
                io.Int.Input("width", default=1328, min=16, max=MAX_SIDE, step=16, tooltip="Pixels of the picture."),
                io.Int.Input("height", default=1328, min=16, max=MAX_SIDE, step=16, tooltip="Pixels of the picture."),
                io.Int.Input("batch_size", default=1, min=1, max=MAX_BATCH, tooltip="How many pictures at once."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Zeros of the right shape, for Denoise.")],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> io.NodeOutput:
        return io.NodeOutput({"samples": empty_latents(width, height, batch_size)})


class Denoise(io.ComfyNode):
    """The denoising loop, with KSampler's habits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        mu = io.Float.Input("mu", default=0.916, min=-10.0, max=10.0, step=0.001, tooltip=(
            "Logarithm of the schedule's shift, whatever the size of the picture: 0.916 is a shift of 2.5, 1.099 one "
            "of 3."))
        shift = io.Float.Input("shift", default=5.0, min=0.01, max=100.0, step=0.01, tooltip=(
            "For videos: more spends more steps where there is much noise. Wan takes 5, FLF2V 16."))
        sigmas = [
            io.Sigmas.Input("sigmas", tooltip="The schedule, from a scheduler for flow models."),
            io.Boolean.Input("add_noise", default=True, tooltip=(
                "Off for a latent that still has noise in it: the second part of a schedule that was split.")),
        ]
        schema = io.Schema(
            node_id="DiffSynthBackend_Denoise",
            display_name="Denoise (DiffSynth)",
            category=types.CATEGORY,
            description="Draws: removes noise from a latent, step by step, as the prompt says. Takes and gives "
                        "ComfyUI's own latents, so native nodes fit before and behind it.",
            search_aliases=["diffsynth", "ksampler", "sampler", "sample", "generate", "image to image", "img2img",
                            "denoise", "text to image", "txt2img", "text to video", "lightning", "采样器", "降噪",
                            "文生图", "图生图", "文生视频"],
            inputs=[
                types.Pipeline.Input("pipeline", tooltip="The pipeline whose denoiser draws."),
                types.Conditioning.Input("conditioning", tooltip="The prompts, from Prompt Encode."),
                io.Latent.Input("latent", tooltip="Its size is the picture's; with denoise below 1 also its content."),
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff, control_after_generate=True, tooltip=(
                    "The same seed draws the same picture. One seed serves a whole batch.")),
                io.Float.Input("cfg", default=4.0, min=0.0, max=100.0, step=0.1, tooltip=(
                    "How closely to follow the prompt. 1 turns guidance off: twice as fast, no negative prompt.")),
                io.DynamicCombo.Input("schedule", options=[
                    io.DynamicCombo.Option("steps", steps_inputs(20)), io.DynamicCombo.Option("sigmas", sigmas),
                    io.DynamicCombo.Option("lightning", steps_inputs(4)),
                    io.DynamicCombo.Option("fixed shift", [*steps_inputs(20), mu]),
                    io.DynamicCombo.Option("video", [*steps_inputs(50), shift]),
                ], tooltip="steps: the model's own schedule. sigmas: one from a scheduler node. lightning: for "
                           "Lightning LoRAs, with cfg 1. fixed shift: the model's own, shifted as given. "
                           "video: Wan's own, with its shift."),
                io.Boolean.Input("cfg_norm", default=False, advanced=True, tooltip=(
                    "Guidance that keeps the length of the prediction, as diffusers does it: calmer at high cfg.")),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The finished latent, for a VAE Decode.")],
        )
        schema.has_intermediate_output = True  # as an argument, ComfyUI before 0.18 would refuse it
        return schema

    @classmethod
    def execute(cls, pipeline: PipelineHandle, conditioning: Conditioning, latent: dict, seed: int, cfg: float,
                schedule: dict, cfg_norm: bool) -> io.NodeOutput:
        lines: list[str] = []
        samples = sample(pipeline, conditioning, latent["samples"], plan(schedule), seed, cfg, cfg_norm=cfg_norm,
                         batch_index=latent.get("batch_index"), noise_mask=latent.get("noise_mask"),
                         report=lines.append, step_callback=host.DenoiseProgress(pipeline.device))
        return io.NodeOutput({"samples": samples}, ui=ui.PreviewText("\n".join(lines)) if lines else None)
