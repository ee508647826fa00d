"""The memory adapter by itself: what a model has on a device, and leaving it."""
from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from tests.helpers.pack import submodule

CPU = torch.device("cpu")
FIELDS = {f"{state}_{part}": value for state in ("offload", "onload", "preparing", "computation")
          for part, value in (("dtype", torch.float32), ("device", "cpu"))}


@pytest.fixture(scope="module")
def memory(pack):
    return submodule("nodes.memory")


@pytest.fixture
def managed(pack):
    vram = submodule("diffsynth_backend.core.vram")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    return vram.enable_vram_management(model, {nn.Linear: vram.AutoWrappedLinear}, FIELDS)


def test_sizes(memory):
    model = nn.Linear(10, 10)
    adapter = memory.adapter_of(model, CPU, torch.float32, None)
    assert adapter.model_size() == adapter.loaded_size() == 440 and adapter.current_loaded_device() == CPU
    assert memory.adapter_of(model, CPU, torch.float32, None) is adapter
    assert memory.adapter_of(nn.Linear(10, 10), CPU, torch.bfloat16, 100).model_size() == 100


def test_the_adapter_lives_as_long_as_its_model_and_no_longer(memory):
    model = nn.Linear(2, 2)
    adapter = weakref.ref(memory.adapter_of(model, CPU, torch.float32, None))
    gone = weakref.ref(model)
    assert adapter().model is model
    gc.disable()
    try:
        del model
        assert gone() is None and adapter() is None
    finally:
        gc.enable()


def test_layers_that_move_by_themselves_are_sent_to_where_they_rest(memory, managed):
    vram = submodule("diffsynth_backend.core.vram")
    adapter = memory.adapter_of(managed, CPU, torch.float32, None)
    vram.onload_model(managed)
    adapter.in_use = True
    adapter.partially_unload(CPU, 1)
    assert [layer.state for layer in vram.iter_managed(managed)] == [1, 1], "at work: stays"
    adapter.in_use = False
    adapter.detach(unpatch_all=False)
    assert [layer.state for layer in vram.iter_managed(managed)] == [1, 1], "loaded once more: stays"
    adapter.detach()
    assert [layer.state for layer in vram.iter_managed(managed)] == [0, 0]


def test_a_model_as_a_whole_leaves_and_comes_back_as_it_was(memory):
    model = nn.Linear(3, 3).requires_grad_(False)
    before = model.weight.clone()
    adapter = memory.adapter_of(model, CPU, torch.float32, None)
    with torch.inference_mode():
        adapter.partially_unload(CPU, 1)
        adapter.partially_load(CPU, 1e32)
    assert torch.equal(model.weight, before) and not model.weight.is_inference()


def test_it_has_what_the_manager_calls(memory):
    for name in ("model", "load_device", "offload_device", "parent", "is_dynamic", "is_clone", "model_patches_models",
                 "model_patches_to", "model_dtype", "model_size", "loaded_size", "current_loaded_device",
                 "lowvram_patch_counter", "partially_load", "partially_unload", "detach"):
        assert hasattr(memory.adapter_of(nn.Linear(1, 1), CPU, torch.float32, None), name)
