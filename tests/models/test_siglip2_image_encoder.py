"""SigLIP 2's image encoder: its published layout, and its vectors against transformers' with equal weights."""
from __future__ import annotations

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from diffsynth_backend.core.loader.file import hash_state_dict
from diffsynth_backend.models.siglip2_image_encoder import Siglip2ImageEncoder

SIZES = {"hidden_size": 24, "num_layers": 2, "num_heads": 3, "intermediate_size": 40, "image_size": 48,
         "patch_size": 16}
# config.json of SigLIP2-G384, without its sizes.
PUBLISHED = {"attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_channels": 3}


@pytest.fixture
def theirs(randomized):
    return randomized(SiglipVisionModel(SiglipVisionConfig(
        **PUBLISHED, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=48,
        patch_size=16)))


@pytest.fixture
def ours(theirs):
    model = Siglip2ImageEncoder(**SIZES).eval().requires_grad_(False)
    # The layers lay one level deeper before transformers 5.
    model.load_state_dict({key.removeprefix("vision_model."): value for key, value in theirs.state_dict().items()})
    return model


def test_default_layout_is_the_published_checkpoint():
    with torch.device("meta"):
        model = Siglip2ImageEncoder()
    assert hash_state_dict(model.state_dict()) == "469c78b61e3e31bc9eec0d0af3d3f2f8"
    assert sum(parameter.numel() for parameter in model.parameters()) == 1163659776
    assert model.image_size == 384


@pytest.mark.parametrize("batch", [1, 3])
def test_vectors_equal_transformers(ours, theirs, relative_error, batch):
    pixels = torch.randn(batch, 3, 48, 48)
    assert relative_error(ours(pixels), theirs(pixels).pooler_output) <= 1e-5


@pytest.mark.parametrize("shape", [(1, 3, 48, 64), (1, 3, 32, 32), (1, 1, 48, 48), (3, 48, 48)])
def test_other_shapes_raise(ours, shape):
    with pytest.raises(ValueError, match=r"expected \(batch, 3, 48, 48\): resize them first"):
        ours(torch.zeros(shape))
