"""The demo model's additions and its inpainting do in the picture what they say, and without them nothing does."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffsynth_backend.demo.examine import PICTURE, held_out_prompts, pixels_of
from diffsynth_backend.demo.examine_features import (
    CONTROLNET,
    FEATURES,
    LORAS,
    blueprint,
    box,
    is_blueprint,
    load_controlled,
    lora,
    outline,
    wrong_features,
)
from diffsynth_backend.demo.judge import is_right
from diffsynth_backend.demo.scenes import SHAPES, Scene, Thing, draw, nominal_mask, plain_prompt
from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline

FEW = 4  # prompts


@pytest.fixture(scope="module")
def controlled() -> QwenImagePipeline:
    return load_controlled()


def in_bytes(picture: Tensor) -> Tensor:
    """(3, 128, 128) in −1…1 → (128, 128, 3), 0…255."""
    return (picture.permute(1, 2, 0) + 1) * 127.5


def drawn(scene: Scene, seed: int = 0) -> Tensor:
    return draw([scene], torch.Generator().manual_seed(seed))[0]


# ---- files and judges -----------------------------------------------------------------------------------------------

def test_the_files_are_small():
    sizes = {path.name: path.stat().st_size for path in (*LORAS.values(), CONTROLNET)}
    assert max(sizes[path.name] for path in LORAS.values()) <= 300_000
    assert sizes[CONTROLNET.name] <= 600_000


def test_only_blueprints_are_judged_blueprints():
    scenes = [scene for scene, _ in held_out_prompts(24)]
    assert all(is_blueprint(in_bytes(drawn(blueprint(scene), i)), scene) for i, scene in enumerate(scenes))
    assert not any(is_blueprint(in_bytes(drawn(scene, i)), scene) for i, scene in enumerate(scenes))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_outline_lies_on_the_border_of_its_shape(shape):
    """Every line pixel is at most 2 pixels from a pixel inside and from one outside, and the line is closed."""
    line = outline(Scene((Thing("red", shape, "center"),), "white"))[0] > 0
    inside = nominal_mask(shape, "center")
    assert line.any() and not (line & ~dilated(inside)).any() and not (line & ~dilated(~inside)).any()
    assert not (dilated(inside & ~line, 1) & ~inside & ~line).any()


def dilated(mask: Tensor, by: int = 2) -> Tensor:
    return torch.nn.functional.max_pool2d(mask[None].float(), 2 * by + 1, stride=1, padding=by)[0] > 0


# ---- LoRAs ----------------------------------------------------------------------------------------------------------

def test_the_style_lora_draws_blueprints(demo):
    assert len(wrong_features(demo, FEATURES["blueprint"], 1)) == 1
    with lora(demo, LORAS["blueprint"]):
        assert len(wrong_features(demo, FEATURES["blueprint"], FEW)) <= 1


def test_a_lora_does_more_at_more_strength(demo):
    scene = Scene((Thing("red", "circle", "center"),), "white")
    goal, far = in_bytes(drawn(blueprint(scene))), []
    for strength in (0.0, 0.9, 1.0):
        with lora(demo, LORAS["blueprint"], strength):
            far.append((pixels_of(demo(plain_prompt(scene), seed=1, **PICTURE)) - goal).abs().mean().item())
    assert far[0] > 1.3 * far[1] > 1.3**2 * far[2], far


def test_the_entity_lora_draws_each_thing_in_its_region(demo):
    assert len(wrong_features(demo, FEATURES["entities"], 1)) == 1
    with lora(demo, LORAS["entities"]):
        assert len(wrong_features(demo, FEATURES["entities"], FEW)) <= 1


# ---- ControlNet -----------------------------------------------------------------------------------------------------

def test_the_controlnet_puts_things_where_their_outlines_are(controlled):
    assert len(wrong_features(controlled, FEATURES["places"], 1, given=False)) == 1
    assert len(wrong_features(controlled, FEATURES["places"], FEW)) <= 1


# ---- inpainting -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("colour", "shape"), [("blue", "square"), ("yellow", "ring")])
def test_inpainting_draws_inside_the_mask_and_keeps_the_rest(demo, colour, shape):
    """The prompt names the new thing alone, so only the mask keeps the old one."""
    there, new = Thing("red", "circle", "top left"), Thing(colour, shape, "bottom right")
    before, asked, wanted = (Scene(things, "gray") for things in ((there,), (new,), (there, new)))
    picture, mask = (drawn(before) + 1).permute(1, 2, 0) / 2, box(new, 26)
    inputs = {"seed": 4, "input_image": picture, **PICTURE}
    after = pixels_of(demo(plain_prompt(asked), inpaint_mask=mask.float(), **inputs))
    assert is_right(after, wanted)
    assert not is_right(pixels_of(demo(plain_prompt(asked), **inputs)), wanted)
    with torch.no_grad():
        latents = demo.encode_image(drawn(before)[None].to(demo.torch_dtype))
        kept = in_bytes(demo.decode_latents(latents)[0].float().clamp(-1, 1))
    far = ~dilated(mask, 16)
    assert (after - kept)[far].abs().mean() < 0.6, "only rounding to bytes, and what the decoder sees from afar"
