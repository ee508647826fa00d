"""Watching a load: each tensor is told of before it is read, with its file, and whoever watches may stop it."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth_backend.core import AutoWrappedLinear, load_model
from diffsynth_backend.core.loader.watch import LoadStep, watch_loading, watched

FIELDS = {f"{state}_{part}": value for state in ("offload", "onload", "preparing", "computation")
          for part, value in (("dtype", torch.float32), ("device", "cpu"))}
ON_DISK = {"offload_dtype": "disk", "offload_device": "disk", "onload_dtype": "disk", "onload_device": "disk",
           "computation_dtype": torch.float32, "computation_device": "cpu"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)


@pytest.fixture
def shards(tmp_path) -> list[str]:
    """c with a piece of a in the second of two files."""
    state = {name: tensor.detach() for name, tensor in Net().state_dict().items()}
    files = [str(tmp_path / f"net-0000{i}-of-00002.safetensors") for i in (1, 2)]
    save_file({"a.weight": state["a.weight"], "b.weight": state["b.weight"]}, files[0])
    save_file({"old_c": state["c.weight"].T.contiguous()}, files[1])
    return files


def converter(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"c.weight" if name == "old_c" else name: tensor.T if name == "old_c" else tensor
            for name, tensor in stored.items()}


@pytest.mark.parametrize("management", [{}, {"module_map": {nn.Linear: AutoWrappedLinear}, "vram_config": FIELDS}],
                         ids=["plain", "managed"])
@pytest.mark.parametrize("use_disk_map", [False, True])
def test_each_tensor_is_told_of_with_its_shard(shards, management, use_disk_map):
    steps: list[LoadStep] = []
    with watch_loading(steps.append):
        model = load_model(Net, shards, torch_dtype=torch.float32, state_dict_converter=converter,
                           use_disk_map=use_disk_map, **management)
    assert sorted((Path(step.file).name, step.shard) for step in steps) == [
        (Path(shards[0]).name, 1), (Path(shards[0]).name, 1), (Path(shards[1]).name, 2)]
    assert {(step.shards, step.total_bytes) for step in steps} == {(2, 4 * (64 + 64 + 32))}
    done = [step.done_bytes for step in steps]
    assert done[0] == 0 and done == sorted(set(done)) and done[-1] < steps[0].total_bytes
    plain = load_model(Net, shards, torch_dtype=torch.float32, state_dict_converter=converter)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_weights_that_stay_on_disk_are_told_of_once_and_stay_there(shards):
    steps: list[LoadStep] = []
    with watch_loading(steps.append):
        model = load_model(Net, shards, state_dict_converter=converter, vram_config=ON_DISK,
                           module_map={nn.Linear: AutoWrappedLinear})
    assert [(step.shard, step.done_bytes) for step in steps] == [(1, 0)]
    assert all(parameter.is_meta for parameter in model.parameters())


class Stopped(BaseException):
    """As ComfyUI's interrupt: not an Exception."""


def test_a_watcher_stops_the_loading_and_the_next_works(shards):
    steps: list[LoadStep] = []

    def stop_at_second(step: LoadStep) -> None:
        steps.append(step)
        if len(steps) == 2:
            raise Stopped

    with pytest.raises(Stopped), watch_loading(stop_at_second):
        load_model(Net, shards, state_dict_converter=converter)
    load_model(Net, shards, state_dict_converter=converter)
    assert len(steps) == 2, "nobody watches any more"


def test_a_converter_that_computes_with_values_is_watched_all_the_same(shards):
    def computes(stored: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor + 1 for name, tensor in converter(stored).items()}

    steps: list[LoadStep] = []
    with watch_loading(steps.append):
        load_model(Net, shards, state_dict_converter=computes)
    assert len(steps) == 3 and {step.shard for step in steps} == {1}, "which shard it is cannot be known"


def test_without_a_watcher_nothing_is_wrapped(shards):
    weights = {"a": torch.zeros(1)}
    assert watched(weights, shards, None, stay_on_disk=False) is weights
