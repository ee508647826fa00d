"""Estimates are what the loader says after loading, and cost no memory."""
from __future__ import annotations

import time
from dataclasses import replace

import psutil
import pytest
import torch

from diffsynth_backend.core.loader.file import ModelFileError
from diffsynth_backend.pipelines.estimate import estimate, outline_pipeline
from diffsynth_backend.pipelines.handle import ModelSource, PipelineHandle, VramChoice
from diffsynth_backend.pipelines.locate import locate_preset
from diffsynth_backend.pipelines.owner import WeightsOwner
from diffsynth_backend.pipelines.report import describe
from tests.helpers.models_folder import CONTROLNET, fill_models_folder
from tests.helpers.tiny import MODELS

SIZE = (64, 48)
MIB = 1 / 1024
CASES = [("low", None), ("low", 0.0), ("disk", 9 * MIB), ("disk", 0.0), ("disk", MIB), ("disk", None), ("fp8", None),
         ("balanced", None)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_files):
    return fill_models_folder(tmp_path_factory.mktemp("models"), tiny_files)


@pytest.fixture(params=[False, True], ids=["", "with a ControlNet"])
def models(request, tiny_files, folder) -> PipelineHandle:
    files = [tiny_files.file(model) for model in MODELS] + [str(folder / CONTROLNET)] * request.param
    sources = tuple(ModelSource(file, (file,)) for file in files)
    return PipelineHandle("qwen-image", sources, tiny_files.tokenizer, torch.float32, "cpu")


@pytest.mark.parametrize("preset,limit", CASES)
def test_it_says_what_the_loader_says(models, preset, limit):
    handle = replace(models, vram=VramChoice(preset, limit).settings(torch.float32, "cpu", 16))
    lines = estimate(replace(handle, tokenizer=None), SIZE)
    said = describe(handle, WeightsOwner().get(handle), SIZE).split("\n")
    planned = [line for line in said if " cross per step" in line or "does not fit" in line]
    assert lines[-len(planned):] == planned or not planned
    assert len(lines) == 1 + len(planned) + (limit is not None)


def test_no_weight_is_read(models):
    handle = replace(models, vram=VramChoice("low", 0.0).settings(torch.float32, "cpu", 16))
    pipe = outline_pipeline(handle)
    assert [name for name, _ in pipe.named_models()] and all(parameter.is_meta for parameter in pipe.parameters())


def test_the_published_model_in_full_size_within_moments(full_size):
    sources = locate_preset("qwen-image", [str(full_size / "models")])
    vram = VramChoice("disk", 8.0).settings(torch.bfloat16, "cpu", 24.0)
    handle = PipelineHandle("qwen-image", sources, None, torch.bfloat16, "cpu", vram)
    before, began = psutil.Process().memory_info().rss, time.process_time()
    lines = estimate(handle, (1328, 1328))
    assert time.process_time() - began < 20
    assert psutil.Process().memory_info().rss - before < 600 * 2**20
    assert lines[0].startswith("53.7 GiB of weights in bfloat16, on disk")
    dit = next(line for line in lines if line.startswith("dit at 1328×1328: "))
    assert float(dit.split(": ")[1].split()[0]) < 8


def test_files_of_no_known_model(tmp_path, tiny_files):
    from safetensors.torch import save_file

    save_file({"nothing": torch.zeros(1)}, tmp_path / "x.safetensors")
    source = ModelSource("x", (str(tmp_path / "x.safetensors"),))
    vram = VramChoice("disk", None).settings(torch.float32, "cpu", 16)
    with pytest.raises(ModelFileError, match="unknown layout"):
        estimate(PipelineHandle("qwen-image", (source,), None, torch.float32, "cpu", vram), SIZE)
