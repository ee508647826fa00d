"""The whole pipeline against diffusers' `QwenImagePipeline`: same weights, same noise, same prompts, float32.

Where the two differ by intent (guidance without norm rescaling, image to image), the oracle is the loop written out
over diffusers' transformer and scheduler.
"""
from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline as DiffusersPipeline
from PIL import Image
from torch import Tensor

TOLERANCE = 1e-5
HEIGHT, WIDTH, STEPS, SEED = 64, 96, 4, 5
PROMPT, NEGATIVE = "a red circle", "blue, blurred"


def noise(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn((1, 16, height // 8, width // 8), generator=generator)


def pack(latents: Tensor) -> Tensor:
    return DiffusersPipeline._pack_latents(latents, *latents.shape)


def unpack(tokens: Tensor, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    return DiffusersPipeline._unpack_latents(tokens, height, width, 8)[:, :, 0]


def their_latents(theirs, cfg_scale: float, height: int = HEIGHT, width: int = WIDTH, **options) -> Tensor:
    negative = NEGATIVE if cfg_scale > 1 else None
    tokens = theirs(prompt=PROMPT, negative_prompt=negative, true_cfg_scale=cfg_scale, height=height, width=width,
                    latents=pack(noise(height, width)), output_type="latent",
                    **{"num_inference_steps": STEPS, **options}).images
    return unpack(tokens, height, width)


def their_loop(theirs, tokens: Tensor, scheduler, guide, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """diffusers' models in a loop of this file's own; `guide(positive, negative)` makes one prediction of two."""
    positive, negative = (theirs.encode_prompt([text])[0] for text in (PROMPT, NEGATIVE))
    shapes = [[(1, height // 16, width // 16)]]
    for timestep in scheduler.timesteps:
        predictions = [theirs.transformer(hidden_states=tokens, timestep=timestep[None] / 1000, img_shapes=shapes,
                                          encoder_hidden_states=embedding).sample for embedding in (positive, negative)]
        tokens = scheduler.step(guide(*predictions), timestep, tokens).prev_sample
    return unpack(tokens, height, width)


def their_scheduler(theirs, steps: int = STEPS) -> FlowMatchEulerDiscreteScheduler:
    made = FlowMatchEulerDiscreteScheduler.from_config(theirs.scheduler.config)
    tokens = (HEIGHT // 16) * (WIDTH // 16)
    mu = 0.5 + (0.9 - 0.5) * (tokens - 256) / (8192 - 256)
    made.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    return made


# ---- latents --------------------------------------------------------------------------------------------------------

def test_without_guidance_equals_diffusers(pipe, theirs, draw, relative_error):
    assert relative_error(draw(pipe, PROMPT)["latents"], their_latents(theirs, 1.0)) <= TOLERANCE


@pytest.mark.parametrize("height, width, steps", [(64, 96, 4), (48, 80, 2), (112, 48, 7)])  # odd token grids too
def test_norm_preserving_guidance_equals_diffusers(pipe, theirs, draw, relative_error, height, width, steps):
    ours = draw(pipe, PROMPT, negative_prompt=NEGATIVE, cfg_scale=4.0, cfg_norm=True, height=height, width=width,
                num_inference_steps=steps)
    expected = their_latents(theirs, 4.0, height, width, num_inference_steps=steps)
    assert relative_error(ours["latents"], expected) <= TOLERANCE


def test_guidance_is_the_documents_formula_over_diffusers(pipe, theirs, draw, relative_error):
    ours = draw(pipe, PROMPT, negative_prompt=NEGATIVE, cfg_scale=4.0)
    expected = their_loop(theirs, pack(noise()), their_scheduler(theirs),
                          lambda positive, negative: negative + 4.0 * (positive - negative))
    assert relative_error(ours["latents"], expected) <= TOLERANCE


def test_the_kinds_of_guidance_differ(pipe, draw, relative_error):
    """Else the tests above would prove nothing about which one runs."""
    plain, normed, none = (draw(pipe, PROMPT, negative_prompt=NEGATIVE, **options)["latents"] for options in (
        {"cfg_scale": 4.0}, {"cfg_scale": 4.0, "cfg_norm": True}, {"cfg_scale": 1.0}))
    assert relative_error(plain, normed) > 1e-3
    assert relative_error(normed, none) > 1e-3


def test_an_explicit_shift_is_diffusers_mu(pipe, theirs, draw, relative_error):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(theirs.scheduler.config)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=1.7)
    expected = their_loop(theirs, pack(noise()), scheduler, lambda positive, _: positive)
    assert relative_error(draw(pipe, PROMPT, exponential_shift_mu=1.7)["latents"], expected) <= TOLERANCE


def test_image_to_image_starts_from_the_noised_picture(pipe, theirs, draw, relative_error):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    ours = draw(pipe, PROMPT, input_image=Image.fromarray(pixels), denoising_strength=0.6)

    image = torch.from_numpy(pixels / 127.5 - 1).float().permute(2, 0, 1)[None, :, None]
    raw = theirs.vae.encode(image).latent_dist.mode()
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (theirs.vae.config.latents_mean,
                                                                theirs.vae.config.latents_std))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(theirs.scheduler.config)
    tokens = (HEIGHT // 16) * (WIDTH // 16)
    scheduler.set_timesteps(sigmas=np.linspace(0.6, 0.6 / STEPS, STEPS), mu=0.5 + 0.4 * (tokens - 256) / (8192 - 256))
    sigma = scheduler.sigmas[0]
    start = (1 - sigma) * ((raw - mean) / std)[:, :, 0] + sigma * noise()
    expected = their_loop(theirs, pack(start), scheduler, lambda positive, _: positive)
    assert sigma < 0.8  # the picture takes part
    assert relative_error(ours["latents"], expected) <= 1e-4  # the autoencoder's tolerance


# ---- pictures -------------------------------------------------------------------------------------------------------

def test_the_picture_equals_diffusers_to_the_last_level(pipe, theirs, draw):
    ours = np.asarray(draw(pipe, PROMPT, negative_prompt=NEGATIVE, cfg_scale=4.0, cfg_norm=True)["image"], dtype=int)
    expected = theirs(prompt=PROMPT, negative_prompt=NEGATIVE, true_cfg_scale=4.0, height=HEIGHT, width=WIDTH,
                      num_inference_steps=STEPS, latents=pack(noise()), output_type="pil").images[0]
    expected = np.asarray(expected, dtype=int)
    assert expected.std() > 5  # a picture, not one colour
    assert np.abs(ours - expected).max() <= 1
    assert (ours != expected).mean() < 0.01  # values that lie on the border between two levels


# ---- parts ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("texts", [["a red circle"], [""], ["a", "a red circle on a blue square", ""]])
def test_prompt_embeddings_equal_diffusers(pipe, theirs, prompts, relative_error, texts):
    expected, expected_mask = theirs._get_qwen_prompt_embeds(texts)
    embedding, mask = prompts.embed(pipe.text_encoder, texts)
    assert torch.equal(mask, expected_mask)
    # Padding: the encoder's states in ours, zeros in theirs; the mask keeps both out of the denoiser.
    assert relative_error(embedding * mask[..., None], expected) <= TOLERANCE


def test_normalisation_equals_diffusers_at_both_borders(pipe, theirs, relative_error):
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    mean, std = (torch.tensor(v).view(1, 16, 1, 1) for v in (theirs.vae.config.latents_mean,
                                                             theirs.vae.config.latents_std))
    expected = (theirs.vae.encode(image[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
    assert relative_error(pipe.encode_image(image), expected) <= 1e-4
    latents = torch.randn(1, 16, 4, 6)
    decoded = theirs.vae.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
    assert relative_error(pipe.decode_latents(latents), decoded) <= 1e-4
