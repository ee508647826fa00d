"""Attention through one door, so that a faster kernel is a row in a table and not an edit in every model.

`DIFFSYNTH_ATTENTION_IMPLEMENTATION` chooses; "auto" takes torch's own, which picks flash, memory-efficient or cuDNN
kernels by itself.
"""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..environment import ATTENTION, choice


def _torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


IMPLEMENTATIONS = {"torch": _torch, "auto": _torch}


def chosen() -> str:
    """The implementation that DIFFSYNTH_ATTENTION_IMPLEMENTATION chooses, a key of IMPLEMENTATIONS.

    Raises EnvironmentValueError for a name that is not there.
    """
    return choice(ATTENTION, "auto", tuple(IMPLEMENTATIONS))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of q, k, v (B, heads, S, head_dim) → (B, heads, S, head_dim).

    `mask` broadcasts to (B, heads, S, S): boolean (True takes part) or added to the scores. Raises as `chosen` does.
    """
    return IMPLEMENTATIONS[chosen()](q, k, v, mask)
