"""ModelPool: recognition by hash, the documented messages, models by name, and what it says about unknown files."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import diffsynth_backend
from diffsynth_backend.configs.model_configs import MODEL_CONFIGS
from diffsynth_backend.core import hash_model_file
from diffsynth_backend.core.loader.file import ModelFileError
from diffsynth_backend.core.vram import ResidencyBudget, iter_managed
from diffsynth_backend.models.model_loader import ModelPool

ROOT = Path(diffsynth_backend.__file__).parents[1]


class Small(nn.Module):
    def __init__(self, depth: int = 6, head: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(depth))
        if head:
            self.head = nn.Linear(3, 1)


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)


def strip(state_dict: dict) -> dict:
    return {name.removeprefix("conv_"): state_dict[name] for name in state_dict if name.startswith("conv_")}


@pytest.fixture
def registry():
    """The registry as an empty list for the length of a test: programs may change it in place."""
    rows = list(MODEL_CONFIGS)
    MODEL_CONFIGS.clear()
    yield MODEL_CONFIGS
    MODEL_CONFIGS[:] = rows


@pytest.fixture
def small(registry, tmp_path: Path) -> str:
    """A file that the registry knows as "small"."""
    path = str(tmp_path / "small.safetensors")
    save_file(Small().state_dict(), path)
    registry.append({"model_hash": hash_model_file(path), "model_name": "small", "model_class": Small})
    return path


def saved(tmp_path: Path, name: str, tensors: dict) -> str:
    save_file(tensors, tmp_path / name)
    return str(tmp_path / name)


def test_known_file_is_loaded_to_the_cpu_in_bfloat16_with_the_documented_messages(small, caplog):
    caplog.set_level("INFO")
    pool = ModelPool()
    pool.auto_load_model([small])
    model = pool.fetch_model("small")
    assert isinstance(model, Small) and not list(iter_managed(model))
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "cpu")}
    loading, loaded = (record.getMessage() for record in caplog.records)
    assert loading == "Loading models from: " + json.dumps([small], indent=4)
    summary = {"model_name": "small", "model_class": f"{__name__}.Small", "extra_kwargs": None}
    assert loaded == "Loaded model: " + json.dumps(summary, indent=4)
    assert (pool.loaded[0].name, pool.loaded[0].paths) == ("small", (small,))


MESSAGES = """
import json, sys
from diffsynth_backend.configs.model_configs import MODEL_CONFIGS
from diffsynth_backend.core import hash_model_file
from diffsynth_backend.models.model_loader import ModelPool
path = sys.argv[1]
MODEL_CONFIGS.append({"model_hash": hash_model_file(path), "model_name": "norm", "extra_kwargs": {"dim": 3},
                      "model_class": "models.general_modules.RMSNorm"})
ModelPool(), ModelPool().auto_load_model([path])
import logging
logging.basicConfig(stream=sys.stderr, level="INFO", format="seen %(message)s")
ModelPool().auto_load_model([path])
"""


def test_a_script_without_logging_sees_the_messages_on_stdout(tmp_path):
    path = saved(tmp_path, "norm.safetensors", {"weight": torch.ones(3)})
    result = subprocess.run([sys.executable, "-c", MESSAGES, path], capture_output=True, text=True, check=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})
    summary = {"model_name": "norm", "model_class": "diffsynth_backend.models.general_modules.RMSNorm",
               "extra_kwargs": {"dim": 3}}
    expected = f"Loading models from: {json.dumps([path], indent=4)}\nLoaded model: {json.dumps(summary, indent=4)}\n"
    assert result.stdout == expected
    assert result.stderr.count("seen Load") == 2


def test_every_row_of_a_hash_is_loaded(registry, tmp_path):
    path = saved(tmp_path, "both.safetensors", {"conv_conv.weight": torch.ones(1, 1, 1, 1),
                                                "conv_conv.bias": torch.ones(1), "weight": torch.ones(2, 2)})
    model_hash = hash_model_file(path)
    registry += [
        {"model_hash": model_hash, "model_name": "other", "model_class": Other, "state_dict_converter": strip},
        {"model_hash": model_hash, "model_name": "linear", "model_class": "torch.nn.Linear",
         "extra_kwargs": {"in_features": 2, "out_features": 2, "bias": False},
         "state_dict_converter": lambda state_dict: {"weight": state_dict["weight"]}},
    ]
    pool = ModelPool()
    pool.auto_load_model(path)
    assert isinstance(pool.fetch_model("other"), Other) and isinstance(pool.fetch_model("linear"), nn.Linear)


def test_absent_and_several_models(small, tmp_path):
    second = saved(tmp_path, "second.safetensors", Small().state_dict())
    pool = ModelPool()
    assert pool.fetch_model("small") is None and pool.fetch_model("small", "all") == []
    pool.auto_load_model(small)
    pool.auto_load_model(second)
    models = [entry.model for entry in pool.loaded]
    assert pool.fetch_model("small", 1) is models[1] and pool.fetch_model("small", [1, 0]) == models[::-1]
    assert pool.fetch_model("small", "all") == models
    with pytest.raises(ValueError, match=r"2 models are called small: 0: .*small\.safetensors; 1: .*second"):
        pool.fetch_model("small")
    with pytest.raises(IndexError, match="index 2 asked for, 2 loaded"):
        pool.fetch_model("small", 2)
    with pytest.raises(TypeError, match="index 'first'"):
        pool.fetch_model("small", "first")


def test_management_needs_both_fields_of_offload(small):
    bf16_cpu = {"onload_dtype": torch.bfloat16, "onload_device": "cpu", "computation_dtype": torch.float32,
                "computation_device": "cpu"}
    pool = ModelPool()
    pool.auto_load_model(small, vram_config={**bf16_cpu, "offload_dtype": torch.bfloat16, "offload_device": None})
    pool.auto_load_model(small, vram_config={**bf16_cpu, "offload_dtype": "disk", "offload_device": "disk"},
                         vram_limit=1)
    plain, managed = pool.fetch_model("small", "all")
    assert not list(iter_managed(plain)) and plain.layers[0].weight.dtype == torch.float32
    assert list(iter_managed(managed)) == [managed] and managed.vram_management_enabled
    assert pool.loaded[1].vram_limit == 1 and pool.loaded[1].vram_config["offload_dtype"] == "disk"


def test_models_with_one_limit_share_one_budget(small):
    vram_config = {"offload_dtype": "disk", "offload_device": "disk"}
    pool, own = ModelPool(), ResidencyBudget(5)
    for vram_limit in (1, 1, 2, own):
        pool.auto_load_model(small, vram_config, vram_limit)
    first, second, third, fourth = (model._managed.budget for model in pool.fetch_model("small", "all"))
    assert first is second and first is not third and fourth is own


def test_structure_only(small):
    pool = ModelPool()
    pool.auto_load_model(small, clear_parameters=True)
    assert all(p.is_meta for p in pool.fetch_model("small").parameters())


def test_state_dict_in_place_of_files(small):
    pool, state_dict = ModelPool(), Small().state_dict()
    pool.auto_load_model(None, state_dict=state_dict)
    assert torch.equal(pool.fetch_model("small").layers[0].weight, state_dict["layers.0.weight"].bfloat16())


def test_unknown_layout_names_the_nearest_known_one(small, registry, tmp_path):
    registry += [
        {"model_hash": "0" * 32, "model_name": "far", "model_class": Other},
        {"model_hash": "1" * 32, "model_name": "needs_library", "model_class": "library_that_is_absent.Model"},
    ]
    state_dict = Small(head=True).state_dict()
    state_dict["layers.1.weight"] = torch.zeros(3, 4)
    path = saved(tmp_path, "finetune.safetensors", state_dict)
    with pytest.raises(ModelFileError) as error:
        ModelPool().auto_load_model([path])
    message = str(error.value)
    assert message.startswith(f"unknown layout {hash_model_file(path)}: {path}")
    assert "nearest: small, 3 of its 12 keys differ: 2 unexpected: head.bias, head.weight" in message
    assert "1 of wrong shape or type: layers.1.weight (expected [3, 3] float32, found [3, 4] float32)" in message


def test_part_of_a_model_is_recognised_as_such(small, tmp_path):
    path = saved(tmp_path, "part.safetensors", {"layers.0.weight": torch.zeros(3, 3)})
    with pytest.raises(ModelFileError, match="nearest: small, 11 of its 12 keys differ: 11 missing"):
        ModelPool().auto_load_model(path)


def test_unknown_layout_like_nothing_known(small, tmp_path):
    path = saved(tmp_path, "foreign.safetensors", {"something": torch.zeros(3)})
    with pytest.raises(ModelFileError, match=r"like none of the models there \(small\)"):
        ModelPool().auto_load_model(path)
    with pytest.raises(ModelFileError, match="like none of the models there"):
        ModelPool().auto_load_model(None, state_dict={"something": torch.zeros(3)})


def test_no_file_at_all(registry):
    with pytest.raises(ModelFileError, match="no model file given"):
        ModelPool().auto_load_model([])
