"""Qwen-Image's text encoder: Qwen2.5-VL-7B (arXiv 2502.13923), language model and vision tower, from transformers.

Notable: the configuration is written here, so nothing is fetched and no file but the weights is needed. The vision
tower and `lm_head` are part of the published files, so they are part of the model. Tokens of a picture lie on the
rotary embedding's rows and columns, those of the text on a line; transformers 5 must be told which are which.
"""
from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

# In the order of their ids, which follow one another from `first_vision_token` on.
VISION_TOKENS = ("vision_start_token_id", "vision_end_token_id", "vision_token_id", "image_token_id", "video_token_id")
# Of half a head, the multimodal rotary embedding gives this share to rows and as much to columns, the rest to time.
SPATIAL_SHARE = 24 / 64


def _text_config(hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int, intermediate_size: int,
                 vocab_size: int) -> dict:
    half_head = hidden_size // num_heads // 2
    spatial = round(SPATIAL_SHARE * half_head)
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "type": "default",
            "mrope_section": [half_head - 2 * spatial, spatial, spatial]}
    return {"model_type": "qwen2_5_vl_text", "hidden_size": hidden_size, "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads,
            "intermediate_size": intermediate_size, "vocab_size": vocab_size, "max_position_embeddings": 128000,
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "rope_theta": 1000000.0,
            # transformers 5 reads rope_parameters, 4 reads rope_scaling
            "rope_parameters": rope, "rope_scaling": rope, "use_sliding_window": False, "max_window_layers": num_layers,
            # no text is generated, so none ends; transformers warns of ends outside a smaller vocabulary
            "tie_word_embeddings": False, "attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": None}


def _vision_config(hidden_size: int, depth: int, num_heads: int, intermediate_size: int, out_hidden_size: int) -> dict:
    return {"model_type": "qwen2_5_vl", "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads,
            "intermediate_size": intermediate_size, "out_hidden_size": out_hidden_size, "hidden_act": "silu",
            "in_channels": 3, "in_chans": 3, "patch_size": 14, "spatial_patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "window_size": 112, "tokens_per_second": 2,
            "fullatt_block_indexes": [i for i in range(depth) if i % 8 == 7] or [depth - 1]}


class QwenImageTextEncoder(nn.Module):
    """Token ids → hidden states of the last layer, after its final norm.

    Defaults: `Qwen/Qwen-Image`, `text_encoder/` (729 tensors). Smaller sizes make the demo model and the tests.
    """

    def __init__(self, hidden_size: int = 3584, num_layers: int = 28, num_heads: int = 28, num_kv_heads: int = 4,
                 intermediate_size: int = 18944, vocab_size: int = 152064, vision_hidden_size: int = 1280,
                 vision_depth: int = 32, vision_num_heads: int = 16, vision_intermediate_size: int = 3420,
                 first_vision_token: int = 151652) -> None:
        super().__init__()
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel  # heavy: imported when a model is built

        text = _text_config(hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size, vocab_size)
        vision = _vision_config(vision_hidden_size, vision_depth, vision_num_heads, vision_intermediate_size,
                                hidden_size)
        self.config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False,
                                       **{name: first_vision_token + i for i, name in enumerate(VISION_TOKENS)})
        self.model = Qwen2_5_VLModel(self.config)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor | None = None,
                image_grid_thw: Tensor | None = None) -> Tensor:
        """Tokens, and the pictures that stand where they have image tokens → hidden states (B, T, hidden_size).

        input_ids, attention_mask   (B, T) int64, padded on the right
        pixel_values                (P, 1176): every picture's patches, all pictures of the batch one after the other
        image_grid_thw              (pictures, 3) int64: frames (1), rows and columns of patches; four make a token

        Raises ValueError for pixel_values without image_grid_thw or the reverse, and for another count of image tokens.
        """
        if (pixel_values is None) != (image_grid_thw is None):
            raise ValueError("pixel_values and image_grid_thw belong together: give both, or none for text alone")
        pictures = {} if pixel_values is None else self._pictures(input_ids, pixel_values, image_grid_thw)
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False,
                          **pictures).last_hidden_state

    def _pictures(self, input_ids: Tensor, pixel_values: Tensor, image_grid_thw: Tensor) -> dict[str, Tensor]:
        """What the model wants besides tokens, in the installed version of transformers."""
        is_picture = input_ids == self.config.image_token_id
        expected = int(image_grid_thw.prod(dim=-1).sum()) // self.config.vision_config.spatial_merge_size**2
        if (found := int(is_picture.sum())) != expected:
            raise ValueError(f"the prompt has {found} image tokens (id {self.config.image_token_id}), its pictures "
                             f"need {expected}: tokenizer and text encoder may be of different models")
        pictures = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        # Older versions find the pictures by their tokens. Newer ones, left without this, take everything for text.
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            pictures["mm_token_type_ids"] = is_picture.to(torch.int32)
        return pictures
