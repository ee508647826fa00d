"""What else guides a Wan video: a control video and a reference picture (Fun-Control), the path of a camera
(Fun-Control-Camera), and how fast things move (a motion controller).

Published models: PAI/Wan2.1-Fun-…, PAI/Wan2.2-Fun-A14B-…, DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..diffusion import PipelineUnit
from ..models.wan_video_camera_controller import ORIGIN, SPEED, camera_control
from ..utils.pictures import Picture, check_picture
from ..utils.videos import Video, frames_of
from .wan_video_images import TILE_PARAMS, tile_options

if TYPE_CHECKING:
    from .wan_video import WanVideoPipeline

SPEEDS = (0, 100)  # of motion_bucket_id: still, fast


class WanVideoUnit_FunControl(PipelineUnit):
    """The control video (edges, depth, poses, …) as normalised latents (1, 16, T, h, w)."""

    def __init__(self) -> None:
        super().__init__(input_params=("control_video", "num_frames", "height", "width", *TILE_PARAMS),
                         output_params=("control_latents",), onload_model_names=("vae",))

    def process(self, pipe: WanVideoPipeline, control_video: Video | None, num_frames: int, height: int, width: int,
                tiled: bool | None, tile_size: Any, tile_stride: Any) -> dict:
        if control_video is None:
            return {}
        video = pipe.preprocess_video(frames_of("control_video", control_video, num_frames), width, height)
        return {"control_latents": pipe.encode_image(video, **tile_options(tiled, tile_size, tile_stride))}


class WanVideoUnit_FunReference(PipelineUnit):
    """The reference picture as normalised latents (1, 16, h, w)."""

    def __init__(self) -> None:
        super().__init__(input_params=("reference_image", "height", "width", *TILE_PARAMS),
                         output_params=("reference_latents",), onload_model_names=("vae",))

    def process(self, pipe: WanVideoPipeline, reference_image: Picture | None, height: int, width: int,
                tiled: bool | None, tile_size: Any, tile_stride: Any) -> dict:
        if reference_image is None:
            return {}
        picture = pipe.preprocess_video([check_picture("reference_image", reference_image)], width, height)
        latents = pipe.encode_image(picture, **tile_options(tiled, tile_size, tile_stride))
        return {"reference_latents": latents[:, :, 0]}


class WanVideoUnit_FunCameraControl(PipelineUnit):
    """The camera's path as rays (1, 24, T, H, W); the denoiser's adapter makes tokens of them.

    It asks for the latents to be made when the loop begins: rays are quickly made, and large (0.4 GB for 81 frames of
    832×480 in bf16), so nothing but the loop should keep them.
    """

    def __init__(self) -> None:
        super().__init__(input_params=("camera_control_direction", "camera_control_speed", "camera_control_origin",
                                       "num_frames", "height", "width", "latents"),
                         output_params=("control_camera_latents_input",))

    def process(self, pipe: WanVideoPipeline, camera_control_direction: str | None, camera_control_speed: float | None,
                camera_control_origin: Sequence[float] | None, num_frames: int, height: int, width: int,
                latents: Tensor) -> dict:
        if camera_control_direction is None:
            return {}
        speed = SPEED if camera_control_speed is None else camera_control_speed
        rays = camera_control(camera_control_direction, num_frames, height, width, speed,
                              ORIGIN if camera_control_origin is None else camera_control_origin)
        return {"control_camera_latents_input": rays.to(pipe.device, pipe.torch_dtype)}


class WanVideoUnit_SpeedControl(PipelineUnit):
    """How fast things move, as an addition (1, 6·dim) to the timestep's modulation."""

    def __init__(self) -> None:
        super().__init__(input_params=("motion_bucket_id",), output_params=("motion",),
                         onload_model_names=("motion_controller",))

    def process(self, pipe: WanVideoPipeline, motion_bucket_id: float | None) -> dict:
        if motion_bucket_id is None:
            return {}
        pipe.load_models_to_device(self.onload_model_names)
        bucket = torch.tensor([float(motion_bucket_id)], device=pipe.device)
        return {"motion": pipe.motion_controller(bucket, pipe.torch_dtype)}
