"""The registry and the module maps: names resolve wherever the package lies, maps cover all weights of each model."""
from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffsynth_backend.configs import model_configs
from diffsynth_backend.configs.model_configs import MODEL_CONFIGS, display_path, find_configs, relative_path, resolve
from diffsynth_backend.configs.vram_management_module_maps import VRAM_MANAGEMENT_MODULE_MAPS, module_map_of
from diffsynth_backend.core.loader.file import hash_state_dict
from diffsynth_backend.core.loader.model import build_on_meta
from diffsynth_backend.core.vram import enable_vram_management, iter_managed
from diffsynth_backend.models.general_modules import RMSNorm
from diffsynth_backend.utils.state_dict_converters.qwen_image_text_encoder import published_text_encoder_keys
from diffsynth_backend.utils.state_dict_converters.qwen_image_vae import repackaged_vae_keys
from diffsynth_backend.utils.state_dict_converters.wan_video_dit import (
    diffusers_image_keys,
    diffusers_keys,
    prefixed_dit_keys,
)
from diffsynth_backend.utils.state_dict_converters.wan_video_image_encoder import (
    diffusers_image_encoder_keys,
    published_image_encoder_keys,
)
from diffsynth_backend.utils.state_dict_converters.wan_video_text_encoder import diffusers_text_encoder_keys
from diffsynth_backend.utils.state_dict_converters.wan_video_vae import (
    diffusers_vae38_keys,
    diffusers_vae_keys,
    published_vae_keys,
)
from tests.helpers.wan_files import diffusers_vace_set, original_vace_set

PACKAGE_FOLDER = Path(model_configs.__file__).parents[1]
ON_DISK = {"offload_dtype": "disk", "offload_device": "disk", "onload_dtype": "disk", "onload_device": "disk",
           "computation_dtype": torch.bfloat16, "computation_device": "cpu"}

ROWS = pytest.mark.parametrize("row", MODEL_CONFIGS, ids=[row["model_hash"] for row in MODEL_CONFIGS])


# Converter → the function that gives a model's names as the file has them.
INVERSES = {"": dict, "QwenImageTextEncoderStateDictConverter": published_text_encoder_keys,
            "QwenImageVAERepackagedStateDictConverter": repackaged_vae_keys,
            "WanTextEncoderFromDiffusers": diffusers_text_encoder_keys,
            "WanImageEncoderStateDictConverter": published_image_encoder_keys,
            "WanImageEncoderFromDiffusers": diffusers_image_encoder_keys,
            "WanVideoDiTStateDictConverter": original_vace_set,
            "VaceWanModelDictConverter": original_vace_set,
            "WanVideoDiTPrefixedStateDictConverter": prefixed_dit_keys,
            "WanVideoDiTFromDiffusers": diffusers_keys,
            "WanVideoImageDiTFromDiffusers": diffusers_image_keys,
            "WanVideoVaceDiTFromDiffusers": diffusers_vace_set,
            "VaceWanModelFromDiffusers": diffusers_vace_set,
            "WanVideoVAEStateDictConverter": published_vae_keys,
            "WanVideoVAEFromDiffusers": diffusers_vae_keys,
            "WanVideoVAE38FromDiffusers": diffusers_vae38_keys}


@ROWS
def test_rows_are_complete_and_resolve(row):
    assert row in find_configs(row["model_hash"])
    assert issubclass(resolve(row["model_class"]), nn.Module)
    assert row.get("state_dict_converter") is None or callable(resolve(row["state_dict_converter"]))


@dataclass(frozen=True)
class Built:
    """A row's model on meta. `layout` is its state dict as built, whatever a test does to `model` later."""

    row: dict[str, Any]
    model: nn.Module
    layout: dict[str, torch.Tensor]
    to_file: Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module", params=MODEL_CONFIGS, ids=[row["model_hash"] for row in MODEL_CONFIGS])
def built(request: pytest.FixtureRequest) -> Iterator[Built]:
    """Of each row once: pytest runs the tests of one parameter together, and then forgets the model."""
    row = request.param
    model = build_on_meta(resolve(row["model_class"]), row.get("extra_kwargs"))
    yield Built(row, model, dict(model.state_dict()), INVERSES[row.get("state_dict_converter", "").rpartition(".")[2]])


def test_class_has_the_layout_of_the_registered_hash(built: Built) -> None:
    assert hash_state_dict(built.to_file(dict(built.layout))) == built.row["model_hash"]


def test_converter_undoes_what_the_file_changes(built: Built) -> None:
    converter = resolve(built.row.get("state_dict_converter")) or dict
    converted = converter(built.to_file(dict(built.layout)))
    assert {name: tensor.shape for name, tensor in converted.items()} == {
        name: tensor.shape for name, tensor in built.layout.items()}


def test_map_covers_every_weight(built: Built) -> None:
    # All weights stay on disk: one outside the map would have to be read, and these cannot be.
    enable_vram_management(built.model, module_map_of(resolve(built.row["model_class"])), ON_DISK,
                           disk_map=built.layout)
    assert all(parameter.is_meta for parameter in built.model.parameters())
    assert len(list(iter_managed(built.model))) > 1


def test_maps_are_for_models_of_the_registry():
    assert set(VRAM_MANAGEMENT_MODULE_MAPS) <= {row["model_class"] for row in MODEL_CONFIGS}


def test_resolve_takes_relative_and_absolute_paths_and_objects():
    assert resolve("models.general_modules.RMSNorm") is RMSNorm
    assert resolve("torch.nn.Linear") is nn.Linear and resolve(nn.Linear) is nn.Linear and resolve(None) is None
    for missing in ("models.general_modules.Gone", "models.gone.Gone", "gone.Gone", "Gone"):
        with pytest.raises(ImportError, match=f"{missing} names nothing"):
            resolve(missing)


def test_module_that_cannot_be_imported_is_not_taken_for_absent(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import library_that_is_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="library_that_is_absent"):
        resolve("needs_more.Model")


def test_row_with_a_misspelt_field_is_refused():
    MODEL_CONFIGS.append({"model_hash": "x", "model_name": "x", "model_clas": "x"})
    try:
        with pytest.raises(ValueError, match="expected the fields"):
            find_configs("x")
    finally:
        MODEL_CONFIGS.pop()


def test_package_under_a_name_that_is_a_path():
    """As ComfyUI imports it: the name is the folder's path, with dots replaced."""
    pack = "/somewhere/ComfyUI/custom_nodes/pack_x_1"
    name = f"{pack}.diffsynth_backend"
    spec = importlib.util.spec_from_file_location(name, PACKAGE_FOLDER / "__init__.py",
                                                  submodule_search_locations=[str(PACKAGE_FOLDER)])
    sys.modules[pack] = types.ModuleType(pack)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
        configs = importlib.import_module(f"{name}.configs.model_configs")
        maps = importlib.import_module(f"{name}.configs.vram_management_module_maps")
        model_class = configs.resolve("models.qwen_image_dit.QwenImageDiT")
        assert model_class.__module__ == f"{name}.models.qwen_image_dit"
        assert configs.relative_path(model_class) == "models.qwen_image_dit.QwenImageDiT"
        assert configs.display_path(model_class) == "diffsynth_backend.models.qwen_image_dit.QwenImageDiT"
        assert nn.Linear in maps.module_map_of(model_class)
    finally:
        for module in [module for module in sys.modules if module.startswith(pack)]:
            del sys.modules[module]


def test_paths_of_classes_of_others():
    assert relative_path(nn.Linear) == display_path(nn.Linear) == "torch.nn.modules.linear.Linear"
    assert module_map_of(nn.Linear) is None
