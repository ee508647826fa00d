"""What every Wan video begins with: options that fit the models, sizes, noise, prompts, and a video to start from."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..diffusion import PipelineUnit
from ..models.general_modules import check_tiles
from ..models.wan_video_camera_controller import DIRECTIONS, check_origin
from ..utils.pictures import Picture, size_of
from ..utils.videos import Video, check_video, frames_of
from .wan_video_cache import TeaCache
from .wan_video_control import SPEEDS
from .wan_video_images import TILE_PARAMS, channels_of, tile_options
from .wan_video_vace import VACE_PARAMS, references_of

if TYPE_CHECKING:
    from .wan_video import WanVideoPipeline


def check_tile_options(tile_size: int | tuple[int, int], tile_stride: int | tuple[int, int]) -> None:
    """Raises ValueError for tiles that would leave gaps."""
    for size, stride in zip(*(value if isinstance(value, list | tuple) else (value, value)
                              for value in (tile_size, tile_stride))):
        check_tiles(size, stride)


class WanVideoUnit_OptionChecker(PipelineUnit):
    """Refuses options that the loaded models cannot honour, and models that need more, before anything is computed."""

    def __init__(self) -> None:
        super().__init__(input_params=(
            "input_image", "end_image", "control_video", "reference_image", "camera_control_direction",
            "camera_control_origin", "motion_bucket_id", *VACE_PARAMS, "vace_scale", "switch_DiT_boundary", "cfg_merge",
            "sliding_window_size", "sliding_window_stride", "tea_cache_l1_thresh", "tea_cache_model_id"))

    def process(self, pipe: WanVideoPipeline, input_image: Picture | None, end_image: Picture | None,
                control_video: Video | None, reference_image: Picture | None, camera_control_direction: str | None,
                camera_control_origin: Sequence[float] | None, motion_bucket_id: float | None,
                vace_video: Video | None, vace_video_mask: Video | Picture | None,
                vace_reference_image: Picture | Sequence[Picture] | None, vace_scale: float | None,
                switch_DiT_boundary: float | None, cfg_merge: bool | None, sliding_window_size: int | None,
                sliding_window_stride: int | None, tea_cache_l1_thresh: float | None, tea_cache_model_id: str | None
                ) -> dict:
        _check_pictures(pipe, input_image, end_image, control_video)
        _check_guides(pipe, reference_image, camera_control_direction, motion_bucket_id)
        if camera_control_origin is not None:
            check_origin(camera_control_origin)
        vace = [value for value in (vace_video, vace_video_mask, vace_reference_image) if value is not None]
        _check_vace(pipe, bool(vace), vace_scale)
        references_of(vace_reference_image)
        if switch_DiT_boundary is not None and not 0 <= switch_DiT_boundary <= 1:
            raise ValueError(f"switch_DiT_boundary must lie in 0…1, got {switch_DiT_boundary!r}")
        _check_window(sliding_window_size, sliding_window_stride)
        _check_cache(pipe, tea_cache_l1_thresh, tea_cache_model_id, sliding_window_size)
        return {}


def _check_pictures(pipe: WanVideoPipeline, first: Picture | None, last: Picture | None, control: Video | None) -> None:
    kind, fused = channels_of(pipe.dit), pipe.dit.fuse_vae_embedding_in_latents
    if control is not None and not kind.control:
        raise ValueError("control_video is for Fun-Control models, and the denoiser that is loaded is none: load one, "
                         "or leave control_video out")
    if control is None and kind.control:
        raise ValueError("the denoiser that is loaded draws after a control video: give control_video, or load another "
                         "model")
    if first is not None and kind.picture is None and not fused:
        raise ValueError("the denoiser that is loaded draws from text alone: load an image-to-video model (I2V, InP, "
                         "TI2V), or leave input_image out; to start from a video, give input_video")
    if first is None and kind.picture is not None and not kind.control:
        raise ValueError("the denoiser that is loaded begins with a picture: give input_image, or load a text-to-video "
                         "model")
    if last is not None and (first is None or kind.picture in (None, "frame")):
        raise ValueError("end_image needs an input_image and a model that takes both (FLF2V, I2V, InP): give it, or "
                         "leave end_image out")
    if pipe.dit.has_image_pos_emb and last is None:
        raise ValueError("the denoiser that is loaded goes from a first picture to a last one: give end_image, too")


def _check_guides(pipe: WanVideoPipeline, reference: Picture | None, camera: str | None, speed: float | None) -> None:
    if reference is not None and not pipe.dit.has_ref_conv:
        raise ValueError("the denoiser that is loaded takes no reference picture: load a Fun-V1.1-Control or "
                         "Fun-A14B-Control model, or leave reference_image out")
    if camera is not None and pipe.dit.control_adapter is None:
        raise ValueError("the denoiser that is loaded has no camera adapter: load a Fun-Control-Camera model, or leave "
                         "camera_control_direction out")
    if camera is not None and camera not in DIRECTIONS:
        raise ValueError(f"unknown camera_control_direction {camera!r}; expected one of {', '.join(DIRECTIONS)}")
    if speed is None:
        return
    if not SPEEDS[0] <= speed <= SPEEDS[1]:
        raise ValueError(f"motion_bucket_id must lie in {SPEEDS[0]}…{SPEEDS[1]}, got {speed!r}")
    pipe.check_loaded(["motion_controller"])
    if (makes := pipe.motion_controller.linear[-1].out_features) != 6 * pipe.dit.dim:
        raise ValueError(f"the motion controller is for a denoiser of width {makes // 6} and the one that is loaded "
                         f"has {pipe.dit.dim}: it is for Wan2.1-T2V-1.3B")


def _check_vace(pipe: WanVideoPipeline, wanted: bool, scale: float | None) -> None:
    if wanted:
        pipe.check_loaded(["vace"] if pipe.dit2 is None else ["vace", "vace2"])
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"vace_scale must be a finite number, got {scale!r}")


def _check_window(size: int | None, stride: int | None) -> None:
    if (size is None) != (stride is None):
        raise ValueError("sliding_window_size and sliding_window_stride belong together: give both or neither")
    if size is not None:
        if not isinstance(size, int) or not isinstance(stride, int):
            raise TypeError(f"sliding windows are whole numbers of latent frames, got {size!r} and {stride!r}")
        check_tiles(size, stride)


def _check_cache(pipe: WanVideoPipeline, threshold: float | None, model_id: str | None, window: int | None) -> None:
    if threshold is None:
        if model_id:
            raise ValueError(f"tea_cache_model_id is {model_id!r} without tea_cache_l1_thresh: give both or neither")
        return
    TeaCache(model_id or "", threshold)
    if window is not None or pipe.dit2 is not None:
        raise ValueError("TeaCache remembers one denoiser's result for the whole video: it works neither with sliding "
                         "windows nor with two denoisers; leave tea_cache_l1_thresh out")


class WanVideoUnit_ShapeChecker(PipelineUnit):
    """Height, width and number of frames in the multiples that the models can draw."""

    def __init__(self) -> None:
        super().__init__(input_params=("height", "width", "num_frames"),
                         output_params=("height", "width", "num_frames"))

    def process(self, pipe: WanVideoPipeline, height: int, width: int, num_frames: int) -> dict:
        height, width = pipe.check_resize_height_width(height, width)
        return {"height": height, "width": width, "num_frames": pipe.check_num_frames(num_frames)}


class WanVideoUnit_NoiseInitializer(PipelineUnit):
    """Starting noise (batch_size, C, references + T, h, w), drawn in float32.

    One generator draws for the whole batch. `batch_index` picks videos out of a larger batch: each gets the noise that
    it has there. Of the frames that are drawn, the references get the last ones, as published.
    """

    def __init__(self) -> None:
        super().__init__(input_params=("height", "width", "num_frames", "seed", "rand_device", "batch_size",
                                       "batch_index", "vace_reference_image"), output_params=("noise",))

    def process(self, pipe: WanVideoPipeline, height: int, width: int, num_frames: int, seed: int | None,
                rand_device: str | None, batch_size: int | None, batch_index: Sequence[int] | None,
                vace_reference_image: Picture | Sequence[Picture] | None) -> dict:
        references = len(references_of(vace_reference_image))
        count = batch_size or 1 if batch_index is None else max(batch_index) + 1
        shape = (count, pipe.latent_channels, references + pipe.latent_frames(num_frames), height // pipe.vae_factor,
                 width // pipe.vae_factor)
        noise = pipe.generate_noise(shape, seed=seed, rand_device=rand_device or "cpu")
        noise = noise if batch_index is None else noise[list(batch_index)]
        return {"noise": noise.roll(references, dims=2)}


class WanVideoUnit_PromptEmbedder(PipelineUnit):
    """A prompt as umT5's hidden states (1, 512, D), zeros behind its end."""

    def __init__(self) -> None:
        super().__init__(seperate_cfg=True, input_params_posi={"prompt": "prompt"},
                         input_params_nega={"prompt": "negative_prompt"}, output_params=("context",),
                         onload_model_names=("text_encoder",))

    def process(self, pipe: WanVideoPipeline, prompt: str) -> dict:
        pipe.load_models_to_device(self.onload_model_names)
        states, _ = pipe.prompts.embed(pipe.text_encoder, [prompt], pipe.device)
        return {"context": states.to(pipe.torch_dtype)}


class WanVideoUnit_InputVideoEmbedder(PipelineUnit):
    """Video to video: the video's normalised latents (1, C, T, h, w)."""

    def __init__(self) -> None:
        super().__init__(input_params=("input_video", "num_frames", "height", "width", *TILE_PARAMS),
                         output_params=("input_latents",), onload_model_names=("vae",))

    def process(self, pipe: WanVideoPipeline, input_video: Video | None, num_frames: int, height: int, width: int,
                tiled: bool | None, tile_size: Any, tile_stride: Any) -> dict:
        if input_video is None:
            return {}
        check_video("input_video", input_video)
        frames = frames_of("input_video", input_video, num_frames)
        if other := [size for size in map(size_of, frames) if size != (width, height)]:
            raise ValueError(f"input_video is {'×'.join(map(str, other[0]))} but the video to draw is {width}×{height} "
                             "(width × height): resize one of them")
        video = pipe.preprocess_video(frames, width, height)
        return {"input_latents": pipe.encode_image(video, **tile_options(tiled, tile_size, tile_stride))}


class WanVideoUnit_InitialLatents(PipelineUnit):
    """Where the loop starts: noise, mixed with the input's latents as far as the schedule's first sigma says."""

    def __init__(self) -> None:
        super().__init__(input_params=("noise", "input_latents", "vace_reference_latents"), output_params=("latents",))

    def process(self, pipe: WanVideoPipeline, noise: Tensor, input_latents: Tensor | None,
                vace_reference_latents: Tensor | None) -> dict:
        if input_latents is None:
            return {"latents": noise}
        if vace_reference_latents is not None:
            references = vace_reference_latents.expand(len(input_latents), -1, -1, -1, -1).to(input_latents)
            input_latents = torch.cat([references, input_latents], dim=2)
        return {"latents": pipe.scheduler.add_noise(input_latents, noise, pipe.scheduler.timesteps[0])}
