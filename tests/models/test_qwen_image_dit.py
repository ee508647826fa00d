"""The denoiser against diffusers' `QwenImageTransformer2DModel` with equal weights, and its published layout."""
from __future__ import annotations

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

from diffsynth_backend.core.loader.file import hash_state_dict
from diffsynth_backend.models.qwen_image_dit import Grid, QwenImageDiT, image_rotations, keys_kept, text_rotations
from tests.helpers.denoiser import SIZES, TOLERANCE, diffusers_forward as reference, make_pair


@pytest.fixture
def pair(randomized):
    return make_pair(randomized)


@pytest.fixture
def theirs(pair):
    return pair[1]


@pytest.fixture
def ours(pair):
    return pair[0]


def test_default_layout_is_the_published_checkpoint():
    with torch.device("meta"):
        model = QwenImageDiT()
    assert hash_state_dict(model.state_dict()) == "0319a1cb19835fb510907dd3367c95ff"


# 6×10 latents are 3×5 tokens: an odd grid has no middle, so the centred positions are lopsided.
@pytest.mark.parametrize("height, width", [(4, 4), (6, 10), (10, 6), (2, 14), (8, 2)])
def test_forward_equals_diffusers(ours, theirs, relative_error, height, width):
    latents, prompt_emb = torch.randn(1, 16, height, width), torch.randn(1, 7, 24)
    timestep = torch.tensor([612.5])
    error = relative_error(ours(latents, timestep, prompt_emb), reference(theirs, latents, timestep, prompt_emb))
    assert error <= TOLERANCE


@pytest.mark.parametrize("timestep", [1000.0, 766.709, 455.614, 20.0, 0.5])
def test_timesteps_count_to_1000(ours, theirs, relative_error, timestep):
    latents, prompt_emb, timestep = torch.randn(1, 16, 4, 6), torch.randn(1, 5, 24), torch.tensor([timestep])
    error = relative_error(ours(latents, timestep, prompt_emb), reference(theirs, latents, timestep, prompt_emb))
    assert error <= TOLERANCE


@pytest.mark.parametrize("lengths", [None, (5, 5), (2, 5), (5, 1)])
def test_batch_with_padded_prompts_equals_diffusers(ours, theirs, relative_error, lengths):
    latents, prompt_emb = torch.randn(2, 16, 6, 10), torch.randn(2, 5, 24)
    timestep = torch.tensor([900.0, 100.0])  # one timestep a sample
    mask = None if lengths is None else (torch.arange(5) < torch.tensor(lengths)[:, None]).long()
    error = relative_error(ours(latents, timestep, prompt_emb, mask),
                           reference(theirs, latents, timestep, prompt_emb, mask))
    assert error <= TOLERANCE


def test_padding_does_not_change_the_result(ours, relative_error):
    latents, prompt_emb, timestep = torch.randn(1, 16, 4, 4), torch.randn(1, 3, 24), torch.tensor([500.0])
    padded = torch.cat([prompt_emb, torch.full((1, 4, 24), 7.0)], dim=1)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0]])
    assert relative_error(ours(latents, timestep, padded, mask), ours(latents, timestep, prompt_emb)) <= TOLERANCE


def test_a_full_mask_is_no_mask():
    assert keys_kept(torch.ones(2, 5, dtype=torch.long), before=0, after=9) is None
    assert keys_kept(None, before=0, after=9) is None


def test_patchify_packs_as_diffusers_and_unpatchify_inverts_it(ours):
    latents = torch.randn(2, 16, 6, 10)
    tokens = ours.patchify(latents)
    assert torch.equal(tokens, QwenImagePipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(ours.unpatchify(tokens, 6, 10), latents)


@pytest.mark.parametrize("height, width", [(83, 83), (57, 101), (1, 128)])
def test_rope_of_large_grids_equals_diffusers(height, width):
    """Real sizes, where float32 angles would show a difference in how they are computed."""
    embed = QwenImageTransformer2DModel(**{**SIZES, "num_layers": 0}).pos_embed
    axes, cpu = SIZES["axes_dims_rope"], torch.device("cpu")
    image = image_rotations((Grid(0, height, width),), axes, cpu)
    text = text_rotations(max(height, width) // 2, 77, axes, cpu)
    image_reference, text_reference = embed([(1, height, width)], max_txt_seq_len=77, device=torch.device("cpu"))
    torch.testing.assert_close(image, torch.view_as_real(image_reference), rtol=0, atol=1e-6)
    torch.testing.assert_close(text, torch.view_as_real(text_reference), rtol=0, atol=1e-6)


def test_rope_made_in_inference_mode_still_allows_gradients(ours):
    latents, prompt_emb, timestep = torch.randn(1, 16, 2, 22), torch.randn(1, 3, 24), torch.tensor([500.0])
    with torch.inference_mode():
        ours(latents, timestep, prompt_emb)  # fills the cache for this size
    latents = torch.randn(1, 16, 2, 22).requires_grad_()
    ours(latents, timestep, torch.randn(1, 3, 24)).sum().backward()
    assert latents.grad.abs().sum() > 0


def test_rope_axes_must_add_up_to_the_head():
    with pytest.raises(ValueError, match="axes_dims_rope .* 32"):
        QwenImageDiT(num_layers=1, num_attention_heads=1, attention_head_dim=32, axes_dims_rope=(8, 8, 8))
