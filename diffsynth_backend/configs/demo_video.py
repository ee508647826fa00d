"""The video demo's constructor arguments and registry rows; everything else is as in the full-size classes."""
from __future__ import annotations

DIT = {"dim": 128, "in_dim": 16, "ffn_dim": 512, "out_dim": 16, "text_dim": 64, "freq_dim": 128, "eps": 1e-6,
       "patch_size": (1, 2, 2), "num_heads": 4, "num_layers": 6, "has_image_input": False}
VAE = {"base_dim": 8}
TEXT_ENCODER = {"vocab": 64, "dim": 64, "dim_attn": 64, "dim_ffn": 128, "num_heads": 2, "num_layers": 2}

MODEL_CONFIGS = [
    {"model_hash": "da2e77c57fe0a45736cb8c26adac3eb3", "model_name": "wan_video_dit",
     "model_class": "models.wan_video_dit.WanModel", "extra_kwargs": DIT},
    {"model_hash": "df7d0c78f0f9b87b87bc729fa2e10372", "model_name": "wan_video_text_encoder",
     "model_class": "models.wan_video_text_encoder.WanTextEncoder", "extra_kwargs": TEXT_ENCODER},
    {"model_hash": "cb16b9a02ae4539361b6cc6302ce413b", "model_name": "wan_video_vae",
     "model_class": "models.wan_video_vae.WanVideoVAE", "extra_kwargs": VAE,
     "state_dict_converter": "utils.state_dict_converters.wan_video_vae.WanVideoVAEStateDictConverter"},
]
