"""Nodes that change given pictures: edit models, and a mask for what is to be redrawn."""
from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io
from torch import Tensor

from ..diffsynth_backend.pipelines.handle import PipelineHandle
from ..diffsynth_backend.pipelines.steps import Conditioning, give
from . import types
from .values import every, one_mask

MAX_IMAGES = 8
# Which list of pictures, and which timestep for them, a model was trained with.
VARIANTS = {"Edit-2511": {"several": True, "zero_cond_t": True}, "Edit-2509": {"several": True, "zero_cond_t": False},
            "Edit": {"several": False, "zero_cond_t": False}}


def edit_images(images: dict[str, Tensor | None], variant: str) -> Tensor | list[Tensor]:
    """The pictures of all batches as the model of that name takes them. Raises ValueError for too many."""
    pictures = [picture for batch in every(images) for picture in batch]
    if len(pictures) > MAX_IMAGES:
        raise ValueError(f"{len(pictures)} pictures to edit by, at most {MAX_IMAGES} are taken: a batch counts as "
                         "several")
    if VARIANTS[variant]["several"]:
        return pictures
    if len(pictures) != 1:
        raise ValueError(f"{len(pictures)} pictures for {variant}, which takes one: choose Edit-2509 or Edit-2511 if "
                         "that is the model, or leave pictures out")
    return pictures[0]


class EditImages(io.ComfyNode):
    """Pictures for an edit model to draw by."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        images = io.Autogrow.Input(
            "images", tooltip="What to edit. The prompt may call them Picture 1, Picture 2 …, from Edit-2509 on.",
            template=io.Autogrow.TemplatePrefix(
                io.Image.Input("image", tooltip="A picture to edit, or to take something from. A batch is several."),
                prefix="image", min=1, max=MAX_IMAGES))
        return io.Schema(
            node_id="DiffSynthBackend_EditImages",
            display_name="Edit Images (DiffSynth)",
            category=types.CATEGORY,
            description="Pictures that an edit model changes as the prompt says. Before Prompt Encode, so that the "
                        "prompt is read once, with the pictures; behind it works, too.",
            search_aliases=["diffsynth", "qwen image edit", "text encode qwen image edit", "reference image",
                            "reference latent", "firered", "kontext", "instruct", "edit", "qwen edit", "image edit",
                            "try on", "change clothes", "编辑", "图像编辑", "换装", "换背景", "参考图"],
            inputs=[
                types.Pipeline.Input("pipeline", tooltip="The pipeline whose autoencoder encodes the pictures."),
                images,
                io.Combo.Input("variant", options=list(VARIANTS), tooltip=(
                    "Which edit model draws. Edit-2511: Qwen-Image-Edit-2511. Edit-2509: that, and FireRed-Image-Edit. "
                    "Edit: the first Qwen-Image-Edit, which takes one picture.")),
                io.Boolean.Input("auto_resize", default=True, tooltip=(
                    "Bring each picture to about a megapixel, as the models were trained. Off: as it is; its sides "
                    "must be multiples of 16.")),
                io.Boolean.Input("rope_interpolation", default=False, advanced=True, tooltip=(
                    "A small picture lies over the whole of the one to draw: for the LoRA Qwen-Image-Edit-Lowres-Fix, "
                    "with auto_resize off.")),
                types.Conditioning.Input("conditioning", optional=True, tooltip=(
                    "What there is already: a prompt, which is then read once more, or other things to draw by.")),
            ],
            outputs=[types.Conditioning.Output(display_name="conditioning", tooltip=(
                "With the pictures; for Prompt Encode, or for Denoise if the prompt is in it."))],
        )

    @classmethod
    def execute(cls, pipeline: PipelineHandle, images: dict[str, Any], variant: str, auto_resize: bool,
                rope_interpolation: bool, conditioning: Conditioning | None = None) -> io.NodeOutput:
        inputs = {"edit_image": edit_images(images, variant), "edit_image_auto_resize": auto_resize,
                  "edit_rope_interpolation": rope_interpolation, "zero_cond_t": VARIANTS[variant]["zero_cond_t"]}
        return io.NodeOutput(give(pipeline, inputs, conditioning=conditioning))


class Inpaint(io.ComfyNode):
    """Which part of a picture to redraw."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffSynthBackend_Inpaint",
            display_name="Inpaint (DiffSynth)",
            category=types.CATEGORY,
            description="Redraws the masked part and keeps the rest. The picture goes to Denoise as its latent, "
                        "through a VAE Encode.",
            search_aliases=["diffsynth", "inpaint", "mask", "set latent noise mask", "inpaint model conditioning",
                            "outpaint", "fill", "redraw", "重绘", "局部重绘", "遮罩", "蒙版"],
            inputs=[
                types.Conditioning.Input("conditioning", tooltip="What to draw there, from Prompt Encode."),
                io.Mask.Input("mask", tooltip="White is what to redraw. Of any size; one mask serves a whole batch."),
                io.DynamicCombo.Input("blur", options=[
                    io.DynamicCombo.Option("off", []),
                    io.DynamicCombo.Option("on", [
                        io.Int.Input("size", default=2, min=1, max=64, tooltip=(
                            "How far the edge is softened, in latents of 8 pixels.")),
                        io.Float.Input("sigma", default=1.0, min=0.05, max=64.0, step=0.05, tooltip=(
                            "Standard deviation of the blur, in latents: more is softer.")),
                    ]),
                ], tooltip="on: a soft edge between what is redrawn and what is kept."),
            ],
            outputs=[types.Conditioning.Output(display_name="conditioning", tooltip="With the mask, for Denoise.")],
        )

    @classmethod
    def execute(cls, conditioning: Conditioning, mask: Tensor, blur: dict[str, Any]) -> io.NodeOutput:
        inputs = {"inpaint_mask": one_mask("mask", mask)}
        if blur["blur"] == "on":
            inputs |= {"inpaint_blur_size": blur["size"], "inpaint_blur_sigma": blur["sigma"]}
        return io.NodeOutput(give(conditioning.handle, inputs, conditioning=conditioning))
