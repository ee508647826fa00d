"""Shared parts: normalisation and timestep features against their oracles, and the properties of tiling."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from diffsynth_backend.models.general_modules import RMSNorm, tile_starts, tiled_apply, timestep_frequencies


def test_timestep_frequencies_equal_diffusers():
    timestep = torch.tensor([1.0, 0.766709, 0.02, 0.0])
    theirs = get_timestep_embedding(timestep, 256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
    torch.testing.assert_close(timestep_frequencies(timestep, 256), theirs, rtol=0, atol=1e-6)


def test_timestep_frequencies_are_float32_whatever_comes_in():
    assert timestep_frequencies(torch.tensor([0.5], dtype=torch.bfloat16), 8).dtype == torch.float32


def test_rms_norm_is_its_formula():
    norm, x = RMSNorm(6), torch.randn(3, 5, 6)
    torch.nn.init.normal_(norm.weight)
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


# ---- tiling ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("length, size, stride, starts", [
    (4, 8, 4, [0]),  # smaller than a tile
    (8, 8, 4, [0]),
    (9, 8, 4, [0, 1]),
    (16, 8, 4, [0, 4, 8]),
    (18, 8, 4, [0, 4, 8, 10]),  # the last one moves back to end at the border
    (16, 8, 8, [0, 8]),
])
def test_tile_starts(length, size, stride, starts):
    assert tile_starts(length, size, stride) == starts


def recorded(seen: list):
    """A progress wrapper that notes each tile when it is handed out."""
    def wrap(tiles):
        for tile in tiles:
            seen.append(tile)
            yield tile
    return wrap


@pytest.mark.parametrize("height, width, size, stride", [
    (16, 16, 8, 4), (18, 23, 8, 4), (9, 8, 8, 1), (24, 8, 8, 8), (5, 7, 8, 4), (20, 20, 8, 7)])
def test_a_pixelwise_function_is_unchanged_by_tiling(height, width, size, stride):
    x = torch.randn(2, 3, height, width)
    out = tiled_apply(torch.tanh, x, size, stride, scale=1)
    torch.testing.assert_close(out, torch.tanh(x))


def test_tiles_may_be_rectangles_of_a_video():
    x, sizes = torch.randn(2, 3, 4, 16, 20), set()

    def noted(tile: Tensor) -> Tensor:
        sizes.add(tuple(tile.shape[1:]))
        return torch.tanh(tile)

    torch.testing.assert_close(tiled_apply(noted, x, (6, 8), (3, 5), scale=1), torch.tanh(x))
    assert sizes == {(3, 4, 6, 8)}


def upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=8, mode="nearest")


def downsample(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 8)


@pytest.mark.parametrize("function, shape, size, stride, scale", [
    (upsample, (1, 2, 6, 5), 4, 2, 8), (downsample, (1, 2, 48, 40), 32, 16, 1 / 8)], ids=["decoder", "encoder"])
def test_tiles_of_another_scale_land_in_their_place(function, shape, size, stride, scale):
    x = torch.randn(shape)
    torch.testing.assert_close(tiled_apply(function, x, size, stride, scale), function(x))


def test_neighbours_are_blended_without_a_step():
    """Each tile answers with its own number; between two tiles the result moves evenly from one to the other."""
    numbers = iter([0.0, 1.0])
    out = tiled_apply(lambda tile: torch.full_like(tile, next(numbers)), torch.zeros(1, 1, 1, 12), 8, 4, scale=1)
    assert out[0, 0, 0].tolist() == pytest.approx([0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


def test_the_dtype_stays():
    assert tiled_apply(torch.tanh, torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16), 4, 2, scale=1).dtype == torch.bfloat16


def test_progress_sees_each_tile_once_and_in_step_with_the_work():
    seen, worked = [], []

    def function(tile: Tensor) -> Tensor:
        worked.append(len(seen))
        return tile

    tiled_apply(function, torch.zeros(1, 1, 8, 12), 8, 4, scale=1, progress_bar_cmd=recorded(seen))
    assert seen == [(0, 0), (0, 4)]
    assert worked == [1, 2]


def test_an_exception_in_progress_stops_the_work():
    worked = []

    def stopping(tiles):
        yield tiles[0]
        raise InterruptedError("stopped by the user")

    with pytest.raises(InterruptedError):
        tiled_apply(lambda tile: worked.append(1) or tile, torch.zeros(1, 1, 32, 32), 8, 4, 1, stopping)
    assert len(worked) == 1


@pytest.mark.parametrize("size, stride", [(8, 9), (8, 0), (8, -4), (0, 0)])
def test_a_stride_that_leaves_gaps_is_refused(size, stride):
    with pytest.raises(ValueError, match=rf"tile_stride must lie in 1..tile_size \({size}\), got {stride}"):
        tiled_apply(torch.tanh, torch.zeros(1, 1, 16, 16), size, stride, scale=1)


@pytest.mark.parametrize("shape, size, stride", [
    ((1, 1, 64, 64), 20, 16), ((1, 1, 64, 64), 16, 12), ((1, 1, 68, 64), 16, 8)])
def test_edges_between_output_pixels_are_refused(shape, size, stride):
    with pytest.raises(ValueError, match="multiples of 8"):
        tiled_apply(downsample, torch.zeros(shape), size, stride, scale=1 / 8)
