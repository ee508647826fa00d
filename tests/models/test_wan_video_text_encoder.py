"""Wan's text encoder: its published layouts, its states against transformers' umT5, and its files read from disk."""
from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import UMT5Config, UMT5EncoderModel

from diffsynth_backend.configs.vram_management_module_maps import module_map_of
from diffsynth_backend.core import load_model
from diffsynth_backend.core.loader.file import hash_model_file, hash_state_dict, read_tensor_infos
from diffsynth_backend.core.vram import offload_model, onload_model
from diffsynth_backend.models.wan_video_text_encoder import WanTextEncoder
from diffsynth_backend.utils.state_dict_converters.wan_video_text_encoder import (
    WanTextEncoderFromDiffusers,
    diffusers_text_encoder_keys,
)

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
SIZES = {"vocab": 50, "dim": 24, "dim_attn": 32, "dim_ffn": 40, "num_heads": 2, "num_layers": 3}
# text_encoder/config.json of Wan-AI/Wan2.1-T2V-1.3B-Diffusers.
PUBLISHED = {"d_ff": 10240, "d_kv": 64, "d_model": 4096, "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6,
             "num_heads": 64, "num_layers": 24, "relative_attention_max_distance": 128,
             "relative_attention_num_buckets": 32, "tie_word_embeddings": False, "vocab_size": 256384}
TINY = {**PUBLISHED, "d_ff": 40, "d_kv": 16, "d_model": 24, "num_heads": 2, "num_layers": 3, "vocab_size": 50}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def theirs(randomized):
    return randomized(UMT5EncoderModel(UMT5Config(**TINY)))


@pytest.fixture
def published(theirs, tmp_path):
    """The file that transformers itself writes."""
    theirs.save_pretrained(tmp_path / "theirs")
    return load_file(tmp_path / "theirs" / "model.safetensors")


@pytest.fixture
def ours(published):
    model = WanTextEncoder(**SIZES).eval().requires_grad_(False)
    model.load_state_dict(WanTextEncoderFromDiffusers(published), strict=True)
    return model


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return WanTextEncoder()


# ---- layouts --------------------------------------------------------------------------------------------------------

def test_default_layout_is_the_published_checkpoint(full_size):
    assert hash_state_dict(full_size.state_dict()) == "9c8818c2cbea55eca56c7b447df170da"
    assert len(full_size.state_dict()) == 242
    assert sum(parameter.numel() for parameter in full_size.parameters()) == 5680910336


def test_the_layout_of_diffusers_is_that_of_transformers_class(full_size):
    """The embedding is there once: the encoder's is the shared one."""
    with torch.device("meta"):
        names = UMT5EncoderModel(UMT5Config(**PUBLISHED)).state_dict()
    names.pop("encoder.embed_tokens.weight")
    expected = hash_state_dict(names)
    assert expected == "1663aabb1c900fdd416fe4bf56cd0a1b"
    assert hash_state_dict(diffusers_text_encoder_keys(full_size.state_dict())) == expected


def test_the_converter_keeps_the_tensors_and_its_inverse_the_names(published):
    converted = WanTextEncoderFromDiffusers(published)
    back = diffusers_text_encoder_keys(converted)
    assert back.keys() == published.keys() and len(converted) == len(published)
    assert all(back[key] is published[key] for key in published)


# ---- numbers --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lengths", [(1,), (9,), (9, 4), (1, 6, 9), (40, 512)], ids=str)
def test_hidden_states_equal_transformers(ours, theirs, relative_error, lengths):
    """512 tokens reach beyond the greatest distance that positions tell apart."""
    longest = max(lengths)
    ids = torch.randint(0, SIZES["vocab"], (len(lengths), longest))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    kept = mask.bool()
    assert relative_error(ours(ids, mask)[kept], theirs(ids, mask).last_hidden_state[kept]) <= 1e-5


def test_padding_is_not_seen(ours, relative_error):
    ids = torch.randint(0, SIZES["vocab"], (1, 12))
    mask = (torch.arange(12) < 5).long()[None]
    assert relative_error(ours(ids, mask)[:, :5], ours(ids[:, :5])) <= 1e-6
    assert relative_error(ours(ids)[:, :5], ours(ids[:, :5])) > 1e-3


def test_order_matters(ours, relative_error):
    ids = torch.randint(0, SIZES["vocab"], (1, 6))
    assert relative_error(ours(ids.flip(1)).flip(1), ours(ids)) > 1e-3


def test_half_precision_saturates_where_it_would_overflow(ours):
    with torch.no_grad():
        for block in ours.blocks:
            block.ffn.fc2.weight.mul_(1e3)
            block.norm2.weight.fill_(40)
    half = ours.half()
    seen = []
    half.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert half(torch.randint(0, SIZES["vocab"], (2, 8))).isfinite().all()
    assert seen[0].abs().max() == torch.finfo(torch.float16).max


# ---- files ----------------------------------------------------------------------------------------------------------

def on_disk(path: Path, **fields) -> WanTextEncoder:
    """The model with its weights on disk, in use."""
    config = {"offload_dtype": "disk", "offload_device": "disk", "onload_dtype": "disk", "onload_device": "disk",
              "preparing_dtype": BF16, "preparing_device": "cpu", "computation_dtype": BF16,
              "computation_device": "cpu"}
    model = load_model(WanTextEncoder, str(path), SIZES, module_map=module_map_of(WanTextEncoder), vram_config=config,
                       vram_limit=0, **fields)
    onload_model(model)
    return model


def test_the_published_pickle_is_read_tensor_by_tensor(ours, published, tmp_path):
    """Both layouts, from disk, give the bits of the model in memory."""
    original = {key: tensor.to(BF16) for key, tensor in ours.state_dict().items()}
    torch.save(original, pickle := tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save({key: tensor.to(BF16) for key, tensor in published.items()}, other := tmp_path / "model.bin")
    assert hash_model_file(pickle) == hash_state_dict(original)
    assert all(info.offset is not None for info in read_tensor_infos(pickle).values())
    ids, mask = torch.randint(0, SIZES["vocab"], (2, 8)), torch.tensor([[1] * 8, [1] * 3 + [0] * 5])
    expected = load_model(WanTextEncoder, str(pickle), SIZES)(ids, mask)
    for model in (on_disk(pickle), on_disk(other, state_dict_converter=WanTextEncoderFromDiffusers)):
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(model(ids, mask), expected)


@torch.inference_mode()
def test_same_bits_as_unmanaged_in_every_state(ours, tmp_path):
    ids = torch.randint(0, SIZES["vocab"], (2, 8))
    state_dict = {key: tensor.to(BF16) for key, tensor in ours.state_dict().items()}
    expected = {storage: load_model(WanTextEncoder, None, SIZES, state_dict={
        key: tensor.to(storage).to(BF16) for key, tensor in state_dict.items()})(ids) for storage in (BF16, FP8)}
    assert not torch.equal(expected[BF16], expected[FP8])
    for (offload, onload), limit in itertools.product(((BF16, BF16), (FP8, FP8)), (0, None)):
        config = {"offload_dtype": offload, "offload_device": "cpu", "onload_dtype": onload, "onload_device": "cpu",
                  "preparing_dtype": onload, "preparing_device": "cpu", "computation_dtype": BF16,
                  "computation_device": "cpu"}
        managed = load_model(WanTextEncoder, None, SIZES, state_dict=state_dict, vram_config=config, vram_limit=limit,
                             module_map=module_map_of(WanTextEncoder))
        for change in (onload_model, offload_model):
            change(managed)
            assert torch.equal(managed(ids), expected[offload])
