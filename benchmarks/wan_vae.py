"""What Wan's autoencoders need in memory and time for a video, against the bound that they state and diffusers' class.

    MALLOC_MMAP_THRESHOLD_=1000000 python -m benchmarks.wan_vae [2.1 | 2.2 …] [--only encode|decode]
        [--device cpu|cuda] [--frames N] [--height N] [--width N] [--base-dim N]

Notable: weights are random and, by default, so few that the CPU is done in minutes; memory is in proportion to their
width. Working memory is what there is at most besides weights, input and result. On the CPU it is seen from outside, as
anonymous memory. So what kernels take for themselves counts, which the bound leaves out (convolutions there copy their
input and output into a layout of their own), and so do holes in the heap, unless the variable above has glibc return
what is freed. On an accelerator it is what torch has allocated, and input and result stay in the host's memory.
"""
from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffsynth_backend.models.wan_video_vae import WanVideoVAE, WanVideoVAE38

from . import harness
from .harness import Target, say, table

MIB = 2**20
TILE, STRIDE = (30, 52), (15, 26)
FEW = 9  # frames, which need as much as more do: a first chunk, a last one, and one between them
KERNELS = 1.5  # working memory on the CPU / the bound: convolutions' own copies
VERSIONS, METHODS = ("2.1", "2.2"), ("encode", "decode")


@dataclass(frozen=True)
class Video:
    """What the command line says."""

    device: torch.device
    frames: int
    height: int
    width: int
    base_dim: int


@dataclass(frozen=True)
class Need:
    """Of one run; working memory in bytes."""

    working: int
    seconds: float


def model(version: str, base_dim: int) -> WanVideoVAE:
    """As published but for the width."""
    vae = WanVideoVAE(base_dim) if version == "2.1" else WanVideoVAE38(base_dim, base_dim)
    return vae.eval().requires_grad_(False)


def bound(version: str, base_dim: int, height: int, width: int) -> int:
    """Bytes that the class states for a tile (or whole frames) of this size in pixels, in float32."""
    times, channels, halved = (12, base_dim, 1) if version == "2.1" else (8, 2 * base_dim, 2)
    return times * math.prod((4, channels, height // halved, width // halved, 4))


@contextmanager
def working_memory(device: torch.device) -> Iterator[list[int]]:
    """The list's one item: the most memory above the start, in bytes."""
    if device.type != "cuda":
        with harness.peak_memory(0.005) as peak:
            yield peak
        return
    torch.cuda.reset_peak_memory_stats(device)
    start, peak = torch.cuda.memory_allocated(device), [0]
    yield peak
    peak[0] = torch.cuda.max_memory_allocated(device) - start


def need(run: Callable[[Tensor], Tensor], x: Tensor, device: torch.device) -> Need:
    with torch.inference_mode(), working_memory(device) as peak:
        began = time.perf_counter()
        result = run(x)
        seconds = time.perf_counter() - began
    return Need(peak[0] - (result.numel() * 4 if device.type == "cpu" else 0), seconds)


def report(version: str, method: str, video: Video) -> None:
    vae = model(version, video.base_dim).to(video.device)
    many, few = (inputs(vae, method, video, frames) for frames in (video.frames, FEW))
    tile = [min(size, side // vae.spatial_factor) * vae.spatial_factor
            for size, side in zip(TILE, (video.height, video.width))]
    run = partial(getattr(vae, method), device=video.device)
    need(run, few[:, :, :1], video.device)  # kernels are chosen at their first call
    shorter, whole = need(run, few, video.device), need(run, many, video.device)
    tiled = need(partial(run, tiled=True, tile_size=TILE, tile_stride=STRIDE), few, video.device)
    limit = Target(1 if video.device.type == "cuda" else KERNELS)
    say(f"\nWan {version}, {method}: {whole.working / MIB:.0f} MiB of working memory, {whole.seconds:.0f} s")
    table(f"Wan {version}, {method}, {video.frames} frames of {video.height} × {video.width}", [
        ("working memory / bound",
         [whole.working / bound(version, video.base_dim, video.height, video.width)], limit),
        (f"working memory / that of {FEW} frames", [whole.working / shorter.working], Target(1.1)),
        (f"tiled, {FEW} frames: working memory / bound",
         [tiled.working / bound(version, video.base_dim, *tile)], limit),
        (f"tiled, {FEW} frames: time / that of the whole", [tiled.seconds / shorter.seconds], None),
        *against_diffusers(version, method, video, few, shorter)])


def inputs(vae: WanVideoVAE, method: str, video: Video, frames: int) -> Tensor:
    if method == "encode":
        return torch.rand(1, 3, frames, video.height, video.width) * 2 - 1
    sides = video.height // vae.spatial_factor, video.width // vae.spatial_factor
    return torch.randn(1, vae.z_dim, vae.latent_frames(frames), *sides)


def against_diffusers(version: str, method: str, video: Video, x: Tensor, ours: Need) -> list[harness.Row]:
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        say(f"Without diffusers: {error}")
        return []
    sizes = {"z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
             "scale_factor_spatial": 16} if version == "2.2" else {}
    theirs = AutoencoderKLWan(base_dim=video.base_dim, **sizes).to(video.device).eval()

    def run(x: Tensor) -> Tensor:
        x = x.to(video.device)
        return theirs.decode(x).sample if method == "decode" else theirs.encode(x).latent_dist.mode()

    need(run, x[:, :, :1], video.device)
    found = need(run, x, video.device)
    return [(f"diffusers, {FEW} frames: working memory / ours", [found.working / ours.working], None),
            (f"diffusers, {FEW} frames: time / ours", [found.seconds / ours.seconds], None)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wan_vae", description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", metavar="version", help=f"of {', '.join(VERSIONS)}; by default both")
    parser.add_argument("--only", choices=METHODS, help="by default both")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--frames", type=int, default=81, metavar="N", help="one more than a multiple of 4")
    parser.add_argument("--height", type=int, default=480, metavar="N", help="a multiple of 16")
    parser.add_argument("--width", type=int, default=832, metavar="N", help="a multiple of 16")
    parser.add_argument("--base-dim", type=int, default=16, metavar="N",
                        help="a multiple of 16: the CPU's kernels round up to that")
    arguments = vars(parser.parse_args())
    versions, only = arguments.pop("versions") or VERSIONS, arguments.pop("only")
    if unknown := set(versions) - set(VERSIONS):
        parser.error(f"no version {', '.join(sorted(unknown))}; there are {', '.join(VERSIONS)}")
    video = Video(**arguments)
    say(harness.machine(video.device))
    if video.device.type == "cpu" and harness.anonymous_bytes() is None:
        parser.error("neither /proc/self/status nor psutil is there to say how much memory is used")
    for version in versions:
        for method in [only] if only else METHODS:
            report(version, method, video)


if __name__ == "__main__":
    main()
