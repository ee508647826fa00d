"""Videos as pipelines take them: a list of pictures, a tensor of frames as ComfyUI has it, or what can be indexed so.

Notable: the frames stay on the CPU, since an autoencoder takes them to its device a few at a time.
"""
from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .pictures import Picture, check_picture, pixels, resized

Video = Sequence[Picture] | Tensor  # a tensor is (frames, H, W, 3 or 4) in 0…1

logger = logging.getLogger(__name__)


def check_video(what: str, video: Any) -> None:
    """Raises TypeError or ValueError, with `what` in it, for what is no video or has no frames."""
    if isinstance(video, Tensor) and video.ndim != 4:
        raise ValueError(f"{what} is a tensor of shape {tuple(video.shape)}; expected (frames, height, width, 3 or 4)")
    if not hasattr(video, "__len__") or not hasattr(video, "__getitem__") or isinstance(video, str | bytes | dict):
        raise TypeError(f"{what} must be a list of pictures or a tensor (frames, height, width, channels), got "
                        f"{type(video).__name__}")
    if not len(video):
        raise ValueError(f"{what} has no frames: give at least one, or None")


def frames_of(what: str, video: Video, count: int) -> list[Picture]:
    """The first `count` frames; says so when there are more.

    Raises TypeError or ValueError for what is no video, and for fewer frames.
    """
    check_video(what, video)
    if len(video) < count:
        raise ValueError(f"{what} has {len(video)} frames and the video to draw {count}: give as many, or set "
                         f"num_frames to {len(video)} or less")
    if len(video) > count:
        logger.info("%s has %d frames; the first %d are used", what, len(video), count)
    return [check_picture(f"{what}[{index}]", video[index]) for index in range(count)]


def video_pixels(frames: Sequence[Picture], width: int, height: int, channels: int = 3) -> Tensor:
    """(1, channels, frames, height, width), float32 in 0…1, on the CPU. Frames of another size are resized."""
    return torch.stack([pixels(resized(frame, width, height), channels).cpu() for frame in frames], dim=2)
