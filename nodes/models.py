"""Nodes that say which models to use and how to keep them in memory, and the one that loads them."""
from __future__ import annotations

from comfy_api.v0_0_2 import io, ui

from ..diffsynth_backend.core.loader.config import VRAM_FIELDS
from ..diffsynth_backend.core.vram.presets import VRAM_CHOICES
from ..diffsynth_backend.pipelines.families import FAMILIES
from ..diffsynth_backend.pipelines.handle import VramChoice
from ..diffsynth_backend.pipelines.locate import preset_parts
from ..diffsynth_backend.pipelines.presets import MODEL_PRESETS
from . import host, types
from .downloading import missing_files_can_be_had
from .loading import DTYPES, FROM_PRESET, field_choices, load, overrides, source_of, sources_of
from .values import every

MAX_CONFIGS = 8
MAX_EXTRAS = 8
OWN_FILES = "model configs"

STATE_TOOLTIPS = {
    "offload": "while its model is not in use",
    "onload": "while its model is in use and the layer waits for its turn",
    "preparing": "for a layer that the limit allows to stay on the card",
    "computation": "while the layer computes",
}
PART_TOOLTIPS = {"dtype": "The precision of a layer's weights {}.", "device": "Where a layer's weights are {}."}
FIELD_TOOLTIPS = {name: PART_TOOLTIPS[part].format(STATE_TOOLTIPS[state])
                  + " Replaces what the preset says; with custom, which says nothing, the default is the computation's."
                  for name in VRAM_FIELDS for state, part in [name.split("_")]}


class ModelConfigNode(io.ComfyNode):
    """One model: a part of a known one, or a file from ComfyUI's folders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffSynthBackend_ModelConfig",
            display_name="Model Config (DiffSynth)",
            category=types.CATEGORY,
            description="Names the file of one model for the Model Loader. What the file contains is recognised by its "
                        "layout, so any file of a supported model will do, whatever it is called.",
            search_aliases=["diffsynth", "load diffusion model", "load vae", "load clip", "safetensors", "checkpoint",
                            "load unet", "model file", "模型文件", "加载模型"],
            inputs=[
                io.Combo.Input("model", options=[*preset_parts(), *host.model_files()], tooltip=(
                    "A part of a known model (looked for in models/diffsynth), or a file from ComfyUI's folders "
                    "diffusion_models, text_encoders, vae, clip_vision, model_patches and diffsynth: safetensors, or "
                    "a pickle (.pth, .bin, .ckpt) as far as the setting DiffSynth, Pickles allows. Of a model in "
                    "several files (…-00001-of-00009) the first stands for all.")),
            ],
            outputs=[types.ModelConfig.Output(display_name="model config", tooltip="The file, for a Model Loader.")],
        )

    @classmethod
    def validate_inputs(cls, model: str) -> bool | str:
        if model in preset_parts() or model in host.model_files():
            return True
        return (f"{model!r} is not among the models that this ComfyUI has: put the file into models/diffusion_models, "
                "text_encoders, vae, clip_vision, model_patches or diffsynth, and press R to refresh the list, or "
                "choose another entry")

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        with missing_files_can_be_had(model):
            return io.NodeOutput(source_of(model))


class VramConfig(io.ComfyNode):
    """How a pipeline keeps its weights in memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        summaries = "\n".join(f"{name}: {summary}" for name, summary in VRAM_CHOICES.items())
        return io.Schema(
            node_id="DiffSynthBackend_VramConfig",
            display_name="VRAM Config (DiffSynth)",
            category=types.CATEGORY,
            description="Decides where a pipeline's weights rest and how they reach the card. Without this node the "
                        "Model Loader decides by itself, as the preset auto does.",
            search_aliases=["diffsynth", "low vram", "offload", "block swap", "fp8", "memory", "vram", "low memory",
                            "out of memory", "oom", "显存", "低显存", "爆显存", "卸载"],
            inputs=[
                io.Combo.Input("preset", options=list(VRAM_CHOICES), default="low", tooltip=summaries),
                io.DynamicCombo.Input("vram_limit", options=[
                    io.DynamicCombo.Option("automatic", []),
                    io.DynamicCombo.Option("GiB", [io.Float.Input(
                        "gib", default=8.0, min=0.0, max=1024.0, step=0.5, tooltip=(
                            "GiB of the card, for weights that stay, the buffer that others pass through, and the "
                            "loop's computation. 0: no layer stays, each is copied when it computes. A number below "
                            "what the computation needs is an error that says how much that is."))]),
                    io.DynamicCombo.Option("none", []),
                ], tooltip="How much of the card is for the pipeline. automatic: all but a tenth, at least 1.5 GiB; on "
                           "a CPU, and where whole models move, no limit. none: everything may stay."),
                *(io.Combo.Input(name, options=field_choices(name), default=FROM_PRESET, advanced=True, tooltip=tooltip)
                  for name, tooltip in FIELD_TOOLTIPS.items()),
                io.DynamicCombo.Input("ram_limit", options=[
                    io.DynamicCombo.Option("none", []),
                    io.DynamicCombo.Option("GiB", [io.Float.Input(
                        "gib", default=8.0, min=0.0, max=1024.0, step=0.5, tooltip=(
                            "GiB of RAM. As many layers as fit are read from disk once a run instead of once a step; "
                            "they are dropped when their model is no longer in use."))]),
                ], optional=True, tooltip="RAM in which layers may wait that would be read from disk in each step, for "
                                          "the presets disk and auto. none: all of them are read in each step."),
            ],
            outputs=[types.VramConfig.Output(display_name="vram config", tooltip="For a Model Loader.")],
        )

    @classmethod
    def execute(cls, preset: str, vram_limit: dict, ram_limit: dict | None = None, **fields: str) -> io.NodeOutput:
        limits = {"automatic": "automatic", "GiB": vram_limit.get("gib"), "none": None}
        return io.NodeOutput(VramChoice(preset, limits[vram_limit["vram_limit"]], overrides(fields),
                                        (ram_limit or {}).get("gib")))


class ModelLoader(io.ComfyNode):
    """Loads a pipeline and says what it found."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        configs = io.Autogrow.Input(
            "configs", tooltip="One Model Config for each model of the pipeline.", template=io.Autogrow.TemplatePrefix(
                types.ModelConfig.Input("config", tooltip="A model for the pipeline."),
                prefix="config", min=1, max=MAX_CONFIGS))
        family = io.Combo.Input("family", options=list(FAMILIES), tooltip="The kind of pipeline that the files make.")
        schema = io.Schema(
            node_id="DiffSynthBackend_ModelLoader",
            display_name="Model Loader (DiffSynth)",
            category=types.CATEGORY,
            description="Loads a pipeline: text encoder, denoiser and autoencoder. Each file is recognised by its "
                        "layout; what was found is written below the node.",
            search_aliases=["diffsynth", "load checkpoint", "load model", "qwen image", "pipeline", "demo", "qwen",
                            "qwen-image", "low vram", "加载模型", "模型加载器", "千问"],
            inputs=[
                io.DynamicCombo.Input("model", options=[
                    *(io.DynamicCombo.Option(name, []) for name in MODEL_PRESETS),
                    io.DynamicCombo.Option(OWN_FILES, [family, configs]),
                ], tooltip="A known model, or files that Model Configs name. demo and demo-video are "
                           "part of this pack; the files of the others are looked for in "
                           "models/diffsynth/<owner>/<name>. Nothing is downloaded."),
                io.Combo.Input("dtype", options=DTYPES, default=DTYPES[0], advanced=True, tooltip=(
                    "The precision to compute in. automatic: bfloat16, on a CPU float32.")),
                types.VramConfig.Input("vram", display_name="vram config", optional=True, tooltip=(
                    "Where weights rest. Without it as its preset auto: on the card if all fit, else streamed from "
                    "RAM, else from the files.")),
                # Not inside the choice of the model: the page cannot build a first choice that has sockets alone.
                io.Autogrow.Input("extras", optional=True, tooltip=(
                    "Models besides: ControlNets, in the order in which Control counts them, and the like."),
                    template=io.Autogrow.TemplatePrefix(
                        types.ModelConfig.Input("extra", optional=True, tooltip="A model that some features need."),
                        prefix="extra", min=0, max=MAX_EXTRAS)),
            ],
            outputs=[types.Pipeline.Output(display_name="pipeline", tooltip="The pipeline, for this pack's nodes.")],
            hidden=[io.Hidden.unique_id],
        )
        schema.has_intermediate_output = True  # as an argument, ComfyUI before 0.18 would refuse it
        return schema

    @classmethod
    def execute(cls, dtype: str, model: dict | None = None, vram: VramChoice | None = None,
                extras: dict | None = None) -> io.NodeOutput:
        if model is None:  # ComfyUI leaves out a choice that it does not know, from a newer version's workflow perhaps
            raise ValueError(f"this version does not know the chosen model: choose {', '.join(MODEL_PRESETS)} or "
                             f"{OWN_FILES}, or update the pack")
        choice = model["model"]
        if choice == OWN_FILES:
            family, size = model["family"], None
            sources = every(model["configs"])
        else:
            preset = MODEL_PRESETS[choice]
            family, size = preset.family, (preset.width, preset.height)
            with missing_files_can_be_had(choice):
                sources = sources_of(choice)
        handle, text = load(family, (*sources, *every(extras or {})), dtype, vram, cls.hidden.unique_id, size)
        return io.NodeOutput(handle, ui=ui.PreviewText(text))
