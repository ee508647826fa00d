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
         "vocab_size": 300, "vision_hidden_size": 16, "vision_depth": 2, "vision_num_heads": 1,
         "vision_intermediate_size": 20, "first_vision_token": 290}
VISION_START, IMAGE_TOKEN = 290, 293

# config.json of Qwen/Qwen2.5-VL-7B-Instruct, without the names of tokens and classes.
PUBLISHED_TEXT = {"attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
                  "max_position_embeddings": 128000, "max_window_layers": 28, "num_attention_heads": 28,
                  "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
                  "use_sliding_window": False, "vocab_size": 152064}
PUBLISHED_VISION = {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                    "in_channels": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
                    "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
                    "tokens_per_second": 2, "temporal_patch_size": 2}
PUBLISHED_TOKENS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
                    "image_token_id": 151655, "video_token_id": 151656}
PUBLISHED_ROPE = {"rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}


def tiny_reference() -> Qwen2_5_VLForConditionalGeneration:
    """transformers' model from a config in the published layout, with this file's sizes."""
    text = {**PUBLISHED_TEXT, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "intermediate_size": 48, "vocab_size": 300, "bos_token_id": None,
            "eos_token_id": None}
    tokens = {name: token - 151652 + 290 for name, token in PUBLISHED_TOKENS.items()}
    vision = {**PUBLISHED_VISION, "hidden_size": 16, "depth": 2, "num_heads": 1, "intermediate_size": 20,
              "out_hidden_size": 64, "fullatt_block_indexes": [1]}
    # Half a head is 16 here instead of 64, so the three axes get a quarter of the published shares.
    rope = {"type": "mrope", "mrope_section": [4, 6, 6]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        **text, **tokens, vision_config=vision, rope_theta=1000000.0, rope_scaling=rope, tie_word_embeddings=False))


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


# ---- pictures -------------------------------------------------------------------------------------------------------

# Rows and columns of patches; 10 × 26 is more than one window of the tower's attention each way.
GRIDS = [[(4, 4)], [(2, 12)], [(10, 26)], [(4, 6), (8, 2)], [(2, 2), (2, 4), (6, 2)]]


def prompt_with_pictures(grids: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (1, T), three before each picture and four at the end; and frames, rows, columns of each."""
    ids = torch.randint(0, 280, (1, 4))
    for rows, columns in reversed(grids):
        picture = torch.full((1, rows * columns // 4), IMAGE_TOKEN)
        before = torch.tensor([[*torch.randint(0, 280, (2,)), VISION_START]])  # by which transformers 4 finds it
        ids = torch.cat([before, picture, ids], dim=1)
    return ids, torch.tensor([(1, *grid) for grid in grids])


def positions(grids: list[tuple[int, int]]) -> torch.Tensor:
    """(3, 1, T) as arXiv 2409.12191 has them: a picture's tokens share a time and count rows and columns; the text goes
    on after the largest of them."""
    rows, now = [], 0
    for height, width in ((height // 2, width // 2) for height, width in grids):
        rows += [(now + i,) * 3 for i in range(3)]
        now += 3
        rows += [(now, now + y, now + x) for y in range(height) for x in range(width)]
        now += max(height, width)
    rows += [(now + i,) * 3 for i in range(4)]
    return torch.tensor(rows).T[:, None]


@pytest.mark.parametrize("grids", GRIDS)
def test_pictures_equal_transformers_at_the_papers_positions(ours, theirs, relative_error, grids):
    """The oracle gets its positions from this file: left to itself it needs types, without which all of it is text."""
    ids, grid = prompt_with_pictures(grids)
    patches = torch.randn(int(grid.prod(dim=-1).sum()), 1176)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": patches,
              "image_grid_thw": grid}
    expected, flat = (theirs(**inputs, position_ids=at, output_hidden_states=True).hidden_states[-1]
                      for at in (positions(grids), torch.arange(ids.shape[1]).expand(3, 1, -1)))
    result = ours(**inputs)
    assert relative_error(result, expected) <= 1e-5
    assert relative_error(flat, expected) > 1e-4  # the positions matter


def test_a_batch_of_prompts_with_pictures_equals_single_ones(ours, relative_error):
    grids = [[(4, 4)], [(4, 6), (8, 2)]]
    prompts = [prompt_with_pictures(each) for each in grids]
    patches = [torch.randn(int(grid.prod(dim=-1).sum()), 1176) for _, grid in prompts]
    ids = torch.nn.utils.rnn.pad_sequence([ids[0] for ids, _ in prompts], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids[0]) for ids, _ in prompts], batch_first=True)
    together = ours(ids, mask, torch.cat(patches), torch.cat([grid for _, grid in prompts]))
    for row, (own, grid), patch in zip(together, prompts, patches):
        assert relative_error(row[:own.shape[1]], ours(own, torch.ones_like(own), patch, grid)[0]) <= 1e-5


def test_text_after_pictures_is_text_again(ours):
    """transformers keeps the last picture's offset on the model; a prompt without one must not see it."""
    text = torch.randint(0, 280, (1, 9))
    before = ours(text, torch.ones_like(text))
    ids, grid = prompt_with_pictures([(4, 12)])
    ours(ids, torch.ones_like(ids), torch.randn(48, 1176), grid)
    assert torch.equal(ours(text, torch.ones_like(text)), before)


def test_another_count_of_image_tokens_raises_with_both(ours):
    ids, _ = prompt_with_pictures([(4, 4)])
    with pytest.raises(ValueError, match=r"4 image tokens \(id 293\), its pictures need 6"):
        ours(ids, torch.ones_like(ids), torch.randn(24, 1176), torch.tensor([[1, 4, 6]]))


@pytest.mark.parametrize("given", ["pixel_values", "image_grid_thw"])
def test_half_a_picture_raises(ours, given):
    ids, grid = prompt_with_pictures([(4, 4)])
    half = {"pixel_values": torch.randn(16, 1176), "image_grid_thw": grid}[given]
    with pytest.raises(ValueError, match="belong together"):
        ours(ids, torch.ones_like(ids), **{given: half})


# ---- configuration --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("key, value", PUBLISHED_TOKENS.items())
def test_tokens_of_pictures_are_the_published_ones(full_size, key, value):
    assert getattr(full_size.config, key) == value


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
