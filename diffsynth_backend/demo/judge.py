"""Says whether a picture shows the scene that was asked for: colours, places and shapes of all its things.

Notable: the reference is the drawn, unjittered mask of each thing, never an earlier output of the model.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, nominal_mask

MIN_IOU = 0.7


@dataclass(frozen=True)
class Verdict:
    """Per thing: the colour seen, the overlap with where it should be, and the shape that overlaps best."""

    colour: str
    iou: float
    shape: str

    def agrees(self, thing: Thing) -> bool:
        return self.colour == thing.colour and self.iou >= MIN_IOU and self.shape == thing.shape


def nearest(pixels: Tensor, palette: dict[str, tuple[int, int, int]]) -> Tensor:
    """Index into the palette of the colour nearest to each pixel (…, 3), 0…255."""
    colours = torch.tensor(list(palette.values()), dtype=torch.float32)
    return torch.cdist(pixels.reshape(-1, 3), colours).argmin(dim=1).reshape(pixels.shape[:-1])


def overlap(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


def thing_mask(pixels: Tensor, scene: Scene, thing: Thing) -> Tensor:
    """Pixels (128, 128) that look like the thing rather than like the background or another thing."""
    palette = {"background": BACKGROUNDS[scene.background]} | {t.colour: COLOURS[t.colour] for t in scene.things}
    return nearest(pixels, palette) == list(palette).index(thing.colour)


def judge(pixels: Tensor, scene: Scene) -> list[Verdict]:
    """One verdict per thing of the scene; `pixels` (128, 128, 3), 0…255, float."""
    verdicts = []
    for thing in scene.things:
        nominal = nominal_mask(thing.shape, thing.place)
        inside = pixels[nominal].median(dim=0).values
        colour = list(COLOURS)[int(nearest(inside, COLOURS))]
        seen = thing_mask(pixels, scene, thing)
        overlaps = {shape: overlap(seen, nominal_mask(shape, thing.place)) for shape in SHAPES}
        verdicts.append(Verdict(colour, overlaps[thing.shape], max(overlaps, key=overlaps.__getitem__)))
    return verdicts


def is_right(pixels: Tensor, scene: Scene) -> bool:
    """Whether every thing has the right colour, place and shape."""
    return all(verdict.agrees(thing) for verdict, thing in zip(judge(pixels, scene), scene.things, strict=True))
