"""The whole Wan pipeline against diffusers' ones: same weights, same noise, same prompts, float32, after 3 steps."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.wan_denoiser import FIRST_AND_LAST, IMAGE, TI2V
from tests.helpers.wan_pipeline import (
    WanPipeline,
    WanVACEPipeline,
    make_wan,
    picture,
    write_tokenizer,
)

TOLERANCE = 1e-5
HEIGHT, WIDTH, FRAMES, STEPS, SEED = 32, 48, 5, 3, 5
PROMPT, NEGATIVE = "a red circle", "blue, a square"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def make(folder) -> Callable[..., tuple]:
    """Pairs of pipelines by their sizes, made once."""
    made: dict[str, tuple] = {}

    def get(**sizes: Any) -> tuple:
        key = repr(sizes)
        if key not in made:
            made[key] = make_wan(folder, **sizes)
        return made[key]
    return get


def noise(channels: int = 16, factor: int = 8, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH,
          references: int = 0) -> Tensor:
    shape = (1, channels, (frames - 1) // 4 + 1 + references, height // factor, width // factor)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    return torch.cat([drawn[:, :, drawn.shape[2] - references:], drawn[:, :, :drawn.shape[2] - references]], dim=2)


def draw(pipe, cfg_scale: float = 4.0, **options: Any) -> tuple[Tensor, list[Image.Image]]:
    """Finished latents and the frames."""
    steps: list = []
    frames = pipe(PROMPT, NEGATIVE, **{"cfg_scale": cfg_scale, "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES,
                                       "seed": SEED, "num_inference_steps": STEPS, "tiled": False,
                                       "progress_bar_cmd": iter, "step_callback": steps.append, **options})
    return steps[-1].latents, frames


def as_bytes(frames: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(frame, dtype=int) for frame in frames])


# ---- text to video --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
@pytest.mark.parametrize("merged", [False, True])
def test_text_to_video_equals_diffusers(make, relative_error, cfg_scale, merged):
    pipe, theirs = make()
    latents, _ = draw(pipe, cfg_scale, cfg_merge=merged)
    expected = theirs.latents(theirs.pipeline(WanPipeline), noise(), cfg_scale, PROMPT, NEGATIVE,
                              num_inference_steps=STEPS)
    assert relative_error(latents, expected) <= TOLERANCE


def test_the_frames_equal_diffusers_to_the_last_level(make):
    pipe, theirs = make()
    ours = as_bytes(draw(pipe)[1])
    expected = theirs.latents(theirs.pipeline(WanPipeline), noise(), 4.0, PROMPT, NEGATIVE, num_inference_steps=STEPS,
                              output_type="pil")
    expected = as_bytes(expected[0])
    assert ours.shape == (FRAMES, HEIGHT, WIDTH, 3) and expected.std() > 3
    assert np.abs(ours - expected).max() <= 1 and (ours != expected).mean() < 0.01


# ---- pictures -------------------------------------------------------------------------------------------------------

def test_a_first_picture_with_clip_equals_diffusers(make, relative_error):
    pipe, theirs = make(**IMAGE)
    expected = theirs.latents(theirs.from_pictures(WIDTH, HEIGHT), noise(), 4.0, PROMPT, NEGATIVE,
                              num_inference_steps=STEPS, image=picture(1))
    for merged in (False, True):
        assert relative_error(draw(pipe, input_image=picture(1), cfg_merge=merged)[0], expected) <= TOLERANCE
    assert relative_error(draw(pipe, input_image=picture(2))[0], expected) > 1000 * TOLERANCE


def test_first_and_last_picture_equal_diffusers(make, relative_error):
    pipe, theirs = make(**FIRST_AND_LAST)
    expected = theirs.latents(theirs.from_pictures(WIDTH, HEIGHT), noise(frames=9), 4.0, PROMPT, NEGATIVE,
                              num_inference_steps=STEPS, image=picture(1), last_image=picture(2))
    ours, _ = draw(pipe, input_image=picture(1), end_image=picture(2), num_frames=9)
    assert relative_error(ours, expected) <= TOLERANCE
    swapped, _ = draw(pipe, input_image=picture(2), end_image=picture(1), num_frames=9)
    assert relative_error(swapped, expected) > 1000 * TOLERANCE


@pytest.mark.parametrize("image", [False, True])
def test_ti2v_equals_diffusers(make, relative_error, image):
    pipe, theirs = make(**TI2V)
    size = {"height": 64, "width": 96, "num_frames": 9}
    start = noise(48, 16, 9, 64, 96)
    config = {"expand_timesteps": True}
    if image:
        first = picture(1, 96, 64)
        their_pipe = theirs.from_pictures(96, 64, **config)
        expected = theirs.latents(their_pipe, start, 4.0, PROMPT, NEGATIVE, num_inference_steps=STEPS, image=first)
        ours, _ = draw(pipe, input_image=first, **size)
        assert relative_error(ours[:, :, :1], expected[:, :, :1]) <= TOLERANCE
    else:
        expected = theirs.latents(theirs.pipeline(WanPipeline, **config), start, 4.0, PROMPT, NEGATIVE,
                                  num_inference_steps=STEPS)
        ours, _ = draw(pipe, **size)
    assert relative_error(ours, expected) <= TOLERANCE


# ---- two experts ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("boundary", [0.0, 0.9, 1.0])  # with three steps: 1000, 909.1, 714.3
def test_two_denoisers_take_turns_as_in_diffusers(make, relative_error, boundary):
    pipe, theirs = make(experts=2)
    expected = theirs.latents(theirs.pipeline(WanPipeline, boundary_ratio=boundary), noise(), 4.0, PROMPT, NEGATIVE,
                              num_inference_steps=STEPS)
    assert relative_error(draw(pipe, switch_DiT_boundary=boundary)[0], expected) <= TOLERANCE


def test_two_denoisers_from_a_picture_equal_diffusers(make, relative_error):
    pipe, theirs = make(experts=2, in_dim=36)
    expected = theirs.latents(theirs.from_pictures(WIDTH, HEIGHT, boundary_ratio=0.9), noise(), 4.0, PROMPT,
                              NEGATIVE, num_inference_steps=STEPS, image=picture(1))
    assert relative_error(draw(pipe, input_image=picture(1), switch_DiT_boundary=0.9)[0], expected) <= TOLERANCE
    assert relative_error(draw(pipe, input_image=picture(1), switch_DiT_boundary=0.95)[0], expected) > 1e-3


# ---- VACE -----------------------------------------------------------------------------------------------------------

def frames(count: int = FRAMES, mode: str = "RGB") -> list[Image.Image]:
    return [picture(10 + index).convert(mode) for index in range(count)]


def masks(count: int = FRAMES) -> list[Image.Image]:
    """Grey in places: the border is 0.5."""
    return [Image.fromarray(np.random.default_rng(index).choice([0, 100, 200, 255], (HEIGHT, WIDTH)).astype(np.uint8))
            for index in range(count)]


VACE = {"video": {"vace_video": frames()}, "mask": {"vace_video": frames(), "vace_video_mask": masks()},
        "reference": {"vace_reference_image": picture(3)},
        "all": {"vace_video": frames(), "vace_video_mask": masks(), "vace_reference_image": [picture(3)]}}


@pytest.mark.parametrize("options", VACE.values(), ids=VACE)
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_vace_equals_diffusers(make, relative_error, options, scale):
    pipe, theirs = make(vace=True)
    reference = options.get("vace_reference_image")
    references = [] if reference is None else reference if isinstance(reference, list) else [reference]
    start = noise(references=len(references))
    expected = theirs.latents(
        theirs.pipeline(WanVACEPipeline), start, 4.0, PROMPT, NEGATIVE, num_inference_steps=STEPS, num_frames=FRAMES,
        video=options.get("vace_video"), mask=options.get("vace_video_mask"), conditioning_scale=scale,
        reference_images=[*references] or None)
    ours, pictures = draw(pipe, vace_scale=scale, **options)
    assert relative_error(ours, expected[:, :, len(references):]) <= TOLERANCE
    assert len(pictures) == FRAMES
