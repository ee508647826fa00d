"""The image-to-LoRA nets: their published layouts, the formula written out, and names and sizes of the denoiser."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffsynth_backend.core.loader.file import hash_state_dict
from diffsynth_backend.models.qwen_image_dit import QwenImageDiT
from diffsynth_backend.models.qwen_image_image2lora import QwenImageImage2LoRAModel

SIZES = {"num_blocks": 3, "compress_dim": 5, "rank": 2, "residual_length": 4, "residual_mid_dim": 3, "dim": 8,
         "image_dim": 11, "residual_dim": 7}
# In the order of the net's blocks.
LAYERS = (("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"), ("img_mlp.net.2", "img_mod.1"),
          ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"), ("txt_mlp.net.2", "txt_mod.1"))


@pytest.fixture
def net(randomized):
    return randomized(QwenImageImage2LoRAModel(**SIZES))


@pytest.fixture
def style(randomized):
    return randomized(QwenImageImage2LoRAModel(**SIZES, use_residual=False))


@pytest.mark.parametrize("published, parameters, options", [
    ("a166c33455cdbd89c0888a3645ca5c0f", 7927234560, {}),  # Coarse
    ("a5476e691767a4da6d3a6634a10f7408", None, {"residual_length": 1376, "residual_mid_dim": 64}),  # Fine
    ("0aad514690602ecaff932c701cb4b0bb", None, {"compress_dim": 64, "use_residual": False}),  # Style
])
def test_layout_is_the_published_checkpoint(published, parameters, options):
    with torch.device("meta"):
        model = QwenImageImage2LoRAModel(**options)
    assert hash_state_dict(model.state_dict()) == published
    assert parameters in (None, sum(parameter.numel() for parameter in model.parameters()))


def expected_lora(weights: dict[str, Tensor], x: Tensor, residual: Tensor | None) -> dict[str, Tensor]:
    """For one picture, x (image_dim,) and residual (length, residual_dim), layer by layer."""
    lora = {}
    for i, names in enumerate(names for names in LAYERS for _ in range(3)):
        added = 0
        if residual is not None:
            seen = 0.05 * residual @ weights[f"blocks.{i}.proj_residual.proj_in.weight"].T
            added = weights[f"blocks.{i}.proj_residual.proj_out.weight"] @ seen.reshape(-1)
        for j, name in enumerate(names):
            w = {key: weights[f"blocks.{i}.layers.{j}.{key}.weight"] for key in (
                "proj_a.proj_in", "proj_a.proj_out", "proj_b.proj_in", "proj_b.proj_out")}
            a = w["proj_a.proj_out"] @ (w["proj_a.proj_in"] @ x + added)
            b = w["proj_b.proj_out"] @ (w["proj_b.proj_in"] @ x + added)
            layer = f"transformer_blocks.{i % 3}.{name}"
            lora[f"{layer}.lora_A.default.weight"] = a.reshape(2, -1)
            lora[f"{layer}.lora_B.default.weight"] = b.reshape(-1, 2)
    return lora


def test_one_picture_is_the_formula(net, relative_error):
    x, residual = torch.randn(1, 11), torch.randn(1, 4, 7)
    lora, expected = net(x, residual), expected_lora(net.state_dict(), x[0], residual[0])
    assert lora.keys() == expected.keys()
    assert all(relative_error(lora[name], expected[name]) <= 1e-5 for name in lora)


def test_the_net_without_residual_is_the_formula(style, relative_error):
    x = torch.randn(1, 11)
    lora, expected = style(x), expected_lora(style.state_dict(), x[0], None)
    assert lora.keys() == expected.keys()
    assert all(relative_error(lora[name], expected[name]) <= 1e-5 for name in lora)


def test_several_pictures_lie_side_by_side_in_rank(net, relative_error):
    x, residual = torch.randn(3, 11), torch.randn(3, 4, 7)
    lora = net(x, residual)
    singles = [expected_lora(net.state_dict(), *pair) for pair in zip(x, residual)]
    for name, tensor in lora.items():
        side_by_side = torch.cat([single[name] for single in singles], dim=0 if ".lora_A." in name else 1)
        assert relative_error(tensor, side_by_side) <= 1e-5


def test_matrices_fit_the_layers_of_the_denoiser(net):
    with torch.device("meta"):
        dit = QwenImageDiT(num_layers=3, num_attention_heads=2, attention_head_dim=4, joint_attention_dim=6,
                           axes_dims_rope=(0, 2, 2))
    lora = net(torch.randn(1, 11), torch.randn(1, 4, 7))
    assert len(lora) == 2 * 3 * 12
    for name, a in lora.items():
        if ".lora_A." in name:
            weight = dit.get_submodule(name.partition(".lora_A.")[0]).weight
            assert (lora[name.replace("lora_A", "lora_B")].shape[0], a.shape[1]) == weight.shape


@pytest.mark.parametrize("shape", [(1, 12), (11,), (1, 1, 11)])
def test_embeddings_of_another_shape_raise(style, shape):
    with pytest.raises(ValueError, match=r"expected \(pictures, 11\)"):
        style(torch.zeros(shape))


@pytest.mark.parametrize("shape", [None, (1, 4, 7), (2, 5, 7), (2, 28)])
def test_states_that_do_not_fit_raise(net, shape):
    with pytest.raises(ValueError, match=r"takes states of the text encoder of shape \(2, 4, 7\), but got"):
        net(torch.zeros(2, 11), None if shape is None else torch.zeros(shape))


def test_states_that_a_net_does_not_read_raise(style):
    with pytest.raises(ValueError, match="takes no states of the text encoder, but got"):
        style(torch.zeros(1, 11), torch.zeros(1, 4, 7))
