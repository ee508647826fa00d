"""The demo model's world: one or two coloured shapes on a plain background, 128×128, with English prompts.

Notable: shapes are signed distances, so a whole batch is drawn at once and the same code draws a nominal mask to
compare a generated picture with. Scenes for which `is_held_out` holds never reach training, in any wording.
"""
from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 128
RADIUS = 17.0

COLOURS = {"red": (214, 40, 40), "green": (46, 160, 67), "blue": (40, 90, 230), "yellow": (250, 210, 40),
           "purple": (130, 60, 180), "orange": (245, 130, 30), "cyan": (40, 200, 210), "pink": (245, 130, 180),
           "white": (245, 245, 245), "black": (18, 18, 18)}
BACKGROUNDS = {"white": (245, 245, 245), "black": (18, 18, 18), "gray": (128, 128, 128), "navy": (20, 28, 80),
               "beige": (225, 205, 165)}
# Place → centre in pixels and the ways people say it.
PLACES = {
    "top left": ((26, 26), ("in the top left", "at the top left", "in the top left corner", "top left")),
    "top": ((64, 26), ("at the top", "in the top center", "top")),
    "top right": ((102, 26), ("in the top right", "at the top right", "in the top right corner", "top right")),
    "left": ((26, 64), ("on the left", "at the left", "left")),
    "center": ((64, 64), ("in the center", "in the middle", "center")),
    "right": ((102, 64), ("on the right", "at the right", "right")),
    "bottom left": ((26, 102), ("in the bottom left", "at the bottom left", "in the bottom left corner",
                                "bottom left")),
    "bottom": ((64, 102), ("at the bottom", "in the bottom center", "bottom")),
    "bottom right": ((102, 102), ("in the bottom right", "at the bottom right", "in the bottom right corner",
                                  "bottom right")),
}


# ---- shapes: signed distance in pixels, negative inside; x, y relative to the centre, r the half-extent -------------

def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.hypot(x, y) - r


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - r * 0.88


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Upright, its base at y = +r·0.85 and its apex at y = −r."""
    slope = torch.hypot(torch.tensor(1.85), torch.tensor(1.05))
    sides = (x.abs() * 1.85 - (y + r) * 1.05) / slope
    return torch.maximum(sides, y - r * 0.85)


def _diamond(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (x.abs() + y.abs() - r * 1.1) / 2**0.5


def _ring(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return (torch.hypot(x, y) - r * 0.75).abs() - r * 0.25


def _cross(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    across = torch.maximum(x.abs() - r, y.abs() - r * 0.33)
    down = torch.maximum(x.abs() - r * 0.33, y.abs() - r)
    return torch.minimum(across, down)


SHAPES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "diamond": _diamond, "ring": _ring, "cross": _cross}


# ---- scenes ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str


def is_held_out(scene: Scene) -> bool:
    """One scene in sixteen, chosen by a hash of what it shows: kept out of training whatever the wording."""
    text = ";".join(f"{t.colour} {t.shape} {t.place}" for t in scene.things) + "|" + scene.background
    return hashlib.md5(text.encode()).digest()[0] % 16 == 0


def _random_scene(rng: random.Random) -> Scene:
    background = rng.choice(list(BACKGROUNDS))
    colours = rng.sample([c for c in COLOURS if c != background], 2)
    places = rng.sample(list(PLACES), 2)
    count = rng.choice((1, 1, 2))
    things = tuple(Thing(colours[i], rng.choice(list(SHAPES)), places[i]) for i in range(count))
    return Scene(things, background)


def sample_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene of the training set, or of the held-out one."""
    while is_held_out(scene := _random_scene(rng)) != held_out:
        pass
    return scene


# ---- prompts --------------------------------------------------------------------------------------------------------

def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _describe(thing: Thing, rng: random.Random, say_place: bool) -> str:
    article = f"{_article(thing.colour)} " if rng.random() < 0.85 else ""
    words = f"{article}{thing.colour} {thing.shape}"
    if not say_place:
        return words
    return words + rng.choice((" ", " ", " ", ", ")) + rng.choice(PLACES[thing.place][1])


def plain_prompt(scene: Scene) -> str:
    """The plainest way of asking for everything in the scene."""
    things = " and ".join(f"{_article(t.colour)} {t.colour} {t.shape} {PLACES[t.place][1][0]}" for t in scene.things)
    return f"{things} on a {scene.background} background"


def write_prompt(scene: Scene, rng: random.Random, complete: bool = False) -> str:
    """One way of asking for the scene. Unless `complete`, a single thing's place or the background may go unsaid."""
    say_place = complete or len(scene.things) > 1 or rng.random() < 0.92
    say_background = complete or rng.random() < 0.92
    things = rng.sample(scene.things, len(scene.things))
    text = " and ".join(_describe(thing, rng, say_place) for thing in things)
    if say_background:
        name = scene.background
        text = rng.choice((f"{text} on a {name} background", f"{text}, {name} background", f"{text} on {name}",
                           f"a {name} background with {text}", f"{text}, on a {name} background"))
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.3 else text


# ---- pictures -------------------------------------------------------------------------------------------------------

def _grid() -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    return x, y


def nominal_mask(shape: str, place: str) -> Tensor:
    """Where a shape lies when nothing is jittered: boolean (128, 128)."""
    x, y = _grid()
    cx, cy = PLACES[place][0]
    return SHAPES[shape](x - cx, y - cy, torch.tensor(RADIUS)) < 0


def confetti(count: int, generator: torch.Generator, shapes: int = 8) -> Tensor:
    """Pictures (count, 3, 128, 128) of many shapes of any colour, size and place, to teach the autoencoder colour."""
    x, y = _grid()

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    pictures = uniform(-1, 1, count, 3, 1, 1).expand(-1, -1, SIZE, SIZE)
    for _ in range(shapes):
        kind = list(SHAPES.values())[int(uniform(0, len(SHAPES), 1))]
        cx, cy, r = (uniform(low, high, count, 1, 1) for low, high in ((0, SIZE), (0, SIZE), (6, 34)))
        cover = (0.5 - kind(x - cx, y - cy, r)).clamp(0, 1)[:, None]
        pictures = pictures * (1 - cover) + uniform(-1, 1, count, 3, 1, 1) * cover
    return pictures


def draw(scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, 128, 128) in −1…1. Position (±1.5 px), size (±0.7 px) and colours vary a little."""
    x, y = _grid()

    def jitter(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    def paint(rgb: tuple[int, int, int]) -> Tensor:
        return torch.tensor(rgb, dtype=torch.float32) + jitter(3) * 7

    pictures = []
    for scene in scenes:
        slope = jitter(2) * 5 / SIZE
        shade = ((x - SIZE / 2) * slope[0] + (y - SIZE / 2) * slope[1])[None]
        picture = paint(BACKGROUNDS[scene.background])[:, None, None] + shade
        for thing in scene.things:
            cx, cy = torch.tensor(PLACES[thing.place][0]) + jitter(2) * 1.5
            distance = SHAPES[thing.shape](x - cx, y - cy, RADIUS + jitter(1) * 0.7)
            cover = (0.5 - distance).clamp(0, 1)
            picture = picture * (1 - cover) + paint(COLOURS[thing.colour])[:, None, None] * cover
        pictures.append(picture)
    return (torch.stack(pictures) / 127.5 - 1).clamp(-1, 1)
