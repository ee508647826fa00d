"""Masks of what to redraw: pictures of any size brought to a grid, and soft edges."""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .pictures import Picture, check_picture, pixels, resized


def grey_mask(what: str, mask: Picture, width: int, height: int) -> Tensor:
    """(1, 1, height, width), float32 in 0…1, of a picture of any size: the mean of its colours.

    Raises TypeError or ValueError, with `what` in it, for what is no picture.
    """
    check_picture(what, mask)
    if isinstance(mask, Image.Image):
        mask = mask.convert("RGB")  # alpha would weigh the colours
    return pixels(resized(mask, width, height), channels=1).clamp(0, 1)


def latent_mask(mask: Tensor, width: int, height: int) -> Tensor:
    """Masks (B, H, W) or (B, 1, H, W) of any size → (B, 1, height, width), float32 in 0…1; sizes in latents.

    Raises ValueError for another shape.
    """
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim != 3 or not mask.numel():
        raise ValueError(f"the mask has shape {tuple(mask.shape)}; expected (batch, height, width) or "
                         "(batch, 1, height, width)")
    return torch.cat([grey_mask("the mask", one, width, height) for one in mask])


@dataclass(frozen=True)
class Blur:
    """A Gaussian blur of a mask's edge: a kernel of 2·size + 1 latents, of standard deviation `sigma` latents.

    Raises ValueError for a size or sigma that makes no kernel.
    """

    size: int
    sigma: float

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 0:
            raise ValueError(f"inpaint_blur_size must be a whole number of latents, 0 or more, got {self.size!r}")
        if not isinstance(self.sigma, (int, float)) or not 0 < self.sigma < math.inf:
            raise ValueError(f"inpaint_blur_sigma must be above 0, got {self.sigma!r}")

    def __call__(self, mask: Tensor) -> Tensor:
        """The mask (B, 1, h, w) blurred; it goes on mirrored beyond its borders. Both sides must exceed `size`."""
        if self.size >= min(mask.shape[-2:]):
            raise ValueError(f"inpaint_blur_size {self.size} reaches across the mask, which is {mask.shape[-1]}×"
                             f"{mask.shape[-2]} latents (width × height, 8 pixels each): make it smaller")
        offsets = torch.arange(-self.size, self.size + 1, dtype=torch.float32, device=mask.device)
        kernel = torch.exp(-0.5 * (offsets / self.sigma) ** 2)
        kernel = kernel / kernel.sum()
        padded = F.pad(mask.float(), (self.size,) * 4, mode="reflect")
        return F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])
