"""How fast things move in a video, as an addition to the denoiser's time modulation.

Key names: `DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1` (6 tensors), made for `Wan-AI/Wan2.1-T2V-1.3B`.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .general_modules import timestep_frequencies

TIMESTEP_PER_BUCKET = 10.0  # so that the fastest, 100, has the features of timestep 1000


class WanMotionControllerModel(nn.Module):
    """Speed → `motion` of `WanModel.forward`. Depends on the speed alone: run it once, not per step."""

    def __init__(self, freq_dim: int = 256, dim: int = 1536) -> None:
        super().__init__()
        self.freq_dim = freq_dim
        self.linear = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(),
                                    nn.Linear(dim, 6 * dim))

    def forward(self, motion_bucket_id: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,), 0 (still) … 100 → (B, 6·dim) in `dtype`."""
        features = timestep_frequencies(motion_bucket_id, self.freq_dim, scale=TIMESTEP_PER_BUCKET)
        return self.linear(features.to(dtype))
