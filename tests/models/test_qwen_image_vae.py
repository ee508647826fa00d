"""The autoencoder against diffusers' `AutoencoderKLQwenImage` with equal weights, its layout, its tiling."""
from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffsynth_backend.core.loader.file import hash_state_dict
from diffsynth_backend.models.qwen_image_vae import (
    LATENTS_MEAN,
    LATENTS_STD,
    AttentionBlock,
    QwenImageVAE,
    denormalize_latents,
    normalize_latents,
)

TOLERANCE = 1e-4
# A tile sees zeros where the whole picture goes on. Relative to the whole, at half a tile of overlap (measured: 0.05).
TILING_TOLERANCE = 0.1


def pair(randomized, **sizes):
    """diffusers' model and ours with its weights."""
    channels = sizes.get("image_channels", 3)
    theirs = randomized(AutoencoderKLQwenImage(base_dim=sizes.get("base_dim", 16), input_channels=channels))
    with torch.no_grad():  # small pictures: diffusers clamps them, which would hide differences
        theirs.decoder.conv_out.weight.mul_(0.01)
        theirs.decoder.conv_out.bias.mul_(0.01)
    ours = QwenImageVAE(base_dim=sizes.get("base_dim", 16), image_channels=channels).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture
def models(randomized):
    return pair(randomized)


def smooth(channels: int, height: int, width: int) -> torch.Tensor:
    """A slow gradient (1, channels, height, width) within −1…1."""
    rows, columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(0, 3, width)[None]
    return torch.stack([torch.sin(rows * (1 + c / channels) + columns) for c in range(channels)])[None]


def test_default_layout_is_the_published_checkpoint():
    with torch.device("meta"):
        model = QwenImageVAE()
    assert hash_state_dict(model.state_dict()) == "ed4ea5824d55ec3107b09815e318123a"


@pytest.mark.parametrize("batch, height, width", [(1, 16, 16), (1, 32, 48), (2, 40, 24)])
def test_encode_equals_the_mode_of_diffusers(models, relative_error, batch, height, width):
    ours, theirs = models
    image = torch.rand(batch, 3, height, width) * 2 - 1
    posterior = theirs.encode(image[:, :, None]).latent_dist
    assert relative_error(ours.encode(image), posterior.mode()[:, :, 0]) <= TOLERANCE


def test_moments_equal_diffusers(models, relative_error):
    ours, theirs = models
    image = torch.rand(1, 3, 24, 16) * 2 - 1
    mean, log_variance = ours.moments(image)
    posterior = theirs.encode(image[:, :, None]).latent_dist
    assert relative_error(mean, posterior.mean[:, :, 0]) <= TOLERANCE
    assert relative_error(log_variance.clamp(-30, 20), posterior.logvar[:, :, 0]) <= TOLERANCE  # diffusers clamps


@pytest.mark.parametrize("batch, height, width", [(1, 2, 2), (1, 4, 6), (2, 5, 3)])
def test_decode_equals_diffusers(models, relative_error, batch, height, width):
    ours, theirs = models
    latents = torch.randn(batch, 16, height, width)
    picture = theirs.decode(latents[:, :, None]).sample[:, :, 0]
    assert picture.abs().max() < 1  # so the clamp did nothing
    assert relative_error(ours.decode(latents), picture) <= TOLERANCE


def test_four_image_channels_equal_diffusers(randomized, relative_error):
    """The layered variant's pictures have an alpha channel."""
    ours, theirs = pair(randomized, image_channels=4, base_dim=8)
    image, latents = torch.rand(1, 4, 16, 24) * 2 - 1, torch.randn(1, 16, 2, 3)
    assert relative_error(ours.encode(image), theirs.encode(image[:, :, None]).latent_dist.mode()[:, :, 0]) <= TOLERANCE
    assert relative_error(ours.decode(latents), theirs.decode(latents[:, :, None]).sample[:, :, 0]) <= TOLERANCE


def test_statistics_are_the_published_ones():
    config = AutoencoderKLQwenImage(base_dim=4).config
    assert list(LATENTS_MEAN) == config.latents_mean
    assert list(LATENTS_STD) == config.latents_std


def test_normalize_follows_the_statistics_and_denormalize_inverts_it():
    latents = torch.tensor(LATENTS_MEAN)[:, None, None] + torch.tensor(LATENTS_STD)[:, None, None] * torch.ones(2, 3)
    assert torch.allclose(normalize_latents(latents), torch.ones(16, 2, 3), atol=1e-6)
    raw = torch.randn(2, 16, 4, 4)
    assert torch.allclose(denormalize_latents(normalize_latents(raw)), raw, atol=1e-6)


def test_normalize_keeps_the_dtype():
    assert normalize_latents(torch.zeros(1, 16, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_z_dim_must_match_the_statistics():
    with pytest.raises(ValueError, match="z_dim must be 16.*got 8"):
        QwenImageVAE(base_dim=4, z_dim=8)


# ---- memory ---------------------------------------------------------------------------------------------------------

class LargestTensor(TorchDispatchMode):
    """Of all that are made inside: the number of its elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return result


def test_attention_needs_no_matrix_of_all_pixels_by_all_pixels():
    block = AttentionBlock(8).eval().requires_grad_(False)
    with LargestTensor() as largest:
        block(torch.randn(1, 8, 32, 32))
    assert largest.elements < (32 * 32)**2


# ---- tiling ---------------------------------------------------------------------------------------------------------

def fade(left: torch.Tensor, right: torch.Tensor, overlap: int) -> torch.Tensor:
    """Two neighbours as one picture: a straight line from one to the other over the columns that both have."""
    weight = (torch.arange(overlap) + 1) / (overlap + 1)
    both = left[..., -overlap:] * (1 - weight) + right[..., :overlap] * weight
    return torch.cat([left[..., :-overlap], both, right[..., overlap:]], dim=-1)


def test_tiled_decode_is_diffusers_on_each_tile_blended(models, relative_error):
    ours, theirs = models
    latents = torch.randn(1, 16, 4, 6)
    left, right = (theirs.decode(latents[..., None, :, x:x + 4]).sample[:, :, 0] for x in (0, 2))
    tiled = ours.decode(latents, tiled=True, tile_size=4, tile_stride=2)
    assert relative_error(tiled, fade(left, right, overlap=16)) <= TOLERANCE


def test_tiled_encode_is_diffusers_on_each_tile_blended(models, relative_error):
    ours, theirs = models
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    left, right = (theirs.encode(image[..., None, :, x:x + 32]).latent_dist.mode()[:, :, 0] for x in (0, 16))
    tiled = ours.encode(image, tiled=True, tile_size=4, tile_stride=2)
    assert relative_error(tiled, fade(left, right, overlap=2)) <= TOLERANCE


@pytest.fixture
def calm_vae():
    """Random weights with quiet residual branches: like a trained model, and unlike a random one, it acts locally."""
    vae = QwenImageVAE(base_dim=16).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "conv2" in name or "proj" in name:
            parameter.mul_(0.1)
    return vae


@pytest.mark.parametrize("channels, scale, method", [(3, 8, "encode"), (16, 1, "decode")], ids=["encode", "decode"])
def test_tiled_is_close_to_the_whole_on_smooth_input(calm_vae, relative_error, channels, scale, method):
    x = smooth(channels, 16 * scale, 20 * scale)
    run = getattr(calm_vae, method)
    whole = run(x)
    overlapping = relative_error(run(x, tiled=True, tile_size=12, tile_stride=6), whole)
    abutting = relative_error(run(x, tiled=True, tile_size=8, tile_stride=8), whole)
    assert overlapping <= TILING_TOLERANCE
    assert overlapping < abutting / 2


def test_one_tile_is_the_whole(models, relative_error):
    ours, _ = models
    image, latents = torch.rand(1, 3, 32, 16) * 2 - 1, torch.randn(1, 16, 4, 2)
    assert relative_error(ours.encode(image, tiled=True, tile_size=4, tile_stride=2), ours.encode(image)) <= 1e-6
    assert relative_error(ours.decode(latents, tiled=True, tile_size=4, tile_stride=2), ours.decode(latents)) <= 1e-6


@pytest.mark.parametrize("run", [
    lambda vae, **tiling: vae.encode(torch.zeros(1, 3, 48, 32), tiled=True, **tiling),
    lambda vae, **tiling: vae.decode(torch.zeros(1, 16, 6, 4), tiled=True, **tiling)], ids=["encode", "decode"])
def test_progress_counts_latent_tiles(models, run):
    """Six by four latent pixels in tiles of four, two apart: two rows, one column, whichever way the model runs."""
    seen = []
    run(models[0], tile_size=4, tile_stride=2, progress_bar_cmd=lambda tiles: seen.extend(tiles) or tiles)
    assert len(seen) == 2


@pytest.mark.parametrize("tile_size, tile_stride", [(4, 5), (4, 0), (4, -1), (0, 0)])
def test_tiles_with_gaps_are_refused(models, tile_size, tile_stride):
    with pytest.raises(ValueError, match="tile_stride must lie in"):
        models[0].decode(torch.zeros(1, 16, 4, 4), tiled=True, tile_size=tile_size, tile_stride=tile_stride)
