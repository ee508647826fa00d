"""Qwen-Image's text encoder: Qwen2.5-VL-7B (arXiv 2502.13923), language model and vision tower, from transformers.

Notable: the configuration is written here, so nothing is fetched and no file but the weights is needed. The vision
tower and `lm_head` are part of the published files, so they are part of the model.
"""
from __future__ import annotations

from torch import Tensor, nn

VISION_TOKENS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
                 "image_token_id": 151655, "video_token_id": 151656}
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
                 vision_depth: int = 32, vision_num_heads: int = 16, vision_intermediate_size: int = 3420) -> None:
        super().__init__()
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel  # heavy: imported when a model is built

        text = _text_config(hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size, vocab_size)
        vision = _vision_config(vision_hidden_size, vision_depth, vision_num_heads, vision_intermediate_size,
                                hidden_size)
        self.config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False,
                                       **VISION_TOKENS)
        self.model = Qwen2_5_VLModel(self.config)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, T) int64, padded on the right → hidden states (B, T, hidden_size)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
