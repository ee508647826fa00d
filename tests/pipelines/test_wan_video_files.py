"""Wan from files: both layouts, VACE and the denoiser out of one, experts by their folders, weights anywhere, and each
step on its own. The same bits everywhere."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffsynth_backend.configs import model_configs
from diffsynth_backend.core import ModelConfig
from diffsynth_backend.core.loader.file import ModelFileError
from diffsynth_backend.core.platform import PositionedFile
from diffsynth_backend.core.vram import iter_managed
from diffsynth_backend.core.vram.layers import OFFLOAD
from diffsynth_backend.core.vram.presets import vram_preset
from diffsynth_backend.models.wan_video_image_encoder import WanImageEncoder
from diffsynth_backend.models.wan_video_vae import WanVideoVAE
from diffsynth_backend.pipelines import steps
from diffsynth_backend.pipelines.handle import ModelSource, PipelineHandle
from diffsynth_backend.pipelines.owner import WeightsOwner, build_pipeline
from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline
from diffsynth_backend.pipelines.report import describe, plan_lines
from diffsynth_backend.pipelines.steps import (
    Sigmas,
    Steps,
    decode_latents,
    encode_pictures,
    encode_prompts,
    give,
    sample,
)
from diffsynth_backend.pipelines.wan_video import WanVideoPipeline
from tests.helpers.wan_pipeline import picture
from tests.helpers.wan_tiny import WanFiles, write_wan_files

F32, MIB = torch.float32, 1 / 1024  # GiB
LIMIT = 0.5 * MIB  # below a denoiser's weights
PICTURE_LIMIT = 32 * MIB  # the image encoder's layers are as wide as published
T2V = ("text_encoder", "t2v", "vae")
EXPERTS = ("experts/high_noise_model/dit", "experts/low_noise_model/dit")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Iterator[WanFiles]:
    """The registry knows all of them as long as the module's tests run."""
    written = write_wan_files(tmp_path_factory.mktemp("wan"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_configs, "MODEL_CONFIGS", [*model_configs.MODEL_CONFIGS, *written.rows])
        yield written


def frames(count: int = 5) -> list:
    return [picture(10 + index) for index in range(count)]


def draw(pipe: WanVideoPipeline, cfg_scale: float = 4.0, **options: Any) -> tuple[Tensor, np.ndarray]:
    """The latents after each step, and the frames."""
    steps: list[Tensor] = []
    pictures = pipe("a red circle", "blue", step_callback=lambda step: steps.append(step.latents.clone()), **{
        "height": 32, "width": 48, "num_frames": 5, "seed": 5, "num_inference_steps": 2, "cfg_scale": cfg_scale,
        "progress_bar_cmd": iter, **options})
    return torch.stack(steps), np.stack([np.asarray(one) for one in pictures])


def same(one: tuple[Tensor, np.ndarray], other: tuple[Tensor, np.ndarray]) -> bool:
    return torch.equal(one[0], other[0]) and np.array_equal(one[1], other[1])


# ---- layouts --------------------------------------------------------------------------------------------------------

def test_both_layouts_draw_the_same(files):
    diffusers = files.load("text_encoder_diffusers", "t2v_diffusers", "vae_diffusers")
    assert same(draw(diffusers), draw(files.load(*T2V)))


def test_a_file_that_two_families_know_is_the_pipelines_own(files):
    config = ModelConfig(path=files.files["vae_diffusers"])
    for pipeline, name in ((WanVideoPipeline, "wan_video_vae"), (QwenImagePipeline, "qwen_image_vae")):
        pool = pipeline(device="cpu", torch_dtype=F32).download_and_load_models([config])
        assert [entry.name for entry in pool.loaded] == [name]
    assert type(files.load("vae_diffusers").vae).__name__ == "WanVideoVAE"


def test_a_file_of_another_family_is_refused(files):
    with pytest.raises(ModelFileError, match="is a wan_video_dit, which this pipeline does not use"):
        QwenImagePipeline.from_pretrained(F32, "cpu", [ModelConfig(path=files.files["t2v"])])


@pytest.mark.parametrize("layout", ["vace", "vace_diffusers"])
def test_vace_and_the_denoiser_read_their_own_tensors_of_one_file(files, monkeypatch, layout):
    read: list[int] = []
    read_into = PositionedFile.read_into
    monkeypatch.setattr(PositionedFile, "read_into", lambda *arguments: read.append(read_into(*arguments)) or read[-1])
    fields = vram_preset("disk", F32, "cpu")
    pipe = files.load("text_encoder", layout, "vae", vram_limit=0, **fields)
    options = {"vace_video": frames(), "vace_reference_image": picture(3)}
    found = draw(pipe, 1.0, num_inference_steps=1, **options)
    assert same(found, draw(files.load("text_encoder", "vace", "vae"), 1.0, num_inference_steps=1, **options))
    for names, models in ((("dit",), (pipe.dit,)), (("dit", "vace"), (pipe.dit, pipe.vace))):
        read.clear()
        draw(pipe, 1.0, num_inference_steps=1, **(options if len(models) == 2 else {}))
        loop = pipe.last_loop
        assert loop.models == models
        assert loop.traffic.read_bytes == 2 * sum(tensor.numel() for model in models
                                                  for tensor in _parameters(model)), names


def _parameters(model: torch.nn.Module) -> list[Tensor]:
    return list(model.state_dict(keep_vars=True).values())


# ---- experts --------------------------------------------------------------------------------------------------------

def test_experts_are_told_by_their_folders(files):
    one, other = (files.load("text_encoder", *order, "vae") for order in (EXPERTS, EXPERTS[::-1]))
    assert one.files["dit"] == (files.files[EXPERTS[0]],) == other.files["dit"]
    assert same(draw(one), draw(other))
    assert not same(draw(one), draw(files.load("text_encoder", EXPERTS[0], "vae")))


def test_experts_without_names_are_to_be_stated(files):
    with pytest.raises(ModelFileError, match="do not tell which one is for high"):
        files.load(EXPERTS[0], "unnamed")
    low = files.load("unnamed", EXPERTS[0], experts=("low_noise", "high_noise"))
    assert low.files == {"dit": (files.files[EXPERTS[0]],), "dit2": (files.files["unnamed"],)}


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_experts_are_never_there_together(files, cfg_scale):
    """While one of them streams and stays within the limit, the other one is back where it rests."""
    pipe = files.load("text_encoder", *EXPERTS, "vae", vram_limit=LIMIT, **vram_preset("disk", F32, "cpu"))
    states = []

    def note(step) -> None:
        idle = pipe.dit2 if step.index < 2 else pipe.dit
        states.append({layer.state for layer in iter_managed(idle)})
        assert pipe.last_loop.traffic.peak_device_bytes <= LIMIT * 2**30

    steps = []
    pipe("a red circle", "blue", height=32, width=48, num_frames=5, seed=5, num_inference_steps=4, cfg_scale=cfg_scale,
         progress_bar_cmd=iter, step_callback=lambda step: steps.append(step.latents.clone()) or note(step))
    assert states == [{OFFLOAD}] * 4 and [loop.traffic.moved_bytes > 0 for loop in pipe.last_loops] == [True, True]
    expected, _ = draw(files.load("text_encoder", *EXPERTS, "vae"), cfg_scale, num_inference_steps=4)
    assert torch.equal(torch.stack(steps), expected)


def test_the_plan_counts_experts_apart(files):
    pipe = files.load(*EXPERTS, vram_limit=1 * MIB, **vram_preset("disk", F32, "cpu"))
    plans = pipe.preview(32, 48)
    assert list(plans) == ["dit", "dit2"] and all(plan.activation_bytes for plan in plans.values())


# ---- weights anywhere -----------------------------------------------------------------------------------------------

FEATURES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "text": (T2V, {}),
    "video": (T2V, {"input_video": frames(), "denoising_strength": 0.7}),
    "merged": (T2V, {"cfg_merge": True}),
    "windows": (T2V, {"num_frames": 17, "sliding_window_size": 3, "sliding_window_stride": 2}),
    "cache": (T2V, {"tea_cache_l1_thresh": 0.3, "tea_cache_model_id": "Wan2.1-T2V-1.3B", "num_inference_steps": 5}),
    "speed": ((*T2V, "motion_controller"), {"motion_bucket_id": 70}),
    "picture": (("text_encoder", "image_encoder", "i2v", "vae"), {"input_image": picture(1)}),
    "clean frame": (("text_encoder", "ti2v", "vae_2.2"), {"input_image": picture(1), "height": 64, "width": 64}),
    "experts": (("text_encoder", *EXPERTS, "vae"), {"num_inference_steps": 4}),
    "control": (("text_encoder", "image_encoder", "control", "vae"),
                {"control_video": frames(), "reference_image": picture(1)}),
    "camera": (("text_encoder", "image_encoder", "camera", "vae"),
               {"input_image": picture(1), "camera_control_direction": "LeftUp"}),
    "vace": (("text_encoder", "vace", "vae"), {"vace_video": frames(), "vace_reference_image": picture(1)}),
}


@pytest.fixture(scope="module")
def expected(files) -> Callable[[str, float], tuple[Tensor, np.ndarray]]:
    """What the unmanaged pipeline draws."""
    @cache
    def get(name: str, cfg_scale: float) -> tuple[Tensor, np.ndarray]:
        models, options = FEATURES[name]
        return draw(files.load(*models), cfg_scale, **options)
    return get


# Where weights are, and the limit; the rarer two with what has more than one model in the loop, or more than one pass.
MANAGEMENT = [("disk", LIMIT, FEATURES), ("disk", None, FEATURES), ("disk", 0, ("experts", "vace", "windows")),
              ("balanced", None, ("experts", "vace", "windows"))]


@pytest.mark.parametrize("management, limit, name", [
    (management, limit, name) for management, limit, names in MANAGEMENT for name in names])
def test_the_bits_are_the_same_wherever_the_weights_are(files, expected, name, management, limit):
    models, options = FEATURES[name]
    if limit and "image_encoder" in models:
        limit = PICTURE_LIMIT
    pipe = files.load(*models, vram_limit=limit, **vram_preset(management, F32, "cpu"))
    for cfg_scale in (1.0, 4.0):
        assert same(draw(pipe, cfg_scale, **options), expected(name, cfg_scale))


def test_fp8_storage_is_near(files, expected, relative_error):
    models, _ = FEATURES["text"]
    pipe = files.load(*models, **vram_preset("fp8", F32, "cpu"))
    assert 1e-4 < relative_error(draw(pipe)[0], expected("text", 4.0)[0]) < 0.5


@pytest.mark.parametrize("name", ["text", "merged"])
def test_the_timesteps_weights_are_read_once(files, name):
    """A loop from disk reads what depends on the timestep alone for all steps at once, also with both sides in one."""
    models, options = FEATURES[name]
    pipe = files.load(*models, vram_limit=0, **vram_preset("disk", F32, "cpu"))
    draw(pipe, 4.0, **options)
    total = sum(tensor.numel() for tensor in _parameters(pipe.dit))
    once = sum(tensor.numel() for module in (pipe.dit.time_embedding, pipe.dit.time_projection)
               for tensor in _parameters(module))
    assert pipe.last_loop.traffic.read_bytes == 2 * (once + 2 * (total - once))


# ---- step by step ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def weights() -> WeightsOwner:
    return WeightsOwner()


@pytest.fixture(scope="module")
def handle_of(files) -> Callable[..., PipelineHandle]:
    def make(*names: str, slot: str = "1") -> PipelineHandle:
        sources = tuple(ModelSource(name, (files.files[name],)) for name in names)
        return PipelineHandle("wan", sources, files.tokenizer, F32, "cpu", slot=slot)
    return make


def as_images(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(pictures).float() / 255


def test_the_steps_draw_what_the_pipeline_draws(handle_of, weights):
    handle = handle_of(*T2V)
    prompt = encode_prompts(handle, "a red circle", "blue", weights)
    samples = sample(handle, prompt, torch.zeros(1, 16, 2, 4, 6), Steps(2), seed=5, cfg_scale=4.0, weights=weights)
    images = decode_latents(handle, samples, weights=weights)
    assert samples.shape == (1, 16, 2, 4, 6) and images.shape == (5, 32, 48, 3)
    _, pictures = draw(weights.get(handle), tiled=False)
    assert (images - as_images(pictures)).abs().max() <= 0.5 / 255 + 1e-4


def test_a_video_goes_in_and_is_changed(handle_of, weights):
    handle = handle_of(*T2V)
    images = as_images(np.stack([np.asarray(one) for one in frames()]))
    latents = encode_pictures(handle, images, weights=weights)
    assert latents.shape == (1, 16, 2, 4, 6)
    prompt = encode_prompts(handle, "a red circle", "blue", weights)
    samples = sample(handle, prompt, latents, Steps(2, 0.6, shift=3.0), 5, 4.0, weights=weights)
    _, pictures = draw(weights.get(handle), input_video=frames(), denoising_strength=0.6, sigma_shift=3.0, tiled=False)
    assert (decode_latents(handle, samples, weights=weights) - as_images(pictures)).abs().max() <= 0.5 / 255 + 1e-4


def test_a_conditioning_takes_pictures_and_waits_for_the_size(handle_of, weights):
    handle = handle_of("text_encoder", "image_encoder", "i2v", "vae")
    prompt = encode_prompts(handle, "a red circle", "blue", weights)
    conditioned = give(handle, {"input_image": picture(1), "tiled": False}, weights, prompt)
    samples = sample(handle, conditioned, torch.zeros(1, 16, 2, 4, 6), Steps(2), 5, 4.0, weights=weights)
    _, pictures = draw(weights.get(handle), input_image=picture(1), tiled=False)
    assert (decode_latents(handle, samples, weights=weights) - as_images(pictures)).abs().max() <= 0.5 / 255 + 1e-4


GUIDES = {
    "a first picture": (("image_encoder", "i2v", "vae"), {"input_image": picture(1)}),
    "a first and a last one": (("image_encoder", "i2v", "vae"), {"input_image": picture(1), "end_image": picture(2)}),
    "a clean first frame": (("ti2v", "vae_2.2"), {"input_image": picture(1)}),
    "VACE": (("vace", "vae"), {"vace_video": frames(), "vace_reference_image": [picture(3)], "vace_scale": 0.5}),
    "control": (("image_encoder", "control", "vae"), {"control_video": frames(), "reference_image": picture(3)}),
    "a camera": (("image_encoder", "camera", "vae"), {"input_image": picture(1), "camera_control_direction": "Left"}),
}


@pytest.mark.parametrize("guide", GUIDES)
def test_guides_are_encoded_once_for_all_seeds(handle_of, weights, monkeypatch, guide):
    names, inputs = GUIDES[guide]
    handle, encoded = handle_of("text_encoder", *names, slot="guided"), []
    for model, method in ((WanVideoVAE, "encode"), (WanImageEncoder, "forward")):
        plain = getattr(model, method)
        monkeypatch.setattr(model, method, lambda *given, plain=plain, **more: encoded.append(plain) or plain(*given,
                                                                                                             **more))
    prompt = encode_prompts(handle, "a red circle", "blue", weights)
    pipe = weights.get(handle)
    empty = torch.zeros(1, pipe.latent_channels, 2, 64 // pipe.vae_factor, 64 // pipe.vae_factor)

    def draw_with(conditioned, seed, latents=empty, scale=4.0):
        return sample(handle, conditioned, latents, Steps(2), seed, scale, weights=weights)

    def fresh():
        return give(handle, inputs, weights, prompt)

    conditioned = fresh()
    drawn = [draw_with(conditioned, seed) for seed in (1, 2)]
    once = len(encoded)
    draw_with(conditioned, 2, scale=1.0)
    draw_with(conditioned, 2, latents=empty.expand(2, -1, -1, -1, -1))
    assert len(encoded) == once > 0, "neither the seed nor the scale nor the number of videos matters"
    assert [torch.equal(before, draw_with(fresh(), seed)) for before, seed in zip(drawn, (1, 2))] == [True, True]
    assert len(encoded) == 3 * once, "another conditioning begins anew"
    draw_with(conditioned, 1, latents=empty[..., :2])
    assert len(encoded) == 4 * once, "and so does another size"
    kept = steps._sized[conditioned.bundle].bundle.names()
    assert not {"noise", "latents", "control_camera_latents_input", "tea_cache"} & kept


def test_one_start_is_taken(handle_of, weights):
    handle = handle_of(*T2V)
    conditioned = give(handle, {"input_video": frames()}, weights, encode_prompts(handle, "a", "", weights))
    with pytest.raises(ValueError, match="a video to start from, and the latent is one, too"):
        sample(handle, conditioned, torch.zeros(1, 16, 2, 4, 6), Steps(2), 5, 4.0, weights=weights)


def test_two_halves_are_one_run(handle_of, weights):
    handle, empty = handle_of("text_encoder", *EXPERTS, "vae", slot="2"), torch.zeros(2, 16, 2, 4, 6)
    prompt = encode_prompts(handle, "a red circle", "blue", weights)
    first = sample(handle, prompt, empty, Sigmas((1.0, 0.9)), 1, 4.0, weights=weights)
    second = sample(handle, prompt, first, Sigmas((0.9, 0.3, 0.0), adds_noise=False), 99, 4.0, weights=weights)
    whole = sample(handle, prompt, empty, Sigmas((1.0, 0.9, 0.3, 0.0)), 1, 4.0, weights=weights)
    assert torch.allclose(second, whole, atol=1e-4)


def test_progress_counts_the_parts_of_a_video(handle_of, weights):
    counted: list[int] = []
    decode_latents(handle_of(*T2V), torch.zeros(2, 16, 3, 4, 6), progress=lambda parts: counted.append(len(parts))
                   or iter(parts), weights=weights)
    assert counted == [3, 3]


@pytest.mark.parametrize("latents, options, message", [
    (torch.zeros(1, 48, 2, 4, 6), {}, "has 48 channels .* works with 16"),
    (torch.zeros(1, 16, 2, 3, 6), {}, "3×6; both sides must be multiples of 2"),
    (torch.ones(1, 16, 2, 4, 6), {"noise_mask": torch.ones(1, 32, 48)}, "does not take"),
    (torch.zeros(1, 16, 2, 4, 6), {"schedule": Steps(3, mu=1.0)}, "takes its shift as sigma_shift"),
])
def test_what_does_not_fit_is_refused(handle_of, weights, latents, options, message):
    handle = handle_of(*T2V)
    prompt = encode_prompts(handle, "a", "", weights)
    schedule = options.pop("schedule", Steps(2))
    with pytest.raises(ValueError, match=message):
        sample(handle, prompt, latents, schedule, 1, 1.0, weights=weights, **options)


def test_a_missing_model_is_said_by_its_published_names(handle_of, weights):
    handle = handle_of(*T2V)
    with pytest.raises(ValueError, match="wan_video_motion_controller to the Model Loader, such as "
                                         "wan2.1-t2v-1.3b/motion_controller"):
        give(handle, {"motion_bucket_id": 3}, weights)


def test_a_handle_takes_two_denoisers_and_not_three(files, handle_of):
    with pytest.raises(ModelFileError, match="are each a wan_video_dit: a pipeline has 2"):
        build_pipeline(handle_of(*EXPERTS, "t2v"))
    with pytest.raises(ModelFileError, match="vae and vae_diffusers are both a wan_video_vae"):
        build_pipeline(handle_of("vae", "vae_diffusers"))


def test_the_report_names_each_experts_own_file(files, handle_of, weights):
    handle = handle_of("text_encoder", *EXPERTS[::-1], "vae", slot="3")
    lines = describe(handle, weights.get(handle), size=(48, 32)).splitlines()
    assert lines[0] == "Wan video · computes in float32 on cpu"
    assert [line.partition(":")[0] for line in lines[1:5]] == ["text_encoder", "dit", "dit2", "vae"]
    assert weights.get(handle).files["dit2"] == (files.files[EXPERTS[1]],)
    assert plan_lines(weights.get(handle), 48, 32) == []
