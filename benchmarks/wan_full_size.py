"""Wan's denoisers of 14 billion parameters in full size: one pass from disk, and two experts that share one limit.

    python -m benchmarks.wan_full_size [section …] [--device cpu|cuda] [--limit GIB] [--steps N] [--folder DIR]

forward   each published layout is recognised by its hash, loaded strictly, and computes one pass for a small clip while
          nothing stays in memory
experts   the denoising loop of the pipeline with A14B's two denoisers, which take turns. All the time it is looked at
          how many bytes the engine has on the device, and whether a layer of each denoiser has left the disk

Notable: the files are sparse, 28.6 GB of bf16 each (some are published in float32), and all but one of their tensors
are zeros: the bias of the last layer. So this bias has to come out of each pass, exactly, and each step tells which of
the experts drew it. On the CPU a limit counts what it would count on an accelerator.
"""
from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffsynth_backend.configs.model_configs import WAN_CONFIGS
from diffsynth_backend.core import ModelConfig, hash_model_file
from diffsynth_backend.core.device import GIB
from diffsynth_backend.core.vram import Loop, Residency
from diffsynth_backend.core.vram.layers import iter_managed
from diffsynth_backend.core.vram.placement import OFFLOAD, ResidencyBudget
from diffsynth_backend.core.vram.presets import vram_preset
from diffsynth_backend.core.vram.timestep_table import Schedule
from diffsynth_backend.diffusion import Step
from diffsynth_backend.models.model_loader import ModelPool
from diffsynth_backend.models.wan_video_dit import WanModel
from diffsynth_backend.pipelines.wan_video import BOUNDARY, WanVideoPipeline
from diffsynth_backend.utils.state_dict_converters.wan_video_dit import diffusers_keys
from tests.helpers.sparse import Checkpoint, makes_holes

from . import harness
from .harness import Row, Target, say, table

ORIGINAL, DIFFUSERS = "aafcfd9672c3a2456dc46e1cb6e52c70", "cb104773c6c2cb6df4f9529ad5c60d0b"
LAST_BIAS = "head.head.bias"
PROMPT_TOKENS, CFG_SCALE = 20, 5.0
MEMORY = Target(3)  # GiB above the start, activations included
SECONDS = Target(300)  # of a pass, on 2 cores
LOOK_EVERY = 0.002  # seconds


@dataclass(frozen=True)
class Setup:
    """What the command line says; `folder` is ours alone."""

    device: torch.device
    limit: float  # GiB
    steps: int
    folder: Path

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16


@dataclass(frozen=True)
class Clip:
    frames: int
    height: int
    width: int

    @property
    def latents(self) -> tuple[int, ...]:
        """Their shape."""
        return 1, 16, (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    def describe(self) -> str:
        return f"{self.frames} frames of {self.height} × {self.width}"


FORWARD_CLIP, EXPERTS_CLIP = Clip(9, 96, 160), Clip(5, 64, 64)


# ---- files ----------------------------------------------------------------------------------------------------------

def checkpoint(stem: str, model_hash: str, shards: int) -> Checkpoint:
    arguments = next(row["extra_kwargs"] for row in WAN_CONFIGS if row["model_hash"] == model_hash)
    return Checkpoint(f"{stem}/diffusion_pytorch_model", "models.wan_video_dit.WanModel", model_hash, shards, arguments,
                      diffusers_keys if model_hash == DIFFUSERS else dict)


LAYOUTS = {"original layout": checkpoint("Wan-AI/Wan2.1-T2V-14B", ORIGINAL, 6),
           "diffusers' layout": checkpoint("Wan-AI/Wan2.1-T2V-14B-Diffusers/transformer", DIFFUSERS, 12)}
A14B = [checkpoint(f"Wan-AI/Wan2.2-T2V-A14B/{noise}_noise_model", ORIGINAL, 6) for noise in ("high", "low")]


def write(files: Checkpoint, folder: Path, last_bias: Tensor) -> list[str]:
    """Zeros, but for the last bias."""
    return files.write(folder, values=files.published_keys({LAST_BIAS: last_bias}))


def numbers(setup: Setup, clip: Clip) -> tuple[Tensor, Tensor]:
    """Random latents and prompt."""
    shapes = clip.latents, (1, PROMPT_TOKENS, 4096)
    latents, prompt = (torch.randn(shape).to(setup.device, setup.dtype) for shape in shapes)
    return latents, prompt


def verdict(label: str, met: bool) -> Row:
    return label, [float(met)], Target(1, at_least=True)


# ---- one pass -------------------------------------------------------------------------------------------------------

def forward(setup: Setup) -> None:
    """One pass of each layout."""
    for title, files in LAYOUTS.items():
        report_forward(title, files, setup)


def report_forward(title: str, files: Checkpoint, setup: Setup) -> None:
    bias = torch.arange(64, dtype=torch.float32)
    paths = write(files, setup.folder, bias)
    latents, prompt = numbers(setup, FORWARD_CLIP)
    timestep = torch.full((1,), 500.0, device=setup.device)
    with torch.no_grad(), harness.peak_memory() as peak:
        began = time.perf_counter()
        recognised = hash_model_file(paths) == files.model_hash
        pool = ModelPool()
        pool.auto_load_model(paths, vram_config=vram_preset("disk", setup.dtype, setup.device), vram_limit=0)
        dit: WanModel = pool.fetch_model("wan_video_dit")
        residency, loaded, worked = Residency([dit]), time.perf_counter(), time.process_time()
        loop = Loop(1, activation_bytes=dit.activation_bytes(*latents.shape[:1], *latents.shape[2:], setup.dtype),
                    schedule=Schedule((timestep[0],), 1, setup.dtype))
        with residency.loop(loop):
            velocity, = residency.run([partial(dit, latents, timestep, prompt)])
        seconds, worked = time.perf_counter() - loaded, time.process_time() - worked
    grid = [side // patch for side, patch in zip(latents.shape[2:], dit.patch_size)]
    expected = dit.unpatchify(bias.expand(1, math.prod(grid), -1), tuple(grid))
    table(f"{title}, {FORWARD_CLIP.describe()}, {setup.dtype} from bf16 on disk", [
        verdict("recognised by its hash, of all files", recognised),
        ("seconds of loading", [loaded - began], None),
        ("seconds of one pass", [seconds], SECONDS),
        ("seconds of the processor in it, in all threads", [worked], None),
        ("GiB of anonymous memory above the start, at most", [peak[0] / GIB], MEMORY),
        ("GiB of the engine on the device, at most", [residency.traffic.peak_device_bytes / GIB], None),
        ("GiB of activations, estimated", [loop.activation_bytes / GIB], None),
        verdict("the result is the last bias of the files", torch.equal(velocity.float().cpu(), expected))])


# ---- two experts ----------------------------------------------------------------------------------------------------

@dataclass
class Seen:
    """Of the engine, at most, by somebody who looks all the time."""

    device_bytes: int = 0
    looks: int = 0
    both_away: int = 0  # looks that found a layer of each expert that was not on the disk


def budget_of(pipe: WanVideoPipeline) -> ResidencyBudget:
    """The one that all layers of its models share."""
    return next(iter_managed(pipe.dit)).management.budget


@contextmanager
def watched(pipe: WanVideoPipeline) -> Iterator[Seen]:
    # The later one first, so that no look begins before the change of experts and ends after it.
    experts = [list(iter_managed(model)) for model in (pipe.dit2, pipe.dit)]
    budget, seen, ended = budget_of(pipe), Seen(), threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK_EVERY):
            seen.looks += 1
            seen.device_bytes = max(seen.device_bytes, budget.used_bytes)
            seen.both_away += all(any(layer.state != OFFLOAD for layer in layers) for layers in experts)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        ended.set()
        watcher.join()


def experts(setup: Setup) -> None:
    """The loop of A14B's two denoisers within one limit; which is which is said by their folders."""
    biases = [torch.full((64,), float(value)) for value in (1, 2)]
    configs = [ModelConfig(path=write(files, setup.folder, bias), **vram_preset("disk", setup.dtype, setup.device))
               for files, bias in reversed(list(zip(A14B, biases)))]  # low noise first: order must not matter
    latents, prompt = numbers(setup, EXPERTS_CLIP)
    before, drawn = [latents], []

    def note(step: Step) -> None:
        velocity = (before[-1] - step.denoised) / float(pipe.scheduler.sigmas[step.index])
        drawn.append(round(float(velocity.mean()), 1))
        before.append(step.latents)

    with torch.no_grad(), harness.peak_memory() as peak:
        pipe = WanVideoPipeline.from_pretrained(setup.dtype, setup.device, configs, vram_limit=setup.limit)
        pipe.set_schedule(EXPERTS_CLIP.height, EXPERTS_CLIP.width, setup.steps)
        with watched(pipe) as seen:
            began = time.perf_counter()
            pipe.denoise({"latents": latents}, {"context": prompt}, {"context": prompt}, cfg_scale=CFG_SCALE,
                         step_callback=note)
            seconds = time.perf_counter() - began
    report_experts(setup, pipe, seen, peak[0], seconds, drawn)


def report_experts(setup: Setup, pipe: WanVideoPipeline, seen: Seen, peak: int, seconds: float,
                   drawn: list[float]) -> None:
    activations = [loop.plan.activation_bytes for loop in pipe.last_loops]
    counted = max(loop.traffic.peak_device_bytes for loop in pipe.last_loops)
    due = [1.0 if float(timestep) >= 1000 * BOUNDARY else 2.0 for timestep in pipe.scheduler.timesteps]
    limit = Target(setup.limit)
    table(f"two experts within {setup.limit:g} GiB, {EXPERTS_CLIP.describe()}, {due.count(1.0)} + {due.count(2.0)} "
          f"steps of both sides, {setup.dtype} from bf16 on disk", [
              ("GiB of the engine on the device, at most: as it counts itself", [counted / GIB], limit),
              (f"the same, as seen in {seen.looks} looks", [seen.device_bytes / GIB], limit),
              ("the same and the activations' estimate", [(counted + max(activations)) / GIB], limit),
              ("looks at which both experts had a layer away from the disk", [seen.both_away], Target(0)),
              ("GiB on the device when the loop has ended", [budget_of(pipe).used_bytes / GIB], Target(0)),
              verdict("each step was drawn by the expert that it is due to", drawn == due),
              ("seconds of a step", [seconds / setup.steps], None),
              ("GiB of anonymous memory above the start, at most", [peak / GIB], None)])


# ---- the command ----------------------------------------------------------------------------------------------------

SECTIONS = {"forward": forward, "experts": experts}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wan_full_size", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; by default all")
    parser.add_argument("--device", default="cpu", type=torch.device, help="where the layers compute")
    parser.add_argument("--limit", default=2.0, type=float, metavar="GIB", help="vram_limit of the two experts")
    parser.add_argument("--steps", default=4, type=int, metavar="N", help="of the two experts, at least 2")
    parser.add_argument("--folder", metavar="DIR", help="on a file system with sparse files")
    arguments = vars(parser.parse_args())
    sections, folder = arguments.pop("sections"), arguments.pop("folder")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if harness.anonymous_bytes() is None:
        parser.error("neither /proc/self/status nor psutil is there to say how much memory is used")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)  # plan and traffic
    say(harness.machine(arguments["device"]))
    for name in sections or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="wan-", dir=folder) as made:
            setup = Setup(**arguments, folder=Path(made))
            if not makes_holes(setup.folder):
                parser.error("the folder's file system has no sparse files: name another one with --folder")
            SECTIONS[name](setup)


if __name__ == "__main__":
    main()
