"""DINOv3's image encoder: its published layout, and its vectors against transformers' with equal weights."""
from __future__ import annotations

import pytest
import torch

from diffsynth_backend.core.loader.file import hash_state_dict
from diffsynth_backend.models.dinov3_image_encoder import DINOv3ImageEncoder

transformers = pytest.importorskip("transformers", minversion="4.56", reason="it has DINOv3 since 4.56")

SIZES = {"hidden_size": 32, "num_layers": 3, "num_heads": 2, "intermediate_size": 40}
# config.json of DINOv3-7B, without its sizes.
PUBLISHED = {"attention_dropout": 0.0, "drop_path_rate": 0.0, "hidden_act": "silu", "image_size": 224,
             "key_bias": False, "layer_norm_eps": 1e-5, "layerscale_value": 1.0, "mlp_bias": True, "num_channels": 3,
             "num_register_tokens": 4, "patch_size": 16, "pos_embed_jitter": None, "pos_embed_rescale": 2.0,
             "pos_embed_shift": None, "proj_bias": True, "query_bias": False, "rope_theta": 100.0,
             "use_gated_mlp": True, "value_bias": False}


@pytest.fixture
def theirs(randomized):
    return randomized(transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(
        **PUBLISHED, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40)))


@pytest.fixture
def published(theirs):
    """Names as in the file: the layers lie one level deeper in newer versions of the class."""
    return {key.removeprefix("model."): value for key, value in theirs.state_dict().items()}


@pytest.fixture
def ours(published):
    model = DINOv3ImageEncoder(**SIZES).eval().requires_grad_(False)
    model.load_state_dict(published)
    return model


def test_default_layout_is_the_published_checkpoint():
    with torch.device("meta"):
        model = DINOv3ImageEncoder()
    assert hash_state_dict(model.state_dict()) == "5722b5c873720009de96422993b15682"


@pytest.mark.parametrize("size", [(16, 16), (224, 224), (48, 80), (96, 32)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_vectors_equal_transformers(ours, theirs, relative_error, size, batch):
    pixels = torch.randn(batch, 3, *size)
    assert relative_error(ours(pixels), theirs(pixels).pooler_output) <= 1e-5


def test_positions_do_not_depend_on_earlier_pictures(ours):
    """They are cached by size."""
    wide, high = torch.randn(1, 3, 32, 64), torch.randn(1, 3, 64, 32)
    with torch.inference_mode():
        first = ours(wide)
    ours(high)
    assert torch.equal(ours(wide), first)


def test_positions_made_in_inference_mode_serve_gradients(ours):
    with torch.inference_mode():
        ours(torch.zeros(1, 3, 112, 16))
    pixels = torch.randn(1, 3, 112, 16, requires_grad=True)
    ours(pixels).sum().backward()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(1, 3, 224, 225), (1, 3, 0, 16), (1, 1, 16, 16), (3, 16, 16)])
def test_other_shapes_raise(ours, shape):
    with pytest.raises(ValueError, match="multiples of 16: resize them first"):
        ours(torch.zeros(shape))
