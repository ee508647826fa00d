"""A small network and its weights on disk, for the tests of streaming."""
from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth_backend.core.vram import DiskMap
from tests.helpers.streamed import BF16, Net


@pytest.fixture
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False).to(BF16)


@pytest.fixture
def disk_map(net: Net, tmp_path: Path) -> DiskMap:
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    return DiskMap(str(tmp_path / "net.safetensors"))
