"""Attention in which not every token sees every other one, without a mask of the size of the attention.

Notable: queries that see the same keys are one group, and each group is one unmasked attention over its keys, so that
every implementation serves and nothing of tokens × tokens exists.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import attention


@dataclass(frozen=True)
class Group:
    """Queries that see the same keys. Both are indices (int64) into their sequences; `mask` as for `attention`."""

    queries: Tensor  # (Q,)
    keys: Tensor  # (K,)
    mask: Tensor | None = None  # broadcasts to (B, heads, Q, K)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, groups: Iterable[Group]) -> Tensor:
    """q (B, heads, S, head_dim), k and v (B, heads, S', head_dim) → (B, heads, S, head_dim).

    Each query has to be in exactly one of the groups. Besides inputs and result it holds one group's at a time.
    """
    out = torch.empty_like(q)
    for group in groups:
        seen = attention(q.index_select(2, group.queries), k.index_select(2, group.keys),
                         v.index_select(2, group.keys), mask=group.mask)
        out.index_copy_(2, group.queries, seen)
    return out


def region_groups(prompts: Sequence[int], regions: Tensor, others: int = 0,
                  keep: Tensor | None = None) -> tuple[Group, ...]:
    """Who sees whom with prompts for regions (EliGen, arXiv 2501.01097), in a sequence of prompts, image and others.

    prompts   how many tokens each has; the last one is for the whole image
    regions   bool (prompts − 1, image tokens): what the others are for; at least one
    others    how many tokens follow that are seen by all, and see nobody
    keep      bool (B, tokens of the sequence), which of them are seen at all; None: every one

    A prompt sees itself and its region, the image sees itself and the prompts for it. Image tokens that lie in the same
    regions are one group.
    """
    device = regions.device
    text, size = sum(prompts), regions.shape[1]
    spans = torch.arange(text, device=device).split(list(prompts))
    image = torch.arange(text, text + size, device=device)
    last = torch.arange(text + size, text + size + others, device=device)
    seen = [(span, [span, image[region], last]) for span, region in zip(spans, regions)]
    seen.append((spans[-1], [spans[-1], image, last]))
    sets, members = torch.unique(regions, dim=1, return_inverse=True)  # (prompts − 1, sets) and (image tokens,)
    for number, inside in enumerate(sets.T.tolist()):
        known = [span for span, is_known in zip(spans, [*inside, True]) if is_known]
        seen.append((image[members == number], [*known, image, last]))
    groups = [(queries, torch.cat(keys)) for queries, keys in seen]
    return tuple(Group(queries, keys, None if keep is None else keep[:, None, None, keys]) for queries, keys in groups)
