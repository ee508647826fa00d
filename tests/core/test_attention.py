"""Attention goes through one door, and a misspelt choice of implementation is an error."""
from __future__ import annotations

import pytest
import torch

from diffsynth_backend.core.attention import IMPLEMENTATIONS, attention
from diffsynth_backend.core.environment import EnvironmentValueError


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1]**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_each_implementation_computes_the_formula(monkeypatch, name, masked):
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", name)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=generator) for _ in range(3))
    mask = (torch.arange(7) < 5).expand(2, 1, 1, 7) if masked else None
    torch.testing.assert_close(attention(q, k, v, mask=mask), formula(q, k, v, mask))


def test_a_misspelt_implementation_names_the_variable_and_the_choices(monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "flesh")
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(EnvironmentValueError, match="DIFFSYNTH_ATTENTION_IMPLEMENTATION='flesh'.*torch"):
        attention(q, q, q)
