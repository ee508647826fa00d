"""skip_model_initialization: parameters without storage, real buffers, and no effect on other threads."""
from __future__ import annotations

import threading

import psutil
import pytest
import torch
from torch import nn

from diffsynth_backend.core import skip_model_initialization
from diffsynth_backend.models.qwen_image_dit import QwenImageDiT


class WithBuffers(nn.Module):
    """A linear layer beside buffers that only the constructor computes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.extra = nn.ParameterList([torch.ones(2)])
        self.register_buffer("frequencies", 1 / 10000 ** (torch.arange(4) / 4), persistent=False)
        self.register_buffer("count", torch.tensor(7))


def test_parameters_are_on_meta_and_buffers_are_real():
    with skip_model_initialization():
        model = WithBuffers()
    assert {name for name, p in model.named_parameters() if p.is_meta} == {"linear.weight", "linear.bias", "extra.0"}
    assert all(p.requires_grad and isinstance(p, nn.Parameter) for p in model.parameters())
    assert torch.equal(model.frequencies, WithBuffers().frequencies) and model.count.item() == 7


def test_documented_use():
    torch.manual_seed(0)
    source = WithBuffers()
    with skip_model_initialization():
        model = WithBuffers()
    model.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 4)
    assert torch.equal(model.linear(x), source.linear(x))


def test_tied_weights_stay_tied():
    with skip_model_initialization():
        embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        head.weight = embedding.weight
    assert head.weight is embedding.weight and head.weight.is_meta


def test_nested_blocks_and_exceptions_switch_off_in_the_end():
    with skip_model_initialization():
        with skip_model_initialization():
            pass
        assert nn.Linear(2, 2).weight.is_meta
    with pytest.raises(RuntimeError, match="stop"), skip_model_initialization():
        raise RuntimeError("stop")
    assert not nn.Linear(2, 2).weight.is_meta


def test_other_threads_build_as_always():
    built = []
    with skip_model_initialization():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        assert nn.Linear(2, 2).weight.is_meta
    assert not built[0].weight.is_meta


def test_twenty_billion_parameters_take_no_memory():
    process = psutil.Process()
    before = process.memory_info().rss
    with skip_model_initialization():
        model = QwenImageDiT()
    assert sum(p.numel() for p in model.parameters()) > 20e9
    assert process.memory_info().rss - before < 100 * 2**20
