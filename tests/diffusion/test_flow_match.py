"""Schedules against measured rows and diffusers' schedulers; the Euler step and the noising against their formulas."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from diffsynth_backend.diffusion import FlowMatchScheduler
from diffsynth_backend.diffusion.flow_match import MAX_STEPS, TEMPLATES

# scheduler/scheduler_config.json of Qwen/Qwen-Image.
QWEN_IMAGE = {"base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9,
              "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": 0.02, "time_shift_type": "exponential",
              "use_dynamic_shifting": True}
# As published with the distilled Qwen-Image-Lightning.
QWEN_IMAGE_LIGHTNING = {**QWEN_IMAGE, "base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}

# Measured on the existing implementation: template, steps, options, sigmas.
ROWS = [
    ("FLUX.1", 4, {}, [1, 0.857692, 0.602151, 0.008929]),
    ("Qwen-Image", 4, {"dynamic_shift_len": 4096}, [1, 0.766709, 0.455614, 0.02]),
    ("Qwen-Image", 4, {"dynamic_shift_len": 4096, "denoising_strength": 0.5}, [0.580075, 0.427347, 0.244054, 0.02]),
    ("Qwen-Image-Lightning", 4, {}, [1, 0.9, 0.75, 0.5]),
    ("Qwen-Image-Lightning", 4, {"dynamic_shift_len": 4096}, [1, 0.9, 0.75, 0.5]),
    ("FLUX.2", 4, {"dynamic_shift_len": 4096}, [1, 0.967384, 0.908144, 0.7672]),
    ("Z-Image", 8, {}, [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3]),
    ("Wan", 4, {}, [1, 0.9375, 0.833333, 0.625]),
]


def scheduler(template: str = "Qwen-Image", steps: int = 4, **options) -> FlowMatchScheduler:
    made = FlowMatchScheduler(template)
    made.set_timesteps(steps, **options)
    return made


def diffusers_scheduler(config: dict, steps: int, tokens: int) -> FlowMatchEulerDiscreteScheduler:
    """Set up as diffusers' `QwenImagePipeline` does it."""
    made = FlowMatchEulerDiscreteScheduler(**config)
    mu = calculate_shift(tokens, config["base_image_seq_len"], config["max_image_seq_len"], config["base_shift"],
                         config["max_shift"])
    made.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return made


# ---- schedules ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("template, steps, options, sigmas", ROWS)
def test_measured_rows(template, steps, options, sigmas):
    assert scheduler(template, steps, **options).sigmas.tolist() == pytest.approx(sigmas, abs=1e-6)


@pytest.mark.parametrize("template, config", [("Qwen-Image", QWEN_IMAGE),
                                              ("Qwen-Image-Lightning", QWEN_IMAGE_LIGHTNING)])
@pytest.mark.parametrize("steps", [2, 4, 30, 50])
@pytest.mark.parametrize("tokens", [256, 64 * 64, 83 * 83])
def test_qwen_image_equals_diffusers(template, config, steps, tokens):
    ours = scheduler(template, steps, dynamic_shift_len=tokens)
    theirs = diffusers_scheduler(config, steps, tokens)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas[:-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-3)
    assert theirs.sigmas[-1] == 0  # ours implies it


@pytest.mark.parametrize("steps", [1, 4, 30, 50])
@pytest.mark.parametrize("tokens", [1024, 4096, 4300, 4301, 6889])
def test_flux2_equals_diffusers(steps, tokens):
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    ours = scheduler("FLUX.2", steps, dynamic_shift_len=tokens)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas[:-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens, mu", [(4096, 0.69355), (6889, 0.83432)])
def test_the_shift_follows_the_size(tokens, mu):
    by_size = scheduler(steps=10, dynamic_shift_len=tokens).sigmas
    torch.testing.assert_close(by_size, scheduler(steps=10, exponential_shift_mu=mu).sigmas, rtol=0, atol=1e-5)


def test_without_a_size_the_shift_is_the_documented_default():
    assert torch.equal(scheduler().sigmas, scheduler(exponential_shift_mu=0.8).sigmas)


def test_an_explicit_shift_beats_the_size():
    assert torch.equal(scheduler(exponential_shift_mu=0.8, dynamic_shift_len=4096).sigmas, scheduler().sigmas)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("steps, strength", [(1, 1.0), (1, 0.3), (2, 0.01), (7, 0.6), (100, 1.0)])
def test_every_schedule_falls_within_one_and_zero(template, steps, strength):
    sigmas = scheduler(template, steps, denoising_strength=strength).sigmas
    assert len(sigmas) == steps
    assert sigmas.isfinite().all() and (sigmas > 0).all() and (sigmas <= 1).all()
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("template", ["Qwen-Image", "Qwen-Image-Lightning", "Z-Image", "Wan", "FLUX.2", "FLUX.1"])
def test_one_full_step_starts_from_pure_noise(template):
    assert scheduler(template, 1).sigmas.tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("template", TEMPLATES)
def test_timesteps_are_a_thousand_sigmas(template):
    made = scheduler(template, 5)
    assert torch.equal(made.timesteps, made.sigmas * 1000)


def test_a_lower_strength_starts_lower():
    starts = [float(scheduler(denoising_strength=strength).sigmas[0]) for strength in (1.0, 0.8, 0.5, 0.2)]
    assert starts == sorted(starts, reverse=True) and starts[0] == 1


# ---- given sigmas ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, kept", [
    ([1.0, 0.6, 0.2, 0.0], [1.0, 0.6, 0.2]),  # ComfyUI's SIGMAS end with 0
    ([1.0, 0.6, 0.2], [1.0, 0.6, 0.2]),
    ([0.7, 0.0], [0.7]),
    ([0.7], [0.7]),
])
def test_given_sigmas_are_kept_but_for_the_last_zero(given, kept):
    made = FlowMatchScheduler("Qwen-Image")
    made.set_sigmas(torch.tensor(given))
    assert made.sigmas.tolist() == pytest.approx(kept)
    assert made.timesteps.tolist() == pytest.approx([1000 * sigma for sigma in kept])
    assert made.next_sigma(len(kept) - 1) == 0


@pytest.mark.parametrize("sigmas", [
    [], [0.0], [0.5, 0.5], [0.2, 0.9], [14.6, 3.0, 0.0], [0.5, -0.1], [0.5, 0.0, 0.0], [float("nan")],
    [1.0, float("nan"), 0.2], [float("inf"), 0.5]])
def test_sigmas_of_another_kind_are_refused(sigmas):
    with pytest.raises(ValueError, match="sigmas must fall"):
        FlowMatchScheduler().set_sigmas(torch.tensor(sigmas))


def test_given_sigmas_may_end_above_zero():
    """A first part of a schedule: the noise that is left is somebody else's."""
    made, x, velocity = FlowMatchScheduler(), torch.randn(2, 3), torch.randn(2, 3)
    made.set_sigmas(torch.tensor([1.0, 0.6]), final_sigma=0.5)
    torch.testing.assert_close(made.step(velocity, made.timesteps[1], x), x + velocity * (0.5 - 0.6))


@pytest.mark.parametrize("final_sigma", [0.7, 0.9, -0.1, float("nan")])
def test_the_end_lies_below_the_last_sigma(final_sigma):
    with pytest.raises(ValueError, match="final_sigma must lie in 0…0.6000"):
        FlowMatchScheduler().set_sigmas(torch.tensor([1.0, 0.6]), final_sigma=final_sigma)


# ---- step and noise -------------------------------------------------------------------------------------------------

def test_a_trajectory_equals_diffusers():
    ours, theirs = scheduler(steps=6, dynamic_shift_len=1024), diffusers_scheduler(QWEN_IMAGE, 6, 1024)
    torch.manual_seed(0)
    x = y = torch.randn(1, 16, 4, 4)
    for timestep, their_timestep in zip(ours.timesteps, theirs.timesteps, strict=True):
        velocity = torch.randn(1, 16, 4, 4)
        x = ours.step(velocity, timestep, x)
        y = theirs.step(velocity, their_timestep, y).prev_sample
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_a_step_moves_along_the_velocity_to_the_next_sigma():
    made, x, velocity = scheduler(), torch.randn(2, 3), torch.randn(2, 3)
    for index, timestep in enumerate(made.timesteps):
        following = made.sigmas[index + 1] if index < 3 else 0.0
        expected = x + velocity * (following - made.sigmas[index])
        torch.testing.assert_close(made.step(velocity, timestep, x), expected)
        torch.testing.assert_close(made.step(velocity, timestep, x, progress_id=index), expected)


def test_to_final_goes_to_the_end_at_once():
    made, x, velocity = scheduler(), torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(made.step(velocity, made.timesteps[1], x, to_final=True), x - made.sigmas[1] * velocity)


def test_the_true_velocity_leads_back_to_the_image():
    """x_σ = (1 − σ)·x₀ + σ·ε with velocity ε − x₀: any number of steps ends at x₀."""
    made, image, noise = scheduler(steps=5, denoising_strength=0.7), torch.randn(2, 3), torch.randn(2, 3)
    x = made.add_noise(image, noise, made.timesteps[0])
    for timestep in made.timesteps:
        x = made.step(made.training_target(image, noise, timestep), timestep, x)
    torch.testing.assert_close(x, image)


def test_add_noise_is_the_formula_at_the_nearest_timestep():
    made, image, noise = scheduler(), torch.randn(2, 3), torch.randn(2, 3)
    for index, sigma in enumerate(made.sigmas):
        expected = (1 - sigma) * image + sigma * noise
        torch.testing.assert_close(made.add_noise(image, noise, made.timesteps[index] + 3), expected)


def test_pure_noise_replaces_the_image():
    made, noise = scheduler(), torch.randn(2, 3)
    assert torch.equal(made.add_noise(torch.full((2, 3), 9.0), noise, made.timesteps[0]), noise)


def test_results_keep_the_dtype_of_the_latents():
    made, x = scheduler(), torch.randn(2, 3, dtype=torch.bfloat16)
    assert made.step(x, made.timesteps[0], x).dtype == torch.bfloat16
    assert made.add_noise(x, x, made.timesteps[0]).dtype == torch.bfloat16


def test_small_steps_count_in_bf16():
    """A step is computed in float32 and rounded once: its error is that of one rounding."""
    made = scheduler(steps=50)
    x, velocity = torch.randn(1000, dtype=torch.bfloat16), torch.randn(1000, dtype=torch.bfloat16)
    exact = x.double() + velocity.double() * float(made.sigmas[1].double() - made.sigmas[0].double())
    assert torch.equal(made.step(velocity, made.timesteps[0], x), exact.float().bfloat16())


# ---- errors ---------------------------------------------------------------------------------------------------------

def test_an_unknown_template_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown scheduler template 'Qwen'; known: .*Qwen-Image.*Wan"):
        FlowMatchScheduler("Qwen")


@pytest.mark.parametrize("steps", [0, -1, MAX_STEPS + 1, 4.0, 2.5, float("nan"), "4", None])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(ValueError, match="num_inference_steps must be a whole number"):
        scheduler(steps=steps)


@pytest.mark.parametrize("strength", [0, 0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match="denoising_strength must lie above 0"):
        scheduler(denoising_strength=strength)


@pytest.mark.parametrize("template, option, known", [
    ("Wan", "dynamic_shift_len", "shift"), ("Qwen-Image", "shift", "exponential_shift_mu"),
    ("FLUX.2", "exponential_shift_mu", "dynamic_shift_len"), ("Z-Image", "sigma_shift", "shift")])
def test_an_option_of_another_template_is_refused_with_the_known_ones(template, option, known):
    with pytest.raises(TypeError, match=f"{template}.* no option {option}; it has: .*{known}"):
        scheduler(template, **{option: 3})
