"""The autoencoders of Wan video: 2.1 (16 latent channels, an eighth as high and wide) and 2.2 (48, a sixteenth).

Both are 3-D causal convolution networks; four frames become one latent frame, the first frame one of its own.

Notable: a video goes through in chunks of one latent frame. Every causal convolution is handed the frames before its
chunk by a `Past`, which belongs to the call: modules keep nothing, so several threads may run one model. The first
chunk is a single frame with zeros before it, of which a convolution's last temporal tap is all that acts: it is
computed as an image, at a third of the work. Memory does not grow with the number of frames, see `WanVideoVAE`.
Key names: `Wan-AI/Wan2.1-T2V-14B`, `Wan2.1_VAE.pth`, and `Wan-AI/Wan2.2-TI2V-5B`, `Wan2.2_VAE.pth`, below `model.`;
defaults are those checkpoints'. The numbers in them count layers without weights, too.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attention import attention
from .general_modules import Tiles

# Mean and standard deviation of each latent channel over the training data, by the number of channels.
STATISTICS: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    16: ((-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
          0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
         (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
          3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)),
    48: ((-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
          -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
          -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
          -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
          -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
          0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
         (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
          0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
          0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
          0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
          0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
          0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744)),
}


def _statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    channels = like.shape[-4]
    if channels not in STATISTICS:
        raise ValueError(f"latents (…, {' or '.join(map(str, STATISTICS))}, T, h, w) expected, got "
                         f"{tuple(like.shape)}: statistics are published for these numbers of channels")
    mean, std = (torch.tensor(values, dtype=torch.float32, device=like.device)[:, None, None, None]
                 for values in STATISTICS[channels])
    return mean, std


def normalize_latents(latents: Tensor) -> Tensor:
    """Raw latents (…, 16 or 48, T, h, w) → zero mean, unit variance: what the denoiser works on. Keeps the dtype.

    The number of channels says whose statistics are used: Wan 2.1's or 2.2's. Raises ValueError for another number.
    """
    mean, std = _statistics(latents)
    return ((latents - mean) / std).to(latents.dtype)


def denormalize_latents(latents: Tensor) -> Tensor:
    """The inverse of `normalize_latents`."""
    mean, std = _statistics(latents)
    return (latents * std + mean).to(latents.dtype)


# ---- time -----------------------------------------------------------------------------------------------------------

class Past:
    """For each causal convolution, in the order of their calls, the frames before the chunk that goes through now.

    After a last chunk there are none, so one serves for a video's tiles, one after the other.
    """

    def __init__(self) -> None:
        self.first = self.last = True  # whether the chunk is the video's first frame, and whether none comes after it
        self._frames: deque[Tensor] = deque()

    def extend(self, x: Tensor, count: int) -> Tensor:
        """x (B, C, T, H, W) with the `count` frames before it in front, x alone if it is the video's first frame.

        Its own last `count` frames are kept for the next chunk, zeros standing for frames before the video.
        """
        extended = x if self.first else torch.cat([self._frames.popleft(), x], dim=2)
        if not self.last:
            kept = extended[:, :, -count:]
            # A copy in any case, as a view would hold all of it.
            self._frames.append(F.pad(kept, (0, 0, 0, 0, count - kept.shape[2], 0)))
        return extended


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution whose input brings the frames before it along: no zeros are added in time.

    A single frame is the first of a video: nothing is before it, and the last temporal tap is a 2-D convolution.
    """

    @property
    def reach(self) -> int:
        """How many frames before a chunk it sees."""
        return self.kernel_size[0] - self.stride[0]

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] >= self.kernel_size[0]:
            return super().forward(x)
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.padding[1:])[:, :, None]


def causal(conv: CausalConv3d, x: Tensor, past: Past) -> Tensor:
    """A causal convolution of the chunk x."""
    x = past.extend(x, conv.reach)  # by the same name: what came in is not needed any more
    return conv(x)


def conv3x3x3(in_dim: int, out_dim: int) -> CausalConv3d:
    return CausalConv3d(in_dim, out_dim, 3, padding=(0, 1, 1))


# ---- layers ---------------------------------------------------------------------------------------------------------

class WanVideoRMSNorm(nn.Module):
    """Scales each pixel's channel vector to length sqrt(dim), then by `gamma`; computed in float32.

    `trailing` is the number of unit axes behind the channels: 3 for video, 2 for attention, which sees single frames.
    """

    def __init__(self, dim: int, trailing: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * trailing))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
        return (x / length).to(x.dtype).mul_(self.gamma * x.shape[1]**0.5)


def activated(norm: WanVideoRMSNorm, x: Tensor) -> Tensor:
    return F.silu(norm(x), inplace=True)


class ResidualBlock(nn.Module):
    """Two normalised, activated 3×3×3 convolutions and a shortcut."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        # 1, 4 and 5 are the activations and the dropout of training, which have no weights.
        self.residual = nn.ModuleList([
            WanVideoRMSNorm(in_dim), nn.Identity(), conv3x3x3(in_dim, out_dim),
            WanVideoRMSNorm(out_dim), nn.Identity(), nn.Identity(), conv3x3x3(out_dim, out_dim)])
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, past: Past) -> Tensor:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        h = causal(conv1, activated(norm1, x), past)
        h = past.extend(activated(norm2, h), conv2.reach)  # not `causal`, during which h would still be held here
        return conv2(h).add_(self.shortcut(x))


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels of each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = WanVideoRMSNorm(dim, trailing=2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)  # (B·T, C, H, W)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)[:, None]  # (B·T, 1, H·W, 3·C)
        # Channels side by side in memory: for others no kernel does without a matrix of H·W × H·W.
        out = attention(*qkv.contiguous().chunk(3, dim=-1))  # (B·T, 1, H·W, C)
        out = self.proj(out[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:]))
        return x + out.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def framewise(layers: nn.Module, x: Tensor) -> Tensor:
    """2-D layers on each frame of x (B, C, T, H, W)."""
    return layers(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class Downsample(nn.Module):
    """Halves height and width and, with `temporal`, the frames after the first."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = framewise(self.resample, x)
        if self.time_conv is None:
            return x
        x = past.extend(x, self.time_conv.reach)
        return x if past.first else self.time_conv(x)


class Upsample(nn.Module):
    """Doubles height and width and, with `temporal`, the frames after the first."""

    def __init__(self, in_dim: int, out_dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
                                      nn.Conv2d(in_dim, out_dim, 3, padding=1))
        self.time_conv = CausalConv3d(in_dim, in_dim * 2, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        if self.time_conv is not None and past.first:
            past.extend(torch.zeros_like(x), self.time_conv.reach)  # the second frame does not see the first one here
        elif self.time_conv is not None:
            pairs = causal(self.time_conv, x, past).unflatten(1, (2, -1))  # (B, 2, C, T, H, W)
            x = pairs.movedim(1, 3).flatten(2, 3)  # (B, C, 2·T, H, W)
        return framewise(self.resample, x)


# ---- shortcuts around the levels of 2.2 -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Factors:
    """By how much a level shrinks or grows frames (time) and each side (space)."""

    time: int
    space: int


def shrink(x: Tensor, out_dim: int, factors: Factors) -> Tensor:
    """x (B, C, T, H, W) → (B, out_dim, T/time, H/space, W/space): neighbours become channels, which are averaged.

    Zeros stand for frames before the first one.
    """
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % factors.time, 0))
    x = x.unflatten(4, (-1, factors.space)).unflatten(3, (-1, factors.space)).unflatten(2, (-1, factors.time))
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)  # (B, C·time·space², T/time, H/space, W/space)
    return x.unflatten(1, (out_dim, -1)).mean(dim=2)


def grow(x: Tensor, out_dim: int, factors: Factors, first: bool) -> Tensor:
    """x (B, C, T, H, W) → (B, out_dim, T·time, H·space, W·space): channels are repeated and become neighbours.

    Of the first frame of a video, only the last of its `time` frames is left.
    """
    copies = out_dim * factors.time * factors.space**2 // x.shape[1]
    x = x.repeat_interleave(copies, dim=1).unflatten(1, (out_dim, factors.time, factors.space, factors.space))
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return x[:, :, factors.time - 1:] if first else x


class DownLevel(nn.Module):
    """One resolution level of 2.2's encoder."""

    def __init__(self, layers: list[nn.Module], out_dim: int, factors: Factors) -> None:
        super().__init__()
        self.downsamples = nn.ModuleList(layers)
        self.out_dim, self.factors = out_dim, factors

    def forward(self, x: Tensor, past: Past) -> Tensor:
        h = x
        for layer in self.downsamples:
            h = layer(h, past)
        return h.add_(shrink(x, self.out_dim, self.factors))


class UpLevel(nn.Module):
    """One resolution level of 2.2's decoder; the last one neither grows nor has a shortcut."""

    def __init__(self, layers: list[nn.Module], out_dim: int, factors: Factors) -> None:
        super().__init__()
        self.upsamples = nn.ModuleList(layers)
        self.out_dim, self.factors = out_dim, factors

    def forward(self, x: Tensor, past: Past) -> Tensor:
        h = x
        for layer in self.upsamples:
            h = layer(h, past)
        return h if self.factors.space == 1 else h.add_(grow(x, self.out_dim, self.factors, past.first))


# ---- the networks ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sizes:
    """Of the encoder or of the decoder, whose levels are in the opposite order.

    dims      channels of each level
    temporal  whether the step from a level to the next one halves (doubles) the frames, too
    levels    a shortcut leads around each level, and upsampling keeps the channels, which it halves otherwise
    """

    dims: tuple[int, ...]
    z_dim: int
    num_res_blocks: int
    temporal: tuple[bool, ...]
    pixel_channels: int
    levels: bool

    def factors(self, level: int) -> Factors:
        """Of the step from a level to the next one; there is none after the last."""
        if level == len(self.temporal):
            return Factors(1, 1)
        return Factors(2 if self.temporal[level] else 1, 2)


def _residual_blocks(in_dim: int, out_dim: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(a, b) for a, b in pairwise([in_dim] + [out_dim] * count)]


def _middle(dim: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim)])


def _head(dim: int, out_dim: int) -> nn.ModuleList:
    return nn.ModuleList([WanVideoRMSNorm(dim), nn.Identity(), conv3x3x3(dim, out_dim)])


class Encoder(nn.Module):
    """A chunk of video (B, pixel_channels, T, H, W) → twice z_dim channels of one latent frame."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        dims = (sizes.dims[0], *sizes.dims)
        self.conv1 = conv3x3x3(sizes.pixel_channels, dims[0])
        levels = []
        for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
            layers = _residual_blocks(in_dim, out_dim, sizes.num_res_blocks)
            if level < len(sizes.temporal):
                layers.append(Downsample(out_dim, sizes.temporal[level]))
            levels.append([DownLevel(layers, out_dim, sizes.factors(level))] if sizes.levels else layers)
        self.downsamples = nn.ModuleList(chain(*levels))
        self.middle = _middle(dims[-1])
        self.head = _head(dims[-1], sizes.z_dim * 2)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = causal(self.conv1, x, past)
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, past)
        norm, _, conv = self.head
        return causal(conv, activated(norm, x), past)


class Decoder(nn.Module):
    """One latent frame (B, z_dim, 1, h, w) → a chunk of video (B, pixel_channels, T, H, W)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        dims = (sizes.dims[0], *sizes.dims)
        self.conv1 = conv3x3x3(sizes.z_dim, dims[0])
        self.middle = _middle(dims[0])
        levels = []
        for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
            if level > 0 and not sizes.levels:
                in_dim //= 2
            layers = _residual_blocks(in_dim, out_dim, sizes.num_res_blocks + 1)
            if level < len(sizes.temporal):
                layers.append(Upsample(out_dim, out_dim if sizes.levels else out_dim // 2, sizes.temporal[level]))
            levels.append([UpLevel(layers, out_dim, sizes.factors(level))] if sizes.levels else layers)
        self.upsamples = nn.ModuleList(chain(*levels))
        self.head = _head(dims[-1], sizes.pixel_channels)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = causal(self.conv1, x, past)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, past)
        norm, _, conv = self.head
        return causal(conv, activated(norm, x), past)


def split_pixels(x: Tensor, patch: int) -> Tensor:
    """(B, C, T, H, W) → (B, C·patch², T, H/patch, W/patch); a pixel's column counts before its row."""
    x = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # (B, C, T, H/p, row, W/p, column)
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def join_pixels(x: Tensor, patch: int) -> Tensor:
    """The inverse of `split_pixels`."""
    x = x.unflatten(1, (-1, patch, patch))  # (B, C, column, row, T, H/p, W/p)
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


class VideoVAE(nn.Module):
    """The networks, which see a video chunk by chunk."""

    def __init__(self, encoder: Sizes, decoder: Sizes, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.encoder = Encoder(encoder)
        self.conv1 = CausalConv3d(encoder.z_dim * 2, encoder.z_dim * 2, 1)
        self.conv2 = CausalConv3d(decoder.z_dim, decoder.z_dim, 1)
        self.decoder = Decoder(decoder)

    def moments(self, x: Tensor, past: Past) -> Tensor:
        """A chunk of video → mean and log-variance of its latent frame, (B, 2·z_dim, 1, h, w)."""
        return self.conv1(self.encoder(split_pixels(x, self.patch), past))

    def mode(self, x: Tensor, past: Past) -> Tensor:
        """A chunk of video → its latent frame (B, z_dim, 1, h, w)."""
        return self.moments(x, past).chunk(2, dim=1)[0]

    def pixels(self, z: Tensor, past: Past) -> Tensor:
        """A latent frame → its chunk of video."""
        return join_pixels(self.decoder(self.conv2(z), past), self.patch)


# ---- the autoencoders -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Chunk:
    """Corresponding frames of a video and of its latents."""

    video: slice
    latents: slice


ChunkFunction = Callable[[Tensor, Past], Tensor]


class WanVideoVAE(nn.Module):
    """Variational autoencoder between videos in −1…1 and latents; the defaults are Wan 2.1's.

    `encode` and `decode` speak *raw* latents, as ComfyUI and the published files do; `normalize_latents` and
    `denormalize_latents` turn them into what the denoiser works on and back.

    Memory: input and result (in float32 until it is complete) stay where the input is. On the device that computes,
    there is besides the weights only what one chunk of one tile needs, however many frames there are: at most 12 times
    the widest activation of the decoder (Wan 2.2: 8 times), which is four frames of a tile with `base_dim` channels
    (Wan 2.2: half as high and wide, with 2·`decoder_base_dim`), and what kernels take for themselves.
    """

    def __init__(self, base_dim: int = 96, decoder_base_dim: int | None = None, z_dim: int = 16,
                 dim_mult: tuple[int, ...] = (1, 2, 4, 4), num_res_blocks: int = 2,
                 temporal_downsample: tuple[bool, ...] = (False, True, True), patch: int = 1,
                 levels: bool = False) -> None:
        super().__init__()
        if z_dim not in STATISTICS:
            raise ValueError(f"z_dim must be {' or '.join(map(str, STATISTICS))}, the numbers of channels with "
                             f"published statistics, got {z_dim}")
        if len(temporal_downsample) != len(dim_mult) - 1:
            raise ValueError(f"temporal_downsample needs one value for each of the {len(dim_mult) - 1} steps between "
                             f"levels, got {temporal_downsample}")
        self.z_dim = z_dim
        self.temporal_factor = 2**sum(temporal_downsample)
        self.spatial_factor = patch * 2**len(temporal_downsample)
        encoder = Sizes(tuple(base_dim * m for m in dim_mult), z_dim, num_res_blocks, temporal_downsample,
                        3 * patch**2, levels)
        dims = tuple((decoder_base_dim or base_dim) * m for m in reversed(dim_mult))
        decoder = replace(encoder, dims=dims, temporal=temporal_downsample[::-1])
        self.model = VideoVAE(encoder, decoder, patch)

    def encode(self, video: Tensor, device: torch.device | str | None = None, tiled: bool = False,
               tile_size: int | tuple[int, int] = (30, 52), tile_stride: int | tuple[int, int] = (15, 26),
               progress_bar_cmd: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """Video (B, 3, 4·k + 1, H, W) in −1…1 → the mode of its raw latents (B, z_dim, k + 1, h, w).

        The work is done on `device` (by default the video's), chunk by chunk; the result is where the video is and has
        its dtype. Tile size and stride are in latent pixels, one number or (vertical, horizontal).
        `progress_bar_cmd` wraps the list of all tiles' chunks: an exception that it raises stops the work between two.
        Raises ValueError for a shape that does not fit, and for tiles that would leave gaps.
        """
        self._check_video(video)
        tile_size, tile_stride = self._in_pixels(tile_size), self._in_pixels(tile_stride)
        shape = (video.shape[0], self.z_dim, self.latent_frames(video.shape[2]))
        parts = [(chunk.video, chunk.latents) for chunk in self._chunks(shape[2])]
        tiles = self._tiles(video, tiled, tile_size, tile_stride, 1 / self.spatial_factor)
        return _in_parts(self.model.mode, video, shape, parts, tiles, device, progress_bar_cmd)

    def decode(self, latents: Tensor, device: torch.device | str | None = None, tiled: bool = False,
               tile_size: int | tuple[int, int] = (30, 52), tile_stride: int | tuple[int, int] = (15, 26),
               progress_bar_cmd: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """Raw latents (B, z_dim, k + 1, h, w) → video (B, 3, 4·k + 1, H, W), about −1…1 and not clipped.

        `device`, tiles, progress and errors as for `encode`.
        """
        if latents.ndim != 5 or latents.shape[1] != self.z_dim or not all(latents.shape):
            raise ValueError(f"latents (B, {self.z_dim}, T, h, w) expected, got {tuple(latents.shape)}")
        chunks = self._chunks(latents.shape[2])
        shape = (latents.shape[0], 3, chunks[-1].video.stop)
        tiles = self._tiles(latents, tiled, tile_size, tile_stride, self.spatial_factor)
        parts = [(chunk.latents, chunk.video) for chunk in chunks]
        return _in_parts(self.model.pixels, latents, shape, parts, tiles, device, progress_bar_cmd)

    def latent_frames(self, frames: int) -> int:
        """How many latent frames a video has. Raises ValueError unless its frames are one more than a multiple of 4."""
        whole, rest = divmod(frames - 1, self.temporal_factor)
        if rest or frames < 1:
            below = max(whole, 0) * self.temporal_factor + 1
            raise ValueError(f"{self.temporal_factor}·k + 1 frames expected, got {frames}: give {below} or "
                             f"{below + self.temporal_factor}")
        return whole + 1

    def _chunks(self, latent_frames: int) -> list[Chunk]:
        factor = self.temporal_factor
        return [Chunk(slice(max(0, (index - 1) * factor + 1), index * factor + 1), slice(index, index + 1))
                for index in range(latent_frames)]

    def _check_video(self, video: Tensor) -> None:
        fits = video.ndim == 5 and video.shape[1] == 3 and all(video.shape)
        if not fits or any(side % self.spatial_factor for side in video.shape[3:]):
            raise ValueError(f"video (B, 3, F, H, W) expected, with sides that are multiples of {self.spatial_factor}, "
                             f"got {tuple(video.shape)}")

    def _in_pixels(self, size: int | tuple[int, int]) -> tuple[int, int]:
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.spatial_factor, width * self.spatial_factor

    @staticmethod
    def _tiles(x: Tensor, tiled: bool, size: int | tuple[int, int], stride: int | tuple[int, int],
               scale: float) -> Tiles:
        if not tiled:
            size = stride = x.shape[-2:]
        return Tiles(*x.shape[-2:], size, stride, scale)


def _in_parts(function: ChunkFunction, x: Tensor, shape: tuple[int, ...], parts: list[tuple[slice, slice]],
              tiles: Tiles, device: torch.device | str | None,
              progress_bar_cmd: Callable[[Iterable], Iterable]) -> Tensor:
    """`function` on each tile of x, part after part; `parts` are frames of x and those of the result that they give.

    `shape` is the result's, without height and width.
    """
    past, total = Past(), x.new_zeros(*shape, *tiles.out_size, dtype=torch.float32)
    for corner, (source, target) in progress_bar_cmd([(corner, part) for corner in tiles.corners for part in parts]):
        past.first, past.last = source.start == 0, source.stop == x.shape[2]
        tile = tiles.cut(x[:, :, source], corner)
        tiles.add(total[:, :, target], function(tile.to(device), past), corner)
    return total.to(x.dtype)


class WanVideoVAE38(WanVideoVAE):
    """Wan 2.2's (TI2V-5B): 48 channels, pixels two by two at once, a wider decoder and shortcuts around each level."""

    def __init__(self, base_dim: int = 160, decoder_base_dim: int = 256, z_dim: int = 48,
                 dim_mult: tuple[int, ...] = (1, 2, 4, 4), num_res_blocks: int = 2,
                 temporal_downsample: tuple[bool, ...] = (False, True, True)) -> None:
        super().__init__(base_dim, decoder_base_dim, z_dim, dim_mult, num_res_blocks, temporal_downsample,
                         patch=2, levels=True)
