"""The demo model's constructor arguments and registry rows; everything else is as in the full-size classes."""
from __future__ import annotations

DIT = {"num_layers": 6, "num_attention_heads": 2, "attention_head_dim": 64, "joint_attention_dim": 128,
       "axes_dims_rope": (8, 28, 28)}
VAE = {"base_dim": 16}
TEXT_ENCODER = {"hidden_size": 128, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 256,
                "vocab_size": 512, "vision_hidden_size": 16, "vision_depth": 1, "vision_num_heads": 1,
                "vision_intermediate_size": 32, "first_vision_token": 481}
CONTROLNET = {"num_layers": 6, "in_dim": 64, "dim": 128}

MODEL_CONFIGS = [
    {"model_hash": "bd64a0b3007cc6b87db799bc41742314", "model_name": "qwen_image_dit",
     "model_class": "models.qwen_image_dit.QwenImageDiT", "extra_kwargs": DIT},
    {"model_hash": "0bbf10ca05b4c2a36a07e75aa24f1a28", "model_name": "qwen_image_text_encoder",
     "model_class": "models.qwen_image_text_encoder.QwenImageTextEncoder", "extra_kwargs": TEXT_ENCODER,
     "state_dict_converter":
         "utils.state_dict_converters.qwen_image_text_encoder.QwenImageTextEncoderStateDictConverter"},
    {"model_hash": "438d631aacf1c0bf3b359a8315529e73", "model_name": "qwen_image_vae",
     "model_class": "models.qwen_image_vae.QwenImageVAE", "extra_kwargs": VAE,
     "state_dict_converter": "utils.state_dict_converters.qwen_image_vae.QwenImageVAERepackagedStateDictConverter"},
    {"model_hash": "de8f1914832f821a667412713483b598", "model_name": "qwen_image_blockwise_controlnet",
     "model_class": "models.qwen_image_controlnet.QwenImageBlockWiseControlNet", "extra_kwargs": CONTROLNET},
]
