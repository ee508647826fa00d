"""Nodes of the autoencoder: between pictures and latents."""
from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..diffsynth_backend.pipelines.handle import PipelineHandle
from ..diffsynth_backend.pipelines.steps import Tiles, decode_latents, encode_pictures
from . import host, types


def tiling_input() -> io.DynamicCombo.Input:
    """Whether to work tile by tile, and with which."""
    return io.DynamicCombo.Input("tiling", options=[
        io.DynamicCombo.Option("off", []),
        io.DynamicCombo.Option("on", [
            io.Int.Input("tile_size", default=1024, min=128, max=8192, step=64, tooltip="Side of a tile, in pixels."),
            io.Int.Input("overlap", default=256, min=0, max=4096, step=32, tooltip=(
                "Pixels that neighbouring tiles share; must be less than tile_size. More hides seams better.")),
        ]),
    ], tooltip="on: tile by tile, for large pictures on small cards. It needs less memory and more time.")


def tiles(tiling: dict) -> Tiles | None:
    """The choice as the backend takes it."""
    if tiling["tiling"] == "off":
        return None
    size, overlap = tiling["tile_size"], tiling["overlap"]
    if overlap >= size:
        raise ValueError(f"overlap is {overlap} pixels and tile_size {size}: the overlap must be smaller")
    return Tiles(size, size - overlap)


class VaeDecode(io.ComfyNode):
    """Latent → picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffSynthBackend_VaeDecode",
            display_name="VAE Decode (DiffSynth)",
            category=types.CATEGORY,
            description="Turns a latent into a picture with the pipeline's autoencoder. ComfyUI's own VAE Decode does "
                        "the same with a VAE that it has loaded.",
            search_aliases=["diffsynth", "decode", "latent to image", "vae decode tiled", "decode latent", "解码",
                            "潜空间转图像"],
            inputs=[
                types.Pipeline.Input("pipeline", tooltip="The pipeline whose autoencoder decodes."),
                io.Latent.Input("samples", tooltip="The latent to decode, one picture for each entry of its batch."),
                tiling_input(),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The decoded pictures.")],
        )

    @classmethod
    def execute(cls, pipeline: PipelineHandle, samples: dict, tiling: dict) -> io.NodeOutput:
        return io.NodeOutput(decode_latents(pipeline, samples["samples"], tiles(tiling), host.each))


class VaeEncode(io.ComfyNode):
    """Picture → latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffSynthBackend_VaeEncode",
            display_name="VAE Encode (DiffSynth)",
            category=types.CATEGORY,
            description="Turns pictures into a latent with the pipeline's autoencoder, for image to image. Several "
                        "pictures become a batch.",
            search_aliases=["diffsynth", "encode", "image to latent", "vae encode tiled", "image to image",
                            "encode image", "img2img", "编码", "图像转潜空间", "图生图"],
            inputs=[
                types.Pipeline.Input("pipeline", tooltip="The pipeline whose autoencoder encodes."),
                io.Image.Input("pixels", tooltip="The pictures; width and height must be multiples of 16."),
                tiling_input(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The encoded pictures, for Denoise.")],
        )

    @classmethod
    def execute(cls, pipeline: PipelineHandle, pixels: io.Image.Type, tiling: dict) -> io.NodeOutput:
        return io.NodeOutput({"samples": encode_pictures(pipeline, pixels, tiles(tiling), host.each)})
