"""The registry: which hash of a model file's keys and shapes means which architecture.

Rows are data. `model_class` and `state_dict_converter` are given as paths relative to this package, as absolute dotted
paths, or as the objects themselves. Several rows may have one hash: a file with several models is loaded as each of
them. Programs may append rows of their own to `MODEL_CONFIGS`.
"""
from __future__ import annotations

from typing import Any

from ..core.lookup import find_object
from . import demo_model, demo_video

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

# The arguments of Wan's denoisers that go with their sizes; rows add what differs.
_WAN = {"patch_size": (1, 2, 2), "freq_dim": 256, "text_dim": 4096, "eps": 1e-6, "has_image_input": False}
_WAN_1_3B = {**_WAN, "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "in_dim": 16, "out_dim": 16}
_WAN_14B = {**_WAN, "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, "in_dim": 16, "out_dim": 16}
_WAN_5B = {**_WAN, "dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "in_dim": 48, "out_dim": 48,
           "seperated_timestep": True, "require_clip_embedding": False, "require_vae_embedding": False,
           "fuse_vae_embedding_in_latents": True}
_VACE_14B = {"vace_layers": (0, 5, 10, 15, 20, 25, 30, 35), "dim": 5120, "ffn_dim": 13824, "num_heads": 40}

WAN_CONFIGS: list[dict[str, Any]] = [
    {   # Wan-AI/Wan2.1-T2V-1.3B
        "model_hash": "9269f8db9040a9d860eaca435be61814",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": _WAN_1_3B,
    },
    {   # Wan-AI/Wan2.1-T2V-14B; Wan-AI/Wan2.2-T2V-A14B: high_noise_model/ and low_noise_model/
        "model_hash": "aafcfd9672c3a2456dc46e1cb6e52c70",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": _WAN_14B,
    },
    {   # krea/krea-realtime-video
        "model_hash": "5ec04e02b42d2580483ad69f4e76346a",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": _WAN_14B,
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.WanVideoDiTPrefixedStateDictConverter",
    },
    {   # Wan-AI/Wan2.1-I2V-14B-480P, -720P; PAI/Wan2.1-Fun-14B-InP, -V1.1-14B-InP
        "model_hash": "6bfcfb3b342cb286ce886889d519a77e",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_14B, "in_dim": 36, "has_image_input": True},
    },
    {   # Wan-AI/Wan2.1-FLF2V-14B-720P
        "model_hash": "3ef3b1f8e1dab83d5b71fd7b617f859f",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_14B, "in_dim": 36, "has_image_input": True, "has_image_pos_emb": True},
    },
    {   # PAI/Wan2.1-Fun-1.3B-InP, -V1.1-1.3B-InP
        "model_hash": "6d6ccde6845b95ad9114ab993d917893",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_1_3B, "in_dim": 36, "has_image_input": True},
    },
    {   # PAI/Wan2.1-Fun-1.3B-Control
        "model_hash": "349723183fc063b2bfc10bb2835cf677",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_1_3B, "in_dim": 48, "has_image_input": True},
    },
    {   # PAI/Wan2.1-Fun-14B-Control
        "model_hash": "efa44cddf936c70abd0ea28b6cbe946c",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_14B, "in_dim": 48, "has_image_input": True},
    },
    {   # PAI/Wan2.1-Fun-V1.1-1.3B-Control
        "model_hash": "70ddad9d3a133785da5ea371aae09504",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_1_3B, "in_dim": 48, "has_image_input": True, "has_ref_conv": True},
    },
    {   # PAI/Wan2.1-Fun-V1.1-14B-Control
        "model_hash": "26bde73488a92e64cc20b0a7485b9e5b",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_14B, "in_dim": 48, "has_image_input": True, "has_ref_conv": True},
    },
    {   # PAI/Wan2.1-Fun-V1.1-1.3B-Control-Camera
        "model_hash": "ac6a5aa74f4a0aab6f64eb9a72f19901",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_1_3B, "in_dim": 32, "has_image_input": True, "add_control_adapter": True},
    },
    {   # PAI/Wan2.1-Fun-V1.1-14B-Control-Camera
        "model_hash": "b61c605c2adbd23124d152ed28e049ae",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_14B, "in_dim": 32, "has_image_input": True, "add_control_adapter": True},
    },
    {   # Wan-AI/Wan2.2-I2V-A14B, PAI/Wan2.2-Fun-A14B-InP: high_noise_model/ and low_noise_model/
        "model_hash": "5b013604280dd715f8457c6ed6d6a626",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_14B, "in_dim": 36, "require_clip_embedding": False},
    },
    {   # PAI/Wan2.2-Fun-A14B-Control: high_noise_model/ and low_noise_model/
        "model_hash": "2267d489f0ceb9f21836532952852ee5",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_14B, "in_dim": 52, "has_ref_conv": True, "require_clip_embedding": False},
    },
    {   # PAI/Wan2.2-Fun-A14B-Control-Camera: high_noise_model/ and low_noise_model/
        "model_hash": "47dbeab5e560db3180adf51dc0232fb1",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_14B, "in_dim": 36, "add_control_adapter": True, "require_clip_embedding": False},
    },
    {   # Wan-AI/Wan2.2-TI2V-5B
        "model_hash": "1f5ab7703c6fc803fdded85ff040c316",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": _WAN_5B,
    },
    {   # iic/VACE-Wan2.1-1.3B-Preview, Wan-AI/Wan2.1-VACE-1.3B
        "model_hash": "a61453409b67cd3246cf0c3bebad47ba",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": _WAN_1_3B,
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.WanVideoDiTStateDictConverter",
    },
    {   # The same file
        "model_hash": "a61453409b67cd3246cf0c3bebad47ba",
        "model_name": "wan_video_vace",
        "model_class": "models.wan_video_dit.VaceWanModel",
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.VaceWanModelDictConverter",
    },
    {   # Wan-AI/Wan2.1-VACE-14B; PAI/Wan2.2-VACE-Fun-A14B: high_noise_model/ and low_noise_model/
        "model_hash": "7a513e1f257a861512b1afd387a8ecd9",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": _WAN_14B,
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.WanVideoDiTStateDictConverter",
    },
    {   # The same file
        "model_hash": "7a513e1f257a861512b1afd387a8ecd9",
        "model_name": "wan_video_vace",
        "model_class": "models.wan_video_dit.VaceWanModel",
        "extra_kwargs": _VACE_14B,
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.VaceWanModelDictConverter",
    },
    {   # DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1
        "model_hash": "dbd5ec76bbf977983f972c151d545389",
        "model_name": "wan_video_motion_controller",
        "model_class": "models.wan_video_motion_controller.WanMotionControllerModel",
    },
    # diffusers' layout, transformer/ of each. The hashes are those of diffusers 0.42's WanTransformer3DModel and
    # WanVACETransformer3DModel, built on meta with the arguments of each config.json.
    {   # Wan-AI/Wan2.1-T2V-1.3B-Diffusers
        "model_hash": "b0a133b5687c7d054175e5bfa66ef5fd",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": _WAN_1_3B,
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.WanVideoDiTFromDiffusers",
    },
    {   # Wan-AI/Wan2.1-T2V-14B-Diffusers; Wan-AI/Wan2.2-T2V-A14B-Diffusers: and transformer_2/
        "model_hash": "cb104773c6c2cb6df4f9529ad5c60d0b",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": _WAN_14B,
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.WanVideoDiTFromDiffusers",
    },
    {   # Wan-AI/Wan2.2-I2V-A14B-Diffusers: and transformer_2/
        "model_hash": "8b85650bb749144f6b934ba7d76a8a0c",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_14B, "in_dim": 36, "require_clip_embedding": False},
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.WanVideoDiTFromDiffusers",
    },
    {   # Wan-AI/Wan2.2-TI2V-5B-Diffusers
        "model_hash": "ae5d9e8609a122565c5604f34731e117",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": _WAN_5B,
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.WanVideoDiTFromDiffusers",
    },
    {   # Wan-AI/Wan2.1-I2V-14B-480P-Diffusers, -720P-Diffusers as diffusers' class saves them
        "model_hash": "e0e8b7e0ab5bbf15b88be20fdf9dfcbd",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_14B, "in_dim": 36, "has_image_input": True},
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.WanVideoDiTFromDiffusers",
    },
    {   # The same as published: with norm_added_q.weight, shaped as norm_added_k.weight, in each block
        "model_hash": "7cf3a086b49216bded0728ce78d59687",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_14B, "in_dim": 36, "has_image_input": True},
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.WanVideoImageDiTFromDiffusers",
    },
    {   # Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers: diffusers' class had lost norm_added_q before it knew pos_embed (0.34)
        "model_hash": "9036a1876a232cff9b831ee3aad49d3e",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": {**_WAN_14B, "in_dim": 36, "has_image_input": True, "has_image_pos_emb": True},
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.WanVideoDiTFromDiffusers",
    },
    {   # Wan-AI/Wan2.1-VACE-1.3B-diffusers
        "model_hash": "8bf23cb53e769c6c0def5787ebf4cbcb",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": _WAN_1_3B,
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.WanVideoVaceDiTFromDiffusers",
    },
    {   # The same file
        "model_hash": "8bf23cb53e769c6c0def5787ebf4cbcb",
        "model_name": "wan_video_vace",
        "model_class": "models.wan_video_dit.VaceWanModel",
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.VaceWanModelFromDiffusers",
    },
    {   # Wan-AI/Wan2.1-VACE-14B-diffusers
        "model_hash": "344c305221c4c63a9e3bf636d7495475",
        "model_name": "wan_video_dit",
        "model_class": "models.wan_video_dit.WanModel",
        "extra_kwargs": _WAN_14B,
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.WanVideoVaceDiTFromDiffusers",
    },
    {   # The same file
        "model_hash": "344c305221c4c63a9e3bf636d7495475",
        "model_name": "wan_video_vace",
        "model_class": "models.wan_video_dit.VaceWanModel",
        "extra_kwargs": _VACE_14B,
        "state_dict_converter": "utils.state_dict_converters.wan_video_dit.VaceWanModelFromDiffusers",
    },
    {   # Wan-AI/Wan2.1-T2V-14B and all later ones: models_t5_umt5-xxl-enc-bf16.pth
        "model_hash": "9c8818c2cbea55eca56c7b447df170da",
        "model_name": "wan_video_text_encoder",
        "model_class": "models.wan_video_text_encoder.WanTextEncoder",
    },
    {   # Wan-AI/Wan2.1-T2V-1.3B-Diffusers and all others of this layout: text_encoder/
        # The hash is that of transformers' UMT5EncoderModel with the published config.json, without
        # encoder.embed_tokens.weight, which is shared.weight.
        "model_hash": "1663aabb1c900fdd416fe4bf56cd0a1b",
        "model_name": "wan_video_text_encoder",
        "model_class": "models.wan_video_text_encoder.WanTextEncoder",
        "state_dict_converter": "utils.state_dict_converters.wan_video_text_encoder.WanTextEncoderFromDiffusers",
    },
    {   # Wan-AI/Wan2.1-I2V-14B-480P and others: models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth
        "model_hash": "5941c53e207d62f20f9025686193c40b",
        "model_name": "wan_video_image_encoder",
        "model_class": "models.wan_video_image_encoder.WanImageEncoder",
        "state_dict_converter":
            "utils.state_dict_converters.wan_video_image_encoder.WanImageEncoderStateDictConverter",
    },
    {   # Wan-AI/Wan2.1-I2V-14B-480P-Diffusers and others: image_encoder/
        # The hash is that of transformers' CLIPVisionModel with the published config.json, behind vision_model.
        "model_hash": "c253f3544157ddf7124c6343c26ec1c2",
        "model_name": "wan_video_image_encoder",
        "model_class": "models.wan_video_image_encoder.WanImageEncoder",
        "state_dict_converter": "utils.state_dict_converters.wan_video_image_encoder.WanImageEncoderFromDiffusers",
    },
    {   # Wan-AI/Wan2.1-T2V-1.3B and all others but TI2V-5B: Wan2.1_VAE.pth
        "model_hash": "ccc42284ea13e1ad04693284c7a09be6",
        "model_name": "wan_video_vae",
        "model_class": "models.wan_video_vae.WanVideoVAE",
        "state_dict_converter": "utils.state_dict_converters.wan_video_vae.WanVideoVAEStateDictConverter",
    },
    {   # Wan-AI/Wan2.2-TI2V-5B: Wan2.2_VAE.pth
        "model_hash": "e1de6c02cdac79f8b739f4d3698cd216",
        "model_name": "wan_video_vae",
        "model_class": "models.wan_video_vae.WanVideoVAE38",
        "state_dict_converter": "utils.state_dict_converters.wan_video_vae.WanVideoVAEStateDictConverter",
    },
    {   # Wan-AI/Wan2.1-T2V-1.3B-Diffusers and all others but TI2V-5B: vae/ (the layout of Qwen-Image's VAE)
        # The hash is that of diffusers 0.42's AutoencoderKLWan with the published config.json; so is the next one.
        "model_hash": "ed4ea5824d55ec3107b09815e318123a",
        "model_name": "wan_video_vae",
        "model_class": "models.wan_video_vae.WanVideoVAE",
        "state_dict_converter": "utils.state_dict_converters.wan_video_vae.WanVideoVAEFromDiffusers",
    },
    {   # Wan-AI/Wan2.2-TI2V-5B-Diffusers: vae/
        "model_hash": "00300c7be455e5dddae31be74e5ec972",
        "model_name": "wan_video_vae",
        "model_class": "models.wan_video_vae.WanVideoVAE38",
        "state_dict_converter": "utils.state_dict_converters.wan_video_vae.WanVideoVAE38FromDiffusers",
    },
]

MODEL_CONFIGS: list[dict[str, Any]] = [*QWEN_IMAGE_CONFIGS, *WAN_CONFIGS, *demo_model.MODEL_CONFIGS,
                                       *demo_video.MODEL_CONFIGS]


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
