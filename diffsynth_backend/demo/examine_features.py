"""How well the demo model's small additions work: `python -m diffsynth_backend.demo.examine_features`.

What each addition means (blueprints, regions, outlines) is defined here, and how a picture is seen to show it.

Notable: scenes are held out as in `examine`, each is also drawn without the addition, and judged the same way: what
works without it would prove nothing.
"""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import ModelConfig
from ..core.vram.presets import vram_preset
from ..pipelines.presets import DEMO_WEIGHTS
from ..pipelines.qwen_image import QwenImagePipeline
from ..pipelines.qwen_image_control import ControlNetInput
from .examine import DEMO, PICTURE, held_out_prompts, pixels_of
from .judge import is_right
from .scenes import BACKGROUNDS, PLACES, SIZE, Scene, Thing, nominal_mask, plain_prompt

LORAS = {name: DEMO_WEIGHTS / "loras" / f"{name}.safetensors" for name in ("blueprint", "entities")}
CONTROLNET = DEMO_WEIGHTS / "controlnet" / "model.safetensors"

REACH = 19  # pixels from a thing's place, at most, that belong to it
REGION = 18  # pixels, half the side of an entity's region
Request = dict[str, Any]  # arguments of the pipeline


# ---- what the additions mean ----------------------------------------------------------------------------------------

def blueprint(scene: Scene) -> Scene:
    """The same shapes in the same places, all white on navy."""
    return Scene(tuple(replace(thing, colour="white") for thing in scene.things), "navy")


def box(thing: Thing, half: float) -> Tensor:
    """A square around the thing's place, boolean (128, 128)."""
    at = torch.arange(SIZE) + 0.5
    x, y = PLACES[thing.place][0]
    return ((at[:, None] - y).abs() < half) & ((at - x).abs() < half)


def outline(scene: Scene) -> Tensor:
    """White lines, 4 pixels wide, on black: (3, 128, 128) in −1…1."""
    line = torch.zeros(1, SIZE, SIZE)
    for thing in scene.things:
        inside = nominal_mask(thing.shape, thing.place)[None].float()
        near, within = (F.max_pool2d(area, 5, stride=1, padding=2) for area in (inside, 1 - inside))
        line = torch.maximum(line, near + within - 1)
    return line.expand(3, -1, -1) * 2 - 1


def named(thing: Thing) -> str:
    """Its colour and shape, without its place."""
    return f"{'an' if thing.colour == 'orange' else 'a'} {thing.colour} {thing.shape}"


def ground_prompt(scene: Scene) -> str:
    return f"a {scene.background} background"


def placeless_prompt(scene: Scene) -> str:
    """Colours and shapes."""
    return f"{' and '.join(map(named, scene.things))} on {ground_prompt(scene)}"


def colour_prompt(scene: Scene) -> str:
    """Colours alone."""
    return placeless_prompt(replace(scene, things=tuple(replace(thing, shape="thing") for thing in scene.things)))


# ---- whether pictures show it ---------------------------------------------------------------------------------------

def is_blueprint(pixels: Tensor, scene: Scene) -> bool:
    """Whether the picture (128, 128, 3), 0…255, is the scene's blueprint; each thing is judged alone, being white."""
    wanted = blueprint(scene)
    return all(is_right(_only(pixels, thing, wanted), Scene((thing,), wanted.background)) for thing in wanted.things)


def _only(pixels: Tensor, thing: Thing, scene: Scene) -> Tensor:
    """With the ground where the scene's other things are."""
    alone = pixels.clone()
    for other in scene.things:
        if other is not thing:
            alone[box(other, REACH)] = torch.tensor(BACKGROUNDS[scene.background], dtype=pixels.dtype)
    return alone


@dataclass(frozen=True)
class Feature:
    """What is asked for, with which further inputs, whether the pixels show it, and in scenes of how many things."""

    prompt: Callable[[Scene], str]
    inputs: Callable[[Scene], Request]
    shown: Callable[[Tensor, Scene], bool]
    most_things: int = 2

    def scenes(self, count: int) -> list[Scene]:
        """The first held-out ones; two of three have one thing."""
        scenes = [scene for scene, _ in held_out_prompts(4 * count) if len(scene.things) <= self.most_things]
        return scenes[:count]


def entity_inputs(scene: Scene) -> Request:
    return {"eligen_entity_prompts": [*map(named, scene.things)],
            "eligen_entity_masks": [box(thing, REGION).float() for thing in scene.things]}


def control_inputs(scene: Scene) -> Request:
    drawing = (outline(scene).permute(1, 2, 0) + 1) / 2
    return {"blockwise_controlnet_inputs": [ControlNetInput(image=drawing)]}


# Outlines say a thing's place, or its place and shape. Of pairs, the ControlNet mixes the colours.
FEATURES = {"blueprint": Feature(plain_prompt, lambda scene: {}, is_blueprint),
            "entities": Feature(ground_prompt, entity_inputs, is_right),
            "places": Feature(placeless_prompt, control_inputs, is_right, most_things=1),
            "shapes": Feature(colour_prompt, control_inputs, is_right, most_things=1)}


def wrong_features(pipe: QwenImagePipeline, feature: Feature, count: int = 24, seeds: tuple[int, ...] = (0,),
                   given: bool = True) -> list[tuple[str, int]]:
    """Prompt and seed of each picture that does not show the feature, `given` its inputs or not."""
    wrong = []
    for scene in feature.scenes(count):
        prompt, inputs = feature.prompt(scene), feature.inputs(scene) if given else {}
        for seed in seeds:
            image = pipe(prompt, seed=seed, cfg_scale=DEMO.cfg_scale, **PICTURE, **inputs)
            if not feature.shown(pixels_of(image), scene):
                wrong.append((prompt, seed))
    return wrong


# ---- with and without -----------------------------------------------------------------------------------------------

def load_controlled(vram: str = "full", vram_limit: float | None = None) -> QwenImagePipeline:
    """As `load_demo`, with the ControlNet for outlines."""
    fields = vram_preset(vram, torch.bfloat16, "cpu")
    configs = [*DEMO.model_configs(**fields), ModelConfig(path=str(CONTROLNET), **fields)]
    return QwenImagePipeline.from_pretrained(device="cpu", model_configs=configs, vram_limit=vram_limit,
                                             tokenizer_config=DEMO.tokenizer_config())


@contextmanager
def lora(pipe: QwenImagePipeline, path: Path, strength: float = 1.0) -> Iterator[None]:
    """Have the LoRA for a while."""
    loaded = pipe.load_lora(pipe.dit, str(path), alpha=strength)
    try:
        yield
    finally:
        pipe.clear_lora(loaded)


def main() -> None:
    count = 48
    pipe = load_controlled()

    def report(what: str, feature: Feature, **options: Any) -> None:
        wrong = wrong_features(pipe, feature, count, **options)
        sys.stdout.write(f"{what}: {count - len(wrong)} of {count}\n")

    for name, path in LORAS.items():
        report(f"{name} without LoRA", FEATURES[name])
        with lora(pipe, path):
            report(f"{name} with LoRA", FEATURES[name])
    for name in ("places", "shapes"):
        for given in (False, True):
            report(f"{name} with{'' if given else 'out'} outlines", FEATURES[name], given=given)


if __name__ == "__main__":
    main()
