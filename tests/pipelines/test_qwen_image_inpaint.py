"""Inpainting: the loop against diffusers' `QwenImageInpaintPipeline`, masks against Pillow and written-out formulas."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import QwenImageInpaintPipeline
from PIL import Image
from torch import Tensor

from diffsynth_backend.pipelines.qwen_image import model_fn_qwen_image
from diffsynth_backend.pipelines.qwen_image_inpaint import (
    QwenImageUnit_Inpaint,
    QwenImageUnit_InputImageEmbedder,
    blended,
    check_same_batch,
)
from diffsynth_backend.utils.masks import Blur, latent_mask

HEIGHT, WIDTH, SEED, PROMPT = 64, 96, 5, "a red circle"
ROWS, COLUMNS = HEIGHT // 8, WIDTH // 8
NO_TILES = {"tiled": False, "tile_size": None, "tile_stride": None}


def picture(seed: int = 0, mode: str = "RGB", height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    channels = () if mode == "L" else (len(mode),)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8))


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


def noise(batch: int = 1) -> Tensor:
    return torch.randn((batch, 16, ROWS, COLUMNS), generator=torch.Generator().manual_seed(SEED))


def hard_mask() -> Tensor:
    """Some latents to redraw, in whole cells."""
    mask = torch.zeros(1, 1, ROWS, COLUMNS)
    mask[..., 2:6, 3:9] = 1
    return mask


def soft_mask() -> Tensor:
    return torch.linspace(0, 1, ROWS * COLUMNS).view(1, 1, ROWS, COLUMNS)


# ---- the loop -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def their_inpainting(theirs) -> QwenImageInpaintPipeline:
    pipe = QwenImageInpaintPipeline(scheduler=theirs.scheduler, vae=theirs.vae, text_encoder=theirs.text_encoder,
                                    tokenizer=theirs.tokenizer, transformer=theirs.transformer)
    pipe.prompt_template_encode_start_idx = theirs.prompt_template_encode_start_idx
    pipe.set_progress_bar_config(disable=True)
    return pipe


def their_latents(pipe: QwenImageInpaintPipeline, clean: Tensor, mask: Tensor, steps: int, strength: float) -> Tensor:
    """Both pictures as latents, so that theirs does not sample the autoencoder's distribution."""
    cells = mask[0, 0].repeat_interleave(8, 0).repeat_interleave(8, 1)
    tokens = pipe(PROMPT, image=clean, mask_image=Image.fromarray(cells.byte().numpy() * 255),
                  masked_image_latents=clean, height=HEIGHT, width=WIDTH, num_inference_steps=steps, strength=strength,
                  output_type="latent", generator=torch.Generator().manual_seed(SEED), true_cfg_scale=1.0).images
    return pipe._unpack_latents(tokens, HEIGHT, WIDTH, 8)[:, :, 0]


def our_latents(pipe, clean: Tensor, mask: Tensor, steps: int, skipped: int = 0) -> Tensor:
    """The loop of a step that blends; `skipped` steps at its beginning are left out, as diffusers does for strength."""
    pipe.set_schedule(HEIGHT, WIDTH, steps)
    pipe.scheduler.set_sigmas(pipe.scheduler.sigmas[skipped:])
    prompt_emb, _ = pipe.prompts.embed(pipe.text_encoder, [PROMPT])
    latents = pipe.scheduler.add_noise(clean, noise(len(clean)), pipe.scheduler.timesteps[0])
    for index, timestep in enumerate(pipe.scheduler.timesteps):
        velocity = model_fn_qwen_image(dit=pipe.dit, latents=latents, timestep=timestep[None], prompt_emb=prompt_emb)
        velocity = blended(velocity, latents, clean, mask, float(pipe.scheduler.sigmas[index]))
        latents = pipe.scheduler.step(velocity, timestep, latents, progress_id=index)
    return latents


@pytest.mark.parametrize("steps, strength, skipped", [(2, 1.0, 0), (4, 1.0, 0), (5, 0.6, 2)])
def test_a_hard_mask_equals_diffusers(pipe, their_inpainting, relative_error, steps, strength, skipped):
    """The velocity towards the input keeps it noised with the same noise, which diffusers mixes in after each step."""
    clean = pipe.encode_image(pipe.preprocess_image(picture()))
    ours = our_latents(pipe, clean, hard_mask(), steps, skipped)
    expected = their_latents(their_inpainting, clean, hard_mask(), steps, strength)
    assert relative_error(ours, expected) <= 1e-5
    assert relative_error(ours, clean) > 0.1  # something was redrawn


def test_what_the_mask_leaves_alone_is_the_input_in_the_end(pipe, relative_error):
    clean = torch.randn(1, 16, ROWS, COLUMNS)
    drawn, kept = our_latents(pipe, clean, hard_mask(), 4), (hard_mask() == 0).expand(-1, 16, -1, -1)
    assert relative_error(drawn[kept], clean[kept]) <= 1e-5
    assert relative_error(drawn[~kept], clean[~kept]) > 0.1


@pytest.mark.parametrize("mask", [torch.zeros(1, 1, ROWS, COLUMNS), torch.ones(1, 1, ROWS, COLUMNS)])
def test_an_empty_mask_changes_nothing_and_a_full_one_everything(pipe, relative_error, mask):
    clean = torch.randn(1, 16, ROWS, COLUMNS)
    expected = clean if not mask.any() else our_latents(pipe, torch.zeros_like(clean), mask, 3)
    assert relative_error(our_latents(pipe, clean, mask, 3), expected) <= 1e-5


def test_a_soft_edge_equals_diffusers_while_the_latents_are_on_the_line(relative_error):
    """And further on is the noise that the latents imply, where diffusers takes that of the beginning."""
    clean, start, velocity, mask = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4), \
        torch.rand(1, 1, 4, 4)
    sigma, then = 0.8, 0.5

    def ours(x: Tensor) -> Tensor:
        return x + blended(velocity, x, clean, mask, sigma) * (then - sigma)

    def renoised(x: Tensor, with_noise: Tensor) -> Tensor:
        return mask * (x + velocity * (then - sigma)) + (1 - mask) * ((1 - then) * clean + then * with_noise)

    on_line, off_line = (1 - sigma) * clean + sigma * start, torch.randn(1, 16, 4, 4)
    implied = (off_line - (1 - sigma) * clean) / sigma
    assert relative_error(ours(on_line), renoised(on_line, start)) <= 1e-5
    assert relative_error(ours(off_line), renoised(off_line, implied)) <= 1e-5
    assert relative_error(ours(off_line), renoised(off_line, start)) > 0.1


def test_a_batch_is_its_pictures_one_by_one(pipe, relative_error):
    clean, masks = torch.randn(2, 16, ROWS, COLUMNS), torch.cat([hard_mask(), 1 - hard_mask()])
    latents, velocity = torch.randn(2, 2, 16, ROWS, COLUMNS)
    together = blended(velocity, latents, clean, masks, 0.7)
    alone = [blended(velocity[i:i + 1], latents[i:i + 1], clean[i:i + 1], masks[i:i + 1], 0.7) for i in range(2)]
    assert torch.equal(together, torch.cat(alone))
    shared = blended(velocity, latents, clean[:1], masks[:1], 0.7)
    assert torch.equal(shared, blended(velocity, latents, clean[[0, 0]], masks[[0, 0]], 0.7))


def test_layers_share_the_mask():
    velocity, latents, clean = torch.randn(3, 1, 16, 2, ROWS, COLUMNS)
    together = blended(velocity, latents, clean, soft_mask(), 0.7)
    for layer in range(2):
        alone = blended(velocity[:, :, layer], latents[:, :, layer], clean[:, :, layer], soft_mask(), 0.7)
        assert torch.equal(together[:, :, layer], alone)


def test_bfloat16_is_blended_in_float32():
    velocity, latents, clean = torch.randn(3, 1, 16, ROWS, COLUMNS).bfloat16()
    result = blended(velocity, latents, clean, hard_mask().bfloat16(), 0.02)
    expected = blended(velocity.float(), latents.float(), clean.float(), hard_mask(), 0.02)
    assert result.dtype == torch.float32 and torch.equal(result, expected)


@pytest.mark.parametrize("clean, mask, message", [
    ((1, 16, 8, 8), (1, 1, 8, 12), "the input's latents are 1×16×8×8; expected 1×16×8×12"),
    ((2, 16, 8, 12), (1, 1, 8, 12), "the input's latents are 2×16×8×12; expected 1×16×8×12"),
    ((1, 16, 8, 12), (1, 1, 8, 8), "the inpaint mask is 1×1×8×8; expected 1×1×8×12"),
    ((1, 16, 8, 12), (2, 1, 8, 12), "the inpaint mask is 2×1×8×12; expected 1×1×8×12"),
    ((1, 16, 8, 12), (8, 12), "the inpaint mask is 8×12; expected 1×1×8×12"),
])
def test_shapes_that_would_be_broadcast_raise(clean, mask, message):
    with pytest.raises(ValueError, match=message):
        blended(noise(), noise(), torch.zeros(clean), torch.zeros(mask), 0.5)


@pytest.mark.parametrize("noises, inputs, fits",
                         [(1, 1, True), (3, 1, True), (3, 3, True), (3, 2, False), (1, 2, False)])
def test_there_is_one_input_for_all_or_one_for_each(noises, inputs, fits):
    if fits:
        check_same_batch(torch.zeros(noises, 1), torch.zeros(inputs, 1))
    else:
        with pytest.raises(ValueError, match=f"batch of {inputs} pictures and {noises} are to be drawn"):
            check_same_batch(torch.zeros(noises, 1), torch.zeros(inputs, 1))


# ---- masks ----------------------------------------------------------------------------------------------------------

def made(pipe, mask, size: int | None = None, sigma: float | None = None, **other) -> Tensor:
    """The unit's mask, for a picture of HEIGHT × WIDTH."""
    inputs = {"input_latents": noise(), "height": HEIGHT, "width": WIDTH, **other}
    return QwenImageUnit_Inpaint().process(pipe, mask, size, sigma, **inputs)["inpaint_mask"]


def published_mask(mask: Image.Image) -> Tensor:
    """The published mask: resized to the latent grid in RGB, mean of the colours."""
    return as_tensor(mask.convert("RGB").resize((COLUMNS, ROWS))).mean(dim=-1)[None, None]


@pytest.mark.parametrize("mask", [picture(1), picture(2, "L"), picture(3, "RGBA"), picture(4, "L", 100, 60),
                                  picture(5).quantize(16), picture(6, "L").point(lambda value: value > 128, mode="1")],
                         ids=["RGB", "L", "RGBA", "another size", "palette", "bits"])
def test_a_mask_is_the_published_one(pipe, mask):
    torch.testing.assert_close(made(pipe, mask), published_mask(mask), rtol=0, atol=1e-6)


def smooth(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    return torch.linspace(0, 1, height)[:, None] * torch.linspace(1, 0, width)


@pytest.mark.parametrize("shape", [lambda mask: mask, lambda mask: mask[..., None].expand(-1, -1, 3)],
                         ids=["grey", "colours"])
def test_a_tensor_is_a_mask_without_rounding(pipe, shape):
    image = Image.fromarray((smooth() * 255).round().byte().numpy())
    torch.testing.assert_close(made(pipe, shape(smooth())), published_mask(image), rtol=0, atol=2 / 255)


def test_masks_of_a_batch_take_the_same_path(pipe):
    masks = torch.stack([smooth(), smooth().flip(0)])
    both = latent_mask(masks, COLUMNS, ROWS)
    assert both.shape == (2, 1, ROWS, COLUMNS)
    assert torch.equal(both, torch.cat([made(pipe, mask) for mask in masks]))
    assert torch.equal(both, latent_mask(masks[:, None], COLUMNS, ROWS))


def test_a_mask_on_the_grid_stays_as_it_is(pipe):
    """The unit may run again on its own output, and would blur it twice."""
    once = made(pipe, picture(1), 2, 1.5)
    assert torch.equal(made(pipe, once, 2, 1.5), once)


def test_values_beyond_the_range_are_cut(pipe):
    assert torch.equal(made(pipe, torch.full((ROWS, COLUMNS), 1.5)), torch.ones(1, 1, ROWS, COLUMNS))


def written_out_blur(mask: Tensor, size: int, sigma: float) -> Tensor:
    """Every value as the weighted mean of the square around it; indices are mirrored at the borders."""
    rows, columns = mask.shape[-2:]

    def mirrored(index: int, length: int) -> int:
        index = abs(index)
        return index if index < length else 2 * (length - 1) - index

    offsets = range(-size, size + 1)
    result = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            total = weight = 0.0
            for down in offsets:
                for right in offsets:
                    w = math.exp(-(down**2 + right**2) / (2 * sigma**2))
                    total += w * float(mask[0, 0, mirrored(row + down, rows), mirrored(column + right, columns)])
                    weight += w
            result[row, column] = total / weight
    return result.float()[None, None]


@pytest.mark.parametrize("size, sigma", [(1, 0.8), (3, 2.0), (7, 10.0)])
def test_the_blur_is_gaussian(pipe, relative_error, size, sigma):
    expected = written_out_blur(published_mask(picture(1)), size, sigma)
    blurred = made(pipe, picture(1), size, sigma)
    assert relative_error(blurred, expected) <= 1e-6
    assert float(blurred.min()) >= 0 and float(blurred.max()) <= 1


def test_a_blur_of_size_nought_changes_nothing(pipe):
    assert torch.equal(made(pipe, picture(1), 0, 1.0), made(pipe, picture(1)))


def test_the_mask_has_the_pipelines_dtype(pipe):
    pipe.torch_dtype = torch.bfloat16
    assert made(pipe, picture(1), 1, 1.0).dtype == torch.bfloat16


def test_without_a_mask_there_is_nothing(pipe):
    assert QwenImageUnit_Inpaint().process(pipe, None, None, None, None, HEIGHT, WIDTH) == {}


@pytest.mark.parametrize("mask, options, error, message", [
    (picture(1), {"input_latents": None}, ValueError, "inpaint_mask needs an input_image"),
    (picture(1), {"size": 2}, ValueError, "inpaint_blur_size is given without inpaint_blur_sigma"),
    (picture(1), {"sigma": 2.0}, ValueError, "inpaint_blur_sigma is given without inpaint_blur_size"),
    (None, {"size": 2, "sigma": 2.0}, ValueError, "are given without an inpaint_mask"),
    (picture(1), {"size": -1, "sigma": 2.0}, ValueError, "inpaint_blur_size must be a whole number"),
    (picture(1), {"size": 1.5, "sigma": 2.0}, ValueError, "inpaint_blur_size must be a whole number"),
    (picture(1), {"size": 2, "sigma": 0.0}, ValueError, "inpaint_blur_sigma must be above 0"),
    (picture(1), {"size": 2, "sigma": float("nan")}, ValueError, "inpaint_blur_sigma must be above 0"),
    (picture(1), {"size": 8, "sigma": 2.0}, ValueError, "inpaint_blur_size 8 reaches across the mask, which is 12×8"),
    (np.zeros((8, 8)), {}, TypeError, "inpaint_mask must be a PIL image or a tensor"),
    (torch.zeros(1, 1, ROWS, COLUMNS + 1), {}, ValueError, "inpaint_mask is 1×1×8×13; expected 1×1×8×12"),
    (torch.zeros(1, 2, ROWS, COLUMNS), {}, ValueError, "inpaint_mask is 1×2×8×12; expected 1×1×8×12"),
])
def test_masks_that_cannot_be_honoured_raise(pipe, mask, options, error, message):
    with pytest.raises(error, match=message):
        made(pipe, mask, **options)


@pytest.mark.parametrize("shape", [(8, 8), (1, 2, 8, 8), (0, 8, 8)])
def test_a_latent_mask_of_another_shape_raises(shape):
    with pytest.raises(ValueError, match="the mask has shape"):
        latent_mask(torch.zeros(shape), COLUMNS, ROWS)


def test_a_blur_keeps_the_sum_of_an_inner_spot():
    spot = torch.zeros(1, 1, 9, 9)
    spot[..., 4, 4] = 1
    assert float(Blur(2, 1.0)(spot).sum()) == pytest.approx(1)


# ---- the input ------------------------------------------------------------------------------------------------------

def embedded(pipe, image, **options) -> Tensor:
    inputs = {"height": HEIGHT, "width": WIDTH, **NO_TILES, **options}
    return QwenImageUnit_InputImageEmbedder().process(pipe, image, **inputs)["input_latents"]


def test_a_list_of_pictures_is_a_batch(pipe):
    pictures = [picture(seed) for seed in range(3)]
    together = embedded(pipe, pictures)
    assert torch.equal(together, torch.cat([embedded(pipe, one) for one in pictures]))
    assert torch.equal(together[1:2], pipe.encode_image(pipe.preprocess_image(pictures[1])))


def test_a_tensor_is_the_picture_it_holds(pipe, relative_error):
    assert relative_error(embedded(pipe, as_tensor(picture())), embedded(pipe, picture())) <= 1e-6


def test_the_picture_is_encoded_tile_by_tile(pipe, relative_error):
    tiled = embedded(pipe, picture(), tiled=True, tile_size=8, tile_stride=4)
    assert torch.equal(tiled, pipe.encode_image(pipe.preprocess_image(picture()), True, tile_size=8, tile_stride=4))
    assert relative_error(tiled, embedded(pipe, picture())) > 1e-6


def test_without_an_input_there_is_nothing(pipe):
    assert QwenImageUnit_InputImageEmbedder().process(pipe, None, HEIGHT, WIDTH, **NO_TILES) == {}


@pytest.mark.parametrize("image, error, message", [
    ([], ValueError, "input_image is an empty list"),
    (np.zeros((64, 96, 3)), TypeError, "input_image must be a PIL image or a tensor"),
    ([picture(), None], TypeError, r"input_image\[1\] must be a PIL image or a tensor"),
    (picture(height=64, width=64), ValueError,
     r"input_image is 64×64 but the picture to draw is 96×64 \(width × height\): resize one of them"),
    ([picture(), picture(height=96, width=64)], ValueError, r"input_image\[1\] is 64×96 but the picture to draw"),
])
def test_inputs_that_do_not_fit_raise_before_anything_is_encoded(pipe, monkeypatch, image, error, message):
    monkeypatch.setattr(type(pipe), "encode_image", lambda *_: pytest.fail("encoded"))
    with pytest.raises(error, match=message):
        embedded(pipe, image)


def test_a_missing_autoencoder_is_named(pipe):
    pipe.vae = None
    with pytest.raises(ValueError, match="needs vae, which is not loaded"):
        embedded(pipe, picture())
