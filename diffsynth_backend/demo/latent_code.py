"""What the demo's latents mean: a fixed linear code of 8×8 pixels, which encoder, decoder and denoiser are trained on.

Notable: an autoencoder that must invent its own code needs long to find more than a thumbnail. This one is given:
13 principal components of what a patch is beyond its mean colour, and the mean colour itself, placed so that the
published linear preview of this latent space (`PREVIEW_FACTORS`) shows it exactly. So the three models can be trained
independently, and ComfyUI's previews show the picture.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH = 8
PATCH_FRAMES = 4  # of a video
# Published linear map from normalised latents of this family to RGB in −1…1 (rows: latent channels).
PREVIEW_FACTORS = (
    (-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747), (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665), (-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364), (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950), (0.1984, 0.0913, 0.1861))
PREVIEW_BIAS = (-0.1835, -0.0868, -0.3360)


def preview(latents: Tensor) -> Tensor:
    """Normalised latents (B, 16, h, w) → the small picture (B, 3, h, w) that ComfyUI's preview shows, −1…1."""
    rgb = torch.einsum("bchw,cd->bdhw", latents, torch.tensor(PREVIEW_FACTORS))
    return rgb + torch.tensor(PREVIEW_BIAS)[:, None, None]


@dataclass(frozen=True)
class LatentCode:
    """`weight` (16, 3, 8, 8) and `bias` (16): one convolution without overlap."""

    weight: Tensor
    bias: Tensor

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in −1…1 → normalised latents (B, 16, H/8, W/8)."""
        return F.conv2d(pictures, self.weight, self.bias, stride=PATCH)


def fit_latent_code(pictures: Tensor) -> LatentCode:
    """The code for the patches of some pictures (B, 3, H, W)."""
    patches = F.unfold(pictures, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3, PATCH**2)
    weight, bias = fit_code(patches)
    return LatentCode(weight.unflatten(2, (PATCH, PATCH)), bias)


def fit_code(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (16, 3, P) and bias (16) of the code for some patches (N, 3, P) of P pixels."""
    factors, offset = torch.tensor(PREVIEW_FACTORS), torch.tensor(PREVIEW_BIAS)  # (16, 3), (3,)
    channels, pixels = len(factors), patches.shape[2]
    beyond_mean = (patches - patches.mean(dim=2, keepdim=True)).flatten(1)  # (N, 3·P)
    variances, vectors = torch.linalg.eigh(beyond_mean.T @ beyond_mean / len(beyond_mean))
    strongest = torch.arange(len(variances) - 1, len(variances) - 1 - (channels - 3), -1)
    deviations, components = variances[strongest].sqrt(), vectors[:, strongest]  # (13,), (3·P, 13)
    # Half whitened: weak components count for the denoiser without being blown up to the strong ones' size.
    components = components / (deviations * deviations[0]).sqrt()
    from_colour = factors @ torch.linalg.inv(factors.T @ factors)  # (16, 3), inverted by the preview
    unseen = torch.linalg.svd(factors).U[:, 3:]  # (16, 13), invisible to the preview
    mean = torch.eye(3).repeat_interleave(pixels, dim=1) / pixels  # (3, 3·P)
    # A component sums to zero over each colour, so it may be applied to the patch itself.
    weight = from_colour @ mean + unseen @ components.T
    return weight.view(channels, 3, pixels), -from_colour @ offset


# ---- videos ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class VideoCode:
    """The same of 4 frames: `weight` (16, 3, 4, 8, 8) and `bias` (16). The first frame counts as four like it."""

    weight: Tensor
    bias: Tensor

    def encode(self, videos: Tensor) -> Tensor:
        """Videos (B, 3, 4·k + 1, H, W) in −1…1 → normalised latents (B, 16, k + 1, H/8, W/8)."""
        return F.conv3d(_from_four(videos), self.weight, self.bias, stride=self.weight.shape[2:])


def _from_four(videos: Tensor) -> Tensor:
    return torch.cat([videos[:, :, :1].expand(-1, -1, PATCH_FRAMES - 1, -1, -1), videos], dim=2)


def fit_video_code(videos: Tensor) -> VideoCode:
    """The code for the patches of some videos (B, 3, 4·k + 1, H, W)."""
    x = _from_four(videos).unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH_FRAMES))
    patches = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(0, 3).flatten(2)  # (N, 3, 4·8·8)
    weight, bias = fit_code(patches)
    return VideoCode(weight.unflatten(2, (PATCH_FRAMES, PATCH, PATCH)), bias)
