"""The node that takes a picture apart into layers."""
from __future__ import annotations

from comfy_api.v0_0_2 import io
from torch import Tensor

from ..diffsynth_backend.pipelines.latents import empty_latents
from ..diffsynth_backend.pipelines.steps import Conditioning, give, with_alpha
from . import types
from .values import one, one_mask

MAX_LAYERS = 64


class Layers(io.ComfyNode):
    """The picture to take apart, and a latent for its layers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffSynthBackend_Layers",
            display_name="Layers (DiffSynth)",
            category=types.CATEGORY,
            description="Takes a picture apart into layers with transparency (Qwen-Image-Layered). VAE Decode gives "
                        "the whole picture first, then each layer.",
            search_aliases=["diffsynth", "qwen image layered", "layers", "rgba", "transparency", "decompose", "alpha",
                            "layer control", "layered", "split layers", "图层", "分层", "透明"],
            inputs=[
                types.Conditioning.Input("conditioning", tooltip=(
                    "From Prompt Encode: what is in the whole picture, or with Layered-Control, which layer to get.")),
                io.Image.Input("image", tooltip=(
                    "The picture, with or without an alpha channel. Its sides must be multiples of 16; the layers "
                    "have its size.")),
                io.Mask.Input("alpha", optional=True, tooltip=(
                    "Its transparency, as Load Image gives it: white is transparent. Without it a picture of three "
                    "channels is opaque.")),
                io.Int.Input("layers", default=3, min=0, max=MAX_LAYERS, tooltip=(
                    "How many layers. 0: one picture alone, for Layered-Control.")),
            ],
            outputs=[
                types.Conditioning.Output(display_name="conditioning", tooltip="With the picture, for Denoise."),
                io.Latent.Output(display_name="latent", tooltip=(
                    "Empty, of the picture's size, with room for the whole and each layer; for Denoise.")),
            ],
        )

    @classmethod
    def execute(cls, conditioning: Conditioning, image: Tensor, layers: int,
                alpha: Tensor | None = None) -> io.NodeOutput:
        picture = with_alpha(one("image", image), None if alpha is None else one_mask("alpha", alpha))
        given = give(conditioning.handle, {"layer_input_image": picture}, conditioning=conditioning)
        height, width = picture.shape[:2]
        return io.NodeOutput(given, {"samples": empty_latents(width, height, layers=layers + 1)})
