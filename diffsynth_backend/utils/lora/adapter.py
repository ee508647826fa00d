"""The mathematics of adapters: a change ΔW of a linear layer's weight in factors, and how it acts on an input.

LowRank    ΔW = up·down                              LoRA, Hu et al. 2021 (arXiv 2106.09685)
Hadamard   ΔW = (w1_a·w1_b) ⊙ (w2_a·w2_b)            LoHa, Hyeon-Woo et al. 2021 (arXiv 2108.06098)
Kronecker  ΔW = w1 ⊗ w2, either in two factors       LoKr, Edalati et al. 2022 (arXiv 2212.10650)
magnitude  m·(W + ΔW)/‖W + ΔW‖ instead of W + ΔW     DoRA, Liu et al. 2024 (arXiv 2402.09353)

Each is scaled by alpha/rank. The names of the factors are those of LyCORIS, whose files they come from.

Notable: at strength s a layer computes with W + s·(adapted(W) − W), for DoRA too. So strengths mean the same for all
kinds, several adapters add up whatever their order, and each is measured against the weight that the model came with.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.vram.adapters import Addition

NORM_FLOOR = torch.finfo(torch.float32).eps  # a weight without a direction keeps none


class Change(Protocol):
    """ΔW of shape (out, in), up to its scale."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What `add` computes with."""

    def matrix(self, device: torch.device) -> Tensor:
        """ΔW (out, in), float32, made on a device."""

    def add(self, y: Tensor, x: Tensor, scale: float, tensors: Sequence[Tensor]) -> None:
        """y (…, out) += scale · x ΔWᵀ, x (…, in)."""


def _wide(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    return [tensor.to(device, torch.float32) for tensor in tensors]


def _rows(tensor: Tensor) -> Tensor:
    return tensor.view(-1, tensor.shape[-1])


@dataclass(frozen=True, eq=False)
class LowRank:
    """down (rank, in), up (out, rank)."""

    down: Tensor
    up: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.down, self.up

    def matrix(self, device: torch.device) -> Tensor:
        down, up = _wide(self.tensors, device)
        return up @ down

    def add(self, y: Tensor, x: Tensor, scale: float, tensors: Sequence[Tensor]) -> None:
        down, up = tensors
        _rows(y).addmm_(_rows(F.linear(x, down)), up.t(), alpha=scale)


@dataclass(frozen=True, eq=False)
class Hadamard:
    """w1_a (out, r1), w1_b (r1, in), w2_a (out, r2), w2_b (r2, in).

    ΔW is made anew in each call: all of them in a large model would take as much memory as the model.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.w1_a, self.w1_b, self.w2_a, self.w2_b

    def matrix(self, device: torch.device) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = _wide(self.tensors, device)
        return (w1_a @ w1_b) * (w2_a @ w2_b)

    def add(self, y: Tensor, x: Tensor, scale: float, tensors: Sequence[Tensor]) -> None:
        w1_a, w1_b, w2_a, w2_b = tensors
        change = (w1_a @ w1_b) * (w2_a @ w2_b)
        _rows(y).addmm_(x.reshape(-1, x.shape[-1]), change.t(), alpha=scale)


@dataclass(frozen=True, eq=False)
class Kronecker:
    """w1 (a, b) and w2 (c, d) for out = a·c, in = b·d; each whole or as its two factors."""

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1[0].shape[0] * self.w2[0].shape[0], self.w1[-1].shape[1] * self.w2[-1].shape[1]

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        return _product(_wide(self.w1, self.w1[0].device)), *self.w2

    def matrix(self, device: torch.device) -> Tensor:
        return torch.kron(_product(_wide(self.w1, device)), _product(_wide(self.w2, device)))

    def add(self, y: Tensor, x: Tensor, scale: float, tensors: Sequence[Tensor]) -> None:
        w1, *w2 = tensors
        inner = x.unflatten(-1, (w1.shape[1], w2[-1].shape[1]))  # (…, b, d)
        for factor in reversed(w2):
            inner = F.linear(inner, factor)  # in the end (…, b, c)
        y.add_((w1 @ inner).flatten(-2), alpha=scale)


def _product(factors: Sequence[Tensor]) -> Tensor:
    return factors[0] @ factors[1] if len(factors) == 2 else factors[0]


# ---- adapters -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Adapter:
    """What a file says about one layer: a change, its scale, and the magnitude of DoRA's (out, 1) or (1, in).

    `keys` are those of the file that it was made of.
    """

    change: Change
    scale: float
    magnitude: Tensor | None
    keys: tuple[str, ...]

    def addition(self, strength: float, weight: Callable[[], Tensor]) -> Addition:
        """For a layer that has this `weight` (out, in), which is only asked for where it is needed."""
        if self.magnitude is None:
            return _Plain(self.change, self.scale * strength)
        return _Decomposed(self.change, self.scale, strength, self._gain(weight()) - 1)

    def changed(self, weight: Tensor, strength: float) -> Tensor:
        """What the strength makes of a weight, as a difference (out, in) in float32."""
        change = self.scale * self.change.matrix(weight.device)
        if self.magnitude is None:
            return strength * change
        weight = weight.float()
        return strength * (self._gain(weight) * (weight + change) - weight)

    def _gain(self, weight: Tensor) -> Tensor:
        """Magnitude over norm, by output (out, 1) or by input (1, in)."""
        adapted = weight.float() + self.scale * self.change.matrix(weight.device)
        along = 1 if self.magnitude.shape[1] == 1 else 0
        return self.magnitude.to(adapted) / adapted.norm(dim=along, keepdim=True).clamp_min(NORM_FLOOR)


@dataclass(frozen=True, eq=False)
class _Plain:
    """scale · x ΔWᵀ"""

    change: Change
    scale: float

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.change.tensors

    def add(self, y: Tensor, x: Tensor, weight: Tensor, tensors: Sequence[Tensor]) -> None:
        self.change.add(y, x, self.scale, tensors)


@dataclass(frozen=True, eq=False)
class _Decomposed:
    """strength · x (g·(W + ΔW) − W)ᵀ, where `excess` is g − 1: near zero, so that a narrow dtype keeps it well."""

    change: Change
    scale: float
    strength: float
    excess: Tensor  # (out, 1) or (1, in)

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.excess, *self.change.tensors

    def add(self, y: Tensor, x: Tensor, weight: Tensor, tensors: Sequence[Tensor]) -> None:
        excess, *factors = tensors
        if self.excess.shape[1] == 1:  # by output: ΔW + (g − 1)·(W + ΔW)
            change = torch.zeros_like(y)
            self.change.add(change, x, self.scale, factors)
            difference = change + excess[:, 0] * (F.linear(x, weight) + change)
        else:  # by input: the same on the other side
            excessive = x * excess[0]
            difference = F.linear(excessive, weight)
            self.change.add(difference, x + excessive, self.scale, factors)
        y.add_(difference, alpha=self.strength)
