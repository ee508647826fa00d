"""What a file is: several models in one, several files in a list, a model by name, rows of one's own, and pickles."""
from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth_backend.configs.model_configs import MODEL_CONFIGS, resolve
from diffsynth_backend.core import hash_model_file
from diffsynth_backend.core.loader.file import MissingShards, ModelFileError, PickleRefused
from diffsynth_backend.core.loader.registry_file import REGISTRY_VARIABLE, RegistryFileError, read_registry_file
from diffsynth_backend.models.model_loader import (
    ModelPool,
    check_workflow_files,
    detect_models,
    find_models,
    use_registry_file,
)
from tests.helpers.tiny import MODELS

NAMES = ["qwen_image_text_encoder", "qwen_image_dit", "qwen_image_vae"]
PREFIXES = ["text_encoders.qwen25_7b.transformer.", "model.diffusion_model.", "vae."]


@pytest.fixture(autouse=True)
def _same_registry(no_settings):
    rows = list(MODEL_CONFIGS)
    yield
    MODEL_CONFIGS[:] = rows


@pytest.fixture
def denoiser(tiny_files) -> dict[str, torch.Tensor]:
    return load_file(tiny_files.file("transformer"))


def write(path: Path, state_dict: dict[str, torch.Tensor]) -> str:
    save_file(state_dict, path)
    return str(path)


def names(files) -> list[str]:
    return [model.name for model in detect_models(files)]


class TestSeveral:
    def test_one_file_with_three_models(self, tiny_files, tmp_path, caplog):
        content = {f"{prefix}{name}": tensor for prefix, model in zip(PREFIXES, MODELS)
                   for name, tensor in load_file(tiny_files.file(model)).items()}
        path = write(tmp_path / "all.safetensors", {**content, "text_encoders.qwen25_7b.logit_scale": torch.ones(1)})
        pool = ModelPool()
        with caplog.at_level(logging.WARNING):
            pool.auto_load_model(path)
        assert sorted(entry.name for entry in pool.loaded) == sorted(NAMES)
        assert "1 tensors belong to no known model and are not used, 'qwen25_7b.logit_scale' first" in caplog.text
        weights = load_file(tiny_files.file("transformer"))
        assert all(torch.equal(tensor, weights[name])
                   for name, tensor in pool.fetch_model("qwen_image_dit").state_dict().items())

    def test_a_list_of_several_models_files(self, tiny_files, tmp_path, denoiser):
        half = len(denoiser) // 2
        shards = [write(tmp_path / f"m-0000{i + 1}-of-00002.safetensors", dict(part))
                  for i, part in enumerate((list(denoiser.items())[:half], list(denoiser.items())[half:]))]
        files = [shards[0], tiny_files.file("vae"), shards[1], tiny_files.file("text_encoder")]
        assert names(files) == ["qwen_image_dit", "qwen_image_vae", "qwen_image_text_encoder"]
        assert detect_models(files)[0].paths == tuple(shards)
        with pytest.raises(MissingShards):
            detect_models(files[:2])

    def test_two_versions_of_a_model_are_two_models(self, denoiser, tmp_path):
        files = [write(tmp_path / f"{name}.safetensors", denoiser) for name in ("high", "low")]
        assert names(files) == ["qwen_image_dit"] * 2

    def test_of_several_files_the_unknown_one_is_named(self, tiny_files, tmp_path, denoiser):
        denoiser.pop("img_in.bias")
        unknown = write(tmp_path / "fine-tune.safetensors", denoiser)
        with pytest.raises(ModelFileError, match=r"unknown layout .*fine-tune\.safetensors is in no row.*img_in\.bias"):
            detect_models([tiny_files.file("vae"), unknown])

    def test_nothing_is_in_the_pool_after_a_failure(self, tiny_files, tmp_path, denoiser, monkeypatch):
        pool = ModelPool()
        monkeypatch.setattr(pool, "_load", lambda found, *rest: None if found.name != "qwen_image_vae" else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pool.auto_load_model([tiny_files.file(model) for model in MODELS])
        assert pool.loaded == []


class TestUnknown:
    def test_the_nearest_is_found_behind_a_prefix(self, tmp_path, denoiser):
        denoiser.pop("img_in.bias")
        path = write(tmp_path / "m.safetensors", {f"model.diffusion_model.{k}": v for k, v in denoiser.items()})
        with pytest.raises(ModelFileError, match=r"nearest: qwen_image_dit, 1 of its \d+ keys differ: 1 missing"):
            detect_models(path)
        assert find_models(path) == []

    def test_a_lora_is_told_from_a_model(self, tmp_path):
        path = write(tmp_path / "m.safetensors", {"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 2)})
        with pytest.raises(ModelFileError, match="it looks like a LoRA: give it to load_lora or to a LoRA node"):
            detect_models(path)


class TestByName:
    def test_what_the_model_does_not_have_is_left_out(self, tmp_path, denoiser, caplog):
        path = write(tmp_path / "m.safetensors", {**denoiser, "ema.decay": torch.ones(1)})
        pool = ModelPool()
        pool.auto_load_model(path, model_name="qwen_image_dit")
        assert "without what that model does not have: 1 unexpected: ema.decay" in caplog.text
        loaded = pool.fetch_model("qwen_image_dit").state_dict()
        assert loaded.keys() == denoiser.keys() and torch.equal(loaded["img_in.bias"], denoiser["img_in.bias"])

    def test_what_it_lacks_is_an_error(self, tmp_path, denoiser):
        denoiser.pop("img_in.bias")
        path = write(tmp_path / "m.safetensors", denoiser)
        with pytest.raises(ModelFileError, match="does not fit QwenImageDiT: 1 missing: img_in.bias"):
            ModelPool().auto_load_model(path, model_name="qwen_image_dit")

    def test_names_are_those_of_the_registry(self, tiny_files):
        with pytest.raises(ModelFileError, match="no model of the registry is called .dit.; choose one of qwen_image"):
            detect_models(tiny_files.file("vae"), model_name="dit")


ROW = {"model_hash": "0" * 32, "model_name": "qwen_image_dit", "model_class": "models.qwen_image_dit.QwenImageDiT",
       "extra_kwargs": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64,
                        "joint_attention_dim": 128, "axes_dims_rope": [8, 28, 28]}}


def registry(folder: Path, *rows: object) -> str:
    (folder / "registry.json").write_text(json.dumps({"models": rows}))
    return str(folder / "registry.json")


class TestRegistryFile:
    @pytest.mark.parametrize("by", ["argument", "environment"])
    def test_a_row_of_ones_own(self, tmp_path, denoiser, monkeypatch, by):
        """A denoiser of one layer, which no published model has."""
        small = {name: tensor for name, tensor in denoiser.items()
                 if not name.startswith("transformer_blocks.") or name.startswith("transformer_blocks.0.")}
        path = write(tmp_path / "small.safetensors", small)
        assert find_models(path) == []
        file = registry(tmp_path, {**ROW, "model_hash": hash_model_file(path)})
        if by == "environment":
            monkeypatch.setenv(REGISTRY_VARIABLE, file)
        else:
            use_registry_file(file)
        pool = ModelPool()
        pool.auto_load_model(path)
        assert pool.fetch_model("qwen_image_dit").state_dict().keys() == small.keys()
        count = len(MODEL_CONFIGS)
        use_registry_file(file)
        assert len(MODEL_CONFIGS) == count

    @pytest.mark.parametrize(("change", "message"), [
        ({"model_class": "os.system"}, r"row 1: model_class is 'os\.system'; one of models\."),
        ({"model_class": "torch.load"}, "model_class is 'torch.load'"),
        ({"model_class": None}, "model_class is missing"),
        ({"state_dict_converter": "builtins.eval"}, r"state_dict_converter is 'builtins\.eval'; one of utils\."),
        ({"model_hash": "abc"}, "model_hash is 'abc'; 32 hex digits, as `inspect FILE` prints them"),
        ({"model_name": "../x"}, r"model_name is '\.\./x'; letters, digits"),
        ({"model_name": 3}, "model_name is 3"),
        ({"code": "x"}, "an object with model_hash, model_name, model_class and optionally"),
        ({"extra_kwargs": [1]}, "extra_kwargs is .1.; an object expected"),
        ({"extra_kwargs": {"layers": 1}}, "extra_kwargs has 'layers'; QwenImageDiT takes .*num_layers"),
        ({"extra_kwargs": {"num_layers": 10**6}}, "num_layers=1000000; numbers up to 512"),
        ({"extra_kwargs": {"attention_head_dim": 10**9}}, "numbers up to 1048576"),
        ({"extra_kwargs": {"num_layers": "import os"}}, "num_layers='import os'"),
        ({"extra_kwargs": {"axes_dims_rope": [[1]]}}, "numbers up to .* or lists"),
        ({"extra_kwargs": {"num_layers": float("nan")}}, "num_layers=nan"),
    ])
    def test_rows_that_are_refused(self, tmp_path, change, message):
        with pytest.raises(RegistryFileError, match=message) as error:
            read_registry_file(registry(tmp_path, {**ROW, **change}), MODEL_CONFIGS, resolve)
        assert "see the example in" in str(error.value)

    @pytest.mark.parametrize(("content", "message"), [
        ("", "a JSON object"), ("[]", "a JSON object"), ("{}", "a JSON object"), ("[" * 10**5, "a JSON object"),
        ('{"models": 3}', "must be a list"), ('{"models": [3]}', "row 1: an object"),
        (json.dumps({"models": [{}] * 1001}), "at most 1000 rows"), (" " * 1_000_001, "more than 1000000 bytes"),
    ])
    def test_files_that_are_refused(self, tmp_path, content, message):
        (tmp_path / "registry.json").write_text(content)
        with pytest.raises(RegistryFileError, match=message):
            use_registry_file(str(tmp_path / "registry.json"))


class TestPicklesInWorkflows:
    def test_unknown_ones_are_refused_unless_allowed(self, tmp_path):
        torch.save({"w": torch.ones(2)}, tmp_path / "m.pth")
        with pytest.raises(PickleRefused, match="workflows may not load.*convert IN OUT.safetensors.*in the settings"):
            check_workflow_files(tmp_path / "m.pth")
        assert check_workflow_files(tmp_path / "m.pth", pickles_allowed=True) == [str(tmp_path / "m.pth")]

    def test_those_that_the_registry_knows_are_let_in(self, tmp_path, denoiser):
        torch.save(denoiser, tmp_path / "m.pth")
        assert check_workflow_files([tmp_path / "m.pth"]) == [str(tmp_path / "m.pth")]

    def test_safetensors_are_let_in(self, tmp_path):
        path = write(tmp_path / "m.safetensors", {"w": torch.ones(1)})
        assert check_workflow_files(path) == [path]
