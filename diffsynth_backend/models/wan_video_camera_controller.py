"""The path of a camera as the Fun-Control-Camera models take it: for each pixel of each frame, the ray through it.

A ray is six Plücker coordinates, its moment about the first camera's place and its direction; as in CameraCtrl
(arXiv 2404.02101). `WanModel.control_adapter` turns `camera_control`'s result into what is added to the tokens.

Notable: a published camera is 19 numbers, an instant, four intrinsics as parts of the frame's sides (fx, fy, cx, cy),
two unused, and the world-to-camera matrix (3×4) row by row. A direction changes one number of that matrix by `speed`
per frame: sideways ones turn the view by shearing it, "In" and "Out" move the camera.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ORIGIN = (0, 0.532139961, 0.946026558, 0.5, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
ORIGIN_ASPECT = 1280 / 720  # of the frames that the intrinsics are for
SPEED = 1 / 54
FRAMES_PER_LATENT = 4  # the first frame alone is a latent, too
SMALLEST_DETERMINANT = 1e-6  # of a camera's rotation, which has 1

# Row and column in the world-to-camera matrix of what grows by `speed` per frame, and its sign.
_STEPS = {"Left": (0, 2, 1), "Right": (0, 2, -1), "Up": (1, 2, 1), "Down": (1, 2, -1),
          "In": (2, 3, -1), "Out": (2, 3, 1)}
DIRECTIONS = {"Left": ("Left",), "Right": ("Right",), "Up": ("Up",), "Down": ("Down",),
              "LeftUp": ("Left", "Up"), "LeftDown": ("Left", "Down"), "RightUp": ("Right", "Up"),
              "RightDown": ("Right", "Down"), "In": ("In",), "Out": ("Out",)}


def check_origin(origin: Sequence[float]) -> None:
    """Raises ValueError unless `origin` is a camera: 19 finite numbers, lengths above 0, and a place to look from."""
    if len(origin) != len(ORIGIN):
        raise ValueError(f"a camera has {len(ORIGIN)} numbers (see ORIGIN) and origin {len(origin)}")
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in origin):
        raise ValueError(f"origin has to be finite numbers, got {tuple(origin)!r}")
    if min(origin[1:3]) <= 0:
        raise ValueError(f"the second and third number of origin are focal lengths, above 0, got {origin[1]:g} and "
                         f"{origin[2]:g}")
    rotation = torch.tensor([origin[7:10], origin[11:14], origin[15:18]], dtype=torch.float64)
    if not abs(float(torch.linalg.det(rotation))) > SMALLEST_DETERMINANT:
        raise ValueError("the last twelve numbers of origin are a camera's matrix (3×4, row by row), and theirs maps "
                         "all that it sees onto a plane: begin with ORIGIN's")


def camera_control(direction: str, num_frames: int, height: int, width: int, speed: float = SPEED,
                   origin: Sequence[float] = ORIGIN) -> Tensor:
    """The control video (1, 24, (num_frames + 3) / 4, height, width), float32, on the CPU.

    A channel is one coordinate of one of four frames, the frame changing fastest; the first frame counts four times.
    Raises ValueError for an unknown direction, an `origin` that is no camera, or `num_frames` other than 4·n + 1.
    """
    if (num_frames - 1) % FRAMES_PER_LATENT or num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; expected a multiple of {FRAMES_PER_LATENT}, plus 1")
    poses = camera_poses(direction, num_frames, speed, origin)
    intrinsics = fitted_intrinsics(origin[1:5], height, width)
    frames = torch.stack([plucker_rays(pose, intrinsics, height, width).float() for pose in poses])  # (F, 6, H, W)
    frames = torch.cat([frames[:1].expand(FRAMES_PER_LATENT - 1, -1, -1, -1), frames])
    return frames.unflatten(0, (-1, FRAMES_PER_LATENT)).permute(2, 1, 0, 3, 4).flatten(0, 1)[None]


def camera_poses(direction: str, num_frames: int, speed: float = SPEED, origin: Sequence[float] = ORIGIN) -> Tensor:
    """Camera-to-world matrices (num_frames, 4, 4), float64, in the system of the first camera.

    Raises ValueError for an unknown direction or an `origin` that is no camera.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown camera direction {direction!r}; expected one of {', '.join(DIRECTIONS)}")
    check_origin(origin)
    to_camera = torch.eye(4, dtype=torch.float64).repeat(num_frames, 1, 1)
    to_camera[:, :3] = torch.tensor(origin[7:], dtype=torch.float64).view(3, 4)
    for row, column, sign in (_STEPS[step] for step in DIRECTIONS[direction]):
        to_camera[:, row, column] += sign * speed * torch.arange(num_frames)
    return to_camera[0] @ torch.linalg.inv(to_camera)


def fitted_intrinsics(intrinsics: Sequence[float], height: int, width: int) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy in pixels; a frame of another aspect than the origin's is cut out of it."""
    fx, fy, cx, cy = intrinsics
    covering = max(width, height * ORIGIN_ASPECT), max(height, width / ORIGIN_ASPECT)
    return fx * covering[0], fy * covering[1], cx * width, cy * height


def plucker_rays(pose: Tensor, intrinsics: Sequence[float], height: int, width: int) -> Tensor:
    """Moment and direction (6, height, width) of the rays through the centres of the pixels, in the pose's dtype."""
    fx, fy, cx, cy = intrinsics
    columns = (torch.arange(width, dtype=pose.dtype) + 0.5 - cx) / fx
    rows = (torch.arange(height, dtype=pose.dtype) + 0.5 - cy) / fy
    ahead = pose.new_ones(height, width)
    rays = torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width), ahead])
    rays = torch.einsum("ij,jhw->ihw", pose[:3, :3], rays / rays.norm(dim=0))
    place = pose[:3, 3, None, None].expand_as(rays)
    return torch.cat([torch.linalg.cross(place, rays, dim=0), rays])
