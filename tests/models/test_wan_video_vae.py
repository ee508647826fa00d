"""Wan's autoencoders against diffusers' `AutoencoderKLWan` with equal weights, in time, in tiles and in memory."""
from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from diffsynth_backend.configs.vram_management_module_maps import module_map_of
from diffsynth_backend.core import load_model
from diffsynth_backend.core.vram import offload_model, onload_model
from diffsynth_backend.models.wan_video_vae import (
    STATISTICS,
    AttentionBlock,
    Past,
    WanVideoVAE,
    WanVideoVAE38,
    denormalize_latents,
    normalize_latents,
)
from diffsynth_backend.utils.state_dict_converters.wan_video_vae import (
    WanVideoVAE38FromDiffusers,
    WanVideoVAEFromDiffusers,
    WanVideoVAEStateDictConverter,
    published_vae_keys,
)
from tests.helpers.live_bytes import LiveBytes

TOLERANCE = 1e-4
# A tile sees zeros where the whole picture goes on. Relative to the whole, at half a tile of overlap (measured: 0.09).
TILING_TOLERANCE = 0.15
BF16 = torch.bfloat16
# What diffusers' class needs to be 2.2's, besides its widths.
THEIR_38 = {"z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
            "scale_factor_spatial": 16}
VERSIONS = {"2.1": (WanVideoVAE, {"base_dim": 4}, {}, WanVideoVAEFromDiffusers),
            "2.2": (WanVideoVAE38, {"base_dim": 4, "decoder_base_dim": 6}, THEIR_38, WanVideoVAE38FromDiffusers)}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=VERSIONS)
def models(request):
    """Ours and diffusers' model, with equal weights."""
    model_class, sizes, their_sizes, converter = VERSIONS[request.param]
    torch.manual_seed(0)
    theirs = AutoencoderKLWan(**sizes, **their_sizes).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        # Small pictures: diffusers clamps them, which would hide differences.
        theirs.decoder.conv_out.weight.mul_(0.01)
        theirs.decoder.conv_out.bias.mul_(0.01)
    ours = model_class(**sizes).eval().requires_grad_(False)
    ours.load_state_dict(converter(theirs.state_dict()), strict=True)
    return ours, theirs


def random_video(vae: nn.Module, frames: int, height: int = 2, width: int = 3, batch: int = 1) -> Tensor:
    """Sides in latent pixels."""
    return torch.rand(batch, 3, frames, height * vae.spatial_factor, width * vae.spatial_factor) * 2 - 1


def random_latents(vae: nn.Module, frames: int, height: int = 2, width: int = 3, batch: int = 1) -> Tensor:
    return torch.randn(batch, vae.z_dim, frames, height, width)


# ---- values ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("frames, batch", [(1, 1), (5, 2), (9, 1), (17, 1)])
def test_encode_equals_the_mode_of_diffusers(models, relative_error, frames, batch):
    ours, theirs = models
    video = random_video(ours, frames, batch=batch)
    assert relative_error(ours.encode(video), theirs.encode(video).latent_dist.mode()) <= TOLERANCE


@pytest.mark.parametrize("frames, batch", [(1, 1), (5, 2), (9, 1), (17, 1)])
def test_decode_equals_diffusers(models, relative_error, frames, batch):
    ours, theirs = models
    latents = random_latents(ours, (frames + 3) // 4, batch=batch)
    video = theirs.decode(latents).sample
    assert video.shape[2] == frames and video.abs().max() < 1  # so the clamp did nothing
    assert relative_error(ours.decode(latents), video) <= TOLERANCE


def test_moments_equal_diffusers(models, relative_error):
    ours, theirs = models
    video = random_video(ours, 1)
    mean, log_variance = ours.model.moments(video, Past()).chunk(2, dim=1)
    posterior = theirs.encode(video).latent_dist
    assert relative_error(mean, posterior.mean) <= TOLERANCE
    assert relative_error(log_variance.clamp(-30, 20), posterior.logvar) <= TOLERANCE  # diffusers clamps


def test_later_frames_change_nothing_before_them(models):
    ours, _ = models
    video, latents = random_video(ours, 9), random_latents(ours, 3)
    torch.testing.assert_close(ours.encode(video)[:, :, :2], ours.encode(video[:, :, :5]))
    torch.testing.assert_close(ours.decode(latents)[:, :, :5], ours.decode(latents[:, :, :2]))


def test_statistics_of_2_1_are_the_published_ones():
    config = AutoencoderKLWan(base_dim=4).config
    assert [list(values) for values in STATISTICS[16]] == [config.latents_mean, config.latents_std]


@pytest.mark.parametrize("channels", STATISTICS)
def test_normalize_follows_the_statistics_and_denormalize_inverts_it(channels):
    mean, std = (torch.tensor(values)[:, None, None, None] for values in STATISTICS[channels])
    assert mean.shape == std.shape == (channels, 1, 1, 1)
    torch.testing.assert_close(normalize_latents(mean + std * torch.ones(2, 3, 4)), torch.ones(channels, 2, 3, 4))
    raw = torch.randn(2, channels, 3, 4, 4)
    torch.testing.assert_close(denormalize_latents(normalize_latents(raw)), raw)
    assert normalize_latents(raw.bfloat16()).dtype == denormalize_latents(raw.bfloat16()).dtype == BF16


def test_result_has_the_dtype_of_the_input(models):
    ours = copy.deepcopy(models[0]).to(BF16)
    assert ours.encode(random_video(ours, 5).to(BF16)).dtype == BF16
    assert ours.decode(random_latents(ours, 2).to(BF16)).dtype == BF16


# ---- tiling ---------------------------------------------------------------------------------------------------------

def fade(left: Tensor, right: Tensor, overlap: int) -> Tensor:
    """Two neighbours as one picture: a straight line from one to the other over the columns that both have."""
    weight = (torch.arange(overlap) + 1) / (overlap + 1)
    both = left[..., -overlap:] * (1 - weight) + right[..., :overlap] * weight
    return torch.cat([left[..., :-overlap], both, right[..., overlap:]], dim=-1)


TILES = {"tiled": True, "tile_size": (2, 4), "tile_stride": (2, 2)}


def test_tiled_decode_is_diffusers_on_each_tile_blended(models, relative_error):
    ours, theirs = models
    latents = random_latents(ours, 3, width=6)
    left, right = (theirs.decode(latents[..., x:x + 4]).sample for x in (0, 2))
    assert relative_error(ours.decode(latents, **TILES), fade(left, right, 2 * ours.spatial_factor)) <= TOLERANCE


def test_tiled_encode_is_diffusers_on_each_tile_blended(models, relative_error):
    ours, theirs = models
    video, factor = random_video(ours, 9, width=6), ours.spatial_factor
    left, right = (theirs.encode(video[..., x * factor:(x + 4) * factor]).latent_dist.mode() for x in (0, 2))
    assert relative_error(ours.encode(video, **TILES), fade(left, right, overlap=2)) <= TOLERANCE


def smooth(channels: int, frames: int, height: int, width: int) -> Tensor:
    """A slow gradient (1, channels, frames, height, width) within −1…1, which moves."""
    time = torch.linspace(0, 1, frames)[:, None, None]
    rows, columns = torch.linspace(-1, 1, height)[:, None], torch.linspace(0, 3, width)[None]
    return torch.stack([torch.sin(rows * (1 + c / channels) + columns + time) for c in range(channels)])[None]


@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize("version", VERSIONS)
def test_tiled_is_close_to_the_whole_on_smooth_input(version, method, relative_error):
    model_class, sizes, *_ = VERSIONS[version]
    vae = model_class(**sizes).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():  # quiet branches: a trained model, too, acts locally
        if "residual.6" in name or "proj" in name:
            parameter.mul_(0.1)
    scale = vae.spatial_factor
    x = smooth(3, 5, 8 * scale, 12 * scale) if method == "encode" else smooth(vae.z_dim, 2, 8, 12)
    run = getattr(vae, method)
    whole = run(x)
    overlapping = relative_error(run(x, tiled=True, tile_size=(6, 8), tile_stride=(3, 4)), whole)
    abutting = relative_error(run(x, tiled=True, tile_size=(4, 6), tile_stride=(4, 6)), whole)
    assert overlapping <= TILING_TOLERANCE
    assert overlapping < abutting / 2


def test_one_tile_is_the_whole(models):
    ours, _ = models
    video, latents = random_video(ours, 5), random_latents(ours, 2)
    assert torch.equal(ours.encode(video, tiled=True), ours.encode(video))  # by default, tiles are larger than these
    assert torch.equal(ours.decode(latents, tiled=True, tile_size=3, tile_stride=2), ours.decode(latents))


# ---- waiting --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("run", [
    lambda vae, **options: vae.encode(torch.zeros_like(random_video(vae, 9, width=6)), **options),
    lambda vae, **options: vae.decode(torch.zeros_like(random_latents(vae, 3, width=6)), **options)],
    ids=["encode", "decode"])
def test_progress_counts_chunks_of_tiles_and_can_stop_between_them(models, run):
    """Three latent frames in two tiles; a run that was stopped leaves nothing behind."""
    seen = []
    expected = run(models[0], **TILES, progress_bar_cmd=lambda chunks: seen.extend(chunks) or chunks)
    assert len(seen) == 6

    def stopping(chunks):
        yield from chunks[:4]
        raise InterruptedError("stopped by the user")

    with pytest.raises(InterruptedError):
        run(models[0], **TILES, progress_bar_cmd=stopping)
    assert torch.equal(run(models[0], **TILES), expected)


def test_threads_share_a_model(models):
    ours, _ = models
    latents = [random_latents(ours, 3) for _ in range(4)]
    expected = [ours.decode(each) for each in latents]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(ours.decode, latents), expected))


# ---- memory ---------------------------------------------------------------------------------------------------------

def working_bytes(vae: nn.Module, method: str, x: Tensor) -> int:
    """The peak without weights, input and result."""
    with LiveBytes(x, *vae.parameters()) as live:
        result = getattr(vae, method)(x)
    return live.peak - 4 * result.numel()  # which is gathered in float32


# What the classes state, and the shape of the decoder's widest activation: channels, and four frames of 96 × 160, for
# 2.2 half as high and wide.
BOUNDS = pytest.mark.parametrize("model_class, sizes, times, widest", [
    (WanVideoVAE, {"base_dim": 8}, 12, (8, 4, 96, 160)),
    (WanVideoVAE38, {"base_dim": 8, "decoder_base_dim": 12}, 8, (24, 4, 48, 80))], ids=VERSIONS)


@BOUNDS
def test_memory_stays_within_the_stated_bound(model_class, sizes, times, widest):
    """9 frames of 96 × 160, in bfloat16: norms are computed in float32, so there it is relatively more."""
    vae = model_class(**sizes).to(BF16).eval().requires_grad_(False)
    height, width = 96 // vae.spatial_factor, 160 // vae.spatial_factor
    bound = times * math.prod(widest) * BF16.itemsize
    assert working_bytes(vae, "encode", random_video(vae, 9, height, width).to(BF16)) <= bound
    assert working_bytes(vae, "decode", random_latents(vae, 3, height, width).to(BF16)) <= bound


def test_attention_needs_no_matrix_of_all_pixels_by_all_pixels():
    block, x = AttentionBlock(8).eval().requires_grad_(False), torch.randn(1, 8, 1, 32, 32)
    with LiveBytes(x, *block.parameters()) as live:
        block(x, Past())
    assert live.peak < (32 * 32)**2


def test_memory_does_not_grow_with_frames(models):
    ours, _ = models
    # Three chunks are the first, the last, and one between them, which needs the most.
    for method, make, few, many in (("encode", random_video, 9, 29), ("decode", random_latents, 3, 8)):
        assert working_bytes(ours, method, make(ours, many)) == working_bytes(ours, method, make(ours, few))


# ---- management -----------------------------------------------------------------------------------------------------

def wan_pth(vae: nn.Module, folder: Path) -> str:
    """A file like the published ones, in bfloat16."""
    path = folder / "Wan_VAE.pth"
    torch.save({name: tensor.to(BF16) for name, tensor in published_vae_keys(vae.state_dict()).items()}, path)
    return str(path)


@pytest.mark.parametrize("offload, onload", [("disk", "disk"), ("disk", BF16), (BF16, BF16)], ids=str)
@torch.inference_mode()
def test_managed_has_the_bits_of_unmanaged(models, tmp_path, offload, onload):
    """From a .pth file through the converter, mapped where weights stay on disk."""
    ours, _ = models
    path, model_class = wan_pth(ours, tmp_path), type(ours)
    sizes = next(sizes for known, sizes, *_ in VERSIONS.values() if known is model_class)
    plain = load_model(model_class, path, sizes, state_dict_converter=WanVideoVAEStateDictConverter)
    video, latents = random_video(ours, 5).to(BF16), random_latents(ours, 2).to(BF16)
    expected = plain.encode(video), plain.decode(latents)
    vram_config = {"offload_dtype": offload, "offload_device": "disk" if offload == "disk" else "cpu",
                   "onload_dtype": onload, "onload_device": "disk" if onload == "disk" else "cpu",
                   "preparing_dtype": BF16, "computation_dtype": BF16, "computation_device": "cpu"}
    managed = load_model(model_class, path, sizes, state_dict_converter=WanVideoVAEStateDictConverter,
                         module_map=module_map_of(model_class), vram_config=vram_config, vram_limit=0)
    for change in (onload_model, offload_model):
        change(managed)
        assert torch.equal(managed.encode(video), expected[0])
        assert torch.equal(managed.decode(latents), expected[1])


# ---- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("frames, near", [(2, "1 or 5"), (4, "1 or 5"), (8, "5 or 9")])
def test_frames_that_fill_no_latent_frame_are_refused(models, frames, near):
    with pytest.raises(ValueError, match=rf"4·k \+ 1 frames expected, got {frames}: give {near}"):
        models[0].encode(random_video(models[0], frames))


@pytest.mark.parametrize("shape", [(1, 3, 5, 40, 32), (1, 4, 5, 32, 32), (3, 5, 32, 32), (1, 3, 0, 32, 32)])
def test_videos_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="video .* multiples of 16, got"):
        WanVideoVAE38(4, 4).encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 48, 2, 4, 4), (16, 2, 4, 4), (1, 16, 0, 4, 4)])
def test_latents_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="latents .B, 16, T, h, w. expected, got"):
        WanVideoVAE(4).decode(torch.zeros(shape))


def test_statistics_of_another_number_of_channels_are_refused():
    with pytest.raises(ValueError, match="16 or 48"):
        normalize_latents(torch.zeros(1, 12, 1, 2, 2))
    with pytest.raises(ValueError, match="z_dim must be 16 or 48.*got 12"):
        WanVideoVAE(4, z_dim=12)
    with pytest.raises(ValueError, match="one value for each of the 3 steps"):
        WanVideoVAE(4, temporal_downsample=(True, True))


def test_tiles_with_gaps_are_refused(models):
    with pytest.raises(ValueError, match=r"tile_stride must lie in 1..tile_size \(\d+\)"):
        models[0].decode(random_latents(models[0], 1), tiled=True, tile_size=(4, 4), tile_stride=(4, 5))
    with pytest.raises(ValueError, match=r"tile_stride must lie in 1..tile_size \(\d+\)"):
        models[0].encode(random_video(models[0], 1), tiled=True, tile_size=(4, 4), tile_stride=(5, 4))
