"""The pipeline's behaviour: units that say what they do, progress, cancelling, batches, and errors before any work."""
from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline, model_fn_qwen_image

UNITS = QwenImagePipeline(device="cpu").units
SHARED = {"cfg_scale": 4.0, "input_image": None, "height": 32, "width": 48, "seed": 1, "rand_device": "cpu",
          "tiled": False, "tile_size": 128, "tile_stride": 64}
POSITIVE, NEGATIVE = {"prompt": "a red circle"}, {"negative_prompt": "blue"}


def name_of(value: object) -> str:
    return type(value).__name__


def picture(height: int = 64, width: int = 96) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


class RecordingPipeline(QwenImagePipeline):
    """Notes which models are reached for, and which are onloaded."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.touched: set[str] = set()
        self.onloaded: list[tuple[str, ...]] = []

    def __getattr__(self, name: str):
        value = super().__getattr__(name)
        if isinstance(value, nn.Module):
            self.touched.add(name)
        return value

    def load_models_to_device(self, model_names=()) -> None:
        self.onloaded.append(tuple(model_names))


@pytest.fixture
def calls(our_models):
    """How often each model has run, counted at the model itself."""
    counts = dict.fromkeys(our_models, 0)

    def count(name: str):
        def hook(*_) -> None:
            counts[name] += 1
        return hook

    parts = {"text_encoder": [our_models["text_encoder"]], "dit": [our_models["dit"]],
             "vae": [our_models["vae"].encoder, our_models["vae"].decoder]}
    handles = [part.register_forward_pre_hook(count(name)) for name, members in parts.items() for part in members]
    yield counts
    for handle in handles:
        handle.remove()


# ---- units: what they declare is what they do -----------------------------------------------------------------------

@pytest.mark.parametrize("unit", UNITS, ids=name_of)
def test_declared_inputs_are_the_parameters_of_process(unit):
    parameters = list(inspect.signature(unit.process).parameters)[1:]  # the first is the pipeline
    if unit.take_over:
        assert parameters == ["inputs_shared", "inputs_posi", "inputs_nega"]
        return
    assert unit.input_params_posi.keys() == unit.input_params_nega.keys()
    assert sorted(parameters) == sorted([*unit.input_params, *unit.input_params_posi])


# What makes a unit work that most runs do without. (Edit images need a tokenizer that knows them, ControlNets a net:
# see their own tests.)
ENTITIES = {"eligen_entity_prompts": ["a dog"], "eligen_entity_masks": [picture()]}
TRIGGERS = {"QwenImageUnit_InputImageEmbedder": {"input_image": picture(32, 48)},
            "QwenImageUnit_Inpaint": {"inpaint_mask": picture(32, 48), "input_latents": torch.zeros(1, 16, 4, 6)},
            "QwenImageUnit_ContextImageEmbedder": {"context_image": picture(20, 20)},
            "QwenImageUnit_EntityControl": ENTITIES, "QwenImageUnit_EntityRegions": ENTITIES}
ON_REQUEST = {"QwenImageUnit_OptionChecker", "QwenImageUnit_EditImageEmbedder", "QwenImageUnit_LayerInputImageEmbedder",
              "QwenImageUnit_BlockwiseControlNet", *TRIGGERS}


def observed(pipe, unit, shared):
    """What a unit adds to the dicts behind those before it, the models it reached for, and those it onloaded."""
    pipe.set_schedule(32, 48, 2)
    names = [name_of(other) for other in pipe.units]
    dicts = pipe.run_units({**SHARED, **shared}, POSITIVE, NEGATIVE, units=pipe.units[:names.index(name_of(unit))])
    pipe.touched, pipe.onloaded = set(), []
    after = pipe.run_units(*dicts, units=[unit])
    added = {name for before, now in zip(dicts, after) for name in now if before.get(name) is not now[name]}
    return added, pipe.touched, {name for names in pipe.onloaded for name in names}


@pytest.mark.parametrize("unit", UNITS, ids=name_of)
def test_units_that_nothing_asks_for_do_nothing(make_pipe, unit):
    added, touched, onloaded = observed(make_pipe(RecordingPipeline), unit, {})
    idle = name_of(unit) in ON_REQUEST
    assert added <= (set() if idle else set(unit.output_params))
    assert touched - {"dit"} == onloaded == (set() if idle else set(unit.onload_model_names))


@pytest.mark.parametrize("unit", [unit for unit in UNITS if name_of(unit) in TRIGGERS], ids=name_of)
def test_units_return_and_onload_what_they_declare(make_pipe, unit):
    added, touched, onloaded = observed(make_pipe(RecordingPipeline), unit, TRIGGERS[name_of(unit)])
    assert added == set(unit.output_params)
    assert touched == onloaded == set(unit.onload_model_names)


def test_units_write_nothing_into_the_dicts_of_a_graph(pipe):
    shared, posi, nega = dict(SHARED), dict(POSITIVE), dict(NEGATIVE)
    pipe.set_schedule(32, 48, 2)
    pipe.run_units(shared, posi, nega)
    assert (shared, posi, nega) == (SHARED, POSITIVE, NEGATIVE)


@pytest.mark.parametrize("first", ["QwenImageUnit_PromptEmbedder", "QwenImageUnit_NoiseInitializer"])
def test_units_may_run_as_soon_as_their_inputs_exist(pipe, first):
    pipe.set_schedule(32, 48, 2)
    other = sorted(pipe.units, key=lambda unit: name_of(unit) != first)
    usual, other = (pipe.run_units(SHARED, POSITIVE, NEGATIVE, units=units) for units in (pipe.units, other))
    assert torch.equal(usual[0]["latents"], other[0]["latents"])
    assert torch.equal(usual[1]["prompt_emb"], other[1]["prompt_emb"])


# ---- noise and batches ----------------------------------------------------------------------------------------------

def prepared(pipe, **shared):
    pipe.set_schedule(32, 48, 2)
    return pipe.run_units({**SHARED, **shared}, POSITIVE, NEGATIVE)


def test_noise_is_the_seeds_of_the_latents_shape(pipe):
    expected = torch.randn((1, 16, 4, 6), generator=torch.Generator().manual_seed(1))
    assert torch.equal(prepared(pipe)[0]["noise"], expected)


def test_a_batch_is_its_pictures_one_by_one(pipe, relative_error):
    shared, posi, nega = prepared(pipe, batch_size=3)
    assert shared["latents"].shape == (3, 16, 4, 6)
    together = pipe.denoise(shared, posi, nega, cfg_scale=2.0)["latents"]
    for index in range(3):
        alone = pipe.denoise({**shared, "latents": shared["latents"][index:index + 1]}, posi, nega, cfg_scale=2.0)
        assert relative_error(together[index:index + 1], alone["latents"]) <= 1e-5


def test_a_picture_of_a_batch_keeps_its_noise_alone(pipe):
    batch = prepared(pipe, batch_size=3)[0]["noise"]
    assert torch.equal(prepared(pipe, batch_index=[2, 0])[0]["noise"], batch[[2, 0]])


def test_an_image_starts_a_batch_with_noises_of_their_own(pipe):
    pipe.scheduler.set_timesteps(2, 0.5)
    shared, _, _ = pipe.run_units({**SHARED, "batch_size": 2, "input_image": picture(32, 48)}, POSITIVE, NEGATIVE)
    sigma = pipe.scheduler.sigmas[0]
    expected = (1 - sigma) * shared["input_latents"] + sigma * shared["noise"]
    assert shared["latents"].shape == (2, 16, 4, 6)
    torch.testing.assert_close(shared["latents"], expected)


def test_one_prompt_serves_the_batch(pipe, relative_error):
    latents, prompt_emb, mask = torch.randn(2, 16, 4, 4), torch.randn(1, 5, 64), torch.tensor([[1, 1, 1, 0, 0]])
    shared = model_fn_qwen_image(pipe.dit, latents, torch.tensor([500.0]), prompt_emb, mask)
    repeated = pipe.dit(latents, torch.full((2,), 500.0), prompt_emb.repeat(2, 1, 1), mask.repeat(2, 1))
    assert relative_error(shared, repeated) <= 1e-6


# ---- calls ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cfg_scale, dit, text_encoder", [(1, 4, 1), (1.0, 4, 1), (4.0, 8, 2), (0.5, 8, 2)])
def test_the_negative_side_costs_nothing_without_guidance(pipe, draw, calls, cfg_scale, dit, text_encoder):
    draw(pipe, cfg_scale=cfg_scale)
    assert calls == {"dit": dit, "text_encoder": text_encoder, "vae": 1}


def test_the_negative_prompt_has_no_effect_without_guidance(pipe, draw):
    one, other = (draw(pipe, negative_prompt=text)["latents"] for text in ("", "blue"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("height, width, size", [(64, 96, (96, 64)), (60, 81, (96, 64)), (16, 16, (16, 16))])
def test_the_picture_has_the_size_rounded_up(pipe, draw, height, width, size):
    assert draw(pipe, height=height, width=width)["image"].size == size


def test_a_seed_means_the_same_picture(pipe, draw):
    one, same, other = (np.asarray(draw(pipe, seed=seed)["image"]) for seed in (5, 5, 6))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_one_step_makes_a_picture(pipe, draw):
    assert draw(pipe, num_inference_steps=1)["latents"].isfinite().all()


def test_a_lower_strength_stays_closer_to_the_picture(pipe, draw):
    start = pipe.encode_image(pipe.preprocess_image(picture()))
    distances = [float((draw(pipe, input_image=picture(), denoising_strength=strength)["latents"] - start).norm())
                 for strength in (0.05, 0.4, 1.0)]
    assert distances == sorted(distances)


def test_full_strength_forgets_the_picture(pipe, draw):
    assert torch.equal(draw(pipe, input_image=picture(), denoising_strength=1.0)["latents"], draw(pipe)["latents"])


def test_a_tile_as_large_as_the_picture_changes_nothing(pipe, draw):
    whole, tiled = (np.asarray(draw(pipe, **options)["image"], dtype=int)
                    for options in ({}, {"tiled": True, "tile_size": 12, "tile_stride": 6}))
    assert np.abs(whole - tiled).max() <= 1


def test_the_autoencoder_runs_tile_by_tile_both_ways(pipe, draw, calls):
    """64×96 pixels are 8×12 latents: one row and two columns of tiles for the input and for the output."""
    draw(pipe, input_image=picture(), denoising_strength=0.5, tiled=True, tile_size=8, tile_stride=4)
    assert calls["vae"] == 4


def test_it_runs_inside_inference_mode(pipe, draw):
    """As ComfyUI calls it."""
    with torch.inference_mode():
        inside = draw(pipe)["latents"]
    assert torch.equal(inside, draw(pipe)["latents"])


# ---- progress and cancelling ----------------------------------------------------------------------------------------

def test_each_step_is_reported_with_an_estimate_of_the_result(pipe, draw):
    run = draw(pipe, num_inference_steps=5, cfg_scale=3.0)
    assert [(step.index, step.total) for step in run["steps"]] == [(i, 5) for i in range(5)]
    # The last step lands on its own estimate.
    torch.testing.assert_close(run["steps"][-1].denoised, run["latents"], rtol=0, atol=1e-5)
    assert all(step.denoised.shape == run["latents"].shape for step in run["steps"])


def test_the_progress_bar_wraps_the_timesteps(pipe, draw):
    seen = []
    draw(pipe, num_inference_steps=3, progress_bar_cmd=lambda steps: seen.extend(steps) or steps)
    assert torch.equal(torch.stack(seen), pipe.scheduler.timesteps)


class Cancelled(Exception):
    """What a host raises when its user presses stop."""


def cancel_at(index: int):
    """A step callback that stops the run after the given step."""
    def callback(step) -> None:
        if step.index == index:
            raise Cancelled
    return callback


def bar_that_cancels(timesteps):
    yield timesteps[0]
    raise Cancelled


@pytest.mark.parametrize("options, dit_calls", [
    ({"step_callback": cancel_at(0)}, 1), ({"step_callback": cancel_at(3)}, 4),
    ({"progress_bar_cmd": bar_that_cancels}, 1)], ids=["first_step", "last_step", "progress_bar"])
def test_a_cancelled_run_cleans_up_and_the_next_one_is_whole(make_pipe, draw, calls, options, dit_calls):
    pipe = make_pipe(RecordingPipeline)
    settings = {"height": 64, "width": 96, "num_inference_steps": 4, "seed": 5, "cfg_scale": 1.0,
                "progress_bar_cmd": iter, **options}
    with pytest.raises(Cancelled):
        pipe("a red circle", **settings)
    assert calls["dit"] == dit_calls and calls["vae"] == 0
    assert pipe.onloaded[-1] == ()
    assert torch.equal(draw(pipe)["latents"], draw(make_pipe())["latents"])


def test_models_are_onloaded_when_they_are_needed_and_offloaded_at_the_end(make_pipe, draw):
    pipe = make_pipe(RecordingPipeline)
    draw(pipe, cfg_scale=4.0, input_image=picture(), denoising_strength=0.5)
    needed = [names for names in pipe.onloaded if names]
    assert needed == [("vae",), ("text_encoder",), ("text_encoder",), ("vae",)]
    assert pipe.last_loop.models == (pipe.dit,), "the loop onloads its own, with what it knows"
    assert pipe.onloaded[-1] == ()


# ---- errors ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, error, message", [
    ({"prompt": None}, TypeError, "a prompt must be a text, got NoneType"),
    ({"prompt": ["a", "b"]}, TypeError, "a prompt must be a text, got list"),
    ({"negative_prompt": None}, TypeError, "a prompt must be a text, got NoneType"),
    ({"cfg_scale": float("nan")}, ValueError, "cfg_scale must be a finite number, got nan"),
    ({"height": 0}, ValueError, "height must be a positive whole number"),
    ({"width": float("nan")}, ValueError, "width must be a positive whole number"),
    ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be a whole number"),
    ({"denoising_strength": 0.5}, ValueError, "denoising_strength 0.5 needs an input_image"),
    ({"denoising_strength": 0, "input_image": picture()}, ValueError, "denoising_strength must lie above 0"),
    ({"denoising_strength": 0.5, "input_image": picture(64, 64)}, ValueError,
     r"input_image is 64×64 but the picture to draw is 96×64 \(width × height\)"),
    ({"denoising_strength": 0.5, "input_image": np.zeros((64, 96, 3))}, TypeError,
     "input_image must be a PIL image or a tensor"),
    ({"zero_cond_t": True}, ValueError, "zero_cond_t is about pictures to draw by, and there is none"),
    ({"edit_rope_interpolation": True}, ValueError, "edit_rope_interpolation is about edit images"),
    ({"layer_num": 2}, ValueError, "draws no layers: load the models of Qwen/Qwen-Image-Layered"),
    ({"layer_input_image": picture()}, ValueError, "say how many with layer_num"),
    ({"inpaint_mask": picture()}, ValueError, "inpaint_mask needs an input_image"),
    ({"input_image": [picture(), "b.png"]}, TypeError, r"input_image\[1\] must be a PIL image"),
    ({"tiled": True, "tile_size": 8, "tile_stride": 9}, ValueError, "tile_stride must lie in 1..tile_size"),
    ({"seed": 0.5}, ValueError, "seed must be a whole number"),
    ({"rand_device": "toaster"}, ValueError, "toaster"),
])
def test_values_out_of_range_raise_before_any_model_runs(pipe, draw, calls, options, error, message):
    with pytest.raises(error, match=message):
        draw(pipe, **options)
    assert not any(calls.values())


@pytest.mark.parametrize("missing", ["text_encoder", "dit", "vae"])
def test_a_missing_model_is_named_before_any_other_runs(pipe, draw, calls, missing):
    setattr(pipe, missing, None)
    with pytest.raises(ValueError, match=f"QwenImagePipeline needs {missing}, which is not loaded: add its files"):
        draw(pipe)
    assert not any(calls.values())


def test_an_input_that_the_model_would_ignore_raises(pipe):
    shared, posi, nega = prepared(pipe)
    with pytest.raises(TypeError, match="model_fn_qwen_image does not take controlnet_image"):
        pipe.denoise({**shared, "controlnet_image": 1}, posi, nega)


@pytest.mark.parametrize("shape", [(1, 16, 3, 4), (1, 16, 4, 5), (1, 4, 4, 4), (1, 16, 1, 4, 4), (1, 16, 0, 4)])
def test_latents_of_another_shape_raise_with_both_shapes(pipe, shape):
    with pytest.raises(ValueError, match=rf"shape \({', '.join(map(str, shape))}\); expected \(batch, 16, height"):
        model_fn_qwen_image(pipe.dit, torch.zeros(shape), torch.tensor([500.0]), torch.zeros(1, 3, 64))


def test_units_and_model_fn_name_every_parameter():
    """No **kwargs in which a misspelt input would vanish."""
    for function in (model_fn_qwen_image, *(unit.process for unit in UNITS)):
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds
