"""Says whether a video shows the motion that was asked for: colour and shape in every frame, and where it goes.

Notable: the reference is the drawn mask of each shape at the place that is seen, never an earlier output of the model.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .judge import nearest, overlap
from .moving import COLOURS, DIRECTIONS, SHAPES, TRAVEL, Motion, shape_mask

MIN_IOU = 0.7
MIN_TRAVEL = 0.6 * TRAVEL
MAX_ASIDE = 6.0  # pixels
MAX_BACK = 1.0  # pixels, from one frame to the next
PALETTE = {"white": (255, 255, 255)} | COLOURS


@dataclass(frozen=True)
class Seen:
    """A frame's colour, best shape and its overlap with it, and its centre (x, y) in pixels."""

    colour: str
    shape: str
    iou: float
    centre: tuple[float, float]


def see(pixels: Tensor) -> Seen | None:
    """What a frame (64, 64, 3), 0…255, shows; None if it is all white."""
    names = nearest(pixels, PALETTE)
    mask = names > 0
    if not mask.any():
        return None
    colour = list(PALETTE)[int(names[mask].mode().values)]
    found = [(overlap(mask, shape_mask(shape, x, y) > 0.5), shape, x, y)
             for shape in SHAPES for x, y in [_centre_of(mask, shape)]]
    iou, shape, x, y = max(found, key=lambda each: each[0])
    return Seen(colour, shape, iou, (float(x), float(y)))


def _centre_of(mask: Tensor, shape: str) -> tuple[Tensor, Tensor]:
    """Where a shape's centre is if this mask is it: its centroid, less that of the drawn one."""
    middle = torch.tensor(mask.shape[0] / 2)
    drawn = _centroid(shape_mask(shape, middle, middle) > 0.5)
    return tuple((_centroid(mask) - drawn + middle).unbind())


def _centroid(mask: Tensor) -> Tensor:
    """x, y in pixels."""
    return mask.nonzero().float().mean(dim=0).flip(0) + 0.5


def direction_of(centres: Tensor) -> str | None:
    """Where centres (frames, 2) go; None unless they go one way, far enough, straight and without turning back."""
    steps, whole = centres.diff(dim=0), centres[-1] - centres[0]
    for name, vector in DIRECTIONS.items():
        along = torch.tensor(vector, dtype=torch.float32)
        straight = (centres - centres[0]) @ along.flip(0)
        if whole @ along >= MIN_TRAVEL and (steps @ along).min() >= -MAX_BACK and straight.abs().max() <= MAX_ASIDE:
            return name
    return None


def faults(frames: Sequence[Tensor], motion: Motion) -> list[str]:
    """What is wrong with a video of frames (64, 64, 3), 0…255; nothing if it shows the motion."""
    seen = [see(frame) for frame in frames]
    if None in seen:
        return ["nothing to be seen"]
    found = [f"{name} {getattr(frame, name)}" for name in ("colour", "shape") for frame in seen
             if getattr(frame, name) != getattr(motion, name)]
    found += [f"overlap {frame.iou:.2f}" for frame in seen if frame.iou < MIN_IOU]
    direction = direction_of(torch.tensor([frame.centre for frame in seen]))
    return found + [f"direction {direction}"] * (direction != motion.direction)
