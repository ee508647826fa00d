"""The embedded video demo: its files, what moves in its videos, and that their judge knows right from wrong."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffsynth_backend.configs import demo_video
from diffsynth_backend.core.loader.file import hash_model_file
from diffsynth_backend.demo.examine import pixels_of
from diffsynth_backend.demo.examine_video import DEMO, VIDEO, load_video_demo, video_reconstruction_db, wrong_videos
from diffsynth_backend.demo.judge_video import faults, see
from diffsynth_backend.demo.latent_code import fit_video_code, preview
from diffsynth_backend.demo.moving import (
    COLOURS,
    DIRECTIONS,
    FRAMES,
    HELD_OUT,
    MOTIONS,
    SEEN,
    SHAPES,
    SIDE,
    Motion,
    draw,
    plain_prompt,
)
from diffsynth_backend.pipelines.presets import DEMO_WEIGHTS
from diffsynth_backend.pipelines.wan_prompts import TextPrompts
from diffsynth_backend.pipelines.wan_video import WanVideoPipeline
from diffsynth_backend.utils.pictures import to_image

RIGHT = Motion("blue", "triangle", "up")


@pytest.fixture(scope="module")
def video_demo() -> WanVideoPipeline:
    return load_video_demo()


def frames_of(video: Tensor) -> list[Tensor]:
    """(3, F, H, W) in −1…1 → frames (H, W, 3), 0…255."""
    return list(((video.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0))


# ---- the world and its judge ----------------------------------------------------------------------------------------

def test_a_quarter_of_the_motions_is_held_out_and_every_name_is_seen_as_often():
    assert (len(SEEN), len(HELD_OUT)) == (36, 12) and not {*SEEN} & {*HELD_OUT}
    for table, field in ((COLOURS, "colour"), (SHAPES, "shape"), (DIRECTIONS, "direction")):
        assert {sum(getattr(motion, field) == name for motion in SEEN) for name in table} == {36 // len(table)}


def test_drawn_motions_are_right():
    videos, _ = draw(MOTIONS, torch.Generator().manual_seed(4))
    assert not [motion for motion, video in zip(MOTIONS, videos) if faults(frames_of(video), motion)]


@pytest.mark.parametrize(("field", "other"), [("colour", "red"), ("shape", "circle"), ("shape", "square"),
                                              ("direction", "down"), ("direction", "left")])
def test_another_motion_is_wrong(field, other):
    videos, _ = draw([RIGHT], torch.Generator().manual_seed(4))
    assert field in " ".join(faults(frames_of(videos[0]), replace(RIGHT, **{field: other})))


@pytest.mark.parametrize("wrong", [
    lambda frames: frames[:1] * FRAMES, lambda frames: frames[:9] + frames[8::-1], lambda frames: frames[::2] * 2,
    lambda frames: [frame.roll(8 * (i > 8), dims=1) for i, frame in enumerate(frames)],
    lambda frames: [*frames[:-1], torch.full_like(frames[0], 255)], lambda frames: [frames[0] * 0, *frames[1:]]],
    ids=["still", "there and back", "twice", "jumps aside", "gone", "black"])
def test_a_video_that_does_not_move_so_is_wrong(wrong):
    videos, _ = draw([RIGHT], torch.Generator().manual_seed(4))
    assert faults(wrong(frames_of(videos[0])), RIGHT)


def test_the_code_is_what_the_linear_preview_shows():
    """Each latent pixel's preview is the mean colour of its 4×8×8 pixels."""
    videos, _ = draw(MOTIONS[:6], torch.Generator().manual_seed(4))
    latents = fit_video_code(videos).encode(videos)
    assert latents.shape == (6, 16, 5, 8, 8)
    means = torch.nn.functional.avg_pool3d(videos[:, :, 1:], (4, 8, 8))
    assert torch.allclose(preview(latents[:, :, 1]), means[:, :, 0], atol=1e-4)


# ---- files ----------------------------------------------------------------------------------------------------------

def test_the_files_are_small_and_recognised():
    folder = DEMO_WEIGHTS / "video"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 6_000_000
    hashes = {hash_model_file(str(path)) for path in folder.rglob("*.safetensors")}
    assert hashes == {row["model_hash"] for row in demo_video.MODEL_CONFIGS}


def test_the_tokenizer_has_a_token_for_each_word_whatever_its_case():
    prompts = TextPrompts.load(DEMO_WEIGHTS / "video" / "tokenizer")
    ids, mask = prompts.tokenize([plain_prompt(motion) for motion in MOTIONS] + ["A Red CIRCLE moves left"])
    assert mask.all() and ids.shape[1] == 6 and (ids > 2).sum() == 5 * len(ids)
    assert ids.max() < demo_video.TEXT_ENCODER["vocab"]


# ---- what it draws --------------------------------------------------------------------------------------------------

def test_the_autoencoder_gives_back_held_out_videos(video_demo):
    assert video_reconstruction_db(video_demo).mean() >= 33


def test_held_out_motions_are_drawn(video_demo):
    """Half of those that training has not seen; `examine_video` counts all of them, with several seeds."""
    wrong = wrong_videos(video_demo, HELD_OUT[::2], seeds=[0])
    assert len(wrong) <= 1, wrong


def test_each_word_counts(video_demo):
    """A wrong name in the prompt is seen in the video."""
    motion = HELD_OUT[0]
    for field, other in (("colour", "yellow"), ("shape", "triangle"), ("direction", "down")):
        assert not wrong_videos(video_demo, [replace(motion, **{field: other})], seeds=[1])


def test_video_to_video_changes_the_colour_and_keeps_the_path(video_demo):
    motion, blue = HELD_OUT[0], replace(HELD_OUT[0], colour="blue")
    video, _ = draw([motion], torch.Generator().manual_seed(3))
    before = frames_of(video[0])
    after = [pixels_of(image) for image in video_demo(
        plain_prompt(blue), seed=5, denoising_strength=0.5,
        input_video=[to_image(frame) for frame in video[0].unbind(1)], **VIDEO)]
    assert not faults(before, motion) and not faults(after, blue)
    places = [torch.tensor([see(frame).centre for frame in frames]) for frames in (before, after)]
    assert (places[0] - places[1]).norm(dim=1).max() < 4


@pytest.mark.parametrize(("vram", "limit"), [("low", 0), ("disk", None)])
def test_streamed_weights_give_the_same_bytes(video_demo, vram, limit):
    drawn = [b"".join(image.tobytes() for image in pipe("a red circle moves up", seed=5,
                                                        **{**VIDEO, "num_inference_steps": 2}))
             for pipe in (video_demo, load_video_demo(vram, limit))]
    assert drawn[0] == drawn[1]


def test_the_preset_says_what_the_model_was_trained_for():
    assert (DEMO.width, DEMO.height, DEMO.frames) == (SIDE, SIDE, FRAMES)
