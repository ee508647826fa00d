"""How good the video demo is: `python -m diffsynth_backend.demo.examine_video` prints what it is accepted by.

Notable: the motions are the held-out ones, so the model has seen none of them in any wording.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.vram.presets import vram_preset
from ..pipelines.presets import MODEL_PRESETS
from ..pipelines.wan_video import WanVideoPipeline
from .examine import pixels_of
from .judge_video import faults
from .moving import HELD_OUT, Motion, draw, plain_prompt

DEMO = MODEL_PRESETS["demo-video"]
VIDEO = {"height": DEMO.height, "width": DEMO.width, "num_frames": DEMO.frames, "num_inference_steps": DEMO.steps,
         "cfg_scale": DEMO.cfg_scale, "sigma_shift": DEMO.shift, "progress_bar_cmd": list}


def load_video_demo(vram: str = "full", vram_limit: float | None = None) -> WanVideoPipeline:
    """The embedded model on the CPU in bf16, under a VRAM preset."""
    fields = vram_preset(vram, torch.bfloat16, "cpu")
    return WanVideoPipeline.from_pretrained(device="cpu", model_configs=DEMO.model_configs(**fields),
                                            tokenizer_config=DEMO.tokenizer_config(), vram_limit=vram_limit)


def frames_of(pipe: WanVideoPipeline, motion: Motion, seed: int) -> list[Tensor]:
    """17 frames (64, 64, 3), 0…255, of what the model draws when asked for a motion."""
    return [pixels_of(image) for image in pipe(plain_prompt(motion), seed=seed, **VIDEO)]


def wrong_videos(pipe: WanVideoPipeline, motions: Sequence[Motion], seeds: Sequence[int]) -> dict[str, list[str]]:
    """The faults of each video that does not show what was asked for, by prompt and seed."""
    found = {f"{plain_prompt(motion)}, seed {seed}": faults(frames_of(pipe, motion, seed), motion)
             for motion in motions for seed in seeds}
    return {name: wrong for name, wrong in found.items() if wrong}


@torch.no_grad()
def video_reconstruction_db(pipe: WanVideoPipeline) -> Tensor:
    """Peak signal-to-noise ratio (dB) of a drawn video of each held-out motion through encoder and decoder."""
    videos, _ = draw(HELD_OUT, torch.Generator().manual_seed(8))
    decoded = pipe.decode_latents(pipe.encode_image(videos.to(pipe.torch_dtype))).float().clamp(-1, 1)
    return -10 * ((decoded - videos) / 2).square().mean(dim=(1, 2, 3, 4)).log10()


def main() -> None:
    pipe, seeds = load_video_demo(), range(4)
    sys.stdout.write(f"autoencoder: {float(video_reconstruction_db(pipe).mean()):.1f} dB\n")
    wrong, count = wrong_videos(pipe, HELD_OUT, seeds), len(HELD_OUT) * len(seeds)
    sys.stdout.write(f"right videos: {count - len(wrong)} of {count}\n")
    for name, what in wrong.items():
        sys.stdout.write(f"{name}: {', '.join(sorted(set(what)))}\n")


if __name__ == "__main__":
    main()
