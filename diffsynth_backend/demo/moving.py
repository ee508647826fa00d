"""The video demo's world: one coloured shape that crosses a white square of 64×64 in 17 frames, with English prompts.

Notable: motions for which `is_held_out` holds never reach the networks' training, in any wording; their colours, shapes
and directions do, in other combinations.
"""
from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from .scenes import COLOURS as ALL_COLOURS, SHAPES as ALL_SHAPES

SIDE, FRAMES = 64, 17
RADIUS = 12.0
TRAVEL = 32.0  # pixels from the first frame to the last
COLOURS = {name: ALL_COLOURS[name] for name in ("red", "green", "blue", "yellow")}
SHAPES = {name: ALL_SHAPES[name] for name in ("circle", "square", "triangle")}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x, y
WORDINGS = ("a {} {} moves {}",) * 4 + ("a {} {} moving {}", "{} {} moves {}", "a {} {} moves {}.")


@dataclass(frozen=True)
class Motion:
    colour: str
    shape: str
    direction: str


def is_held_out(motion: Motion) -> bool:
    """One direction for each colour and shape: a Latin square, so that all colours and directions are seen as often."""
    colour, shape, direction = (list(table).index(name) for table, name in (
        (COLOURS, motion.colour), (SHAPES, motion.shape), (DIRECTIONS, motion.direction)))
    return (colour + shape) % len(DIRECTIONS) == direction


MOTIONS = [Motion(*names) for names in product(COLOURS, SHAPES, DIRECTIONS)]
SEEN = [motion for motion in MOTIONS if not is_held_out(motion)]
HELD_OUT = [motion for motion in MOTIONS if is_held_out(motion)]


def plain_prompt(motion: Motion) -> str:
    return WORDINGS[0].format(motion.colour, motion.shape, motion.direction)


def write_prompt(motion: Motion, rng: random.Random) -> str:
    """One way of asking for it."""
    return rng.choice(WORDINGS).format(motion.colour, motion.shape, motion.direction)


def shape_mask(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Coverage in 0…1 of the pixels of a square by a shape whose centre is at x, y (any shape, in pixels): (…, 64, 64).
    """
    rows, columns = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    distance = SHAPES[shape](columns - x[..., None, None], rows - y[..., None, None], torch.tensor(RADIUS))
    return (0.5 - distance).clamp(0, 1)


def path(motion: Motion, generator: torch.Generator) -> Tensor:
    """Centres (17, 2), x and y: along its direction through the middle, up to 7 pixels aside and 2 ahead."""
    direction = torch.tensor(DIRECTIONS[motion.direction], dtype=torch.float32)
    ahead, aside = (torch.rand(2, generator=generator) * 2 - 1) * torch.tensor([2.0, 7.0])
    along = torch.linspace(-TRAVEL / 2, TRAVEL / 2, FRAMES) + ahead
    return SIDE / 2 + along[:, None] * direction + aside * direction.flip(0)


def draw(motions: Sequence[Motion], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Videos (B, 3, 17, 64, 64) in −1…1 and coverage (B, 17, 64, 64) in 0…1."""
    covers = torch.stack([shape_mask(motion.shape, *path(motion, generator).unbind(1)) for motion in motions])
    colours = torch.tensor([COLOURS[motion.colour] for motion in motions]) / 127.5 - 1
    return 1 + covers[:, None] * (colours - 1)[:, :, None, None, None], covers
