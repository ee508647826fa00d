"""Estimates are what is planned after loading, and cost no memory."""
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
from diffsynth_backend.pipelines.memory_map import loop_plan
from diffsynth_backend.pipelines.owner import WeightsOwner
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
def test_it_plans_what_the_loaded_pipeline_plans(models, preset, limit):
    handle = replace(models, vram=VramChoice(preset, limit).settings(torch.float32, "cpu", 16))
    pipe = WeightsOwner().get(handle)
    figures = estimate(replace(handle, tokenizer=None), SIZE)
    assert figures.limit_gib == limit and (figures.width, figures.height) == SIZE
    try:
        plans = pipe.preview(SIZE[1], SIZE[0])
    except ValueError as error:
        assert figures.plans == {} and f"at least {figures.floor_gib:.2f}, or draw a smaller picture" in str(error)
    else:
        assert figures.plans == {names: loop_plan(plan) for names, plan in plans.items()} and not figures.floor_gib


@pytest.mark.parametrize("preset,rests,works,dtype", [
    ("full", "cpu", "cpu", "float32"), ("low", "cpu", "cpu", "float32"), ("disk", "disk", "disk", "float32"),
    ("fp8", "cpu", "cpu", "float8_e4m3fn")])
def test_it_says_where_weights_are(models, preset, rests, works, dtype):
    vram = VramChoice(preset, None).settings(torch.float32, "cpu", 16)
    figures = estimate(replace(models, vram=vram), SIZE)
    assert (figures.rests_on, figures.works_from, figures.dtype) == (rests, works, dtype)
    whole = estimate(models, SIZE).weight_bytes
    assert figures.weight_bytes == whole or preset == "fp8" and figures.weight_bytes < whole / 3


def test_no_weight_is_read(models):
    handle = replace(models, vram=VramChoice("low", 0.0).settings(torch.float32, "cpu", 16))
    pipe = outline_pipeline(handle)
    assert [name for name, _ in pipe.named_models()] and all(parameter.is_meta for parameter in pipe.parameters())


def test_the_published_model_in_full_size_within_moments(full_size):
    sources = locate_preset("qwen-image", [str(full_size / "models")])
    vram = VramChoice("disk", 8.0).settings(torch.bfloat16, "cpu", 24.0)
    handle = PipelineHandle("qwen-image", sources, None, torch.bfloat16, "cpu", vram)
    before, began = psutil.Process().memory_info().rss, time.process_time()
    figures = estimate(handle, (1328, 1328))
    assert time.process_time() - began < 20
    assert psutil.Process().memory_info().rss - before < 600 * 2**20
    assert (figures.dtype, figures.rests_on) == ("bfloat16", "disk")
    assert figures.weight_bytes / 2**30 == pytest.approx(53.7, abs=0.05)
    plan = figures.plans["dit"]
    assert plan.resident_bytes + plan.ring_bytes + plan.activation_bytes <= 8 * 2**30 < figures.weight_bytes


def test_files_of_no_known_model(tmp_path, tiny_files):
    from safetensors.torch import save_file

    save_file({"nothing": torch.zeros(1)}, tmp_path / "x.safetensors")
    source = ModelSource("x", (str(tmp_path / "x.safetensors"),))
    vram = VramChoice("disk", None).settings(torch.float32, "cpu", 16)
    with pytest.raises(ModelFileError, match="unknown layout"):
        estimate(PipelineHandle("qwen-image", (source,), None, torch.float32, "cpu", vram), SIZE)
