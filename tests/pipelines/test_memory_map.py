"""The map of memory: bytes where they are, before, during and after a loop, and gone when they are freed."""
from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from diffsynth_backend.core.device import GIB
from diffsynth_backend.core.loader.watch import LoadStep
from diffsynth_backend.pipelines.handle import LoraChoice, ModelSource, PipelineHandle, VramChoice, weight_bytes_of
from diffsynth_backend.pipelines.memory_map import Loading, loading, memory_map
from diffsynth_backend.pipelines.owner import WeightsOwner
from diffsynth_backend.pipelines.steps import Steps, add_loras, encode_prompts, sample
from tests.helpers.models_folder import save_lora
from tests.helpers.tiny import MODELS

LITTLE = 9 / 1024  # GiB, of which some layers have to be streamed


def handle_for(tiny_files, preset: str = "full", limit: float | None = None) -> PipelineHandle:
    sources = tuple(ModelSource(model, (tiny_files.file(model),)) for model in MODELS)
    vram = VramChoice(preset, limit).settings(torch.float32, "cpu", 16)
    return PipelineHandle("qwen-image", sources, tiny_files.tokenizer, torch.float32, "cpu", vram)


def weight_bytes(owner: WeightsOwner, handle: PipelineHandle) -> dict[str, int]:
    return {name: 4 * sum(parameter.numel() for parameter in model.parameters())
            for name, model in owner.get(handle).named_models()}


def test_weights_in_ram(tiny_files):
    owner, handle = WeightsOwner(), handle_for(tiny_files)
    expected = weight_bytes(owner, handle)
    [pipeline] = memory_map(owner)
    assert (pipeline.title, pipeline.device, pipeline.limit_bytes) == ("text_encoder, transformer, vae", "cpu", None)
    for model in pipeline.models:
        buffers = sum(buffer.nbytes for buffer in getattr(owner.get(handle), model.name).buffers())
        assert (model.device_bytes, model.ram_bytes - buffers, model.disk_bytes) == (0, expected[model.name], 0)
    assert pipeline.plan is None and pipeline.traffic is None
    owner.free_all()
    assert memory_map(owner) == ()


def test_weights_on_disk_pass_through_the_ring_while_the_loop_runs(tiny_files):
    owner, handle = WeightsOwner(), handle_for(tiny_files, "disk", LITTLE)
    stored = sum(weight_bytes_of(source.files, torch.bfloat16) for source in handle.sources)  # as the files are
    seen = []
    conditioning = encode_prompts(handle, "a red circle", "", weights=owner)
    sample(handle, conditioning, torch.zeros(1, 16, 1, 8, 8), Steps(2), seed=1, cfg_scale=4.0, weights=owner,
           step_callback=lambda step: seen.append(memory_map(owner)[0]))
    [after] = memory_map(owner)
    assert sum(model.disk_bytes for model in after.models) == stored
    assert all(model.ring_bytes == 0 for model in after.models) and after.counted_bytes == 0
    during = {model.name: model for model in seen[-1].models}
    assert during["dit"].ring_bytes == seen[-1].plan.ring_bytes > 0 == during["vae"].ring_bytes
    assert 0 < seen[-1].counted_bytes <= seen[-1].limit_bytes == int(LITTLE * GIB)
    assert seen[0].traffic.moved_bytes < seen[1].traffic.moved_bytes
    assert after.traffic.passes == 2 + 1, "what depends on the timestep alone takes one pass of its own"
    assert after.traffic.bandwidth > 0


def test_what_computes_in_another_place_is_counted_in_both(tiny_files):
    """A layer that stays has a copy where it computes and one where it rests; on a CPU both are in RAM."""
    owner, handle = WeightsOwner(), handle_for(tiny_files, "fp8")
    pipe = owner.get(handle)
    rests = {model.name: model.ram_bytes for model in memory_map(owner)[0].models}
    layers = [layer for layer in pipe.dit.modules() if hasattr(type(layer), "state")]
    for layer in layers:
        layer.onload()
        layer._advance(2)
    copies = sum(tensor.nbytes for layer in layers for stored, tensor in
                 zip(layer.management.stored, layer.management.current) if tensor is not stored)
    works = {model.name: model.ram_bytes for model in memory_map(owner)[0].models}
    assert works["dit"] == rests["dit"] + copies and works["vae"] == rests["vae"]


def test_adapters_are_counted(tiny_files, tmp_path):
    save_lora(tmp_path / "loras/a.safetensors")
    owner = WeightsOwner()
    handle, _ = add_loras(handle_for(tiny_files), [LoraChoice("a", str(tmp_path / "loras/a.safetensors"))], owner)
    with owner.use(handle):
        adapters = {model.name: model.adapter_bytes for model in memory_map(owner)[0].models}
    assert adapters == {"text_encoder": 0, "dit": 2 * 2 * 2 * 128 * 4, "vae": 0}


def test_it_is_json(tiny_files):
    owner = WeightsOwner()
    owner.get(handle_for(tiny_files, "low"))
    assert json.loads(json.dumps([dataclasses.asdict(pipeline) for pipeline in memory_map(owner)]))


@pytest.mark.parametrize("shards,room", [(1, None), (2, 6 * GIB)])
def test_a_load_in_figures(shards, room):
    sources = ModelSource("a", ("/m/a",)), ModelSource("b", tuple(f"/m/b{i}" for i in range(shards)))
    handle = PipelineHandle("qwen-image", sources, None, torch.float32, "cpu")
    step = LoadStep("/m/b0", 1, shards, GIB // 2, 2 * GIB)
    assert loading(handle, step, 5, room) == Loading("b", 2, 2, 1, shards, GIB // 2, 2 * GIB, 5, room)


def test_a_load_through_a_link(tmp_path):
    """Folders of models are often links to another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "models").symlink_to(tmp_path / "disk")
    source = ModelSource("a", (str(tmp_path / "models/a"),))
    handle = PipelineHandle("qwen-image", (source,), None, torch.float32, "cpu")
    for folder in ("models", "disk"):
        assert loading(handle, LoadStep(str(tmp_path / folder / "a"), 1, 1, 0, 1)).title == "a"
