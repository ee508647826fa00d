"""What all pipelines share: sizes, noise, pictures, `model_fn`'s inputs, guidance, and a loop that always cleans up."""
from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffsynth_backend.diffusion import BasePipeline, FlowMatchScheduler, PipelineUnit

LOGGER = "diffsynth_backend.diffusion.base_pipeline"


class Linear(BasePipeline):
    """The smallest pipeline: its model predicts side · latents. Notes what is onloaded and how often the model runs."""

    def __init__(self, steps: int = 4) -> None:
        super().__init__(device="cpu", torch_dtype=torch.float32)
        self.scheduler = FlowMatchScheduler("Qwen-Image")
        self.scheduler.set_timesteps(steps)
        self.dit = nn.Identity()
        self.vae = nn.Identity()
        self.in_iteration_models = ("dit",)
        self.onloaded: list[tuple[str, ...]] = []
        self.calls: list[float] = []

        def model_fn(dit, latents, timestep, side):
            self.calls.append(float(timestep))
            return dit(latents) * side

        self.model_fn = model_fn

    def load_models_to_device(self, model_names=()):
        super().load_models_to_device(model_names)
        self.onloaded.append(tuple(model_names))


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    return Linear()


@pytest.fixture
def latents():
    torch.manual_seed(1)
    return torch.randn(1, 16, 2, 2)


# ---- sizes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width, rounded", [
    (16, 16, (16, 16)), (1328, 1328, (1328, 1328)), (17, 31, (32, 32)), (1, 1, (16, 16)), (1000, 512, (1008, 512)),
    (64.0, 63, (64, 64))])
def test_sizes_are_rounded_up(pipe, height, width, rounded):
    result = pipe.check_resize_height_width(height, width)
    assert result == rounded
    assert all(type(value) is int for value in result)


def test_rounding_follows_the_pipelines_factors():
    pipe = BasePipeline(device="cpu", height_division_factor=32, width_division_factor=8)
    assert pipe.check_resize_height_width(33, 33) == (64, 40)


def test_rounding_is_said_and_no_rounding_is_silent(pipe, caplog):
    caplog.set_level(logging.INFO, logger=LOGGER)
    pipe.check_resize_height_width(64, 64)
    assert not caplog.messages
    pipe.check_resize_height_width(64, 65)
    assert caplog.messages == ["height × width 64×65 rounded up to 64×80 (multiples of 16 and 16)"]


@pytest.mark.parametrize("value", [0, -16, 64.5, float("nan"), float("inf"), "64", None, [64], 0.5])
@pytest.mark.parametrize("name", ["height", "width"])
def test_a_size_that_is_no_number_of_pixels_raises_with_its_name(pipe, name, value):
    size = {"height": 64, "width": 64, name: value}
    with pytest.raises(ValueError, match=f"{name} must be a positive whole number of pixels"):
        pipe.check_resize_height_width(**size)


def test_a_size_beyond_all_memory_raises(pipe):
    with pytest.raises(ValueError, match="more than 268435456 pixels"):
        pipe.check_resize_height_width(16384, 16385)


# ---- noise ----------------------------------------------------------------------------------------------------------

def test_a_seed_means_the_same_noise(pipe):
    noise = pipe.generate_noise((1, 4, 3, 3), seed=7)
    torch.rand(1)  # the global generator has no say
    assert torch.equal(pipe.generate_noise((1, 4, 3, 3), seed=7), noise)
    assert not torch.equal(pipe.generate_noise((1, 4, 3, 3), seed=8), noise)


def test_seeded_noise_is_torchs_own_and_leaves_the_global_generator_alone(pipe):
    before = torch.get_rng_state()
    noise = pipe.generate_noise((5,), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(noise, torch.randn(5, generator=torch.Generator().manual_seed(3)))


def test_without_a_seed_each_noise_is_another(pipe):
    assert not torch.equal(pipe.generate_noise((8,)), pipe.generate_noise((8,)))


def test_noise_is_drawn_in_one_dtype_and_given_in_another(pipe):
    drawn = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    given = pipe.generate_noise((6,), seed=0, rand_torch_dtype=torch.bfloat16)
    assert given.dtype == torch.float32 and torch.equal(given, drawn.float())
    assert pipe.generate_noise((6,), seed=0, torch_dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("seed", [0, -1, -2**63, 2**64 - 1])
def test_every_seed_that_torch_takes_is_taken(pipe, seed):
    assert torch.equal(pipe.generate_noise((4,), seed=seed), pipe.generate_noise((4,), seed=seed))


@pytest.mark.parametrize("seed", [0.5, "7", 2**64, -2**63 - 1, float("nan")])
def test_any_other_seed_raises(pipe, seed):
    with pytest.raises(ValueError, match="seed must be a whole number in"):
        pipe.generate_noise((4,), seed=seed)


# ---- pictures -------------------------------------------------------------------------------------------------------

def test_a_picture_becomes_minus_one_to_one(pipe):
    picture = Image.fromarray(np.array([[[0, 255, 51]], [[255, 0, 204]]], dtype=np.uint8))  # 2 high, 1 wide
    tensor = pipe.preprocess_image(picture)
    assert tensor.shape == (1, 3, 2, 1)
    assert tensor[0, :, :, 0].tolist() == [pytest.approx(v) for v in ([-1, 1], [1, -1], [-0.6, 0.6])]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_pictures_of_any_mode_become_three_channels(pipe, mode):
    assert pipe.preprocess_image(Image.new("RGB", (4, 2)).convert(mode)).shape == (1, 3, 2, 4)


def test_a_picture_gets_the_pipelines_dtype():
    pipe = BasePipeline(device="cpu", torch_dtype=torch.bfloat16)
    assert pipe.preprocess_image(Image.new("RGB", (2, 2))).dtype == torch.bfloat16


@pytest.mark.parametrize("value, pixel", [
    (-1.0, 0), (1.0, 255), (-1.7, 0), (1.3, 255),  # clipped
    (0.0, 128), (-0.996, 1), (0.9979, 255), (0.9959, 254),  # rounded, not cut: 127.5, 0.51, 254.73, 254.48
])
def test_output_is_clipped_and_rounded(pipe, value, pixel):
    picture = pipe.vae_output_to_image(torch.full((1, 3, 2, 4), value))
    assert picture.size == (4, 2)
    assert picture.getpixel((3, 1)) == (pixel, pixel, pixel)


def test_a_picture_survives_the_way_there_and_back(pipe):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    back = pipe.vae_output_to_image(pipe.preprocess_image(Image.fromarray(pixels)))
    assert np.array_equal(np.asarray(back), pixels)


# ---- inputs of model_fn ---------------------------------------------------------------------------------------------

def test_model_fn_gets_what_its_signature_names(pipe):
    pipe.model_fn = lambda latents, scale=2: latents * scale
    assert pipe.call_model_fn(latents=3) == 6
    assert pipe.call_model_fn(latents=3, scale=5) == 15


def test_a_value_that_would_be_dropped_raises_with_its_name(pipe):
    with pytest.raises(TypeError, match="model_fn does not take control_image: the value would be ignored"):
        pipe.call_model_fn(dit=pipe.dit, latents=torch.ones(1), timestep=torch.ones(1), side=1, control_image="x")


def test_an_absent_value_is_nothing_to_drop(pipe):
    pipe.call_model_fn(dit=pipe.dit, latents=torch.ones(1), timestep=torch.ones(1), side=1, control_image=None)


@pytest.mark.parametrize("name", ["cfg_scale", "seed", "height", "width", "noise", "rand_device", "input_latents",
                                  "denoising_strength", "num_inference_steps", "progress_id"])
def test_bookkeeping_passes_silently(pipe, name):
    pipe.call_model_fn(dit=pipe.dit, latents=torch.ones(1), timestep=torch.ones(1), side=1, **{name: 1})


def test_what_a_unit_reads_passes_silently(pipe):
    pipe.units = [PipelineUnit(seperate_cfg=True, input_params=("tiled",), input_params_posi={"text": "prompt"})]
    pipe.call_model_fn(dit=pipe.dit, latents=torch.ones(1), timestep=torch.ones(1), side=1, tiled=True, prompt="x")


def test_a_model_fn_with_kwargs_gets_everything(pipe):
    pipe.model_fn = lambda **inputs: inputs
    given = {"latents": 1, "unheard_of": 2, "seed": None}
    assert pipe.call_model_fn(**given) == given


# ---- models ---------------------------------------------------------------------------------------------------------

def test_a_model_that_is_not_loaded_raises_with_its_name(pipe):
    with pytest.raises(ValueError, match="Linear needs controlnet, text_encoder, which is not loaded"):
        pipe.load_models_to_device(["dit", "text_encoder", "controlnet"])


def test_a_string_instead_of_a_list_of_models_raises(pipe):
    with pytest.raises(TypeError, match="got the string 'dit'"):
        pipe.load_models_to_device("dit")


def test_named_models_counts_the_members_of_a_list(pipe):
    pipe.controlnet = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert [name for name, _ in pipe.named_models()] == ["dit", "vae", "controlnet", "controlnet"]


# ---- units ----------------------------------------------------------------------------------------------------------

class Append(PipelineUnit):
    """Adds its letter to `order`."""

    def __init__(self, letter: str) -> None:
        super().__init__(input_params=("order",), output_params=("order",))
        self.letter = letter

    def process(self, pipe, order):
        return {"order": (order or "") + self.letter}


def test_units_run_in_their_order(pipe):
    pipe.units = [Append("a"), Append("b")]
    assert pipe.run_units({}, {}, {})[0] == {"order": "ab"}


def test_given_units_run_instead_of_the_pipelines(pipe):
    pipe.units = [Append("a")]
    assert pipe.run_units({}, {}, {}, units=[Append("c")])[0] == {"order": "c"}
    assert pipe.run_units({}, {}, {}, units=[])[0] == {}


# ---- guidance -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cfg_scale, factor", [(1, 2.0), (4.0, 5 + 4 * (2 - 5)), (0, 5.0), (0.5, 3.5)])
def test_guidance_is_the_documents_formula(pipe, latents, cfg_scale, factor):
    predicted = pipe.cfg_guided_model_fn(cfg_scale, {"latents": latents}, {"side": 2.0}, {"side": 5.0}, dit=pipe.dit,
                                         timestep=torch.ones(1))
    torch.testing.assert_close(predicted, latents * factor)
    assert len(pipe.calls) == (1 if cfg_scale == 1 else 2)


def test_norm_preserving_guidance_is_the_familys_choice(pipe, latents):
    with pytest.raises(ValueError, match="Linear has no cfg_norm"):
        pipe.cfg_guided_model_fn(2, {"latents": latents}, {"side": 1.0}, {"side": 2.0}, cfg_norm=True, dit=pipe.dit,
                                 timestep=torch.ones(1))


# ---- the loop -------------------------------------------------------------------------------------------------------

def denoise(pipe, latents, **options):
    return pipe.denoise({"latents": latents, "seed": 1}, {"side": 1.0}, {"side": 0.5}, **options)


def test_the_loop_is_euler_over_the_schedule(pipe, latents):
    x = latents
    for sigma, following in zip(pipe.scheduler.sigmas, [*pipe.scheduler.sigmas[1:], 0.0]):
        guided = 0.5 * x + 3 * (x - 0.5 * x)
        x = x + guided * (following - sigma)
    result = denoise(pipe, latents, cfg_scale=3)
    torch.testing.assert_close(result["latents"], x)
    assert result["seed"] == 1


def test_the_loop_leaves_its_inputs_alone(pipe, latents):
    shared = {"latents": latents}
    before = latents.clone()
    pipe.denoise(shared, {"side": 1.0}, {"side": 1.0})
    assert shared["latents"] is latents and torch.equal(latents, before)


def test_the_model_sees_each_timestep_once_without_guidance(pipe, latents):
    denoise(pipe, latents)
    assert pipe.calls == pipe.scheduler.timesteps.tolist()


def test_each_step_is_reported(pipe, latents):
    steps = []
    result = denoise(pipe, latents, step_callback=steps.append)
    assert [(step.index, step.total) for step in steps] == [(i, 4) for i in range(4)]
    assert steps[-1].latents is result["latents"]
    # The prediction is v = x, so the estimate x − σ·v of the finished latents is (1 − σ)·x; the last step lands on it.
    torch.testing.assert_close(steps[0].denoised, (1 - pipe.scheduler.sigmas[0]) * latents)
    torch.testing.assert_close(steps[1].denoised, (1 - pipe.scheduler.sigmas[1]) * steps[0].latents)
    torch.testing.assert_close(steps[-1].denoised, result["latents"])


def test_models_are_onloaded_for_the_loop_and_offloaded_after(pipe, latents):
    during = []
    denoise(pipe, latents, step_callback=lambda _: during.append(pipe._looping.models))
    assert during == [(pipe.dit,)] * 4
    assert pipe.onloaded == [()] and pipe._looping is None


class Cancelled(Exception):
    """What a host raises when its user presses stop."""


def cancel(*_):
    raise Cancelled


def cancelling_bar(timesteps):
    yield timesteps[0]
    raise Cancelled


@pytest.mark.parametrize("options, calls", [({"step_callback": cancel}, 1), ({"progress_bar_cmd": cancelling_bar}, 1),
                                            ({"progress_bar_cmd": cancel}, 0)])
def test_a_cancelled_loop_offloads_and_the_next_run_is_whole(pipe, latents, options, calls):
    whole = denoise(Linear(), latents)["latents"]
    with pytest.raises(Cancelled):
        denoise(pipe, latents, **options)
    assert len(pipe.calls) == calls
    assert pipe.onloaded[-1] == ()
    assert torch.equal(denoise(pipe, latents)["latents"], whole)


def test_models_are_offloaded_when_the_model_fails(pipe, latents):
    with pytest.raises(RuntimeError):
        pipe.denoise({"latents": latents}, {"side": torch.ones(3, 3)}, {"side": 1.0})
    assert pipe.onloaded[-1] == ()


@pytest.mark.parametrize("cfg_scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_raises_before_any_model_is_touched(pipe, latents, cfg_scale):
    with pytest.raises(ValueError, match="cfg_scale must be a finite number"):
        denoise(pipe, latents, cfg_scale=cfg_scale)
    assert not pipe.onloaded and not pipe.calls
