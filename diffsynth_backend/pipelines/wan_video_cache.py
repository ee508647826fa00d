"""TeaCache for Wan (arXiv 2411.19108): steps that change little reuse what the blocks added in the last computed one.

Notable: how much a step changes is estimated from the timestep's modulation alone, through a polynomial that was fitted
for one model; other models have none. What is remembered belongs to a step's number, so a step that is done again
(after memory ran out) decides again from the same state, and step 0 begins anew.
Source of the polynomials: the authors' repository (ali-vilab/TeaCache, TeaCache4Wan2.1).
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..diffusion import PipelineUnit

if TYPE_CHECKING:
    from .wan_video import WanVideoPipeline

# Coefficients of the fourth, third … power, for the relative change of the modulation from one step to the next.
POLYNOMIALS: dict[str, tuple[float, ...]] = {
    "Wan2.1-T2V-1.3B": (-5.21862437e+04, 9.23041404e+03, -5.28275948e+02, 1.36987616e+01, -4.99875664e-02),
    "Wan2.1-T2V-14B": (-3.03318725e+05, 4.90537029e+04, -2.65530556e+03, 5.87365115e+01, -3.15583525e-01),
    "Wan2.1-I2V-14B-480P": (2.57151496e+05, -3.54229917e+04, 1.40286849e+03, -1.35890334e+01, 1.32517977e-01),
    "Wan2.1-I2V-14B-720P": (8.10705460e+03, 2.13393892e+03, -3.72934672e+02, 1.66203073e+01, -4.17769401e-02),
}


@dataclass(frozen=True)
class _State:
    """After a step: its number, the change since the last computed one, its modulation, and what the blocks added."""

    step: int = -1
    change: float = 0.0
    modulation: Tensor | None = None
    residual: Tensor | None = None


class TeaCache:
    """One side's memory during a loop.

    `threshold`: the estimated change up to which steps are skipped, such as 0.05 … 0.3; more is faster and coarser.
    Raises ValueError for a model without a polynomial, and a threshold that is not above 0.
    """

    def __init__(self, model_id: str, threshold: float) -> None:
        if model_id not in POLYNOMIALS:
            raise ValueError(f"TeaCache has no calibration for {model_id!r}; give one of {', '.join(POLYNOMIALS)} as "
                             "tea_cache_model_id, or leave tea_cache_l1_thresh out")
        if not 0 < threshold < math.inf:
            raise ValueError(f"tea_cache_l1_thresh must be a number above 0, got {threshold!r}")
        self._polynomial, self._threshold = POLYNOMIALS[model_id], threshold
        self._before = self._now = _State()

    def run(self, blocks: Callable[[], Tensor], tokens: Tensor, modulation: Tensor, step: int, steps: int) -> Tensor:
        """The tokens after the blocks: `blocks()`, or what the last call of it added. `step` of `steps` counts from 0.

        The first and the last step are always computed.
        """
        if step != self._now.step:
            self._before = _State() if step == 0 else self._now
        before = self._before
        if before.residual is not None and step != steps - 1:
            change = before.change + self._estimate(modulation, before.modulation)
            if change < self._threshold:
                self._now = replace(before, step=step, change=change, modulation=modulation)
                return tokens + before.residual
        result = blocks()
        self._now = _State(step, 0.0, modulation, result - tokens)
        return result

    def _estimate(self, modulation: Tensor, previous: Tensor) -> float:
        x = float((modulation - previous).abs().mean() / previous.abs().mean())
        value = 0.0
        for coefficient in self._polynomial:
            value = value * x + coefficient
        return value


class WanVideoUnit_TeaCache(PipelineUnit):
    """A cache for each side.

    It asks for the latents to be made when the loop begins: what it remembers must not outlive the loop.
    """

    def __init__(self) -> None:
        super().__init__(seperate_cfg=True, input_params=("tea_cache_l1_thresh", "tea_cache_model_id", "latents"),
                         output_params=("tea_cache",))

    def process(self, pipe: WanVideoPipeline, tea_cache_l1_thresh: float | None,
                tea_cache_model_id: str | None, latents: Tensor) -> dict:
        if tea_cache_l1_thresh is None:
            return {}
        return {"tea_cache": TeaCache(tea_cache_model_id or "", tea_cache_l1_thresh)}
