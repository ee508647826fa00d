"""Qwen-Image's units that look at pictures: edit images, the source of layers, in-context control, and the prompt.

Notable: the prompt sees edit images too, at the size of their latents. Each unit resizes for itself and leaves what it
was given as it is, so either may run first, and again, without resizing twice.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..diffusion import PipelineUnit
from ..diffusion.base_pipeline import MAX_PIXELS
from ..utils.pictures import Picture, check_picture, resized, size_of
from .prompts import check_prompt
from .qwen_image_prompts import PicturePrompts, check_aspect, fitted_size, in_colour

if TYPE_CHECKING:
    from .qwen_image import QwenImagePipeline

EDIT_AREA = 1024 * 1024  # pixels of a resized edit image, about
MULTIPLE = 16  # pixels per token: the VAE's 8 times the denoiser's 2
LAYER_CHANNELS = 4  # RGBA
TILES = ("tiled", "tile_size", "tile_stride")

EditImage = Picture | list[Picture] | tuple[Picture, ...]


def edit_pictures(edit_image: EditImage, auto_resize: bool | None = None) -> tuple[Picture, ...]:
    """The picture or pictures as they are edited: in colour, resized to about 1024² unless `auto_resize` is False.

    Resized sides are multiples of 32 in about the same proportion. Raises TypeError or ValueError for what is no
    picture, an empty list, a picture that is too long, and, where nothing is resized, sides that are not multiples of
    16 or too many pixels.
    """
    if _is_one(edit_image):
        return (_edited("edit_image", edit_image, auto_resize),)
    if not edit_image:
        raise ValueError("edit_image is an empty list: give at least one picture, or leave it out")
    return tuple(_edited(f"edit_image {number}", picture, auto_resize)
                 for number, picture in enumerate(edit_image, 1))


def _is_one(edit_image: EditImage) -> bool:
    return not isinstance(edit_image, list | tuple)


def _edited(what: str, picture: Picture, auto_resize: bool | None) -> Picture:
    width, height = size_of(check_picture(what, picture))
    check_aspect(what, width, height)
    if auto_resize is False:
        check_sides(what, picture, "or leave edit_image_auto_resize on")
        return in_colour(picture)
    width, height = fitted_size(width, height, EDIT_AREA)
    check_aspect(f"{what}, resized for editing,", width, height)
    return resized(in_colour(picture), width, height)


def check_sides(what: str, picture: Picture, otherwise: str = "") -> None:
    """Raises ValueError unless the model can take the picture at its own size."""
    width, height = size_of(picture)
    if width % MULTIPLE or height % MULTIPLE or width * height > MAX_PIXELS:
        raise ValueError(f"{what} is {width}×{height} (width × height): both must be multiples of {MULTIPLE}, with "
                         f"{MAX_PIXELS} pixels at most; resize it {otherwise}".rstrip())


def image_channels(pipe: QwenImagePipeline) -> int:
    """How many channels the VAE's pictures have. Raises ValueError when none is loaded."""
    pipe.check_loaded(["vae"])
    return pipe.vae.image_channels


def encode_picture(pipe: QwenImagePipeline, picture: Picture, tiled: bool | None, tile_size: int | None,
                   tile_stride: int | None) -> Tensor:
    """Normalised latents (1, 16, H/8, W/8) of a picture, with alpha if the loaded VAE has it."""
    image = pipe.preprocess_image(picture, channels=image_channels(pipe))
    tiles = {"tile_size": tile_size, "tile_stride": tile_stride} if tiled else {}
    return pipe.encode_image(image, bool(tiled), **tiles)


class QwenImageUnit_EditImageEmbedder(PipelineUnit):
    """Pictures to edit as normalised latents, one tensor (1, 16, h, w) each; see `edit_pictures` for their sizes.

    One picture is Qwen-Image-Edit's way, a list (also of one) that of Edit-2509 and later.
    """

    def __init__(self) -> None:
        super().__init__(input_params=("edit_image", "tiled", "tile_size", "tile_stride", "edit_image_auto_resize"),
                         output_params=("edit_latents",), onload_model_names=("vae",),
                         optional_params=("edit_image_auto_resize", *TILES))

    def process(self, pipe: QwenImagePipeline, edit_image: EditImage | None, tiled: bool | None,
                tile_size: int | None, tile_stride: int | None, edit_image_auto_resize: bool | None = None) -> dict:
        if edit_image is None:
            return {}
        pictures = edit_pictures(edit_image, edit_image_auto_resize)
        return {"edit_latents": tuple(encode_picture(pipe, picture, tiled, tile_size, tile_stride)
                                      for picture in pictures)}


class QwenImageUnit_LayerInputImageEmbedder(PipelineUnit):
    """The picture that Qwen-Image-Layered takes apart, with its alpha, as normalised latents (1, 16, h, w)."""

    def __init__(self) -> None:
        super().__init__(input_params=("layer_input_image", "tiled", "tile_size", "tile_stride"),
                         output_params=("layer_input_latents",), onload_model_names=("vae",), optional_params=TILES)

    def process(self, pipe: QwenImagePipeline, layer_input_image: Picture | None, tiled: bool | None,
                tile_size: int | None, tile_stride: int | None) -> dict:
        if layer_input_image is None:
            return {}
        check_sides("layer_input_image", check_picture("layer_input_image", layer_input_image))
        if (channels := image_channels(pipe)) != LAYER_CHANNELS:
            raise ValueError(f"layer_input_image needs the VAE of Qwen-Image-Layered, which has {LAYER_CHANNELS} image "
                             f"channels; the one that is loaded has {channels}")
        return {"layer_input_latents": encode_picture(pipe, layer_input_image, tiled, tile_size, tile_stride)}


class QwenImageUnit_ContextImageEmbedder(PipelineUnit):
    """In-context control: a picture, resized to the one to draw, as normalised latents (1, 16, H/8, W/8).

    Qwen-Image-In-Context-Control-Union reads it when the prompt begins with "Context_Control. ", which is the user's
    to write: other models of this input want other prompts.
    """

    def __init__(self) -> None:
        super().__init__(input_params=("context_image", "height", "width", "tiled", "tile_size", "tile_stride"),
                         output_params=("context_latents",), onload_model_names=("vae",))

    def process(self, pipe: QwenImagePipeline, context_image: Picture | None, height: int, width: int,
                tiled: bool | None, tile_size: int | None, tile_stride: int | None) -> dict:
        if context_image is None:
            return {}
        check_picture("context_image", context_image)
        picture = resized(in_colour(context_image, image_channels(pipe)), width, height)
        return {"context_latents": encode_picture(pipe, picture, tiled, tile_size, tile_stride)}


class QwenImageUnit_PromptEmbedder(PipelineUnit):
    """Prompts as the text encoder's hidden states, once per side; both sides see the edit images."""

    def __init__(self) -> None:
        super().__init__(seperate_cfg=True, input_params=("edit_image", "edit_image_auto_resize"),
                         input_params_posi={"prompt": "prompt"}, input_params_nega={"prompt": "negative_prompt"},
                         output_params=("prompt_emb", "prompt_emb_mask"), onload_model_names=("text_encoder",),
                         optional_params=("edit_image", "edit_image_auto_resize"))

    def process(self, pipe: QwenImagePipeline, prompt: str, edit_image: EditImage | None = None,
                edit_image_auto_resize: bool | None = None) -> dict:
        check_prompt(prompt)
        pictures = () if edit_image is None else edit_pictures(edit_image, edit_image_auto_resize)
        pipe.load_models_to_device(self.onload_model_names)
        if edit_image is None:
            embedding, mask = pipe.prompts.embed(pipe.text_encoder, [prompt], pipe.device)
        else:
            prompts = PicturePrompts(pipe.prompts.tokenizer)
            embedding, mask = prompts.embed(pipe.text_encoder, prompt, pictures, not _is_one(edit_image), pipe.device)
        return {"prompt_emb": embedding.to(pipe.torch_dtype), "prompt_emb_mask": mask}
