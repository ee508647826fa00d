"""Handles and VRAM choices as values."""
from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from diffsynth_backend.core.device import GIB
from diffsynth_backend.core.loader.config import VRAM_FIELDS
from diffsynth_backend.core.loader.file import MissingFile
from diffsynth_backend.core.vram.presets import AUTO, CUSTOM, VRAM_CHOICES, VRAM_PRESETS, vram_preset
from diffsynth_backend.pipelines.handle import (
    AUTOMATIC,
    ModelSource,
    PipelineHandle,
    VramChoice,
    VramSettings,
    computation_gib,
    decide,
    weight_bytes_of,
    words,
)
from tests.helpers.tiny import MODELS

BF16 = torch.bfloat16
HANDLE = PipelineHandle("qwen-image", (ModelSource("a", ("/x/a.safetensors",)),), "/x/tokenizer", BF16, "cuda",
                        VramChoice("low", 8.0).settings(BF16, "cuda", 24), slot="7")


def test_a_handle_is_a_value():
    assert pickle.loads(pickle.dumps(HANDLE)) == HANDLE and len({HANDLE, dataclasses.replace(HANDLE)}) == 1
    assert dataclasses.replace(HANDLE, slot="8") != HANDLE
    assert dataclasses.replace(HANDLE, slot="8").weights == HANDLE.weights
    assert dataclasses.replace(HANDLE, slot="8", vram=VramSettings()).models == HANDLE.models != HANDLE.weights
    with pytest.raises(dataclasses.FrozenInstanceError):
        HANDLE.device = "cpu"


@pytest.mark.parametrize("preset", VRAM_PRESETS)
def test_a_choice_gives_its_presets_fields(preset):
    settings = VramChoice(preset, None).settings(BF16, "cuda", 24)
    assert {name: value for name, value in settings.fields().items() if value is not None} == \
        vram_preset(preset, BF16, "cuda")
    assert settings.vram_limit is None and settings.managed == (preset != "full")
    assert set(settings.fields()) == set(VRAM_FIELDS)


@pytest.mark.parametrize("total, limit", [(1, 0.0), (8, 6.5), (15, 13.5), (24, 21.6), (96, 86.4)])
@pytest.mark.parametrize("preset", ["low", "disk"])
def test_the_automatic_limit_leaves_room_for_others(preset, total, limit):
    assert VramChoice(preset).settings(BF16, "cuda", total).vram_limit == pytest.approx(limit)


@pytest.mark.parametrize("preset, device", [("full", "cuda"), ("balanced", "cuda"), ("fp8", "cuda"), ("low", "cpu"),
                                            ("disk", "cpu"), (CUSTOM, "cuda")])
def test_there_is_no_automatic_limit_where_it_would_mean_nothing(preset, device):
    assert VramChoice(preset, AUTOMATIC).settings(BF16, device, 24).vram_limit is None


def test_fields_replace_the_presets():
    fields = (("offload_dtype", "disk"), ("offload_device", "disk"), ("preparing_device", "compute"))
    settings = VramChoice("low", 0.0, fields).settings(BF16, "cuda:1", 24)
    assert (settings.offload_dtype, settings.preparing_device, settings.vram_limit) == ("disk", "cuda:1", 0.0)
    assert settings.onload_device == "cpu"


@pytest.mark.parametrize("choice, sentence", [
    (VramChoice("full", 4.0), "4.0 GiB.*low"), (VramChoice(CUSTOM, 4.0), "4.0 GiB.*custom.*low"),
    (VramChoice(CUSTOM, 0.0, (("offload_dtype", BF16),)), "0.0 GiB"),
    (VramChoice("huge"), "unknown VRAM preset"), (VramChoice(AUTO), "decided first"),
    (VramChoice("low", ram_limit=8.0), "ram_limit is 8.0 GiB.*'low'.*disk or auto"),
    (VramChoice("full", ram_limit=0.0), "ram_limit is 0.0 GiB.*'full'"),
    (VramChoice("low", None, (("ofload_dtype", BF16),)), "ofload_dtype")])
def test_choices_without_meaning_are_refused(choice, sentence):
    with pytest.raises(ValueError, match=sentence):
        choice.settings(BF16, "cuda", 24)


def test_managed_needs_both_fields_of_the_offload_state():
    assert not VramSettings(offload_dtype=BF16).managed


# ---- custom ---------------------------------------------------------------------------------------------------------

OFFLOAD_TO_RAM = (("offload_dtype", BF16), ("offload_device", "cpu"))


def test_choices_are_appended_to_the_presets():
    assert tuple(VRAM_CHOICES) == (*VRAM_PRESETS, AUTO, CUSTOM)


def test_custom_starts_from_nothing():
    assert VramChoice(CUSTOM).settings(BF16, "cuda", 24) == VramChoice("full").settings(BF16, "cuda", 24)
    fields = VramChoice(CUSTOM, 4.0, OFFLOAD_TO_RAM).settings(BF16, "cuda", 24)
    assert fields == VramSettings(BF16, "cpu", computation_dtype=BF16, computation_device="cuda", vram_limit=4.0)


@pytest.mark.parametrize("fields, limit", [
    ((), None), ((("onload_dtype", BF16), ("onload_device", "cpu")), 21.6),
    ((("onload_dtype", BF16), ("onload_device", "compute")), None)], ids=["on the card", "in RAM", "as a whole"])
def test_custom_has_an_automatic_limit_where_layers_wait(fields, limit):
    assert VramChoice(CUSTOM, AUTOMATIC, OFFLOAD_TO_RAM + fields).settings(BF16, "cuda:1", 24).vram_limit == limit


def test_custom_with_layers_on_disk_has_an_automatic_limit():
    disk = tuple((f"{state}_{part}", "disk") for state in ("offload", "onload") for part in ("dtype", "device"))
    assert VramChoice(CUSTOM, AUTOMATIC, disk).settings(BF16, "cuda", 24).vram_limit == 21.6
    assert VramChoice(CUSTOM, AUTOMATIC, disk[:3]).settings(BF16, "cuda", 24).vram_limit == 21.6


# ---- auto -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("weights, device, ram, limit, preset", [
    # no accelerator
    (10, None, 12, None, "full"), (10, None, 11.9, None, "disk"),
    (10, None, 12, 4.0, "low"), (10, None, 11.9, 4.0, "disk"), (10, None, 12, 0.0, "low"),
    # on the card, whatever the RAM: beside a fifth, and at least 2 GiB
    (19.2, 24, 64, None, "full"), (19.2, 24, 1, None, "full"), (19.3, 24, 64, None, "low"),
    (6, 8, 64, None, "full"), (6.1, 8, 64, None, "low"), (0.1, 2, 64, None, "low"),
    # beside it
    (56.7, 24, 58.7, None, "low"), (56.7, 24, 58.6, None, "disk"), (56.7, 80, 8, None, "full"),
    # full looks at no limit
    (1, 24, 64, 8.0, "low"), (1, 24, 2, 8.0, "disk")])
def test_auto(weights, device, ram, limit, preset):
    decision = decide(round(weights * GIB), device and device * GIB, round(ram * GIB), limit)
    assert decision.preset == preset and decision.describe().startswith(f"auto: {preset}, because ")


@pytest.mark.parametrize("ram_limit, preset, kept", [(56.9, "disk", 56.9), (57, "low", None), (0, "disk", 0)])
def test_auto_keeps_to_a_limit_of_ram(ram_limit, preset, kept):
    decision = decide(57 * GIB, 24 * GIB, 64 * GIB, ram_limit=ram_limit)
    assert decision.preset == preset and f"fit the ram_limit of {ram_limit:g} GiB" in decision.describe()
    settings = VramChoice(AUTO, ram_limit=ram_limit).decided(decision).settings(BF16, "cuda", 24)
    assert settings.ram_limit == kept and settings.reads_disk_in_use == (preset == "disk")


@pytest.mark.parametrize("inputs, parts", [
    ((57, 24, 60, None), ("57.0 GiB of weights do not fit the card's 24.0 GiB beside 4.8", "they fit 60.0 GiB of")),
    ((57, 24, 16, None), ("they do not fit 16.0 GiB of free RAM",)),
    ((57, 96, 16, None), ("57.0 GiB of weights fit the card's 96.0 GiB beside 19.2 GiB for the computation",)),
    ((57, None, 58, None), ("57.0 GiB of weights do not fit 58.0 GiB of free RAM (2.0 GiB are left to the system)",)),
    ((57, 96, 60, 8.0), ("vram_limit is 8 GiB, and 57.0 GiB of weights fit 60.0 GiB",))])
def test_auto_says_why(inputs, parts):
    weights, device, ram, limit = inputs
    text = decide(weights * GIB, device and device * GIB, ram * GIB, limit).describe()
    assert all(part in text for part in parts), text


def test_what_is_kept_free_for_the_computation():
    assert [computation_gib(total) for total in (8, 10, 24)] == pytest.approx([2, 2, 4.8])


def test_sizes_come_from_headers_and_count_in_the_dtype_of_the_computation(tiny_files, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    sources = tuple(ModelSource(model, (tiny_files.file(model),)) for model in MODELS)
    handle = dataclasses.replace(HANDLE, sources=sources)
    parameters = {model: weight_bytes_of(tiny_files.file(model), BF16) // 2 for model in MODELS}
    assert parameters["transformer"] == sum(p.numel() for p in tiny_files.load(("transformer",)).dit.parameters())
    assert handle.weight_bytes() == 2 * sum(parameters.values())
    assert dataclasses.replace(handle, torch_dtype=torch.float32).weight_bytes() == 4 * sum(parameters.values())
    with pytest.raises(MissingFile):
        HANDLE.weight_bytes()


def test_bytes_in_words():
    assert (words(57 * GIB), words(GIB // 2)) == ("57.0 GiB", "512.0 MiB")
