"""What Wan's autoencoders need in memory and time for a video, against a bound that follows from their layers' sizes.

    MALLOC_MMAP_THRESHOLD_=1000000 python -m benchmarks.wan_vae [2.1 | 2.2 …] [--only encode|decode] [--peers]
        [--device cpu|cuda] [--frames N] [--height N] [--width N] [--base-dim N]

The bound is what the class states, 12 times (2.2: 8 times) the widest activation of the decoder: four frames of a tile
with `base_dim` channels (2.2: half as high and wide, with twice as many). On the CPU there is besides what torch's
kernels take for the one convolution that takes most: a copy of its input and one of its output, channels filled up to
16; or, for few channels and rows, its input unfolded, once for each tap. Shapes are read from a pass on "meta".

Notable: weights are random and so few that the CPU is done in minutes; memory is in proportion to the width, work to
its square (`--base-dim 96` is 2.1 as published). Tiles are a quarter of the picture, overlap by half, and are shown a
few frames, as more take as much. Working memory is what there is at most besides weights, input and result. On the CPU
it is seen from outside, as anonymous memory; so holes in the heap count, unless the variable above has glibc return
what is freed. On an accelerator it is what torch has allocated, and input and result stay in the host's memory. Time on
the CPU is that of the processor, in all threads, whatever else the machine does.
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
from torch import Tensor, nn

from diffsynth_backend.models.wan_video_vae import WanVideoVAE, WanVideoVAE38

from . import harness
from .harness import Target, say, table

MIB = 2**20
FEW = 9  # frames, which need as much as more do: a first chunk, a last one, and one between them
BLOCK = 16  # channels that kernels on the CPU compute at once
UNFOLDED = 20480  # channels · frames · rows (without frames, · columns) of an input, up to which torch's CPU unfolds it
VERSIONS, METHODS = ("2.1", "2.2"), ("encode", "decode")


@dataclass(frozen=True)
class Video:
    """What the command line says."""

    device: torch.device
    frames: int
    height: int
    width: int
    base_dim: int
    peers: bool


@dataclass(frozen=True)
class Need:
    """Of one run; working memory in bytes."""

    working: int
    seconds: float


def model(version: str, base_dim: int) -> WanVideoVAE:
    """As published but for the width."""
    vae = WanVideoVAE(base_dim) if version == "2.1" else WanVideoVAE38(base_dim, base_dim)
    return vae.eval().requires_grad_(False)


def bound(version: str, method: str, video: Video, height: int, width: int) -> int:
    """Bytes, for a tile (or whole frames) of this size in pixels, in float32."""
    times, channels, halved = (12, video.base_dim, 1) if version == "2.1" else (8, 2 * video.base_dim, 2)
    stated = times * math.prod((4, channels, height // halved, width // halved, 4))
    return stated + (kernels(version, method, video.base_dim, height, width) if video.device.type == "cpu" else 0)


def kernels(version: str, method: str, base_dim: int, height: int, width: int) -> int:
    """Bytes that torch's CPU takes for the convolution of a chunk of four frames that takes most."""
    found = [0]

    def note(conv: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        x, = given
        if x.ndim == 4 or x.shape[2] >= conv.kernel_size[0]:  # not the first frame, which is small
            found.append(kernel_bytes(conv, x, output))

    with torch.device("meta"):
        vae = model(version, base_dim)
        x = inputs(vae, method, 5, height, width)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.register_forward_hook(note)
    getattr(vae, method)(x)
    return max(found)


def kernel_bytes(conv: nn.Module, x: Tensor, out: Tensor) -> int:
    """x and out (B, channels, …, columns), float32."""
    if len(x) == 1 and math.prod(x.shape[1:4]) <= UNFOLDED and math.prod(conv.kernel_size) > 1:
        return 4 * math.prod(conv.kernel_size) * x.shape[1] * math.prod(out.shape[2:])
    return sum(4 * tensor.numel() // tensor.shape[1] * (-(-tensor.shape[1] // BLOCK) * BLOCK) for tensor in (x, out))


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
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    with torch.inference_mode(), working_memory(device) as peak:
        began = clock()
        result = run(x)
        seconds = clock() - began
    return Need(peak[0] - (result.numel() * 4 if device.type == "cpu" else 0), seconds)


def report(version: str, method: str, video: Video) -> None:
    vae = model(version, video.base_dim).to(video.device)
    many, few = (inputs(vae, method, frames, video.height, video.width) for frames in (video.frames, FEW))
    tile = [max(1, side // vae.spatial_factor // 2) for side in (video.height, video.width)]
    stride = [-(-side // 2) for side in tile]
    run = partial(getattr(vae, method), device=video.device)
    need(run, few[:, :, :1], video.device)  # kernels are chosen at their first call
    shorter, whole = need(run, few, video.device), need(run, many, video.device)
    tiled = need(partial(run, tiled=True, tile_size=tuple(tile), tile_stride=tuple(stride)), few, video.device)
    limit = bound(version, method, video, video.height, video.width)
    of_tile = bound(version, method, video, *(side * vae.spatial_factor for side in tile))
    say(f"\nWan {version}, {method}: {whole.working / MIB:.0f} MiB of working memory, bound {limit / MIB:.0f}, "
        f"{whole.seconds:.0f} s; {FEW} frames in tiles: {tiled.working / MIB:.0f} MiB, bound {of_tile / MIB:.0f}, "
        f"{tiled.seconds:.0f} s")
    table(f"Wan {version}, {method}, {video.frames} frames of {video.height} × {video.width}", [
        ("working memory / bound", [whole.working / limit], Target(1)),
        (f"working memory / that of {FEW} frames", [whole.working / shorter.working], Target(1.1)),
        (f"time of a frame / that of {FEW} frames", [whole.seconds / video.frames / shorter.seconds * FEW], None),
        (f"tiled, {FEW} frames: working memory / bound", [tiled.working / of_tile], Target(1)),
        (f"tiled, {FEW} frames: time / that of the whole", [tiled.seconds / shorter.seconds], None),
        *(against_diffusers(version, method, video, few, shorter) if video.peers else [])])


def inputs(vae: WanVideoVAE, method: str, frames: int, height: int, width: int) -> Tensor:
    """Random ones, on the default device."""
    if method == "encode":
        return torch.rand(1, 3, frames, height, width) * 2 - 1
    sides = height // vae.spatial_factor, width // vae.spatial_factor
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
    parser.add_argument("--peers", action="store_true", help="measure diffusers' class, too")
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
