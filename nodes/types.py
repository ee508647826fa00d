"""The types of our sockets. Every value on one of these wires is a frozen dataclass of the backend.

PIPELINE      pipelines.handle.PipelineHandle: which files, where, how; never weights
CONDITIONING  pipelines.steps.Conditioning: prompts, and whatever else there is to draw by, as a pipeline's inputs
CONTROL       pipelines.qwen_image_control.ControlNetInput: a picture that controls, and how
ENTITY        pipelines.qwen_image_steps.Entity: a prompt for a region
LORA          pipelines.handle.LoraChoice: a LoRA's file
MODEL_CONFIG  pipelines.handle.ModelSource: the files of one model
VRAM_CONFIG   pipelines.handle.VramChoice: preset, limit, fields
"""
from __future__ import annotations

from comfy_api.v0_0_2 import io

Pipeline = io.Custom("DIFFSYNTH_PIPELINE")
Conditioning = io.Custom("DIFFSYNTH_CONDITIONING")
Control = io.Custom("DIFFSYNTH_CONTROL")
Entity = io.Custom("DIFFSYNTH_ENTITY")
Lora = io.Custom("DIFFSYNTH_LORA")
ModelConfig = io.Custom("DIFFSYNTH_MODEL_CONFIG")
VramConfig = io.Custom("DIFFSYNTH_VRAM_CONFIG")

CATEGORY = "DiffSynth"
