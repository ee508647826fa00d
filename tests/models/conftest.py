"""What the model tests share: random weights, and the measure by which two results are compared."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def randomized() -> Callable[[nn.Module], nn.Module]:
    """Move every weight away from its initial value: norms that start at one would hide a swapped pair."""
    def apply(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval().requires_grad_(False)
    return apply


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """‖ours − theirs‖ / ‖theirs‖; shapes must be equal, so that nothing is broadcast."""
    def measure(ours: Tensor, theirs: Tensor) -> float:
        assert ours.shape == theirs.shape
        return float((ours - theirs).norm() / theirs.norm())
    return measure
