"""Attention through one door, so that a faster kernel is a row in a table and not an edit in every model.

`DIFFSYNTH_ATTENTION_IMPLEMENTATION` chooses; where it is unset, what the program around us prefers; else "auto", which
is torch's own. What the others take is in `kernels`; what they do not take goes to torch's.
"""
from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..environment import ATTENTION, EnvironmentValueError, choice
from .kernels import KERNELS, AttentionUnavailable, torch_attention

__all__ = ["AttentionUnavailable", "IMPLEMENTATIONS", "attention", "chosen", "prefer", "register"]

Attention = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]

IMPLEMENTATIONS: dict[str, Attention] = {"torch": torch_attention, "auto": torch_attention, **KERNELS}
_preferred = "auto"


def register(name: str, implementation: Attention) -> None:
    """Add an implementation that the program around us brings. It is called as `attention` is, with all four."""
    IMPLEMENTATIONS[name] = implementation


def prefer(name: str, setting: str) -> None:
    """Choose for as long as the environment does not; `setting` is what the user knows this choice by.

    Raises EnvironmentValueError for a name that is not in IMPLEMENTATIONS.
    """
    global _preferred
    if name not in IMPLEMENTATIONS:
        raise EnvironmentValueError(setting, name, tuple(IMPLEMENTATIONS))
    _preferred = name


def chosen() -> str:
    """The implementation in use, a key of IMPLEMENTATIONS.

    Raises EnvironmentValueError if DIFFSYNTH_ATTENTION_IMPLEMENTATION is a name that is not there.
    """
    return choice(ATTENTION, _preferred, tuple(IMPLEMENTATIONS))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of q, k, v (B, heads, S, head_dim) → (B, heads, S, head_dim).

    `mask` broadcasts to (B, heads, S, S): boolean (True takes part) or added to the scores. Raises as `chosen` does,
    and AttentionUnavailable if the chosen implementation's package is missing or broken.
    """
    return IMPLEMENTATIONS[chosen()](q, k, v, mask)
