"""Camera paths and their adapter, each against the same thing written out for one pixel or one frame."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffsynth_backend.models.wan_video_camera_controller import DIRECTIONS, ORIGIN, camera_control, camera_poses
from diffsynth_backend.models.wan_video_dit import CameraAdapter

pytestmark = pytest.mark.usefixtures("one_thread")

SPEED = 1 / 20


def ray(direction: str, frame: int, row: int, column: int, height: int, width: int) -> list[float]:
    """Moment and direction of the ray through one pixel, from the published numbers of a camera."""
    camera = list(ORIGIN)
    for word, place, sign in (("Left", 9, 1), ("Right", 9, -1), ("Up", 13, 1), ("Down", 13, -1), ("In", 18, -1),
                              ("Out", 18, 1)):
        camera[place] += sign * SPEED * frame if word in direction else 0
    to_camera = torch.tensor([*camera[7:], 0, 0, 0, 1], dtype=torch.float64).view(4, 4)
    pose = torch.linalg.inv(to_camera)  # the first camera is the world's own system
    fx, fy, cx, cy = camera[1:5]
    if width / height < 1280 / 720:
        fx *= height * 1280 / 720 / width
    else:
        fy *= width / (1280 / 720) / height
    seen = torch.tensor([(column + 0.5 - cx * width) / (fx * width), (row + 0.5 - cy * height) / (fy * height), 1.0],
                        dtype=torch.float64)
    along = pose[:3, :3] @ (seen / seen.norm())
    x, y, z = pose[:3, 3].tolist()
    a, b, c = along.tolist()
    return [y * c - z * b, z * a - x * c, x * b - y * a, a, b, c]


@pytest.mark.parametrize("height, width", [(16, 48), (48, 16), (9, 16)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rays_go_through_their_pixels(direction, height, width):
    control = camera_control(direction, 9, height, width, SPEED)
    assert control.shape == (1, 24, 3, height, width) and control.dtype == torch.float32
    for frame, row, column in ((0, 0, 0), (1, height - 1, 3), (4, 5, width - 1), (8, 2, 7)):
        latent, place = (0, 3) if frame == 0 else divmod(frame + 3, 4)
        found = control[0, :, latent, row, column].view(6, 4)[:, place].tolist()
        assert found == pytest.approx(ray(direction, frame, row, column, height, width), abs=1e-6)


def test_the_first_frame_counts_four_times():
    control = camera_control("In", 5, 8, 8, SPEED).view(6, 4, 2, 8, 8)
    assert (control[:, :, 0] == control[:, :1, 0]).all() and not (control[:, 1:, 1] == control[:, :1, 1]).all()


def test_directions_move_the_camera_as_they_say():
    assert torch.equal(camera_poses("Left", 1), torch.eye(4, dtype=torch.float64)[None])
    assert camera_poses("In", 3, 0.5)[2, :3, 3].tolist() == [0, 0, 1]  # forwards, as far as two steps
    left, right = camera_poses("Left", 2, 0.5)[1], camera_poses("Right", 2, 0.5)[1]
    assert math.copysign(1, left[0, 2]) == -math.copysign(1, right[0, 2])


@pytest.mark.parametrize("arguments, message", [
    (("Sideways", 5, 8, 8), "unknown camera direction 'Sideways'; expected one of Left, Right"),
    (("Left", 6, 8, 8), "num_frames is 6; expected a multiple of 4, plus 1"),
    (("Left", 5, 8, 8, 0.1, (0, 1)), "19 numbers .* and origin 2"),
])
def test_what_is_no_path_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        camera_control(*arguments)


# ---- the adapter ----------------------------------------------------------------------------------------------------

def plain_adapter(adapter: CameraAdapter, frame: Tensor) -> Tensor:
    """One frame (3, H, W) → (dim, H/16, W/16): 8×8 pixels are channels, 2×2 of those squares one token."""
    channels, height, width = frame.shape
    packed = torch.stack([frame[c, i::8, j::8] for c in range(channels) for i in range(8) for j in range(8)])
    tokens = torch.stack([(packed[:, row:row + 2, column:column + 2] * adapter.conv.weight).sum((1, 2, 3))
                          for row in range(0, height // 8, 2) for column in range(0, width // 8, 2)])
    x = (tokens + adapter.conv.bias).T.unflatten(1, (height // 16, width // 16))
    block = adapter.residual_blocks[0]
    inside = F.conv2d(x[None], block.conv1.weight, block.conv1.bias, padding=1).clamp(min=0)
    return x + F.conv2d(inside, block.conv2.weight, block.conv2.bias, padding=1)[0]


def test_the_adapter_works_frame_by_frame(randomized, relative_error):
    adapter = randomized(CameraAdapter(3, 8, (2, 2)))
    control = torch.randn(2, 3, 3, 32, 48)
    found = adapter(control)
    wanted = torch.stack([torch.stack([plain_adapter(adapter, frame) for frame in video.unbind(1)], dim=1)
                          for video in control])
    assert found.shape == (2, 8, 3, 2, 3) and relative_error(found, wanted) <= 1e-5
