"""Wan's image encoder: its published layouts, its features against transformers' CLIP, and its files read from disk."""
from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from diffsynth_backend.configs.vram_management_module_maps import module_map_of
from diffsynth_backend.core import load_model
from diffsynth_backend.core.loader.file import hash_state_dict
from diffsynth_backend.core.vram import offload_model, onload_model
from diffsynth_backend.core.vram.disk_map import DiskMap
from diffsynth_backend.models.wan_video_image_encoder import WanImageEncoder
from diffsynth_backend.utils.state_dict_converters.wan_video_image_encoder import (
    WanImageEncoderFromDiffusers,
    WanImageEncoderStateDictConverter,
    diffusers_image_encoder_keys,
    published_image_encoder_keys,
)

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
SIZES = {"dim": 24, "num_heads": 3, "num_layers": 2, "hidden_dim": 40, "image_size": 28, "patch_size": 7}
# image_encoder/config.json of Wan-AI/Wan2.1-I2V-14B-480P-Diffusers.
PUBLISHED = {"attention_dropout": 0.0, "hidden_act": "gelu", "hidden_size": 1280, "image_size": 224,
             "intermediate_size": 5120, "layer_norm_eps": 1e-5, "num_attention_heads": 16, "num_channels": 3,
             "num_hidden_layers": 32, "patch_size": 14, "projection_dim": 1024}
TINY = {**PUBLISHED, "hidden_size": 24, "image_size": 28, "intermediate_size": 40, "num_attention_heads": 3,
        "num_hidden_layers": 3, "patch_size": 7}

pytestmark = pytest.mark.usefixtures("one_thread")


def with_level(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"vision_model.{key.removeprefix('vision_model.')}": tensor for key, tensor in state_dict.items()}


@pytest.fixture
def theirs(randomized):
    return randomized(CLIPVisionModel(CLIPVisionConfig(**TINY)))


@pytest.fixture
def diffusers_layout(theirs, tmp_path):
    """The file that transformers itself writes; before version 5 its class had one level more, and so has the published
    file."""
    theirs.save_pretrained(tmp_path / "theirs")
    return with_level(load_file(tmp_path / "theirs" / "model.safetensors"))


@pytest.fixture
def ours(diffusers_layout):
    model = WanImageEncoder(**SIZES).eval().requires_grad_(False)
    model.load_state_dict(WanImageEncoderFromDiffusers(diffusers_layout), strict=True)
    return model


@pytest.fixture
def original_layout(ours) -> dict[str, Tensor]:
    """As the original file: with values where the model has none, and a text half of its own size."""
    published = published_image_encoder_keys(ours.state_dict())
    visual = {key: torch.randn(tensor.shape) if tensor.is_meta else tensor for key, tensor in published.items()
              if not key.startswith("textual.")}
    return {**visual, "textual.blocks.0.attn.q.weight": torch.randn(8, 8), "textual.head.0.weight": torch.randn(4, 8)}


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return WanImageEncoder()


# ---- layouts --------------------------------------------------------------------------------------------------------

def test_default_layout_is_the_published_checkpoint(full_size):
    published = published_image_encoder_keys(full_size.state_dict())
    assert hash_state_dict(published) == "5941c53e207d62f20f9025686193c40b"


def test_the_layout_of_diffusers_is_that_of_transformers_class(full_size):
    with torch.device("meta"):
        names = CLIPVisionModel(CLIPVisionConfig(**PUBLISHED)).state_dict()
    expected = hash_state_dict(with_level(names))
    assert expected == "c253f3544157ddf7124c6343c26ec1c2"
    assert hash_state_dict(diffusers_image_encoder_keys(full_size.state_dict())) == expected


def test_the_inverse_gives_the_layout_of_diffusers(ours, diffusers_layout):
    back = diffusers_image_encoder_keys(ours.state_dict())
    assert {key: tensor.shape for key, tensor in back.items()} == {
        key: tensor.shape for key, tensor in diffusers_layout.items()}
    with_values = {key for key, tensor in back.items() if not tensor.is_meta}
    assert all(torch.equal(back[key], diffusers_layout[key]) for key in with_values)
    assert {key for key in back.keys() - with_values if "layers.2." not in key} == {
        "vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias"}


def test_both_layouts_give_the_same_weights(ours, original_layout):
    converted = WanImageEncoderStateDictConverter(original_layout)
    assert converted.keys() == ours.state_dict().keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in ours.state_dict().items())


# ---- numbers --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch", [1, 3])
def test_features_equal_those_before_transformers_last_layer(ours, theirs, relative_error, batch):
    pixels = torch.randn(batch, 3, 28, 28)
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-2]
    assert expected.shape == (batch, 17, 24)
    assert relative_error(ours(pixels), expected) <= 1e-5


@pytest.mark.parametrize("shape", [(1, 3, 28, 35), (1, 3, 14, 14), (1, 1, 28, 28), (3, 28, 28)])
def test_other_shapes_raise(ours, shape):
    with pytest.raises(ValueError, match=r"expected \(batch, 3, 28, 28\): resize them first"):
        ours(torch.zeros(shape))


# ---- files ----------------------------------------------------------------------------------------------------------

def on_disk(path: Path, converter) -> WanImageEncoder:
    """The model with its weights on disk, in use."""
    config = {"offload_dtype": "disk", "offload_device": "disk", "onload_dtype": "disk", "onload_device": "disk",
              "preparing_dtype": BF16, "preparing_device": "cpu", "computation_dtype": BF16,
              "computation_device": "cpu"}
    model = load_model(WanImageEncoder, str(path), SIZES, state_dict_converter=converter, vram_config=config,
                       vram_limit=0, module_map=module_map_of(WanImageEncoder))
    onload_model(model)
    return model


def test_the_published_pickle_is_read_tensor_by_tensor(ours, original_layout, diffusers_layout, tmp_path):
    """Both layouts, from disk, give the bits of the model in memory."""
    files = {WanImageEncoderStateDictConverter: original_layout, WanImageEncoderFromDiffusers: diffusers_layout}
    pixels = torch.randn(2, 3, 28, 28).to(BF16)
    expected = ours.to(BF16)(pixels)
    for converter, layout in files.items():
        torch.save({key: tensor.half() for key, tensor in layout.items()}, path := tmp_path / "clip.pth")
        reference = load_model(WanImageEncoder, str(path), SIZES, state_dict_converter=converter)(pixels)
        model = on_disk(path, converter)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(model(pixels), reference)
        assert (reference - expected).norm() <= 0.02 * expected.norm()  # stored as float16, as published


def test_what_is_not_used_is_not_read(original_layout, tmp_path):
    torch.save(original_layout, path := tmp_path / "clip.pth")
    with DiskMap(path, state_dict_converter=WanImageEncoderStateDictConverter) as disk_map:
        sources = [info for name in disk_map for info in disk_map.sources(name)]
    unused = ("textual.", "log_scale", "visual.post_norm.", "visual.head", "visual.transformer.2.")
    assert sorted(info.name for info in sources) == sorted(
        key for key in original_layout if not key.startswith(unused))
    assert all(info.offset is not None for info in sources)


@torch.inference_mode()
def test_same_bits_as_unmanaged_in_every_state(ours):
    pixels = torch.randn(1, 3, 28, 28).to(BF16)
    state_dict = {key: tensor.to(BF16) for key, tensor in ours.state_dict().items()}
    expected = {storage: load_model(WanImageEncoder, None, SIZES, state_dict={
        key: tensor.to(storage).to(BF16) for key, tensor in state_dict.items()})(pixels) for storage in (BF16, FP8)}
    assert not torch.equal(expected[BF16], expected[FP8])
    for storage, limit in itertools.product((BF16, FP8), (0, None)):
        config = {"offload_dtype": storage, "offload_device": "cpu", "onload_dtype": storage, "onload_device": "cpu",
                  "preparing_dtype": storage, "preparing_device": "cpu", "computation_dtype": BF16,
                  "computation_device": "cpu"}
        managed = load_model(WanImageEncoder, None, SIZES, state_dict=state_dict, vram_config=config, vram_limit=limit,
                             module_map=module_map_of(WanImageEncoder))
        for change in (onload_model, offload_model):
            change(managed)
            assert torch.equal(managed(pixels), expected[storage])
