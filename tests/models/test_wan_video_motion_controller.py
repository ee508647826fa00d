"""The motion controller against the same layers written out."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from diffsynth_backend.core.loader.file import hash_state_dict
from diffsynth_backend.models.wan_video_motion_controller import WanMotionControllerModel


def test_default_layout_is_the_published_checkpoint():
    with torch.device("meta"):
        assert hash_state_dict(WanMotionControllerModel().state_dict()) == "dbd5ec76bbf977983f972c151d545389"


@pytest.mark.parametrize("speed", [0.0, 1.0, 37.5, 100.0])
def test_a_speed_is_ten_timesteps(randomized, relative_error, speed):
    model = randomized(WanMotionControllerModel(freq_dim=8, dim=16))
    angles = torch.tensor([10 * speed * math.exp(-math.log(10000) * i / 4) for i in range(4)], dtype=torch.float64)
    x = torch.cat([angles.cos(), angles.sin()]).float()[None]
    for linear in (model.linear[0], model.linear[2]):
        x = F.silu(x @ linear.weight.T + linear.bias)
    wanted = x @ model.linear[4].weight.T + model.linear[4].bias
    found = model(torch.tensor([speed]), torch.float32)
    assert found.shape == (1, 6 * 16) and relative_error(found, wanted) <= 1e-5


def test_the_result_is_of_the_dtype_that_is_asked_for(randomized):
    model = randomized(WanMotionControllerModel(freq_dim=8, dim=16)).bfloat16()
    assert model(torch.tensor([7.0, 3.0]), torch.bfloat16).dtype == torch.bfloat16
