"""Nodes that stand in most graphs of these tests, with their usual inputs."""
from __future__ import annotations

from typing import Any

from torch import Tensor

STEPS = {"schedule": "steps", "steps": 2, "denoise": 1.0}


def denoise(run, pipeline, conditioning, samples: Tensor | None, **changes: Any) -> Tensor:
    """What Denoise draws; `changes` replace its inputs."""
    inputs = {"latent": {"samples": samples}, "seed": 1, "cfg": 4.0, "schedule": STEPS, "cfg_norm": False, **changes}
    return run("Denoise", pipeline=pipeline, conditioning=conditioning, **inputs)["samples"]
