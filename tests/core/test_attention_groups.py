"""Attention by groups equals attention with the mask that the groups stand for, and holds nothing of its size."""
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffsynth_backend.core.attention import attention, groups as groups_module
from diffsynth_backend.core.attention.groups import Group, grouped_attention, region_groups


def mask_of(groups: tuple[Group, ...], queries: int, keys: int) -> Tensor:
    """What the groups say, as bool (queries, keys); each query must be in one of them, once."""
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    assert sorted(torch.cat([group.queries for group in groups]).tolist()) == list(range(queries))
    for group in groups:
        mask[group.queries[:, None], group.keys] = True
    return mask


def wanted_mask(prompts: list[int], regions: Tensor, others: int) -> Tensor:
    """Written out pair by pair."""
    owner = [number for number, length in enumerate(prompts) for _ in range(length)]
    text, image = len(owner), regions.shape[1]
    inside = torch.cat([regions, torch.ones(1, image, dtype=torch.bool)])  # the last prompt is for the whole image

    def sees(query: int, key: int) -> bool:
        if key >= text + image:
            return True
        if query < text and key < text:
            return owner[query] == owner[key]
        if query >= text and key >= text:
            return True
        token, prompt = (key, query) if query < text else (query, key)
        return bool(inside[owner[prompt], token - text])

    return torch.tensor([[sees(query, key) for key in range(text + image + others)] for query in range(text + image)])


REGIONS = {
    "one": (torch.arange(12) < 5)[None],
    "apart": torch.stack([torch.arange(12) < 5, torch.arange(12) >= 7]),
    "overlapping": torch.stack([torch.arange(12) < 8, torch.arange(12) % 3 == 0, torch.arange(12) >= 4]),
    "empty and full": torch.stack([torch.zeros(12, dtype=torch.bool), torch.ones(12, dtype=torch.bool)]),
}


@pytest.mark.parametrize("regions", REGIONS.values(), ids=REGIONS)
@pytest.mark.parametrize("others", [0, 3])
def test_groups_say_who_sees_whom(regions, others):
    prompts = [2, 3, 1, 4][-len(regions) - 1:]
    groups = region_groups(prompts, regions, others)
    text = sum(prompts)
    assert torch.equal(mask_of(groups, text + 12, text + 12 + others), wanted_mask(prompts, regions, others))


@pytest.mark.parametrize("padded", [False, True])
def test_grouped_attention_equals_the_masked_one(padded):
    torch.manual_seed(0)
    prompts, regions, others = [2, 3, 1, 4], REGIONS["overlapping"], 3
    keep = torch.ones(2, 25, dtype=torch.bool)
    if padded:
        keep[0, 8:10] = keep[1, 9:10] = False
    mask = wanted_mask(prompts, regions, others)[None, None] & keep[:, None, None]
    q, k, v = torch.randn(2, 3, 22, 8), torch.randn(2, 3, 25, 8), torch.randn(2, 3, 25, 8)
    found = grouped_attention(q, k, v, region_groups(prompts, regions, others, keep if padded else None))
    torch.testing.assert_close(found, attention(q, k, v, mask), rtol=1e-5, atol=1e-6)


def test_nothing_is_masked_where_nothing_is_padded(monkeypatch):
    masks = []

    def note(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        masks.append(mask)
        return attention(q, k, v, mask)

    monkeypatch.setattr(groups_module, "attention", note)
    groups = region_groups([2, 3, 1, 4], REGIONS["overlapping"])
    x = torch.randn(1, 1, 22, 8)
    grouped_attention(x, x, x, groups)
    assert masks == [None] * len(groups)


def test_four_entities_at_full_size_take_less_than_a_hundredth_of_a_mask():
    """1328²: 83 × 83 tokens, five prompts of 100."""
    canvas = torch.zeros(4, 83, 83, dtype=torch.bool)
    canvas[0, 5:40, 5:40] = canvas[1, 20:60, 30:70] = canvas[2, 50:80, 2:30] = canvas[3, 0:83, 60:83] = True
    groups = region_groups([100] * 5, canvas.flatten(1))
    indices = sum(tensor.numel() * tensor.element_size() for group in groups for tensor in (group.queries, group.keys))
    tokens = 83 * 83 + 500
    assert len(groups) == 5 + 7  # prompts, and the sets of regions that occur
    assert indices < tokens * tokens * 2 / 100  # of a mask that is added, in bf16
