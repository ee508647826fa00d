"""The demo model's world, and that the judge of its pictures knows right from wrong."""
from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from diffsynth_backend.demo.judge import is_right, judge
from diffsynth_backend.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    Scene,
    Thing,
    draw,
    is_held_out,
    sample_scene,
    write_prompt,
)
from diffsynth_backend.demo.train import SEEN_COLOURS, SEEN_SHAPES, layout_of


def pixels_of(scene: Scene, seed: int = 0) -> torch.Tensor:
    return (draw([scene], torch.Generator().manual_seed(seed))[0].permute(1, 2, 0) + 1) * 127.5


def test_a_drawn_scene_is_judged_right():
    rng = random.Random(5)
    scenes = [sample_scene(rng) for _ in range(60)]
    assert [scene for i, scene in enumerate(scenes) if not is_right(pixels_of(scene, i), scene)] == []


@pytest.mark.parametrize("change", [{"colour": "green"}, {"shape": "square"}, {"place": "left"}], ids=str)
def test_a_scene_with_one_attribute_changed_is_judged_wrong(change):
    thing = Thing("red", "circle", "center")
    drawn = Scene((thing,), "white")
    asked = Scene((replace(thing, **change),), "white")
    assert not is_right(pixels_of(drawn), asked)


def test_the_judge_tells_what_it_sees():
    verdict, = judge(pixels_of(Scene((Thing("blue", "ring", "top left"),), "gray")), Scene(
        (Thing("blue", "circle", "top left"),), "gray"))
    assert verdict.shape == "ring"


def test_every_shape_is_told_from_every_other():
    for shape in SHAPES:
        scenes = {name: Scene((Thing("red", name, "center"),), "white") for name in SHAPES}
        pixels = pixels_of(scenes[shape])
        assert [name for name, scene in scenes.items() if is_right(pixels, scene)] == [shape]


def test_held_out_scenes_never_reach_training():
    rng = random.Random(0)
    assert not any(is_held_out(sample_scene(rng)) for _ in range(500))
    assert all(is_held_out(sample_scene(rng, held_out=True)) for _ in range(20))


def test_a_complete_prompt_says_everything():
    rng = random.Random(1)
    for _ in range(200):
        scene = sample_scene(rng)
        prompt = write_prompt(scene, rng, complete=True).lower()
        for thing in scene.things:
            assert thing.colour in prompt and thing.shape in prompt
            assert any(way in prompt for way in PLACES[thing.place][1])
        assert scene.background in prompt


def test_colours_can_be_told_apart():
    palette = torch.tensor([*COLOURS.values()], dtype=torch.float32)
    distances = torch.cdist(palette, palette) + 1000 * torch.eye(len(palette))
    assert distances.min() > 50
    assert set(BACKGROUNDS) >= {"white", "black"}


def test_the_layout_names_what_each_token_shows():
    scene = Scene((Thing("red", "ring", "top left"), Thing("blue", "cross", "bottom right")), "navy")
    layout = layout_of(scene).view(8, 8, 2)
    names = [[(SEEN_COLOURS[colour], SEEN_SHAPES[shape]) for colour, shape in row] for row in layout.tolist()]
    assert names[1][1] == ("red", "ring"), "also in the hole: a thing's tokens are those of its disc"
    assert names[6][6] == ("blue", "cross")
    assert names[0][7] == names[7][0] == names[4][4] == ("navy background", "none")
    assert sum(name == ("red", "ring") for row in names for name in row) == 5, "the middle one and its neighbours"
