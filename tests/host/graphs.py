"""Prompts in API format, as the page sends them."""
from __future__ import annotations

from typing import Any

from tests.helpers.models_folder import FILES

PREFIX = "DiffSynthBackend_"
Graph = dict[str, dict[str, Any]]
OURS = {"ModelConfig", "ModelLoader", "VramConfig", "PromptEncode", "EmptyLatent", "Denoise", "VaeDecode", "VaeEncode",
        "EditImages", "Inpaint", "Control", "ControlNetApply", "InContextControl", "Entity", "Entities", "Layers",
        "LoraLoader", "LoraStack", "ImageToLora", "ApplyLora", "DownloadModels",
        "EmptyVideoLatent", "ImageToVideo", "VACE", "VideoControl", "Camera", "VideoOptions"}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node of ours by its short name, or any other by its own; a dot in an input's name is written as `__`."""
    return {"class_type": f"{PREFIX if kind in OURS else ''}{kind}",
            "inputs": {name.replace("__", "."): value for name, value in inputs.items()}}


def loader(*files: str, name: str = "load", family: str = "qwen-image", **inputs: Any) -> Graph:
    """A Model Loader called `name`, with a Model Config for each file."""
    configs = {f"{name}{i}": node("ModelConfig", model=file) for i, file in enumerate(files)}
    links = {f"model__configs__config{i}": [f"{name}{i}", 0] for i in range(len(files))}
    return {**configs, name: node("ModelLoader", model="model configs", model__family=family, dtype="automatic",
                                  **links, **inputs)}


def vram(preset: str, limit: str = "none", **more: Any) -> dict[str, Any]:
    """A VRAM Config that leaves the eight fields to the preset."""
    fields = {f"{state}_{part}": "from preset" for state in ("offload", "onload", "preparing", "computation")
              for part in ("dtype", "device")}
    return node("VramConfig", preset=preset, vram_limit=limit, **fields, **more)


def denoise(load: str = "load", prompt: str = "prompt", latent: str = "empty", **changes: Any) -> dict[str, Any]:
    inputs = {"pipeline": [load, 0], "conditioning": [prompt, 0], "latent": [latent, 0], "seed": 1, "cfg": 4.0,
              "cfg_norm": False, "schedule": "steps", "schedule__steps": 3, "schedule__denoise": 1.0}
    return node("Denoise", **{**inputs, **changes})


def text_to_image(*files: str, size: int = 64, batch: int = 1, **changes: Any) -> Graph:
    """From a prompt to a previewed picture, with the tiny files unless others are named; `changes` are Denoise's."""
    return {**loader(*(files or FILES)),
            "prompt": node("PromptEncode", pipeline=["load", 0], positive="a red circle", negative=""),
            "empty": node("EmptyLatent", width=size, height=size, batch_size=batch),
            "denoise": denoise(**changes),
            "decode": node("VaeDecode", pipeline=["load", 0], samples=["denoise", 0], tiling="off"),
            "show": node("PreviewImage", images=["decode", 0])}
