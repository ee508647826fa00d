"""Devices by name, and the CPU as a device like any other."""
from __future__ import annotations

import pytest
import torch

from diffsynth_backend.core.device import available_device, empty_cache, get_device_type, memory_info, parse_device


def test_parsing():
    assert parse_device("cuda:1") == torch.device("cuda", 1) == parse_device(torch.device("cuda:1"))
    assert get_device_type("cuda:1") == "cuda" and get_device_type("cpu") == "cpu"
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        parse_device("gpu")


def test_the_cpu_has_memory_and_no_cache_to_empty():
    empty_cache("cpu")
    free, total = memory_info("cpu")
    assert 0 < free < total


def test_device_that_this_build_of_torch_does_not_know():
    with pytest.raises(ValueError, match="has no support for 'hpu'"):
        empty_cache("hpu")


def test_available_device_can_be_used():
    device = available_device()
    empty_cache(device)
    assert torch.ones(1, device=device).device.type == device.type
    assert all(figure > 0 for figure in memory_info(device))
