"""Handles and VRAM choices as values."""
from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from diffsynth_backend.core.loader.config import VRAM_FIELDS
from diffsynth_backend.core.vram.presets import VRAM_PRESETS, vram_preset
from diffsynth_backend.pipelines.handle import (
    AUTOMATIC,
    ModelSource,
    PipelineHandle,
    VramChoice,
    VramSettings,
    computation_gib,
)

BF16 = torch.bfloat16
HANDLE = PipelineHandle("qwen-image", (ModelSource("a", ("/x/a.safetensors",)),), "/x/tokenizer", BF16, "cuda",
                        VramChoice("low", 8.0).settings(BF16, "cuda", 24), slot="7")


def test_a_handle_is_a_value():
    assert pickle.loads(pickle.dumps(HANDLE)) == HANDLE and len({HANDLE, dataclasses.replace(HANDLE)}) == 1
    assert dataclasses.replace(HANDLE, slot="8") != HANDLE
    assert dataclasses.replace(HANDLE, slot="8").weights == HANDLE.weights
    with pytest.raises(dataclasses.FrozenInstanceError):
        HANDLE.device = "cpu"


@pytest.mark.parametrize("preset", VRAM_PRESETS)
def test_a_choice_gives_its_presets_fields(preset):
    settings = VramChoice(preset, None).settings(BF16, "cuda", 24)
    assert {name: value for name, value in settings.fields().items() if value is not None} == \
        vram_preset(preset, BF16, "cuda")
    assert settings.vram_limit is None and settings.managed == (preset != "full")
    assert set(settings.fields()) == set(VRAM_FIELDS)


@pytest.mark.parametrize("total, limit", [(8, 6.0), (10, 8.0), (24, 19.2), (1, 0.0)])
def test_the_automatic_limit_leaves_room_for_the_computation(total, limit):
    assert VramChoice("low").settings(BF16, "cuda", total).vram_limit == pytest.approx(limit)
    assert computation_gib(total) == pytest.approx(max(2, total / 5))


@pytest.mark.parametrize("preset, device", [("full", "cuda"), ("balanced", "cuda"), ("low", "cpu")])
def test_there_is_no_automatic_limit_where_it_would_mean_nothing(preset, device):
    assert VramChoice(preset, AUTOMATIC).settings(BF16, device, 24).vram_limit is None


def test_fields_replace_the_presets():
    fields = (("offload_dtype", "disk"), ("offload_device", "disk"), ("preparing_device", "compute"))
    settings = VramChoice("low", 0.0, fields).settings(BF16, "cuda:1", 24)
    assert (settings.offload_dtype, settings.preparing_device, settings.vram_limit) == ("disk", "cuda:1", 0.0)
    assert settings.onload_device == "cpu"


@pytest.mark.parametrize("choice, words", [
    (VramChoice("full", 4.0), "4.0 GiB.*low"), (VramChoice("huge"), "unknown VRAM preset"),
    (VramChoice("low", None, (("ofload_dtype", BF16),)), "ofload_dtype")])
def test_choices_without_meaning_are_refused(choice, words):
    with pytest.raises(ValueError, match=words):
        choice.settings(BF16, "cuda", 24)


def test_managed_needs_both_fields_of_the_offload_state():
    assert not VramSettings(offload_dtype=BF16).managed
