"""Pictures: both kinds give the same numbers, are resized alike, and what is no picture is named."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth_backend.utils.pictures import check_picture, pixels, resized, size_of, to_image


def random_image(width: int = 12, height: int = 8, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(values, mode if mode != "RGB" else None)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_both_kinds_give_the_same_numbers(mode, channels):
    image = random_image(mode=mode)
    ours = pixels(image, channels)
    assert ours.shape == (1, channels, 8, 12) and ours.dtype == torch.float32
    assert torch.equal(ours, pixels(as_tensor(image), channels))


def test_a_picture_without_alpha_is_opaque_and_alpha_is_dropped():
    assert (pixels(random_image(), 4)[:, 3] == 1).all()
    image = random_image(mode="RGBA")
    assert torch.equal(pixels(image)[0], as_tensor(image)[..., :3].movedim(-1, 0))


def test_grey_is_the_mean_of_the_colours():
    image = random_image()
    assert torch.allclose(pixels(image, 1)[0, 0], as_tensor(image).mean(dim=-1))


def test_a_mask_of_two_axes_counts_as_grey():
    mask = torch.rand(8, 12)
    assert torch.equal(pixels(mask, 1)[0, 0], mask)
    assert torch.equal(pixels(mask, 3)[0, 1], mask)
    assert resized(mask, 6, 4).shape == (4, 6)


def test_float_values_are_not_rounded_to_bytes():
    picture = torch.full((4, 4, 3), 0.12345)
    assert torch.equal(pixels(picture), torch.full((1, 3, 4, 4), 0.12345))


@pytest.mark.parametrize("size", [(6, 4), (24, 20), (5, 16)])
def test_both_kinds_are_resized_alike_up_to_pillows_rounding(size):
    image = Image.fromarray(np.linspace(0, 255, 40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8))
    of_image, of_tensor = resized(image, *size), resized(as_tensor(image), *size)
    assert size_of(of_image) == size_of(of_tensor) == size
    assert (pixels(of_image) - pixels(of_tensor)).abs().max() < 2 / 255


@pytest.mark.parametrize("mode", ["1", "P"])
def test_palettes_and_single_bits_are_filtered_too(mode):
    image = Image.fromarray((np.indices((16, 16)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert(mode)
    assert set(np.unique(np.asarray(resized(image, 8, 8)))) - {0, 255}


def test_the_same_size_is_the_same_picture():
    image, tensor = random_image(), torch.rand(8, 12, 3)
    assert resized(image, 12, 8) is image and resized(tensor, 12, 8) is tensor


def test_back_to_a_picture_is_exact():
    for mode in ("RGB", "RGBA"):
        image = random_image(mode=mode)
        back = to_image(pixels(image, len(mode))[0] * 2 - 1)
        assert back.mode == mode and np.array_equal(np.asarray(back), np.asarray(image))


@pytest.mark.parametrize("value", ["a.png", None, np.zeros((4, 4, 3))])
def test_what_is_no_picture_is_named(value):
    with pytest.raises(TypeError, match="edit_image must be a PIL image or a tensor"):
        check_picture("edit_image", value)


@pytest.mark.parametrize("value", [torch.zeros(1, 4, 4, 3), torch.zeros(4, 4, 2), torch.zeros(0, 4, 3),
                                   torch.zeros(4, 4, 3, dtype=torch.uint8)])
def test_a_tensor_of_another_form_says_what_is_expected(value):
    with pytest.raises(ValueError, match=r"the mask is a .* expected floats in 0…1 of shape \(height, width, 3 or 4\)"):
        check_picture("the mask", value)
