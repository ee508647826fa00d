"""Qwen-Image's autoencoder: the 3-D causal network of Wan 2.1 with 16 latent channels, run on single images.

Notable: with one frame a causal 3-D convolution sees only zeros before it, so its last temporal tap is all that acts:
it is computed as a 2-D convolution (a third of the work). The temporal resampling layers are part of the published
files and carry weights here too, but a single frame never passes through them.
Key names: `Qwen/Qwen-Image`, `vae/diffusion_pytorch_model.safetensors` (194 tensors); defaults are that checkpoint's.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attention import attention
from .general_modules import tiled_apply

# Mean and standard deviation of each latent channel over the training data; see normalize_latents.
LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


def _statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(v, dtype=torch.float32, device=like.device)[:, None, None]
                 for v in (LATENTS_MEAN, LATENTS_STD))
    return mean, std


def normalize_latents(latents: Tensor) -> Tensor:
    """Raw latents (…, 16, h, w) → zero mean, unit variance: what the denoiser works on. Keeps the dtype."""
    mean, std = _statistics(latents)
    return ((latents - mean) / std).to(latents.dtype)


def denormalize_latents(latents: Tensor) -> Tensor:
    """The inverse of `normalize_latents`."""
    mean, std = _statistics(latents)
    return (latents * std + mean).to(latents.dtype)


class CausalConv3d(nn.Conv3d):
    """A causal 3-D convolution on one frame (B, C, H, W): the last temporal tap as a 2-D convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, -1], self.bias, padding=self.padding[1:])


class QwenImageRMSNorm(nn.Module):
    """Scales each pixel's channel vector to length sqrt(dim), then by `gamma`; computed in float32.

    `trailing` is the number of trailing unit axes that gamma has in the files: 3 in the 3-D parts, 2 in attention.
    """

    def __init__(self, dim: int, trailing: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * trailing))

    def forward(self, x: Tensor) -> Tensor:
        length = x.float().square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
        gamma = self.gamma.flatten()[:, None, None] * x.shape[1]**0.5
        return (x / length).to(x.dtype) * gamma


class ResidualBlock(nn.Module):
    """Two normalised, activated 3×3 convolutions and a shortcut."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1 = QwenImageRMSNorm(in_dim)
        self.conv1 = CausalConv3d(in_dim, out_dim, 3, padding=1)
        self.norm2 = QwenImageRMSNorm(out_dim)
        self.conv2 = CausalConv3d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = QwenImageRMSNorm(dim, trailing=2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None]  # (B, 1, H·W, 3·C)
        # Channels side by side in memory: for others no kernel does without a matrix of H·W × H·W.
        out = attention(*qkv.contiguous().chunk(3, dim=-1))  # (B, 1, H·W, C)
        return x + self.proj(out[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:]))


class Resample(nn.Module):
    """Halves or doubles height and width; `time_conv` belongs to video and rests when there is one frame."""

    def __init__(self, resample: nn.Sequential, time_conv: CausalConv3d | None) -> None:
        super().__init__()
        self.resample = resample
        if time_conv is not None:
            self.time_conv = time_conv

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)


def downsample(dim: int, temporal: bool) -> Resample:
    time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None
    return Resample(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2)), time_conv)


def upsample(dim: int, temporal: bool) -> Resample:
    time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1), padding=(1, 0, 0)) if temporal else None
    return Resample(nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
                                  nn.Conv2d(dim, dim // 2, 3, padding=1)), time_conv)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(dim)])
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Image (B, image_channels, H, W) → twice z_dim channels at H/8 × W/8."""

    def __init__(self, dim: int, z_dim: int, dim_mult: tuple[int, ...], num_res_blocks: int,
                 temporal_downsample: tuple[bool, ...], image_channels: int) -> None:
        super().__init__()
        dims = [dim * m for m in (1, *dim_mult)]
        self.conv_in = CausalConv3d(image_channels, dims[0], 3, padding=1)
        blocks: list[nn.Module] = []
        for level, (in_dim, out_dim) in enumerate(zip(dims, dims[1:])):
            widths = [in_dim] + [out_dim] * num_res_blocks
            blocks += [ResidualBlock(a, b) for a, b in zip(widths, widths[1:])]
            if level < len(temporal_downsample):
                blocks.append(downsample(out_dim, temporal_downsample[level]))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = QwenImageRMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], z_dim * 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(x))))


class UpBlock(nn.Module):
    """One resolution level of the decoder; the upsampler also halves the channels."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, upsampler: Resample | None) -> None:
        super().__init__()
        widths = [in_dim] + [out_dim] * (num_res_blocks + 1)
        self.resnets = nn.ModuleList(ResidualBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Decoder(nn.Module):
    """Latents (B, z_dim, h, w) → image (B, image_channels, 8·h, 8·w)."""

    def __init__(self, dim: int, z_dim: int, dim_mult: tuple[int, ...], num_res_blocks: int,
                 temporal_upsample: tuple[bool, ...], image_channels: int) -> None:
        super().__init__()
        dims = [dim * m for m in (dim_mult[-1], *reversed(dim_mult))]
        self.conv_in = CausalConv3d(z_dim, dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList()
        for level, (in_dim, out_dim) in enumerate(zip(dims, dims[1:])):
            upsampler = upsample(out_dim, temporal_upsample[level]) if level < len(temporal_upsample) else None
            self.up_blocks.append(UpBlock(in_dim if level == 0 else in_dim // 2, out_dim, num_res_blocks, upsampler))
        self.norm_out = QwenImageRMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class QwenImageVAE(nn.Module):
    """Variational autoencoder between images in −1…1 and latents an eighth as high and wide.

    `encode` and `decode` speak *raw* latents, as ComfyUI and the published files do; `normalize_latents` and
    `denormalize_latents` turn them into what the denoiser works on and back.
    """

    spatial_factor = 8

    def __init__(self, base_dim: int = 96, z_dim: int = 16, dim_mult: tuple[int, ...] = (1, 2, 4, 4),
                 num_res_blocks: int = 2, temporal_downsample: tuple[bool, ...] = (False, True, True),
                 image_channels: int = 3) -> None:
        super().__init__()
        if z_dim != len(LATENTS_MEAN):
            raise ValueError(f"z_dim must be {len(LATENTS_MEAN)}, the number of published channel statistics, "
                             f"got {z_dim}")
        self.z_dim, self.image_channels = z_dim, image_channels
        self.encoder = Encoder(base_dim, z_dim, dim_mult, num_res_blocks, temporal_downsample, image_channels)
        self.quant_conv = CausalConv3d(z_dim * 2, z_dim * 2, 1)
        self.post_quant_conv = CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(base_dim, z_dim, dim_mult, num_res_blocks, temporal_downsample[::-1], image_channels)

    # ---- encode, decode ----------------------------------------------------------------------------------------
    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (each (B, 16, H/8, W/8)) of the latents of an image (B, image_channels, H, W)."""
        mean, log_variance = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, image: Tensor, device: torch.device | str | None = None, tiled: bool = False,
               tile_size: int = 128, tile_stride: int = 64,
               progress_bar_cmd: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """Image (B, image_channels, H, W) in −1…1 → the mode of its raw latents (B, 16, H/8, W/8).

        The image is moved to `device` when one is given. Tile size and stride are in latent pixels; see
        `general_modules.tiled_apply` for progress and errors.
        """
        def whole(x: Tensor) -> Tensor:
            return self.moments(x)[0]

        image = image.to(device)
        if not tiled:
            return whole(image)
        factor = self.spatial_factor
        return tiled_apply(whole, image, tile_size * factor, tile_stride * factor, 1 / factor, progress_bar_cmd)

    def decode(self, latents: Tensor, device: torch.device | str | None = None, tiled: bool = False,
               tile_size: int = 128, tile_stride: int = 64,
               progress_bar_cmd: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """Raw latents (B, 16, h, w) → image (B, image_channels, 8·h, 8·w), about −1…1 and not clipped."""
        def whole(x: Tensor) -> Tensor:
            return self.decoder(self.post_quant_conv(x))

        latents = latents.to(device)
        if not tiled:
            return whole(latents)
        return tiled_apply(whole, latents, tile_size, tile_stride, self.spatial_factor, progress_bar_cmd)
