"""One forward pass of the Wan loop: everything that units prepared, as the denoiser takes it, in windows over time.

Notable: every latent here is normalised. A window sees its own frames of everything that has frames, and all of the
reference pictures that lie before the video; where windows overlap, their predictions are faded into one another.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.pipeline_unit import Inputs
from ..models.general_modules import check_tiles, tile_starts
from ..models.wan_video_dit import VaceWanModel, WanModel
from .wan_video_cache import TeaCache

# What there may be one of for each of a batch, besides the prompt.
BATCHED = ("latents", "y", "clip_feature", "reference_latents", "first_frame_latents", "vace_context",
           "control_camera_latents_input", "motion")


@dataclass(frozen=True)
class _Frames:
    """What has frames, axis 2: latents, further channels, VACE's condition, the camera's tokens."""

    latents: Tensor
    y: Tensor | None
    vace_context: Tensor | None
    camera: Tensor | None
    first: Tensor | None  # of the video, clean

    def window(self, start: int, stop: int, references: int) -> _Frames:
        """The frames of a window, counted without the references, which stay in front."""
        def cut(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            frames = tensor[:, :, references + start:references + stop]
            return torch.cat([tensor[:, :, :references], frames], dim=2) if references else frames

        return _Frames(cut(self.latents), cut(self.y), cut(self.vace_context), cut(self.camera),
                       self.first if start == 0 else None)


@dataclass(frozen=True)
class _Pass:
    """What all windows of a forward pass share."""

    dit: WanModel
    vace: VaceWanModel | None
    vace_scale: float
    timestep: Tensor
    context: Tensor
    clip_feature: Tensor | None
    reference_latents: Tensor | None
    motion: Tensor | None
    tea_cache: TeaCache | None
    step: int
    steps: int
    checkpointing: dict[str, bool]

    def velocity(self, frames: _Frames) -> Tensor:
        """Of some frames (B, C, T, h, w)."""
        latents, clean_frames = frames.latents, 0
        if frames.first is not None:
            clean_frames = frames.first.shape[2]
            first = frames.first.expand(len(latents), -1, -1, -1, -1)
            latents = torch.cat([first, latents[:, :, clean_frames:]], dim=2)
        video = self.dit.embed(latents, self.timestep, self.context, y=frames.y, clip_features=self.clip_feature,
                               reference_latents=self.reference_latents, camera=frames.camera, motion=self.motion,
                               clean_frames=clean_frames)

        def blocks() -> Tensor:
            after_block = None
            if frames.vace_context is not None:
                hints = self.vace(video, frames.vace_context, **self.checkpointing)
                after_block = self.vace.corrections(hints, self.vace_scale)
            return self.dit.run_blocks(video, after_block, **self.checkpointing)

        if self.tea_cache is None:
            return self.dit.output(blocks(), video)
        modulation = video.modulations[-1].blocks
        return self.dit.output(self.tea_cache.run(blocks, video.tokens, modulation, self.step, self.steps), video)


def model_fn_wan_video(dit: WanModel, latents: Tensor, timestep: Tensor, context: Tensor,
                       vace: VaceWanModel | None = None, clip_feature: Tensor | None = None, y: Tensor | None = None,
                       reference_latents: Tensor | None = None, first_frame_latents: Tensor | None = None,
                       vace_context: Tensor | None = None, vace_scale: float = 1.0, vace_references: int = 0,
                       control_camera_latents_input: Tensor | None = None, motion: Tensor | None = None,
                       tea_cache: TeaCache | None = None, sliding_window_size: int | None = None,
                       sliding_window_stride: int | None = None, progress_id: int = 0, num_inference_steps: int = 1,
                       use_gradient_checkpointing: bool = False, use_gradient_checkpointing_offload: bool = False
                       ) -> Tensor:
    """Predicted velocity, shaped as the latents. What there is one of serves the whole batch.

    latents               (B, C, T, h, w), h and w even; the first `vace_references` frames are reference pictures
    timestep              (1,) or (B,), 0…1000
    context               (1 or B, L, D)
    clip_feature          (1 or B, 257 or 514, 1280), for models that take it
    y                     (1 or B, in_dim − C, T, h, w): mask, pictures, control video
    reference_latents     (1 or B, 16, h, w): a picture before the first frame (Fun-Control)
    first_frame_latents   (1 or B, C, n, h, w): the first frames, which are clean (TI2V-5B)
    vace, vace_context, vace_scale   condition (1 or B, 96, T, h, w), with the references, and how much it counts
    control_camera_latents_input     (1, 24, T, 8·h, 8·w), see `camera_control`; its tokens are made in each pass
    motion                (1, 6·dim), see `WanMotionControllerModel`
    tea_cache, progress_id, num_inference_steps   see `TeaCache`
    sliding_window_size, …_stride    latent frames; without them one window
    use_gradient_checkpointing, …_offload         for training

    Raises ValueError for what does not fit the latents or the denoiser.
    """
    camera = None
    if control_camera_latents_input is not None:
        if dit.control_adapter is None:
            raise ValueError("this denoiser has no camera adapter: load a Fun-Control-Camera model, or leave "
                             "camera_control_direction out")
        camera = dit.control_adapter(control_camera_latents_input)
    for name, tensor in (("y", y), ("vace_context", vace_context), ("the camera's path", camera)):
        if tensor is not None and tensor.shape[2] != latents.shape[2]:
            raise ValueError(f"{name} has {tensor.shape[2]} latent frames and the video {latents.shape[2]}: make them "
                             "for the same num_frames")
    frames = _Frames(latents, y, vace_context, camera, first_frame_latents)
    run = _Pass(dit, vace, vace_scale, timestep.expand(len(latents)), context, clip_feature, reference_latents, motion,
                tea_cache, progress_id, num_inference_steps,
                {"use_gradient_checkpointing": use_gradient_checkpointing,
                 "use_gradient_checkpointing_offload": use_gradient_checkpointing_offload})
    length = latents.shape[2] - vace_references
    if sliding_window_size is None or sliding_window_size >= length:
        return run.velocity(frames)
    return _in_windows(run, frames, vace_references, sliding_window_size, sliding_window_stride)


def _in_windows(run: _Pass, frames: _Frames, references: int, size: int, stride: int) -> Tensor:
    total, weights = torch.zeros_like(frames.latents, dtype=torch.float32), 0.0
    length = frames.latents.shape[2] - references
    for start, weight in windows(length, size, stride):
        part = run.velocity(frames.window(start, start + len(weight), references)).float()
        placed = torch.zeros(length)
        placed[start:start + len(weight)] = weight
        placed = torch.cat([torch.ones(references), placed]).to(part.device)[:, None, None]
        weights = weights + placed
        covered = placed.flatten() > 0
        total[:, :, covered] += part * placed[covered]
    return (total / weights).to(frames.latents.dtype)


def windows(length: int, size: int, stride: int) -> Iterator[tuple[int, Tensor]]:
    """Where each window over `length` frames begins, with the weight (above 0) of each of its frames.

    The last window is moved back so that it ends with the video. Raises ValueError for a stride that leaves gaps.
    """
    check_tiles(size, stride)
    overlap = size - stride
    for start in tile_starts(length, size, stride):
        position = torch.arange(min(size, length)) + 0.5
        weight = torch.ones_like(position)
        if overlap and start > 0:
            weight = torch.minimum(weight, position / overlap)
        if overlap and start + size < length:
            weight = torch.minimum(weight, position.flip(0) / overlap)
        yield start, weight


def as_one_batch(shared: Inputs, sides: Sequence[Mapping[str, object]]) -> tuple[Inputs, list[Inputs]]:
    """The inputs for both sides at once: all that is of the batch twice, the prompts one after the other."""
    batch = len(shared["latents"])
    doubled = {name: torch.cat([shared[name]] * 2) for name in BATCHED
               if shared.get(name) is not None and (name == "latents" or len(shared[name]) > 1)}
    context = torch.cat([side["context"].expand(batch, -1, -1) for side in sides])
    return {**shared, **doubled}, [{**sides[0], "context": context}]


def activation_bytes(dit: WanModel, latents: Tensor, vace: VaceWanModel | None = None, reference: bool = False,
                     cached: bool = False) -> int:
    """`WanModel.activation_bytes` of a pass over these latents (B, C, T, h, w), with VACE's hints and own tokens, and
    with what TeaCache keeps."""
    batch, _, frames, height, width = latents.shape
    (p_t, p_h, p_w), kept = dit.patch_size, cached
    if vace is not None:
        kept += len(vace.vace_layers) + 1
    tokens = batch * (frames // p_t + reference) * (height // p_h) * (width // p_w)
    return (dit.activation_bytes(batch, frames, height, width, latents.dtype, reference)
            + kept * tokens * dit.dim * latents.dtype.itemsize)
