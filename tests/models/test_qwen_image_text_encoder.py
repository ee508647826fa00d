"""The text encoder against transformers' Qwen2.5-VL, through the files that transformers itself writes."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from diffsynth_backend.core.loader.file import hash_state_dict
from diffsynth_backend.models.qwen_image_text_encoder import QwenImageTextEncoder
from diffsynth_backend.utils.state_dict_converters.qwen_image_text_encoder import (
    QwenImageTextEncoderStateDictConverter,
    published_text_encoder_keys,
)

SIZES = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 48,
         "vocab_size": 300, "vision_hidden_size": 16, "vision_depth": 1, "vision_num_heads": 1,
         "vision_intermediate_size": 20}

# config.json of Qwen/Qwen2.5-VL-7B-Instruct, without the names of tokens and classes.
PUBLISHED_TEXT = {"attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
                  "max_position_embeddings": 128000, "max_window_layers": 28, "num_attention_heads": 28,
                  "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
                  "use_sliding_window": False, "vocab_size": 152064}
PUBLISHED_VISION = {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                    "in_channels": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
                    "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
                    "tokens_per_second": 2, "temporal_patch_size": 2}
PUBLISHED_ROPE = {"rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}


def tiny_reference() -> Qwen2_5_VLForConditionalGeneration:
    """transformers' model from a config in the published layout, with this file's sizes."""
    text = {**PUBLISHED_TEXT, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "intermediate_size": 48, "vocab_size": 300, "bos_token_id": None,
            "eos_token_id": None}
    vision = {**PUBLISHED_VISION, "hidden_size": 16, "depth": 1, "num_heads": 1, "intermediate_size": 20,
              "out_hidden_size": 64, "fullatt_block_indexes": [0]}
    # Half a head is 16 here instead of 64, so the three axes get a quarter of the published shares.
    rope = {"type": "mrope", "mrope_section": [4, 6, 6]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        **text, vision_config=vision, rope_theta=1000000.0, rope_scaling=rope, tie_word_embeddings=False))


@pytest.fixture
def theirs(randomized):
    return randomized(tiny_reference())


@pytest.fixture
def published(theirs, tmp_path):
    """transformers saves under the published names, whatever its classes call the weights."""
    theirs.save_pretrained(tmp_path)
    return load_file(tmp_path / "model.safetensors")


@pytest.fixture
def ours(published):
    model = QwenImageTextEncoder(**SIZES).eval().requires_grad_(False)
    model.load_state_dict(QwenImageTextEncoderStateDictConverter(published), strict=True)
    return model


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return QwenImageTextEncoder()


def test_default_layout_is_the_published_checkpoint(full_size):
    published = published_text_encoder_keys(full_size.state_dict())
    assert hash_state_dict(published) == "8004730443f55db63092006dd9f7110e"


def test_the_inverse_gives_the_published_names(ours, published):
    assert published_text_encoder_keys(ours.state_dict()).keys() == published.keys()


def test_the_converter_keeps_the_tensors(published):
    converted = QwenImageTextEncoderStateDictConverter(published)
    back = published_text_encoder_keys(converted)
    assert all(back[key] is published[key] for key in published)
    assert len(converted) == len(published)


@pytest.mark.parametrize("lengths", [(9,), (9, 9), (9, 4), (1, 6, 9)])
def test_hidden_states_equal_transformers(ours, theirs, relative_error, lengths):
    """The last hidden state after the final norm, as diffusers reads it; padding on the right takes no part."""
    input_ids = torch.randint(0, SIZES["vocab_size"], (len(lengths), 9))
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    expected = theirs(input_ids=input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    kept = mask.bool()
    assert relative_error(ours(input_ids, mask)[kept], expected[kept]) <= 1e-5


def test_hidden_states_are_after_the_final_norm(ours, relative_error):
    """Every token's vector, divided by the norm's weight, has the same root mean square: one."""
    states = ours(torch.randint(0, 300, (1, 6)), torch.ones(1, 6, dtype=torch.long))
    plain = states / ours.model.language_model.norm.weight
    assert relative_error(plain.square().mean(dim=-1), torch.ones(1, 6)) <= 1e-4


@pytest.mark.parametrize("key, value", PUBLISHED_TEXT.items())
def test_text_config_is_the_published_one(full_size, key, value):
    assert getattr(full_size.config.text_config, key) == value


@pytest.mark.parametrize("key, value", PUBLISHED_VISION.items())
def test_vision_config_is_the_published_one(full_size, key, value):
    assert getattr(full_size.config.vision_config, key) == value


@pytest.mark.parametrize("key, value", PUBLISHED_ROPE.items())
def test_rotary_embedding_is_the_published_one(full_size, key, value):
    assert full_size.config.text_config.rope_parameters[key] == value


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 40, 64, 80, 128])
def test_rotary_axes_share_the_whole_of_half_a_head(head_dim):
    """Also where half a head has no exact shares: transformers splits it by these numbers."""
    with torch.device("meta"):
        model = QwenImageTextEncoder(**{**SIZES, "hidden_size": 2 * head_dim})
    assert sum(model.config.text_config.rope_parameters["mrope_section"]) == head_dim // 2
