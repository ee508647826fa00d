"""The embedded demo model: its files, what it draws, and equal pictures through every VRAM preset."""
from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from diffsynth_backend.core.loader.file import hash_model_file
from diffsynth_backend.core.vram.presets import VRAM_PRESETS
from diffsynth_backend.demo.examine import DEMO, load_demo, pixels_of, reconstruction_db, wrong_pictures
from diffsynth_backend.demo.examine_features import LORAS
from diffsynth_backend.demo.judge import thing_mask
from diffsynth_backend.demo.scenes import COLOURS, Scene, plain_prompt, sample_scene
from diffsynth_backend.pipelines.presets import DEMO_WEIGHTS

VIDEO_WEIGHTS = DEMO_WEIGHTS / "video"  # another model
QUIET = {"progress_bar_cmd": list, "height": 128, "width": 128}


# ---- files ----------------------------------------------------------------------------------------------------------

def test_the_files_are_small_and_recognised():
    files = [f for f in DEMO_WEIGHTS.rglob("*") if f.is_file() and VIDEO_WEIGHTS not in f.parents]
    assert sum(f.stat().st_size for f in files) <= 17_000_000
    hashes = [hash_model_file(str(DEMO_WEIGHTS / name)) for name in (
        "transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors")]
    assert hashes == ["bd64a0b3007cc6b87db799bc41742314", "0bbf10ca05b4c2a36a07e75aa24f1a28",
                      "438d631aacf1c0bf3b359a8315529e73"]


def test_the_vae_file_has_the_layout_that_the_native_loader_reads():
    with safe_open(DEMO_WEIGHTS / "vae/diffusion_pytorch_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"decoder.middle.0.residual.0.gamma", "encoder.conv1.weight", "decoder.head.2.weight"} <= names


# ---- autoencoder ----------------------------------------------------------------------------------------------------

def test_the_autoencoder_gives_back_held_out_pictures(demo):
    assert reconstruction_db(demo).mean() >= 30


# ---- meaning --------------------------------------------------------------------------------------------------------

def test_pictures_show_what_their_prompts_say(demo):
    """24 prompts that training has not seen, in any wording, two seeds each."""
    wrong = wrong_pictures(demo)
    assert len(wrong) <= 4, wrong


def test_a_negative_prompt_has_an_effect(demo):
    prompt = "a red circle in the center on a white background"
    plain = demo(prompt, seed=3, num_inference_steps=8, **QUIET)
    steered = demo(prompt, negative_prompt="a black background", seed=3, num_inference_steps=8, **QUIET)
    assert np.abs(np.asarray(plain, int) - np.asarray(steered, int)).mean() > 0.5


def centroid(image: Image.Image, scene: Scene) -> torch.Tensor:
    mask = thing_mask(pixels_of(image), scene, scene.things[0])
    return mask.nonzero().float().mean(dim=0)


def test_image_to_image_changes_the_colour_and_keeps_the_place(demo):
    rng = random.Random(12)
    stayed = 0
    for seed in range(12):
        scene = sample_scene(rng)
        while len(scene.things) > 1:
            scene = sample_scene(rng)
        thing = scene.things[0]
        colour = rng.choice([c for c in COLOURS if c not in (thing.colour, scene.background)])
        changed = Scene((replace(thing, colour=colour),), scene.background)
        before = demo(plain_prompt(scene), seed=seed, num_inference_steps=20, **QUIET)
        after = demo(plain_prompt(changed), seed=seed + 100, input_image=before, denoising_strength=0.5,
                     num_inference_steps=20, **QUIET)
        distance = (centroid(before, scene) - centroid(after, changed)).norm()
        stayed += bool(distance < 8)  # nan, where the new colour is nowhere, counts as gone
    assert stayed >= 10


# ---- VRAM presets ---------------------------------------------------------------------------------------------------

def draw_bytes(pipe) -> bytes:
    return pipe("a blue square in the top left", seed=5, num_inference_steps=3, **QUIET).tobytes()


@pytest.mark.parametrize(("vram", "limit"), [("balanced", None), ("low", None), ("low", 0), ("low", 0.004),
                                             ("disk", None), ("disk", 0)])
def test_every_preset_of_equal_storage_gives_the_same_bytes(demo, vram, limit):
    assert draw_bytes(load_demo(vram, limit)) == draw_bytes(demo)


def in_fp8_and_back():
    """The unmanaged model with weights that have been fp8."""
    pipe = load_demo()
    for model in (pipe.text_encoder, pipe.dit, pipe.vae):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float8_e4m3fn).to(torch.bfloat16)
    return pipe


def test_fp8_storage_equals_weights_cast_to_fp8_and_back():
    assert draw_bytes(load_demo("fp8")) == draw_bytes(in_fp8_and_back())


@pytest.mark.parametrize(("vram", "limit"), [("balanced", None), ("low", 0.004), ("disk", None), ("disk", 0),
                                             ("fp8", None)])
def test_a_lora_gives_the_same_bytes_under_every_preset_and_none_when_it_is_gone(vram, limit):
    drawn = []
    for pipe in (load_demo(vram, limit), in_fp8_and_back() if vram == "fp8" else load_demo()):
        without = draw_bytes(pipe)
        pipe.load_lora(pipe.dit, str(LORAS["blueprint"]))
        drawn.append((without, draw_bytes(pipe)))
        pipe.clear_lora()
        assert draw_bytes(pipe) == without
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]


def test_the_presets_are_those_tested():
    assert set(VRAM_PRESETS) == {"full", "balanced", "low", "fp8", "disk"}


def test_the_preset_says_what_the_model_was_trained_for():
    assert (DEMO.width, DEMO.height, DEMO.steps, DEMO.cfg_scale) == (128, 128, 20, 4.0)
