"""Flow matching: noise schedules of the published families and the Euler step.

Notable: a schedule is a plain function from steps and strength to sigmas, one per family, in the table `TEMPLATES`.
x_σ = (1 − σ)·x₀ + σ·ε, the models predict ε − x₀, timestep = 1000·σ, and the σ after the last one is 0 unless set.
Sources: Esser et al. 2024 (arXiv 2403.03206) for the shifts; each family's published scheduler configuration.
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000
MAX_STEPS = 10000


# ---- grids and shifts -----------------------------------------------------------------------------------------------

def _grid(start: float, end: float, points: int) -> Tensor:
    """Evenly spaced, in float64, so that shifts round once: the timestep's embedding multiplies errors by 1000."""
    return torch.linspace(start, end, points, dtype=torch.float64)


def _open_grid(start: float, steps: int) -> Tensor:
    """`steps` points from `start` towards 0, 0 itself left out."""
    return _grid(start, 0.0, steps + 1)[:-1]


def linear_shift(sigmas: Tensor, shift: float) -> Tensor:
    """Spends more steps at high noise: s·σ / (1 + (s − 1)·σ), in a form that keeps σ = 1 exactly 1."""
    return shift / (shift + (1 / sigmas - 1))


def exponential_shift(sigmas: Tensor, mu: float) -> Tensor:
    """The same curve with s = e^μ."""
    return linear_shift(sigmas, math.exp(mu))


def interpolated_mu(tokens: int | None, low: float, high: float, default: float) -> float:
    """μ grows linearly with the number of image tokens: `low` at 256, `high` at 8192; `default` when it is unknown."""
    if tokens is None:
        return default
    return low + (high - low) * (tokens - 256) / (8192 - 256)


def _stretch_to(sigmas: Tensor, last: float) -> Tensor:
    """Stretch 1 − σ so that the last σ is `last`. A single step has no tail to stretch and stays as it is."""
    if len(sigmas) == 1:
        return sigmas
    return 1 - (1 - sigmas) * (1 - last) / (1 - sigmas[-1])


# ---- one function per family ----------------------------------------------------------------------------------------

def qwen_image_sigmas(steps: int, strength: float, exponential_shift_mu: float | None = None,
                      dynamic_shift_len: int | None = None) -> Tensor:
    mu = exponential_shift_mu
    if mu is None:
        mu = interpolated_mu(dynamic_shift_len, 0.5, 0.9, default=0.8)
    return _stretch_to(exponential_shift(_open_grid(strength, steps), mu), last=0.02)


def qwen_image_lightning_sigmas(steps: int, strength: float, exponential_shift_mu: float | None = None,
                                dynamic_shift_len: int | None = None) -> Tensor:
    """The distilled models were trained at one shift, s = 3; the number of tokens does not change it."""
    mu = math.log(3) if exponential_shift_mu is None else exponential_shift_mu
    return exponential_shift(_open_grid(strength, steps), mu)


def flux_sigmas(steps: int, strength: float, shift: float | None = None) -> Tensor:
    smallest = 0.003 / 1.002
    sigmas = _grid(smallest + (1 - smallest) * strength, smallest, steps)
    return linear_shift(sigmas, 3.0 if shift is None else shift)


def _flux2_mu(tokens: int | None, steps: int) -> float:
    """Empirical: a line in the number of steps between two lines in the number of tokens."""
    if tokens is None:
        return 0.8
    at_200 = 1.6927e-4 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-5 * tokens + 1.89833333
    return at_200 + (at_200 - at_10) / 190 * (steps - 200)


def flux2_sigmas(steps: int, strength: float, dynamic_shift_len: int | None = None) -> Tensor:
    sigmas = _grid(1 / steps + (1 - 1 / steps) * strength, 1 / steps, steps)
    return exponential_shift(sigmas, _flux2_mu(dynamic_shift_len, steps))


def z_image_sigmas(steps: int, strength: float, shift: float | None = None) -> Tensor:
    return linear_shift(_open_grid(strength, steps), 3.0 if shift is None else shift)


def wan_sigmas(steps: int, strength: float, shift: float | None = None) -> Tensor:
    return linear_shift(_open_grid(strength, steps), 5.0 if shift is None else shift)


TEMPLATES: dict[str, Callable[..., Tensor]] = {
    "FLUX.1": flux_sigmas, "Qwen-Image": qwen_image_sigmas, "Qwen-Image-Lightning": qwen_image_lightning_sigmas,
    "FLUX.2": flux2_sigmas, "Z-Image": z_image_sigmas, "Wan": wan_sigmas}


class FlowMatchScheduler:
    """A noise schedule and the Euler step along it.

    `sigmas` and `timesteps` (float32, one entry per step) are there after `set_timesteps` or `set_sigmas`.
    Raises ValueError for an unknown template.
    """

    def __init__(self, template: str = "FLUX.1") -> None:
        if template not in TEMPLATES:
            raise ValueError(f"unknown scheduler template {template!r}; known: {', '.join(TEMPLATES)}")
        self.template = template
        self.sigmas = torch.empty(0)
        self.timesteps = torch.empty(0)
        self.final_sigma = 0.0

    def set_timesteps(self, num_inference_steps: int = 100, denoising_strength: float = 1.0, **options) -> None:
        """Make a schedule.

        `denoising_strength` in (0, 1] is how far up the noise it begins (image to image). Options are those of the
        template's function: `exponential_shift_mu`, `dynamic_shift_len` (image tokens) or `shift`.
        Raises ValueError for fewer than one step or a strength out of range, TypeError for an option that the
        template does not have.
        """
        if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= MAX_STEPS:
            raise ValueError(f"num_inference_steps must be a whole number in 1…{MAX_STEPS}, "
                             f"got {num_inference_steps!r}")
        if not 0 < denoising_strength <= 1:
            raise ValueError(f"denoising_strength must lie above 0 and up to 1, got {denoising_strength!r}; "
                             "with 0 nothing would change: use the input as it is")
        make = TEMPLATES[self.template]
        known = list(inspect.signature(make).parameters)[2:]
        if unknown := options.keys() - set(known):
            raise TypeError(f"the schedule {self.template!r} has no option {', '.join(sorted(unknown))}; "
                            f"it has: {', '.join(known)}")
        self.set_sigmas(make(num_inference_steps, denoising_strength, **options))

    def set_sigmas(self, sigmas: Tensor, final_sigma: float = 0.0) -> None:
        """Use given sigmas (steps,), falling, in 0…1, as they are; a trailing 0 (ComfyUI's SIGMAS) is implied anyway.

        `final_sigma` is where the last step ends: above 0, noise is left for somebody else to remove.
        Raises ValueError for sigmas that are not of that kind.
        """
        sigmas = torch.as_tensor(sigmas, dtype=torch.float32).flatten().cpu()
        if len(sigmas) > 1 and sigmas[-1] == 0:
            sigmas = sigmas[:-1]
        falling = bool((sigmas.diff() < 0).all())
        if len(sigmas) == 0 or not falling or not bool(((sigmas > 0) & (sigmas <= 1)).all()):
            raise ValueError(f"sigmas must fall strictly within 1…0, got {[round(s, 4) for s in sigmas.tolist()]}: "
                             "schedules of models that are not flow-matching do not fit")
        if not 0 <= final_sigma < float(sigmas[-1]):
            raise ValueError(f"final_sigma must lie in 0…{float(sigmas[-1]):.4f}, the last step's sigma, "
                             f"got {final_sigma!r}")
        self.final_sigma = float(final_sigma)
        self.sigmas = sigmas
        self.timesteps = sigmas * TRAIN_TIMESTEPS

    def _index(self, timestep: Tensor | float) -> int:
        return int((self.timesteps - torch.as_tensor(timestep).flatten()[0].float().cpu()).abs().argmin())

    def next_sigma(self, index: int) -> float:
        return float(self.sigmas[index + 1]) if index + 1 < len(self.sigmas) else self.final_sigma

    def step(self, model_output: Tensor, timestep: Tensor | float, sample: Tensor, to_final: bool = False,
             progress_id: int | None = None) -> Tensor:
        """One Euler step: x ← x + v·(σ_next − σ). `to_final` goes to σ = 0 at once.

        `progress_id` counts the steps; without it the step is the one whose timestep is nearest.
        """
        index = self._index(timestep) if progress_id is None else progress_id
        target = 0.0 if to_final else self.next_sigma(index)
        # In float32: in bf16 the small steps near the end would be lost in rounding.
        moved = sample.float() + model_output.float() * (target - float(self.sigmas[index]))
        return moved.to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """(1 − σ)·x₀ + σ·ε at the scheduled timestep nearest to the given one; of the noise's dtype."""
        sigma = float(self.sigmas[self._index(timestep)])
        return ((1 - sigma) * original_samples.float() + sigma * noise.float()).to(noise.dtype)

    def training_target(self, sample: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """What the model is trained to predict: ε − x₀, at every timestep."""
        return noise - sample
