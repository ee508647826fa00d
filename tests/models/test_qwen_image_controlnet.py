"""The blockwise ControlNet: its published layouts, and its forward against the formula written out."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffsynth_backend.core.loader.file import hash_state_dict
from diffsynth_backend.models.qwen_image_controlnet import QwenImageBlockWiseControlNet

SIZES = {"num_layers": 3, "in_dim": 8, "dim": 12}


@pytest.fixture
def controlnet(randomized):
    return randomized(QwenImageBlockWiseControlNet(**SIZES))


@pytest.mark.parametrize("additional_in_dim, published", [
    (0, "073bce9cf969e317e5662cd570c3e79c"),  # Canny, Depth
    (4, "a9e54e480a628f0b956a688a81c33bab"),  # Inpaint
])
def test_default_layout_is_the_published_checkpoint(additional_in_dim, published):
    with torch.device("meta"):
        model = QwenImageBlockWiseControlNet(additional_in_dim=additional_in_dim)
    assert hash_state_dict(model.state_dict()) == published


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * weight


def expected_correction(weights: dict[str, Tensor], x: Tensor, y: Tensor, block: int) -> Tensor:
    """output_proj(GELU(input_proj(rms(x) + rms(y)))), with the exact, not the tanh, form of GELU."""
    w = {key.removeprefix(f"controlnet_blocks.{block}."): value for key, value in weights.items()}
    inside = (rms(x, w["x_rms.weight"]) + rms(y, w["y_rms.weight"])) @ w["input_proj.weight"].T + w["input_proj.bias"]
    active = inside * 0.5 * (1 + torch.erf(inside / math.sqrt(2)))
    return active @ w["output_proj.weight"].T + w["output_proj.bias"]


@pytest.mark.parametrize("block", range(SIZES["num_layers"]))
def test_forward_is_the_formula(controlnet, relative_error, block):
    image, conditioning = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    expected = expected_correction(controlnet.state_dict(), image, conditioning, block)
    assert relative_error(controlnet(image, conditioning, block), expected) <= 1e-5


def test_conditioning_enters_through_one_linear_layer(randomized, relative_error):
    controlnet = randomized(QwenImageBlockWiseControlNet(additional_in_dim=4, **SIZES))
    patches = torch.randn(2, 5, 8 + 4)
    expected = patches @ controlnet.img_in.weight.T + controlnet.img_in.bias
    assert relative_error(controlnet.process_controlnet_conditioning(patches), expected) <= 1e-5


def test_a_fresh_controlnet_changes_nothing(controlnet):
    controlnet.init_weight()
    for block in range(SIZES["num_layers"]):
        assert not controlnet(torch.randn(1, 5, 12), torch.randn(1, 5, 12), block).any()
