"""Wan's units say what they do, its options reach the denoiser, experts are told apart, and errors come before work."""
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffsynth_backend.core.loader.file import ModelFileError
from diffsynth_backend.diffusion.base_pipeline import ModelNotLoaded
from diffsynth_backend.models.general_modules import RMSNorm
from diffsynth_backend.models.wan_video_camera_controller import camera_control
from diffsynth_backend.models.wan_video_motion_controller import WanMotionControllerModel
from diffsynth_backend.pipelines import wan_video_cache
from diffsynth_backend.pipelines.families import FAMILIES
from diffsynth_backend.pipelines.wan_video import WanVideoPipeline, model_fn_wan_video
from diffsynth_backend.pipelines.wan_video_cache import TeaCache
from diffsynth_backend.pipelines.wan_video_experts import in_order, noise_of
from diffsynth_backend.pipelines.wan_video_images import channels_of
from diffsynth_backend.pipelines.wan_video_model import windows
from diffsynth_backend.pipelines.wan_video_vace import on_white
from diffsynth_backend.utils.lora.formats import LoraError, parse_lora
from tests.helpers.wan_denoiser import FIRST_AND_LAST, IMAGE, TI2V
from tests.helpers.wan_pipeline import make_wan, picture, write_tokenizer

UNITS = WanVideoPipeline(device="cpu").units
CONTROL = {"in_dim": 48, "has_image_input": True, "has_ref_conv": True}
CAMERA = {"in_dim": 32, "has_image_input": True, "add_control_adapter": True}
SHARED = {"cfg_scale": 4.0, "height": 32, "width": 48, "num_frames": 5, "seed": 1, "rand_device": "cpu", "tiled": False}
POSITIVE, NEGATIVE = {"prompt": "a red circle"}, {"negative_prompt": "blue"}

pytestmark = pytest.mark.usefixtures("one_thread")


def name_of(value: object) -> str:
    return type(value).__name__


def frames(count: int = 5, seed: int = 10) -> list:
    return [picture(seed + index) for index in range(count)]


@pytest.fixture(scope="module")
def make(tmp_path_factory) -> Callable[..., WanVideoPipeline]:
    """Pipelines by their sizes, made once. Sizes that diffusers' denoiser does not have get random weights of ours."""
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    made: dict[str, WanVideoPipeline] = {}

    def get(own: dict[str, Any] | None = None, **sizes: Any) -> WanVideoPipeline:
        key = repr((own, sizes))
        if key not in made:
            made[key] = make_wan(folder, **sizes)[0]
            if own is not None:
                made[key].dit = _random_dit(made[key], own)
                made[key].image_encoder = make(**IMAGE).image_encoder
        return made[key]

    make = get
    return get


def _random_dit(pipe: WanVideoPipeline, changes: dict[str, Any]) -> nn.Module:
    from tests.helpers.wan_denoiser import SIZES

    dit = type(pipe.dit)(**{**SIZES, **changes}).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return dit


def draw(pipe: WanVideoPipeline, **options: Any) -> Tensor:
    """Finished latents."""
    steps: list = []
    pipe("a red circle", "blue", step_callback=steps.append, **{
        "height": 32, "width": 48, "num_frames": 5, "seed": 5, "num_inference_steps": 3, "cfg_scale": 1.0,
        "tiled": False, "progress_bar_cmd": iter, **options})
    return steps[-1].latents


def by_hand(pipe: WanVideoPipeline, predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor | None = None,
            strength: float = 1.0) -> Tensor:
    """A loop of this file's own: three Euler steps of `predict(latents, timestep)`."""
    grid = torch.linspace(strength, 0, 4)
    sigmas = 5 * grid / (1 + 4 * grid)
    latents = first_noise() if noise is None else noise
    for sigma, following in zip(sigmas, sigmas[1:]):
        latents = latents + (following - sigma) * predict(latents, sigma[None] * 1000)
    return latents


def first_noise(frames: int = 2) -> Tensor:
    return torch.randn((1, 16, frames, 4, 6), generator=torch.Generator().manual_seed(5))


def context(pipe: WanVideoPipeline) -> Tensor:
    return pipe.prompts.embed(pipe.text_encoder, ["a red circle"])[0]


def encoded(pipe: WanVideoPipeline, pictures: list) -> Tensor:
    pixels = torch.stack([torch.from_numpy(np.asarray(one) / 127.5 - 1).float().movedim(-1, 0) for one in pictures], 1)
    return pipe.encode_image(pixels[None])


# ---- units: what they declare is what they do -----------------------------------------------------------------------

class RecordingPipeline(WanVideoPipeline):
    """Notes which models are reached for, and which are onloaded."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.touched: set[str] = set()
        self.onloaded: list[tuple[str, ...]] = []

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, nn.Module):
            self.touched.add(name)
        return value

    def load_models_to_device(self, model_names: Any = ()) -> None:
        self.onloaded.append(tuple(model_names))


@pytest.mark.parametrize("unit", UNITS, ids=name_of)
def test_declared_inputs_are_the_parameters_of_process(unit):
    parameters = list(inspect.signature(unit.process).parameters)[1:]
    assert sorted(parameters) == sorted([*unit.input_params, *unit.input_params_posi])
    assert not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(unit.process).parameters.values())


# What makes a unit work, and the denoiser that takes it.
TRIGGERS: dict[str, tuple[dict, dict]] = {
    "ImageEmbedderCLIP": ({"input_image": picture(0)}, IMAGE),
    "InputVideoEmbedder": ({"input_video": frames()}, {}),
    "ImageEmbedderVAE": ({"input_image": picture(0)}, IMAGE),
    "ImageEmbedderFused": ({"input_image": picture(0), "height": 64, "width": 64}, TI2V),
    "FunControl": ({"control_video": frames()}, {"own": CONTROL}),
    "FunReference": ({"control_video": frames(), "reference_image": picture(0)}, {"own": CONTROL}),
    "VACE": ({"vace_video": frames(), "vace_reference_image": picture(0)}, {"vace": True}),
    "ConditionChannels": ({"input_image": picture(0)}, IMAGE),
    "FunCameraControl": ({"input_image": picture(0), "camera_control_direction": "Left"}, {"own": CAMERA}),
    "SpeedControl": ({"motion_bucket_id": 50}, {}),
    "TeaCache": ({"tea_cache_l1_thresh": 0.1, "tea_cache_model_id": "Wan2.1-T2V-1.3B"}, {}),
}
SILENT = {"WanVideoUnit_OptionChecker"}


def recording(pipe: WanVideoPipeline) -> RecordingPipeline:
    copy = RecordingPipeline(device="cpu", torch_dtype=torch.float32)
    for name, model in pipe.named_models():
        setattr(copy, name, model)
    copy.prompts = pipe.prompts
    copy.motion_controller = WanMotionControllerModel(16, 64)
    copy.check_belong_together()
    return copy


def observed(pipe: RecordingPipeline, unit: Any, shared: dict) -> tuple[set[str], set[str], set[str]]:
    """What a unit adds to the dicts behind those before it, the models it reached for, and those it onloaded."""
    pipe.set_schedule(32, 48, 2)
    names = [name_of(other) for other in pipe.units]
    dicts = pipe.run_units({**SHARED, **shared}, POSITIVE, NEGATIVE, units=pipe.units[:names.index(name_of(unit))])
    pipe.touched, pipe.onloaded = set(), []
    after = pipe.run_units(*dicts, units=[unit])
    added = {name for before, now in zip(dicts, after) for name in now if before.get(name) is not now[name]}
    return added, pipe.touched, {name for names in pipe.onloaded for name in names}


@pytest.mark.parametrize("unit", UNITS, ids=name_of)
def test_units_that_nothing_asks_for_do_nothing(make, unit):
    added, touched, onloaded = observed(recording(make()), unit, {})
    idle = name_of(unit).removeprefix("WanVideoUnit_") in TRIGGERS or name_of(unit) in SILENT
    assert added <= (set() if idle else set(unit.output_params))
    assert touched - {"dit", "dit2", "vae"} <= onloaded
    assert onloaded == (set() if idle else set(unit.onload_model_names))


@pytest.mark.parametrize("unit", [unit for unit in UNITS if name_of(unit).removeprefix("WanVideoUnit_") in TRIGGERS],
                         ids=name_of)
def test_units_return_and_onload_what_they_declare(make, unit):
    shared, sizes = TRIGGERS[name_of(unit).removeprefix("WanVideoUnit_")]
    added, touched, onloaded = observed(recording(make(**sizes)), unit, shared)
    assert added == set(unit.output_params)
    assert onloaded == set(unit.onload_model_names) and touched - {"dit", "dit2", "vae"} <= onloaded


def test_units_write_nothing_into_the_dicts_of_a_graph(make):
    shared, posi, nega = dict(SHARED), dict(POSITIVE), dict(NEGATIVE)
    pipe = make()
    pipe.set_schedule(32, 48, 2)
    pipe.run_units(shared, posi, nega)
    assert (shared, posi, nega) == (SHARED, POSITIVE, NEGATIVE)


def test_the_pipeline_loads_what_its_family_names():
    assert set(FAMILIES["wan"].attributes) == set(WanVideoPipeline.model_names)
    pipe = WanVideoPipeline(device="cpu")
    for name in FAMILIES["wan"].attributes:
        assert all(hasattr(pipe, attribute) for attribute in FAMILIES["wan"].attributes_of(name))


# ---- what reaches the denoiser --------------------------------------------------------------------------------------

def test_video_to_video_starts_from_the_noised_video(make, relative_error):
    pipe = make()
    start = encoded(pipe, frames())
    sigma = 5 * 0.6 / (1 + 4 * 0.6)
    expected = by_hand(pipe, lambda x, t: pipe.dit(x, t, context(pipe)), (1 - sigma) * start + sigma * first_noise(),
                       strength=0.6)
    assert relative_error(draw(pipe, input_video=frames(), denoising_strength=0.6), expected) <= 1e-5


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_a_control_video_and_pictures_reach_the_denoiser(make, relative_error, first, reference):
    pipe = make(own=CONTROL)
    image = encoded(pipe, [picture(1), *[picture(0).point(lambda _: 127.5)] * 4]) if first else None
    control = encoded(pipe, frames())
    ours = draw(pipe, control_video=frames(), **({"input_image": picture(1)} if first else {}),
                **({"reference_image": picture(2)} if reference else {}))
    if first:  # what is not given is exactly 0, which no 8-bit picture is
        video = torch.zeros(1, 3, 5, 32, 48)
        video[:, :, :1] = torch.from_numpy(np.asarray(picture(1)) / 127.5 - 1).float().movedim(-1, 0)[None, :, None]
        image = pipe.encode_image(video)
    shown = picture(2) if reference else picture(1) if first else None
    from diffsynth_backend.pipelines.wan_prompts import clip_pixels
    features = torch.zeros(1, 257, 1280) if shown is None else pipe.image_encoder(clip_pixels(shown, 48, 32, 224))
    y = torch.cat([control, torch.zeros_like(control) if image is None else image], dim=1)
    latents = encoded(pipe, [picture(2)])[:, :, 0] if reference else None
    expected = by_hand(pipe, lambda x, t: pipe.dit(x, t, context(pipe), y=y, clip_features=features,
                                                   reference_latents=latents))
    assert relative_error(ours, expected) <= 1e-5


def test_a_camera_path_reaches_the_denoiser(make, relative_error):
    pipe = make(own=CAMERA)
    from diffsynth_backend.pipelines.wan_prompts import clip_pixels
    features = pipe.image_encoder(clip_pixels(picture(1), 48, 32, 224))
    first = encoded(pipe, [picture(1)])
    y = torch.cat([first, torch.zeros_like(first)], dim=2)
    results = []
    for direction, speed in (("Left", 0.1), ("Up", 0.02)):
        camera = pipe.dit.control_adapter(camera_control(direction, 5, 32, 48, speed))
        expected = by_hand(pipe, lambda x, t: pipe.dit(x, t, context(pipe), y=y, clip_features=features,
                                                       camera=camera))  # noqa: B023
        results.append(draw(pipe, input_image=picture(1), camera_control_direction=direction,
                            camera_control_speed=speed))
        assert relative_error(results[-1], expected) <= 1e-5
    assert relative_error(*results) > 1e-3


def test_speed_reaches_the_denoiser(make, relative_error):
    pipe = make()
    torch.manual_seed(0)
    pipe.motion_controller = WanMotionControllerModel(16, 64).requires_grad_(False)
    try:
        motion = pipe.motion_controller(torch.tensor([70.0]), torch.float32)
        expected = by_hand(pipe, lambda x, t: pipe.dit(x, t, context(pipe), motion=motion))
        assert relative_error(draw(pipe, motion_bucket_id=70), expected) <= 1e-5
        assert relative_error(draw(pipe, motion_bucket_id=0), expected) > 1e-3
    finally:
        pipe.motion_controller = None


def test_several_videos_are_drawn_at_a_time(make, relative_error):
    pipe = make(**IMAGE)
    pipe.set_schedule(32, 48, 2)
    given = {**SHARED, "batch_size": 3, "input_image": picture(1)}
    alone = []
    for extra in ({}, {"batch_index": [2, 0]}, {"cfg_merge": True}):
        dicts = pipe.run_units({**given, **extra}, POSITIVE, NEGATIVE)
        alone.append(pipe.denoise(*dicts, cfg_scale=4.0)["latents"])
    assert relative_error(alone[1], alone[0][[2, 0]]) <= 1e-5
    assert relative_error(alone[2], alone[0]) <= 1e-5


def test_the_preview_of_a_clean_frame_is_that_frame(make, relative_error):
    pipe, steps = make(**TI2V), []
    pipe("a red circle", height=64, width=64, num_frames=5, seed=1, num_inference_steps=3, cfg_scale=1.0, tiled=False,
         input_image=picture(1, 64, 64), progress_bar_cmd=iter, step_callback=steps.append)
    first = encoded(pipe, [picture(1, 64, 64)])
    for step in steps:
        assert relative_error(step.denoised[:, :, :1], first) <= 1e-4


# ---- windows and cache ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("length, size, stride, starts", [(7, 3, 2, [0, 2, 4]), (8, 3, 2, [0, 2, 4, 5]), (3, 5, 2, [0]),
                                                          (6, 3, 3, [0, 3])])
def test_windows_cover_a_video_and_fade(length, size, stride, starts):
    made = list(windows(length, size, stride))
    assert [start for start, _ in made] == starts
    total = torch.zeros(length)
    for start, weight in made:
        total[start:start + len(weight)] += weight
        assert (weight > 0).all() and (weight <= 1).all()
    assert (total > 0).all() and made[0][1][0] == 1 == made[-1][1][-1]


@pytest.mark.parametrize("sizes, options", [
    ({}, {}), (IMAGE, {"input_image": picture(1)}), (TI2V, {"input_image": picture(1)}),
    ({"vace": True}, {"vace_video": frames(17)}),
    ({"vace": True}, {"vace_reference_image": [picture(1), picture(2)], "vace_video": frames(17)})])
def test_windows_draw_what_single_passes_over_them_draw(make, relative_error, sizes, options):
    """Against a pass over each window, written out: five latent frames, three at a time, two at a step."""
    pipe = make(**sizes)
    pipe.set_schedule(32, 48, 1)
    shared, posi, _ = pipe.run_units({**SHARED, "num_frames": 17, **options}, POSITIVE, NEGATIVE)
    inputs = {name: shared.get(name) for name in ("latents", "y", "clip_feature", "vace_context")}
    first = {"first_frame_latents": shared.get("first_frame_latents")}
    n = shared.get("vace_references") or 0
    call = {"dit": pipe.dit, "vace": pipe.vace, "timestep": torch.tensor([600.0]), **posi, "vace_references": n}
    call = {name: value for name, value in call.items() if name in inspect.signature(model_fn_wan_video).parameters}
    ours = model_fn_wan_video(**call, **inputs, **first, sliding_window_size=3, sliding_window_stride=2)
    keep = [*range(n)]
    parts = []
    for start in (0, 2):
        rows = [*keep, *range(n + start, n + start + 3)]
        cut = {name: value if value is None or name == "clip_feature" else value[:, :, rows]
               for name, value in inputs.items()}
        parts.append(model_fn_wan_video(**call, **cut, **(first if start == 0 else {})))
    expected = torch.cat([(parts[0][:, :, :n] + parts[1][:, :, :n]) / 2, parts[0][:, :, n:n + 2],
                          (parts[0][:, :, n + 2:] + parts[1][:, :, n:n + 1]) / 2, parts[1][:, :, n + 1:]], dim=2)
    assert relative_error(ours, expected) <= 1e-5


def test_a_window_as_long_as_the_video_changes_nothing(make):
    pipe = make()
    assert torch.equal(draw(pipe, sliding_window_size=2, sliding_window_stride=1), draw(pipe))


def test_teacache_skips_and_stays_near(make, relative_error, monkeypatch):
    pipe, counted = make(), []
    options = {"num_inference_steps": 8, "tea_cache_model_id": "Wan2.1-T2V-1.3B"}
    plain = draw(pipe, num_inference_steps=8)
    handle = pipe.dit.blocks[0].register_forward_pre_hook(lambda *_: counted.append(1))
    try:
        monkeypatch.setitem(wan_video_cache.POLYNOMIALS, "Wan2.1-T2V-1.3B", (0.0, 0.0, 0.0, 0.0, 0.4))
        exact = draw(pipe, tea_cache_l1_thresh=0.3, **options)
        assert len(counted) == 8 and relative_error(exact, plain) <= 1e-6
        counted.clear()
        near = draw(pipe, tea_cache_l1_thresh=1.0, **options)
        # Each step counts 0.4: two are skipped after each that is computed; the first and the last always are.
        assert len(counted) == 4
        assert 1e-6 < relative_error(near, plain) < 0.5
    finally:
        handle.remove()


def test_teacache_does_a_step_again_from_the_same_state(monkeypatch):
    """As when memory ran out in the middle of it."""
    monkeypatch.setitem(wan_video_cache.POLYNOMIALS, "Wan2.1-T2V-1.3B", (0.0, 0.0, 0.0, 1.0, 0.0))
    cache, computed = TeaCache("Wan2.1-T2V-1.3B", 0.3), []

    def run(step: int) -> Tensor:
        def blocks() -> Tensor:
            computed.append(step)
            return torch.full((1,), 10.0 + step)
        return cache.run(blocks, torch.ones(1), torch.full((1,), 1.0 + 0.2 * step), step, 6)

    once = [float(run(step)) for step in range(6)]
    # Changes by 0.2; 0.2 + 0.17: computed; 0.14; 0.14 + 0.13; the last one is computed.
    assert computed == [0, 2, 5] and once == [10.0, 10.0, 12.0, 12.0, 12.0, 15.0]
    computed.clear()
    again = [[float(run(step)) for _ in range(2)][1] for step in range(6)]
    assert again == once and computed == [0, 0, 2, 2, 5, 5]


def test_teacache_begins_anew_with_each_loop(monkeypatch):
    """A graph keeps the conditioning that it is in."""
    monkeypatch.setitem(wan_video_cache.POLYNOMIALS, "Wan2.1-T2V-1.3B", (0.0, 0.0, 0.0, 0.0, 0.1))
    cache, computed = TeaCache("Wan2.1-T2V-1.3B", 0.3), []
    for step in (0, 1, 2, 0, 1):
        cache.run(lambda: computed.append(step) or torch.ones(1), torch.ones(1), torch.ones(1), step, 4)  # noqa: B023
    assert computed == [0, 0]


# ---- experts --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path, noise", [
    ("Wan-AI/Wan2.2-T2V-A14B/high_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors", "high_noise"),
    ("C:\\models\\Wan2.2\\low_noise_model\\a.safetensors", "low_noise"), ("wan2.2_t2v_HighNoise_14B.safetensors",
                                                                       "high_noise"),
    ("low_noise/wan_high-noise.safetensors", "high_noise"), ("a/high_noise_and_low_noise.safetensors", None),
    ("Diffusers/transformer/diffusion_pytorch_model.safetensors", "high_noise"),
    ("Diffusers/transformer_2/diffusion_pytorch_model.safetensors", "low_noise"), ("a/b.safetensors", None)])
def test_names_say_what_an_expert_is_for(path, noise):
    assert noise_of(path) == noise


def test_experts_come_in_the_order_of_noise():
    low, high = ("L", ["low_noise_model/a"]), ("H", ["high_noise_model/a", "high_noise_model/b"])
    assert in_order("dit", [low, high]) == in_order("dit", [high, low]) == ["H", "L"]
    assert in_order("dit", [low]) == ["L"] and in_order("dit", []) == []
    unnamed = [("first", ["a"]), ("second", ["b"])]
    assert in_order("dit", unnamed, ["low_noise", "high_noise"]) == ["second", "first"]


@pytest.mark.parametrize("files", [(["a"], ["b"]), (["high_noise/a"], ["high_noise/b"]), ([], []),
                                   (["high_noise/a", "low_noise/b"], ["low_noise/c"])])
def test_experts_are_not_guessed(files):
    with pytest.raises(ModelFileError, match="do not tell which one is for high"):
        in_order("wan_video_dit", [("a", files[0]), ("b", files[1])])


def test_statements_about_experts_are_checked():
    with pytest.raises(ModelFileError, match="3 models are a dit"):
        in_order("dit", [("a", ["a"])] * 3)
    with pytest.raises(ValueError, match="expected 'high_noise' and 'low_noise'"):
        in_order("dit", [("a", ["a"])], ["high", "low"])


def test_one_expert_at_a_time(make):
    pipe, order = make(experts=2), []
    handles = [model.register_forward_pre_hook(lambda *_, name=name: order.append((name, pipe._looping.models)))
               for name, model in (("dit", pipe.dit.patch_embedding), ("dit2", pipe.dit2.patch_embedding))]
    seen = []
    try:
        pipe("a", height=32, width=48, num_frames=5, seed=1, num_inference_steps=4, cfg_scale=4.0, tiled=False,
             progress_bar_cmd=lambda steps: seen.append(len(steps)) or steps,
             step_callback=lambda step: seen.append((step.index, step.total)))
    finally:
        for handle in handles:
            handle.remove()
    assert order == [("dit", (pipe.dit,))] * 4 + [("dit2", (pipe.dit2,))] * 4  # at 1000 and 937, at 833 and 625
    assert seen == [4, (0, 4), (1, 4), (2, 4), (3, 4)]
    assert [loop.models for loop in pipe.last_loops] == [(pipe.dit,), (pipe.dit2,)]


def test_a_lora_is_for_the_expert_that_its_name_says(make):
    pipe = make(experts=2)
    state = {"blocks.0.self_attn.q.lora_A.weight": torch.ones(1, 64),
             "blocks.0.self_attn.q.lora_B.weight": torch.ones(64, 1)}
    for title, model in (("x_high_noise.safetensors", pipe.dit), ("x_low_noise.safetensors", pipe.dit2)):
        assert {target.model for target in pipe.match_lora(parse_lora(state, title)).targets} == {model}
    with pytest.raises(LoraError, match="whether it is for high or low noise"):
        pipe.match_lora(parse_lora(state, "x.safetensors"))


# ---- errors ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes, options, message", [
    ({}, {"num_frames": 0}, "num_frames must be a whole number"),
    ({}, {"input_image": picture(0)}, "draws from text alone"),
    ({}, {"control_video": frames()}, "control_video is for Fun-Control models"),
    ({}, {"reference_image": picture(0)}, "takes no reference picture"),
    ({}, {"camera_control_direction": "Left"}, "has no camera adapter"),
    ({}, {"motion_bucket_id": 50}, "needs motion_controller"),
    ({}, {"motion_bucket_id": 101}, "motion_bucket_id must lie in 0…100"),
    ({}, {"vace_video": frames()}, "needs vace, which is not loaded"),
    ({}, {"denoising_strength": 0.5}, "needs an input_video"),
    ({}, {"input_video": frames(3), "denoising_strength": 0.5}, "input_video has 3 frames and the video to draw 5"),
    ({}, {"input_video": [picture(0, 64, 64)] * 5}, "input_video is 64×64 but the video to draw is 48×32"),
    ({}, {"switch_DiT_boundary": 900}, "switch_DiT_boundary must lie in 0…1"),
    ({}, {"sliding_window_size": 3}, "belong together"),
    ({}, {"sliding_window_size": 3, "sliding_window_stride": 4}, "tile_stride must lie in"),
    ({}, {"tea_cache_l1_thresh": 0.1}, "no calibration for ''; give one of Wan2.1-T2V-1.3B"),
    ({}, {"tea_cache_l1_thresh": 0.1, "tea_cache_model_id": "Wan2.2-TI2V-5B"}, "no calibration for 'Wan2.2-TI2V-5B'"),
    ({}, {"tea_cache_model_id": "Wan2.1-T2V-1.3B"}, "without tea_cache_l1_thresh"),
    ({}, {"tea_cache_l1_thresh": 0.1, "tea_cache_model_id": "Wan2.1-T2V-1.3B", "sliding_window_size": 2,
          "sliding_window_stride": 1}, "neither with sliding windows nor"),
    ({"experts": 2}, {"tea_cache_l1_thresh": 0.1, "tea_cache_model_id": "Wan2.1-T2V-1.3B"}, "nor with two denoisers"),
    (IMAGE, {}, "begins with a picture: give input_image"),
    (IMAGE, {"end_image": picture(0)}, "begins with a picture"),
    (FIRST_AND_LAST, {"input_image": picture(0)}, "give end_image, too"),
    (TI2V, {"input_image": picture(0), "end_image": picture(1)}, "end_image needs an input_image and a model"),
    ({"own": CONTROL}, {}, "draws after a control video"),
    ({"own": CAMERA}, {"input_image": picture(0), "camera_control_direction": "Sideways"}, "unknown camera_control"),
    ({"vace": True}, {"vace_reference_image": []}, "vace_reference_image has 0 pictures"),
    ({"vace": True}, {"vace_reference_image": picture(0), "vace_scale": float("nan")}, "vace_scale must be a finite"),
    ({}, {"tiled": True, "tile_size": (8, 8), "tile_stride": (4, 9)}, "tile_stride must lie in"),
    ({}, {"cfg_scale": float("inf")}, "cfg_scale must be a finite number"),
])
def test_what_cannot_be_honoured_raises_before_any_model_runs(make, sizes, options, message):
    pipe = make(**sizes)
    ran: list = []
    handles = [model.register_forward_pre_hook(lambda *_: ran.append(1))
               for model in (pipe.dit, pipe.text_encoder, pipe.vae.model.encoder)]
    try:
        with pytest.raises(ValueError, match=message):
            draw(pipe, **options)
    finally:
        for handle in handles:
            handle.remove()
    assert not ran or "input_video" in options  # a video's frames are counted when it is encoded, behind the prompt


@pytest.mark.parametrize("options", [{"input_video": 3}, {"vace_video": "a.mp4"}])
def test_what_is_no_video_is_named(make, options):
    name, = options
    with pytest.raises(TypeError, match=f"{name} must be a list of pictures"):
        draw(make(vace=True), **options)


def test_a_missing_model_is_named(make):
    pipe = make()
    vae, pipe.vae = pipe.vae, None
    try:
        with pytest.raises(ModelNotLoaded, match="WanVideoPipeline needs vae"):
            draw(pipe)
    finally:
        pipe.vae = vae


def test_sizes_and_frames_are_rounded_up(make):
    assert draw(make(), height=30, width=33, num_frames=3).shape == (1, 16, 2, 4, 6)
    assert draw(make(**TI2V), height=33, width=64, num_frames=1).shape == (1, 48, 1, 4, 4)


def test_models_that_do_not_belong_together_are_refused(make):
    with_48, with_16 = make(**TI2V), make()
    vae, with_16.vae = with_16.vae, with_48.vae
    try:
        with pytest.raises(ModelFileError, match="TI2V-5B takes Wan2.2_VAE"):
            with_16.check_belong_together()
    finally:
        with_16.vae = vae
        with_16.check_belong_together()


def test_further_channels_that_nobody_knows_are_refused(make):
    dit = _random_dit(make(), {"in_dim": 17})
    with pytest.raises(ValueError, match="takes 1 channels beside the 16"):
        channels_of(dit)


def test_a_reference_is_fitted_on_white():
    for as_tensor in (False, True):
        wide = picture(0, 96, 32)
        if as_tensor:
            wide = torch.from_numpy(np.asarray(wide) / 255).float()
        fitted = on_white(wide, 48, 32)
        array = fitted.numpy() if as_tensor else np.asarray(fitted) / 255
        assert array.shape == (32, 48, 3)
        assert (array[:8] == 1).all() and (array[24:] == 1).all() and array[8:24].std() > 0.05


def test_norms_are_shared():
    """So that one map of managed layers serves denoiser and text encoder."""
    from diffsynth_backend.models import wan_video_dit, wan_video_text_encoder

    assert wan_video_dit.RMSNorm is wan_video_text_encoder.RMSNorm is RMSNorm
