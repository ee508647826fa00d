"""Image to LoRA for Qwen-Image: pictures in, a LoRA out that draws like them. Both units are called by hand.

Notable: a net gets all pictures in one pass, so 16 GB of weights that stream are read once and not once per picture.
The LoRAs of several pictures, and of several nets, are laid side by side in rank: what they add to a layer is the sum.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..diffusion import PipelineUnit
from ..models import dinov3_image_encoder, siglip2_image_encoder
from ..utils.lora import merge_lora
from ..utils.lora.merge import check_mergeable
from ..utils.pictures import Picture, check_picture, pixels, size_of
from .qwen_image_prompts import PicturePrompts, in_colour

if TYPE_CHECKING:
    from .qwen_image import QwenImagePipeline

# Sides of the square that is cut from a picture: for the image encoders and the fine net, and for the coarse net. The
# text encoder makes 1376 and 71 tokens of them, for which the nets were trained.
SIDE, COARSE_SIDE = 1024, 28 * 8
ENCODERS = ("siglip2_image_encoder", "dinov3_image_encoder")
NETS = ("image2lora_style", "image2lora_coarse", "image2lora_fine")
MAX_PICTURES = 32  # the rank grows by 4 per picture and net
MAX_RATIO = 20  # of a longer strip, the square in the middle would show next to nothing
PICTURES_AT_ONCE = 8  # in an image encoder


# ---- pictures -------------------------------------------------------------------------------------------------------

def square(picture: Picture, side: int) -> Picture:
    """The square in the middle, side × side, in colours without alpha; of the picture's own kind.

    Resized by a bilinear filter that averages when it shrinks. Raises ValueError for too long a strip.
    """
    picture = in_colour(picture)
    width, height = size_of(picture)
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"a picture of {width}×{height} is more than {MAX_RATIO} times as long as wide: cut it")
    scale = side / min(width, height)
    picture = _resized(picture, round(width * scale), round(height * scale))
    left, top = (round((length - side) / 2) for length in size_of(picture))
    if isinstance(picture, Image.Image):
        return picture.crop((left, top, left + side, top + side))
    return picture[top:top + side, left:left + side]


def _resized(picture: Picture, width: int, height: int) -> Picture:
    if isinstance(picture, Image.Image):
        return picture.resize((width, height), Image.Resampling.BILINEAR)
    return _scaled(picture.movedim(-1, 0)[None], height, width)[0].movedim(0, -1)


def _scaled(images: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def _normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def siglip2_pixels(picture: Picture, side: int) -> Tensor:
    """What SigLIP 2 sees, (1, 3, side, side) float32; the picture is resized as it is, a Pillow one to 8 bits."""
    return _normalised(pixels(_resized(picture, side, side)), siglip2_image_encoder.IMAGE_MEAN,
                       siglip2_image_encoder.IMAGE_STD)


def dinov3_pixels(picture: Picture) -> Tensor:
    """What DINOv3 sees, (1, 3, 224, 224) float32; resized in floats whatever kind of picture it is."""
    side = dinov3_image_encoder.IMAGE_SIZE
    return _normalised(_scaled(pixels(picture), side, side), dinov3_image_encoder.IMAGE_MEAN,
                       dinov3_image_encoder.IMAGE_STD)


# ---- units ----------------------------------------------------------------------------------------------------------

class QwenImageUnit_Image2LoRAEncode(PipelineUnit):
    """Pictures as the nets read them.

    image2lora_images             one picture or several
    image2lora_x                  (N, 5632): the vectors of SigLIP 2 and DINOv3
    image2lora_residual           (N, 71, 3584): the text encoder's states of the picture at 224², if the coarse net is
                                  there; else None
    image2lora_residual_highres   (N, 1376, 3584): at 1024², if the fine net is there; else None
    """

    def __init__(self) -> None:
        super().__init__(input_params=("image2lora_images",),
                         output_params=("image2lora_x", "image2lora_residual", "image2lora_residual_highres"),
                         onload_model_names=(*ENCODERS, "text_encoder"))

    def process(self, pipe: QwenImagePipeline, image2lora_images: Picture | Sequence[Picture] | None) -> dict:
        if image2lora_images is None:
            return {}
        pictures = _as_pictures(image2lora_images)
        coarse, fine = (getattr(pipe, net, None) is not None for net in ("image2lora_coarse", "image2lora_fine"))
        pipe.check_loaded([*ENCODERS, "text_encoder"] if coarse or fine else ENCODERS)
        squares = [square(picture, SIDE) for picture in pictures]
        side = pipe.siglip2_image_encoder.image_size
        siglip2 = self._encode(pipe, "siglip2_image_encoder", [siglip2_pixels(picture, side) for picture in squares])
        dinov3 = self._encode(pipe, "dinov3_image_encoder", [dinov3_pixels(picture) for picture in squares])
        small = [square(picture, COARSE_SIDE) for picture in pictures]
        return {"image2lora_x": torch.cat([siglip2, dinov3], dim=-1),
                "image2lora_residual": self._states(pipe, small) if coarse else None,
                "image2lora_residual_highres": self._states(pipe, squares) if fine else None}

    @staticmethod
    def _encode(pipe: QwenImagePipeline, name: str, inputs: Sequence[Tensor]) -> Tensor:
        pipe.load_models_to_device([name])
        images = torch.cat([image.to(pipe.device, pipe.torch_dtype) for image in inputs])
        return torch.cat([getattr(pipe, name)(part) for part in images.split(PICTURES_AT_ONCE)]).to(pipe.torch_dtype)

    @staticmethod
    def _states(pipe: QwenImagePipeline, pictures: Sequence[Picture]) -> Tensor:
        """Of the empty prompt with one picture, in the layout for editing it, which does not shrink the picture."""
        pipe.load_models_to_device(["text_encoder"])
        prompts = PicturePrompts(pipe.prompts.tokenizer)
        states = [prompts.embed(pipe.text_encoder, "", [picture], numbered=False, device=pipe.device)[0]
                  for picture in pictures]
        return torch.cat(states).to(pipe.torch_dtype)


class QwenImageUnit_Image2LoRADecode(PipelineUnit):
    """What the nets that are loaded write for the pictures, averaged over pictures, as one LoRA."""

    def __init__(self) -> None:
        super().__init__(input_params=("image2lora_x", "image2lora_residual", "image2lora_residual_highres"),
                         output_params=("lora",), onload_model_names=NETS)

    def process(self, pipe: QwenImagePipeline, image2lora_x: Tensor | None, image2lora_residual: Tensor | None = None,
                image2lora_residual_highres: Tensor | None = None) -> dict:
        if image2lora_x is None:
            return {}
        inputs = dict(zip(NETS, (None, image2lora_residual, image2lora_residual_highres)))
        loras = []
        for net in loaded_nets(pipe):
            pipe.load_models_to_device([net])
            loras.append(getattr(pipe, net)(image2lora_x, inputs[net]))
        return {"lora": merge_lora(loras, alpha=1 / len(image2lora_x))}


def loaded_nets(pipe: QwenImagePipeline) -> list[str]:
    """The names of the nets that the pipeline has. Raises ValueError if there are none."""
    loaded = [net for net in NETS if getattr(pipe, net, None) is not None]
    if not loaded:
        raise ValueError(f"image to LoRA needs one of {', '.join(NETS)}, and none is loaded: add a file of "
                         "DiffSynth-Studio/Qwen-Image-i2L to model_configs")
    return loaded


def _as_pictures(given: Picture | Sequence[Picture]) -> list[Picture]:
    pictures = [given] if isinstance(given, Image.Image | Tensor) else list(given)
    if not 0 < len(pictures) <= MAX_PICTURES:
        raise ValueError(f"image2lora_images has {len(pictures)} pictures; expected 1 to {MAX_PICTURES}")
    return [check_picture(f"image2lora_images[{i}]", picture) for i, picture in enumerate(pictures)]


@torch.no_grad()
def images_to_lora(pipe: QwenImagePipeline, images: Picture | Sequence[Picture],
                   bias: Mapping[str, Tensor] | None = None,
                   progress_bar_cmd: Callable[[Iterable], Iterable] = iter) -> dict[str, Tensor]:
    """The LoRA for these pictures, on the CPU, plus `bias` (the content of `Qwen-Image-i2L-Bias.safetensors`).

    The style net goes without a bias; the coarse and fine nets, used together, are meant to be given one.
    `progress_bar_cmd` wraps the two stages, encoders and nets; raising in it stops the run.
    Raises ValueError or TypeError for pictures and models that cannot be used, before any model runs.
    """
    loaded_nets(pipe)
    if bias is not None:
        check_mergeable(bias)
    try:
        values: dict[str, Any] = {"image2lora_images": images}
        for unit in progress_bar_cmd([QwenImageUnit_Image2LoRAEncode(), QwenImageUnit_Image2LoRADecode()]):
            values = unit.process(pipe, **values)
        lora = values["lora"]
    finally:
        pipe.load_models_to_device([])
    if bias is not None:
        lora = merge_lora([lora, bias])
    with torch.inference_mode(False):  # it outlives this call
        return {name: tensor.to("cpu", copy=True) for name, tensor in lora.items()}
