"""A tiny Qwen-Image that sees pictures: diffusers' side of it, for tests of editing and of whole pipelines."""
from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
FIRST_TOKEN, VOCABULARY = 304, 309
SEEING_TEXT_ENCODER = {
    "hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 48,
    "vocab_size": VOCABULARY, "vision_hidden_size": 16, "vision_depth": 2, "vision_num_heads": 1,
    "vision_intermediate_size": 20, "first_vision_token": FIRST_TOKEN}


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth noise, so that two filters agree on it."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, len(mode)), dtype=np.uint8)
    return Image.fromarray(small, mode).resize((width, height), Image.Resampling.BICUBIC)


class PictureProcessor(Qwen2_5_VLProcessor):
    """transformers' processor for pictures alone: the one for videos, which it insists on, needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)


def picture_processor(tokenizer) -> PictureProcessor:
    return PictureProcessor(image_processor=Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056),
                            tokenizer=tokenizer, video_processor=None)


class TypedTokens(Qwen2_5_VLForConditionalGeneration):
    """transformers' model, given the types of the tokens that its own processor makes and diffusers drops."""

    def forward(self, input_ids: Tensor, **inputs):
        types = (input_ids == self.config.image_token_id).int()
        return super().forward(input_ids=input_ids, mm_token_type_ids=types, **inputs)


def seeing_text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 48, "vocab_size": VOCABULARY, "max_window_layers": 2, "bos_token_id": None,
            "eos_token_id": None, "rms_norm_eps": 1e-6}
    vision = {"hidden_size": 16, "depth": 2, "num_heads": 1, "intermediate_size": 20, "out_hidden_size": 64,
              "fullatt_block_indexes": [1]}
    names = ("vision_start_token_id", "vision_end_token_id", "vision_token_id", "image_token_id", "video_token_id")
    model = TypedTokens(Qwen2_5_VLConfig(
        **text, **{name: FIRST_TOKEN + i for i, name in enumerate(names)}, vision_config=vision,
        rope_theta=1000000.0, rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]}, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 0.5 + 0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)
