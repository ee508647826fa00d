"""The nodes for videos, over a tiny Wan with random weights: from nothing to frames, and what guides them."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from diffsynth_backend.models.wan_video_camera_controller import ORIGIN
from diffsynth_backend.pipelines.wan_video import MAX_FRAMES
from tests.helpers.pack import submodule
from tests.helpers.wan_tiny import WanFiles, write_wan_files
from tests.nodes.wiring import STEPS, denoise

EMPTY = torch.zeros(1, 16, 2, 4, 6)
OPTIONS = {"experts": {"experts": "off"}, "windows": {"windows": "off"}, "cache": {"cache": "off"},
           "motion": {"motion": "off"}, "cfg_merge": False}
T2V = ("text_encoder", "t2v", "vae")
SMALL, LARGE = "Wan 2.1, Wan 2.2 A14B", "Wan 2.2 TI2V-5B"


@pytest.fixture(scope="module", autouse=True)
def _as_comfyui_does():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory, pack) -> WanFiles:
    """The pack's registry knows all of them as long as the module's tests run."""
    with torch.inference_mode(False):
        written = write_wan_files(tmp_path_factory.mktemp("wan"))
    configs = submodule("diffsynth_backend.configs.model_configs")
    with pytest.MonkeyPatch.context() as patch:
        for module in (configs, submodule("diffsynth_backend.models.model_loader")):
            patch.setattr(module, "MODEL_CONFIGS", [*configs.MODEL_CONFIGS, *written.named_rows()])
        yield written
    submodule("diffsynth_backend.pipelines.owner").owner.free_all()


@pytest.fixture(scope="module")
def wan(files) -> Callable:
    """The handle of a pipeline of the named files."""
    handle = submodule("diffsynth_backend.pipelines.handle")

    def make(*names: str):
        sources = tuple(handle.ModelSource(name, (files.files[name],)) for name in names)
        return handle.PipelineHandle("wan", sources, files.tokenizer, torch.float32, "cpu", slot="wan")
    return make


@pytest.fixture(scope="module")
def prompt(run) -> Callable:
    return lambda pipeline: run("PromptEncode", pipeline=pipeline, positive="a red circle", negative="blue")


def frames(count: int = 5, seed: int = 0) -> Tensor:
    return torch.rand(count, 32, 48, 3, generator=torch.Generator().manual_seed(seed))


def given(conditioning) -> dict:
    return conditioning.bundle.dicts()[0]


def the_pipeline_draws(pipeline, conditioning, **options) -> Tensor:
    """Latents of the pipeline itself, two steps of the video that EMPTY stands for, drawn by the same inputs."""
    pipe = submodule("diffsynth_backend.pipelines.owner").owner.get(pipeline)
    latents: list[Tensor] = []
    with torch.inference_mode(False):
        pipe("a red circle", "blue", **{
            "seed": 1, "num_frames": 5, "height": 32, "width": 48, "cfg_scale": 4.0, "num_inference_steps": 2,
            "progress_bar_cmd": iter, "step_callback": lambda step: latents.append(step.latents), **options})
    return pipe.export_latents(latents[-1])


def same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


# ---- Empty Video Latent ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model, size, shape", [
    (SMALL, (832, 480, 81), (2, 16, 21, 60, 104)), (SMALL, (48, 32, 1), (2, 16, 1, 4, 6)),
    (LARGE, (1248, 704, 121), (2, 48, 31, 44, 78))])
def test_an_empty_video_has_the_models_shape(run, model, size, shape):
    width, height, count = size
    samples = run("EmptyVideoLatent", batch_size=2, model={"model": model, "width": width, "height": height,
                                                            "frames": count})["samples"]
    assert samples.shape == shape and not samples.any()


@pytest.mark.parametrize("model, size, message", [
    (SMALL, (840, 480, 81), "840×480 .* multiples of 16 expected: 832×480 would do"),
    (LARGE, (1280, 720, 121), "multiples of 32 expected: 1280×704"),
    (SMALL, (832, 480, 80), "80 frames; .* 81 would do")])
def test_sizes_that_no_model_draws(run, model, size, message):
    width, height, count = size
    with pytest.raises(ValueError, match=message):
        run("EmptyVideoLatent", batch_size=1, model={"model": model, "width": width, "height": height, "frames": count})


def test_the_bound_of_frames_is_the_backends(nodes):
    model = next(entry for entry in nodes["EmptyVideoLatent"].define_schema().inputs if entry.id == "model")
    for inputs in model.options["choices"].values():
        assert next(entry for entry in inputs if entry.id == "frames").options["max"] == MAX_FRAMES


# ---- from text ------------------------------------------------------------------------------------------------------

def test_a_prompt_becomes_frames(run, wan, prompt, host):
    pipeline = wan(*T2V)
    host.steps.clear()
    samples = denoise(run, pipeline, prompt(pipeline), EMPTY)
    assert same(samples, the_pipeline_draws(pipeline, None)) and host.steps == [0, 1]
    image = run("VaeDecode", pipeline=pipeline, samples={"samples": samples}, tiling={"tiling": "off"})
    assert image.shape == (5, 32, 48, 3) and image.min() >= 0 and image.max() <= 1
    again = run("VaeEncode", pipeline=pipeline, pixels=image, tiling={"tiling": "off"})["samples"]
    assert again.shape == EMPTY.shape
    changed = denoise(run, pipeline, prompt(pipeline), again, schedule=STEPS | {"denoise": 0.5})
    assert changed.shape == EMPTY.shape and not same(changed, samples)


def test_the_shift_is_a_choice_of_the_schedule(run, wan, prompt, pipeline, conditioning):
    handle = wan(*T2V)
    samples = denoise(run, handle, prompt(handle), EMPTY, schedule={**STEPS, "schedule": "video", "shift": 3.0})
    assert same(samples, the_pipeline_draws(handle, None, sigma_shift=3.0))
    with pytest.raises(ValueError, match="takes its shift as exponential_shift_mu"):
        denoise(run, pipeline, conditioning, torch.zeros(1, 16, 1, 4, 4),
                schedule={**STEPS, "schedule": "video", "shift": 3.0})


@pytest.mark.parametrize("denoiser, vae, channels, tile", [("t2v", "vae", 16, (16, 8)),
                                                           ("ti2v", "vae_2.2", 48, (8, 4))])
def test_tiles_have_the_size_that_is_said(run, wan, monkeypatch, denoiser, vae, channels, tile):
    """128 pixels are 16 latent pixels of Wan 2.1's autoencoder, and 8 of 2.2's."""
    pipeline, used = wan("text_encoder", denoiser, vae), []
    model = submodule("diffsynth_backend.models.wan_video_vae").WanVideoVAE
    for name in ("encode", "decode"):
        plain = getattr(model, name)
        monkeypatch.setattr(model, name, lambda *given, plain=plain, **more: used.append(
            (more["tiled"], more["tile_size"], more["tile_stride"])) or plain(*given, **more))
    tiling = {"tiling": "on", "tile_size": 128, "overlap": 64}
    samples = torch.randn(1, channels, 1, 24 * tile[1] // 8, 12 * tile[1] // 8)
    image = run("VaeDecode", pipeline=pipeline, samples={"samples": samples}, tiling=tiling)
    assert image.shape == (1, 192, 96, 3)
    assert run("VaeEncode", pipeline=pipeline, pixels=image, tiling=tiling)["samples"].shape == samples.shape
    assert used == [(True, *tile)] * 2
    with pytest.raises(ValueError, match=r"4 apart, are finer than the latent, where one stands for (8|16)×"):
        run("VaeDecode", pipeline=pipeline, samples={"samples": samples}, tiling={**tiling, "overlap": 124})


def test_another_familys_schedule_is_refused(run, wan, prompt):
    handle = wan(*T2V)
    with pytest.raises(ValueError, match="schedule Qwen-Image-Lightning is not for a WanVideoPipeline, which has Wan:"):
        denoise(run, handle, prompt(handle), EMPTY, schedule={**STEPS, "schedule": "lightning"})


def test_an_interrupted_video_leaves_nothing_behind(run, wan, prompt, host, monkeypatch):
    pipeline = wan(*T2V)
    conditioned = prompt(pipeline)
    monkeypatch.setattr(host, "interrupt_at", 0)
    with pytest.raises(KeyboardInterrupt):
        denoise(run, pipeline, conditioned, EMPTY)
    monkeypatch.undo()
    assert same(denoise(run, pipeline, conditioned, EMPTY), the_pipeline_draws(pipeline, None))


# ---- pictures and videos --------------------------------------------------------------------------------------------

def test_first_and_last_picture(run, wan, prompt):
    pipeline = wan("text_encoder", "image_encoder", "i2v", "vae")
    first, last = frames(1), frames(1, seed=1)
    conditioned = run("ImageToVideo", conditioning=prompt(pipeline), image=first, end_image=last)
    expected = the_pipeline_draws(pipeline, None, input_image=first[0], end_image=last[0])
    assert same(denoise(run, pipeline, conditioned, EMPTY), expected)
    assert not same(denoise(run, pipeline, run("ImageToVideo", conditioning=prompt(pipeline), image=first), EMPTY),
                    expected)


def test_the_clean_first_frame_of_the_large_latents(run, wan, prompt):
    pipeline = wan("text_encoder", "ti2v", "vae_2.2")
    conditioned = run("ImageToVideo", conditioning=prompt(pipeline), image=frames(1))
    samples = denoise(run, pipeline, conditioned, torch.zeros(1, 48, 2, 2, 4))
    assert same(samples, the_pipeline_draws(pipeline, None, input_image=frames(1)[0], width=64))


def test_pictures_that_the_model_does_not_take(run, wan, prompt):
    pipeline = wan(*T2V)
    conditioned = run("ImageToVideo", conditioning=prompt(pipeline), image=frames(1))
    with pytest.raises(ValueError, match="draws from text alone"):
        denoise(run, pipeline, conditioned, EMPTY)
    with pytest.raises(ValueError, match="image is a batch of 2"):
        run("ImageToVideo", conditioning=prompt(pipeline), image=frames(2))


MASKS = {"one": torch.eye(32)[None], "one without a batch": torch.eye(32), "one a frame": torch.rand(5, 32, 48)}


@pytest.mark.parametrize("mask", MASKS)
def test_vace_changes_a_video_where_a_mask_is_white(run, wan, prompt, mask):
    pipeline = wan("text_encoder", "vace", "vae")
    video, masks = frames(), MASKS[mask]
    conditioned = run("VACE", conditioning=prompt(pipeline), video=video, mask=masks, scale=0.5)
    options = {"vace_video": video, "vace_scale": 0.5,
               "vace_video_mask": list(masks) if mask == "one a frame" else masks.reshape(32, 32)}
    samples = denoise(run, pipeline, conditioned, EMPTY)
    assert samples.shape == EMPTY.shape and same(samples, the_pipeline_draws(pipeline, None, **options))


def test_vace_shows_what_is_in_pictures(run, wan, prompt):
    pipeline = wan("text_encoder", "vace", "vae")
    several = {"reference0": frames(2), "reference1": frames(1, seed=5)[:, :16], "reference2": None}
    conditioned = run("VACE", conditioning=prompt(pipeline), references=several, scale=1.0)
    pictures = given(conditioned)["vace_reference_image"]
    assert [tuple(picture.shape) for picture in pictures] == [(32, 48, 3), (32, 48, 3), (16, 48, 3)]
    assert same(denoise(run, pipeline, conditioned, EMPTY),
                the_pipeline_draws(pipeline, None, vace_reference_image=pictures))


def test_vace_without_anything_and_without_its_model(run, wan, prompt):
    with pytest.raises(ValueError, match="nothing to draw by"):
        run("VACE", conditioning=prompt(wan(*T2V)), scale=1.0)
    conditioned = run("VACE", conditioning=prompt(wan(*T2V)), video=frames(), scale=1.0)
    with pytest.raises(ValueError, match="(?s)needs the pipeline's vace.*wan_video_vace to the Model Loader, "
                                         "such as wan2.1-vace-1.3b/transformer"):
        denoise(run, wan(*T2V), conditioned, EMPTY)


def test_a_video_controls(run, wan, prompt):
    pipeline = wan("text_encoder", "image_encoder", "control", "vae")
    video, reference = frames(), frames(1, seed=3)
    conditioned = run("VideoControl", conditioning=prompt(pipeline), video=video, reference=reference)
    samples = denoise(run, pipeline, conditioned, EMPTY)
    assert same(samples, the_pipeline_draws(pipeline, None, control_video=video, reference_image=reference[0]))
    alone = run("VideoControl", conditioning=prompt(pipeline), video=video)
    assert not same(denoise(run, pipeline, alone, EMPTY), samples)
    short = run("VideoControl", conditioning=prompt(pipeline), video=video[:3])
    with pytest.raises(ValueError, match="control_video has 3 frames and the video to draw 5"):
        denoise(run, pipeline, short, EMPTY)


def test_the_camera_moves(run, wan, prompt):
    pipeline = wan("text_encoder", "image_encoder", "camera", "vae")
    first = run("ImageToVideo", conditioning=prompt(pipeline), image=frames(1))
    expected = partial(the_pipeline_draws, pipeline, None, input_image=frames(1)[0])
    for direction, speed in (("Left", 0.1), ("In", 0.1), ("Left", 0.2)):
        conditioned = run("Camera", conditioning=first, direction=direction, speed=speed)
        assert same(denoise(run, pipeline, conditioned, EMPTY),
                    expected(camera_control_direction=direction, camera_control_speed=speed))


def test_the_camera_begins_where_it_is_said(run, wan, prompt, nodes):
    pipeline, moving = wan("text_encoder", "image_encoder", "camera", "vae"), {"direction": "In", "speed": 0.1}
    first = run("ImageToVideo", conditioning=prompt(pipeline), image=frames(1))

    def draw(**more):
        return denoise(run, pipeline, run("Camera", conditioning=first, **moving, **more), EMPTY)

    known = next(entry.options["default"] for entry in nodes["Camera"].define_schema().inputs if entry.id == "origin")
    assert torch.equal(draw(origin=known), draw())
    closer = (*ORIGIN[:1], 2 * ORIGIN[1], *ORIGIN[2:])
    drawn = draw(origin=" ".join(map(str, closer)))
    assert not same(drawn, draw())
    assert same(drawn, the_pipeline_draws(pipeline, None, input_image=frames(1)[0], camera_control_direction="In",
                                          camera_control_speed=0.1, camera_control_origin=closer))


@pytest.mark.parametrize("origin, message", [
    ("1, 2, three", "origin has to be numbers between commas: .*three"), ("", "has 19 numbers .* and origin 0"),
    (", ".join(["1"] * 18), "and origin 18"), ("0, nan" + ", 1" * 17, "finite numbers"),
    ("0, 0" + ", 1" * 17, "focal lengths, above 0, got 0 and 1"), ("1 " * 19, "maps all that it sees onto a plane"),
    ("1 " * 600, "has 1200 characters, at most 1000")])
def test_what_is_no_camera(run, wan, prompt, origin, message):
    pipeline = wan("text_encoder", "image_encoder", "camera", "vae")
    first = run("ImageToVideo", conditioning=prompt(pipeline), image=frames(1))
    with pytest.raises(ValueError, match=message):
        denoise(run, pipeline, run("Camera", conditioning=first, direction="In", speed=0.1, origin=origin), EMPTY)


# ---- Video Options --------------------------------------------------------------------------------------------------

def options(run, conditioning, **changes):
    return run("VideoOptions", conditioning=conditioning, **{**OPTIONS, **changes})


@pytest.mark.parametrize("changes, inputs", [
    ({"windows": {"windows": "on", "size": 3, "stride": 1}}, {"sliding_window_size": 3, "sliding_window_stride": 1}),
    ({"cfg_merge": True}, {"cfg_merge": True}),
    ({"motion": {"motion": "on", "speed": 80}}, {"motion_bucket_id": 80})])
def test_options_reach_the_loop(run, wan, prompt, changes, inputs):
    pipeline = wan(*T2V, "motion_controller")
    conditioned = options(run, prompt(pipeline), **changes)
    assert same(denoise(run, pipeline, conditioned, torch.zeros(1, 16, 5, 4, 6)),
                the_pipeline_draws(pipeline, None, num_frames=17, **inputs))


def test_the_second_expert_takes_over_where_it_is_said(run, wan, prompt):
    pipeline = wan("text_encoder", "experts/high_noise_model/dit", "experts/low_noise_model/dit", "vae")
    drawn = [denoise(run, pipeline, options(run, prompt(pipeline), experts={"experts": "on", "boundary": boundary}),
                     EMPTY) for boundary in (0.0, 0.9, 1.0)]
    for samples, boundary in zip(drawn, (0.0, 0.9, 1.0)):
        assert same(samples, the_pipeline_draws(pipeline, None, switch_DiT_boundary=boundary))
    assert not same(drawn[0], drawn[1])


def test_what_is_skipped_is_forgotten_after_the_loop(run, wan, prompt):
    pipeline = wan(*T2V)
    cache = {"cache": "on", "threshold": 5.0, "calibration": "Wan2.1-T2V-1.3B"}
    conditioned = options(run, prompt(pipeline), cache=cache)
    drawn = [denoise(run, pipeline, conditioned, EMPTY, schedule=STEPS | {"steps": 4}) for _ in range(2)]
    assert torch.equal(*drawn) and "tea_cache" not in conditioned.bundle.names()
    assert same(drawn[0], the_pipeline_draws(pipeline, None, num_inference_steps=4, tea_cache_l1_thresh=5.0,
                                             tea_cache_model_id="Wan2.1-T2V-1.3B"))


def test_a_motion_controller_that_is_not_loaded_is_named(run, wan, prompt):
    with pytest.raises(ValueError, match="(?s)motion_controller.*wan2.1-t2v-1.3b/motion_controller"):
        pipeline = wan(*T2V)
        denoise(run, pipeline, options(run, prompt(pipeline), motion={"motion": "on", "speed": 1}), EMPTY)


def test_options_that_contradict_each_other(run, wan, prompt):
    pipeline = wan(*T2V)
    both = options(run, prompt(pipeline), windows={"windows": "on", "size": 2, "stride": 1},
                   cache={"cache": "on", "threshold": 0.1, "calibration": "Wan2.1-T2V-1.3B"})
    with pytest.raises(ValueError, match="works neither with sliding windows"):
        denoise(run, pipeline, both, EMPTY)


def test_any_order_draws_the_same_video(run, wan, prompt):
    pipeline = wan("text_encoder", "image_encoder", "camera", "vae")
    picture = {"image": frames(1)}
    moving = {"direction": "Left", "speed": 0.1}
    one = run("Camera", conditioning=run("ImageToVideo", conditioning=prompt(pipeline), **picture), **moving)
    other = run("ImageToVideo", conditioning=run("Camera", conditioning=prompt(pipeline), **moving), **picture)
    assert torch.equal(denoise(run, pipeline, one, EMPTY), denoise(run, pipeline, other, EMPTY))
