"""The registry: which hash of a model file's keys and shapes means which architecture.

Rows are data. `model_class` and `state_dict_converter` are given as paths relative to this package, as absolute dotted
paths, or as the objects themselves. Several rows may have one hash: a file with several models is loaded as each of
them. Programs may append rows of their own to `MODEL_CONFIGS`.
"""
from __future__ import annotations

from typing import Any

from ..core.lookup import find_object
from . import demo_model

# The package's own name: inside ComfyUI it is the path of a folder, so absolute dotted paths would not resolve.
PACKAGE = __name__.rpartition(".configs.")[0]

FIELDS = {"model_hash", "model_name", "model_class", "state_dict_converter", "extra_kwargs"}
REQUIRED_FIELDS = {"model_hash", "model_name", "model_class"}

QWEN_IMAGE_CONFIGS: list[dict[str, Any]] = [
    {   # Qwen/Qwen-Image, -2512, -Edit, -Edit-2509, -Edit-2511: transformer/
        "model_hash": "0319a1cb19835fb510907dd3367c95ff",
        "model_name": "qwen_image_dit",
        "model_class": "models.qwen_image_dit.QwenImageDiT",
    },
    {   # Qwen/Qwen-Image-Layered: transformer/
        "model_hash": "8dc8cda05de16c73afa755e2c1ce2839",
        "model_name": "qwen_image_dit",
        "model_class": "models.qwen_image_dit.QwenImageDiT",
        "extra_kwargs": {"use_layer3d_rope": True, "use_additional_t_cond": True},
    },
    {   # Qwen/Qwen-Image: text_encoder/
        "model_hash": "8004730443f55db63092006dd9f7110e",
        "model_name": "qwen_image_text_encoder",
        "model_class": "models.qwen_image_text_encoder.QwenImageTextEncoder",
        "state_dict_converter":
            "utils.state_dict_converters.qwen_image_text_encoder.QwenImageTextEncoderStateDictConverter",
    },
    {   # Qwen/Qwen-Image: vae/
        "model_hash": "ed4ea5824d55ec3107b09815e318123a",
        "model_name": "qwen_image_vae",
        "model_class": "models.qwen_image_vae.QwenImageVAE",
    },
    {   # Qwen/Qwen-Image-Layered: vae/
        "model_hash": "44b39ddc499e027cfb24f7878d7416b9",
        "model_name": "qwen_image_vae",
        "model_class": "models.qwen_image_vae.QwenImageVAE",
        "extra_kwargs": {"image_channels": 4},
    },
    {   # Comfy-Org/Qwen-Image_ComfyUI: split_files/vae/ (the layout of Wan 2.1's VAE)
        "model_hash": "ccc42284ea13e1ad04693284c7a09be6",
        "model_name": "qwen_image_vae",
        "model_class": "models.qwen_image_vae.QwenImageVAE",
        "state_dict_converter": "utils.state_dict_converters.qwen_image_vae.QwenImageVAERepackagedStateDictConverter",
    },
    {   # DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny, -Depth
        "model_hash": "073bce9cf969e317e5662cd570c3e79c",
        "model_name": "qwen_image_blockwise_controlnet",
        "model_class": "models.qwen_image_controlnet.QwenImageBlockWiseControlNet",
    },
    {   # DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Inpaint
        "model_hash": "a9e54e480a628f0b956a688a81c33bab",
        "model_name": "qwen_image_blockwise_controlnet",
        "model_class": "models.qwen_image_controlnet.QwenImageBlockWiseControlNet",
        "extra_kwargs": {"additional_in_dim": 4},
    },
    {   # DiffSynth-Studio/General-Image-Encoders: SigLIP2-G384/
        "model_hash": "469c78b61e3e31bc9eec0d0af3d3f2f8",
        "model_name": "siglip2_image_encoder",
        "model_class": "models.siglip2_image_encoder.Siglip2ImageEncoder",
    },
    {   # DiffSynth-Studio/General-Image-Encoders: DINOv3-7B/
        "model_hash": "5722b5c873720009de96422993b15682",
        "model_name": "dinov3_image_encoder",
        "model_class": "models.dinov3_image_encoder.DINOv3ImageEncoder",
    },
    {   # DiffSynth-Studio/Qwen-Image-i2L: Qwen-Image-i2L-Coarse.safetensors
        "model_hash": "a166c33455cdbd89c0888a3645ca5c0f",
        "model_name": "qwen_image_image2lora_coarse",
        "model_class": "models.qwen_image_image2lora.QwenImageImage2LoRAModel",
    },
    {   # DiffSynth-Studio/Qwen-Image-i2L: Qwen-Image-i2L-Fine.safetensors
        "model_hash": "a5476e691767a4da6d3a6634a10f7408",
        "model_name": "qwen_image_image2lora_fine",
        "model_class": "models.qwen_image_image2lora.QwenImageImage2LoRAModel",
        "extra_kwargs": {"residual_length": 1376, "residual_mid_dim": 64},
    },
    {   # DiffSynth-Studio/Qwen-Image-i2L: Qwen-Image-i2L-Style.safetensors
        "model_hash": "0aad514690602ecaff932c701cb4b0bb",
        "model_name": "qwen_image_image2lora_style",
        "model_class": "models.qwen_image_image2lora.QwenImageImage2LoRAModel",
        "extra_kwargs": {"compress_dim": 64, "use_residual": False},
    },
]

MODEL_CONFIGS: list[dict[str, Any]] = [*QWEN_IMAGE_CONFIGS, *demo_model.MODEL_CONFIGS]


def find_configs(model_hash: str) -> list[dict[str, Any]]:
    """All rows for a hash. Raises ValueError for a row that lacks a field or has an unknown one."""
    rows = [row for row in MODEL_CONFIGS if row.get("model_hash") == model_hash]
    for row in rows:
        if not REQUIRED_FIELDS <= row.keys() <= FIELDS:
            raise ValueError(f"registry row {row}: expected the fields {sorted(REQUIRED_FIELDS)} and optionally "
                             f"{sorted(FIELDS - REQUIRED_FIELDS)}")
    return rows


def resolve(path_or_object: Any) -> Any:
    """The object that a dotted path names, relative to this package or else absolute; anything else is returned.

    Raises ImportError if there is no such object.
    """
    if not isinstance(path_or_object, str):
        return path_or_object
    for package in (PACKAGE, None):
        found = find_object(path_or_object, package)
        if found is not None:
            return found
    raise ImportError(f"{path_or_object} names nothing, neither in {PACKAGE.rpartition('.')[2]} nor as an absolute "
                      "path: expected 'models.<module>.<Class>' or '<package>.<module>.<Class>'")


def relative_path(cls: type) -> str:
    """The dotted path of a class, relative to this package if it is one of ours."""
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix(f"{PACKAGE}.")


def display_path(cls: type) -> str:
    """The dotted path of a class for people: this package goes by its plain name also where that is a file path."""
    path = f"{cls.__module__}.{cls.__qualname__}"
    return path.removeprefix(PACKAGE.rpartition(".")[0] + ".") if path.startswith(f"{PACKAGE}.") else path
