"""The nodes, and the entry point through which ComfyUI asks for them.

Notable: nodes declare inputs, call the backend and return; whatever concerns the program around them is in `host`.
"""
from __future__ import annotations

from comfy_api.v0_0_2 import ComfyExtension, io

from . import downloading, estimate, host, replacements
from .control import Control, ControlNetApply, InContextControl
from .downloads import DownloadModels
from .editing import EditImages, Inpaint
from .entities import Entities, EntityNode
from .layers import Layers
from .lora import ApplyLora, ImageToLora, LoraLoader, LoraStack
from .models import ModelConfigNode, ModelLoader, VramConfig
from .prompts import PromptEncode
from .sampling import Denoise, EmptyLatent
from .vae import VaeDecode, VaeEncode
from .video import Camera, EmptyVideoLatent, ImageToVideo, Vace, VideoControl, VideoOptions

NODES: list[type[io.ComfyNode]] = [ModelLoader, ModelConfigNode, VramConfig, PromptEncode, EmptyLatent, Denoise,
                                   VaeDecode, VaeEncode, EditImages, Inpaint, Control, ControlNetApply,
                                   InContextControl, EntityNode, Entities, Layers, LoraLoader, LoraStack, ImageToLora,
                                   ApplyLora, DownloadModels, EmptyVideoLatent, ImageToVideo, Vace, VideoControl,
                                   Camera, VideoOptions]


class DiffSynthExtension(ComfyExtension):
    """Hands the nodes to ComfyUI."""

    async def on_load(self) -> None:
        host.register()
        host.serve("/diffsynth_backend/models", downloading.state)
        host.serve("/diffsynth_backend/memory", host.feed.state)
        host.serve("/diffsynth_backend/estimate", estimate.answer)
        await replacements.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)


async def comfy_entrypoint() -> DiffSynthExtension:
    return DiffSynthExtension()
