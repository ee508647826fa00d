"""The owner of live weights: one set for each slot, freed before the next is built, shared where equal."""
from __future__ import annotations

import dataclasses
import gc
import threading
import time
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from diffsynth_backend.core.loader.file import ModelFileError
from diffsynth_backend.pipelines.handle import ModelSource, PipelineHandle, VramChoice
from diffsynth_backend.pipelines.owner import DeviceMemory, WeightsOwner, build_pipeline
from tests.helpers.tiny import MODELS


class Pipe(nn.Module):
    device = torch.device("cpu")


class Workshop:
    """Builds pipelines and remembers which were alive at that moment."""

    def __init__(self):
        self.alive = weakref.WeakValueDictionary()
        self.history: list[tuple[str, list[str]]] = []
        self.free_bytes = 100

    def build(self, handle):
        title = handle.titles()
        self.history.append((title, sorted(self.alive)))
        if title == "broken":
            raise ModelFileError("cannot be read")
        pipe = self.alive[title] = Pipe()
        return pipe

    def owner(self, reserved=0) -> WeightsOwner:
        return WeightsOwner(self.build, available=lambda: self.free_bytes, reserved=reserved)


@pytest.fixture
def workshop():
    gc.disable()  # weights must go without the collector's help
    yield Workshop()
    gc.enable()


def handle(title: str, slot: str) -> PipelineHandle:
    return PipelineHandle("qwen-image", (ModelSource(title, ()),), None, torch.float32, "cpu", slot=slot)


def test_equal_handles_get_the_same_pipeline(workshop):
    owner = workshop.owner()
    assert owner.get(handle("a", "1")) is owner.get(handle("a", "1")) is owner.get(handle("a", "2"))
    assert len(workshop.history) == 1


def test_a_slots_predecessor_is_gone_before_the_successor_is_built(workshop):
    owner = workshop.owner()
    owner.get(handle("a", "1"))
    owner.get(handle("b", "1"))
    assert workshop.history == [("a", []), ("b", [])] and sorted(workshop.alive) == ["b"]


def test_other_slots_stay(workshop):
    owner = workshop.owner()
    for title, slot in (("a", "1"), ("b", "2"), ("a", "1"), ("b", "2")):
        owner.get(handle(title, slot))
    assert len(workshop.history) == 2 and sorted(workshop.alive) == ["a", "b"]


def test_weights_that_another_slot_has_too_stay(workshop):
    owner = workshop.owner()
    owner.get(handle("a", "1"))
    owner.get(handle("a", "2"))
    owner.get(handle("b", "1"))
    assert sorted(workshop.alive) == ["a", "b"]
    owner.free("2")
    assert sorted(workshop.alive) == ["b"]


def test_the_least_recently_used_leave_when_memory_is_short(workshop):
    owner = workshop.owner(reserved=50)
    for title, slot in (("a", "1"), ("b", "2"), ("a", "1")):
        owner.get(handle(title, slot))
    workshop.free_bytes = 10
    owner.get(handle("c", "3"))
    assert workshop.history[-1] == ("c", []) and sorted(workshop.alive) == ["c"]
    workshop.free_bytes = 100
    assert owner.get(handle("a", "1")) is workshop.alive["a"], "loaded again when it is used"


def test_only_as_many_leave_as_must(workshop):
    owner = workshop.owner(reserved=50)
    for title, slot in (("a", "1"), ("b", "2"), ("a", "1")):
        owner.get(handle(title, slot))
    owner._available = lambda: 10 if "b" in workshop.alive else 60
    owner.get(handle("c", "3"))
    assert sorted(workshop.alive) == ["a", "c"]


def test_what_is_in_use_is_not_given_up_to_make_room(workshop):
    owner = workshop.owner(reserved=50)
    with owner.use(handle("a", "1")):
        workshop.free_bytes = 10
        owner.get(handle("b", "2"))
        assert sorted(workshop.alive) == ["a", "b"]
    owner.get(handle("c", "3"))
    assert sorted(workshop.alive) == ["c"]


def test_a_failed_build_leaves_an_empty_slot(workshop):
    owner = workshop.owner()
    owner.get(handle("a", "1"))
    with pytest.raises(ModelFileError):
        owner.get(handle("broken", "1"))
    assert owner.loaded() == () and not workshop.alive
    assert owner.get(handle("a", "1")) is workshop.alive["a"]


def test_free_all(workshop):
    owner = workshop.owner()
    owner.get(handle("a", "1"))
    with owner.use(handle("b", "2")) as pipe:
        owner.free_all()
        assert owner.loaded() == () and sorted(workshop.alive) == ["b"]
        del pipe
    assert not workshop.alive
    owner.free("never used")


def test_an_exception_in_use_is_passed_on_and_forgotten(workshop):
    owner = workshop.owner()
    with pytest.raises(KeyboardInterrupt), owner.use(handle("a", "1")):
        raise KeyboardInterrupt
    assert owner._entries[handle("a", "")].in_use == 0


def test_threads_build_once_and_take_turns(workshop):
    owner, inside, most = workshop.owner(), [], []

    def work():
        with owner.use(handle("a", "1")):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(workshop.history) == 1 and max(most) == 1


def test_the_program_around_us_is_told(workshop):
    told = []

    class Memory(DeviceMemory):
        @contextmanager
        def building(self, about_to_load):
            told.append(f"begin {about_to_load.titles()}")
            yield
            told.append("end")

        def changed(self):
            told.append(f"{len(owner.pipelines())} loaded")

    owner = workshop.owner()
    owner.memory = Memory()
    owner.get(handle("a", "1"))
    owner.get(handle("a", "1"))
    owner.free("1")
    assert told == ["begin a", "end", "1 loaded", "0 loaded"]


# ---- real pipelines --------------------------------------------------------------------------------------------------

@pytest.fixture
def tiny_handle(tiny_files) -> PipelineHandle:
    sources = tuple(ModelSource(model, (tiny_files.file(model),)) for model in MODELS)
    return PipelineHandle("qwen-image", sources, tiny_files.tokenizer, torch.float32, "cpu", slot="1")


@pytest.mark.parametrize("preset", ["full", "low", "disk"])
def test_a_real_pipeline_really_goes(tiny_handle, preset):
    owner = WeightsOwner()
    used = dataclasses.replace(tiny_handle, vram=VramChoice(preset, None).settings(torch.float32, "cpu", 16))
    references = [weakref.ref(owner.get(used)), weakref.ref(owner.get(used).dit),
                  weakref.ref(next(owner.get(used).vae.parameters()))]
    owner.free_all()
    gc.collect()  # transformers' models have cycles of their own
    assert [reference() for reference in references] == [None] * 3


def test_the_denoiser_goes_without_the_garbage_collector(tiny_handle):
    """The large part must not wait for a collection that may come late."""
    owner = WeightsOwner()
    reference = weakref.ref(owner.get(tiny_handle).dit)
    gc.disable()
    try:
        owner.free_all()
        assert reference() is None
    finally:
        gc.enable()


def test_models_without_a_place_are_refused_before_loading(tiny_handle):
    double = dataclasses.replace(tiny_handle, sources=(*tiny_handle.sources, tiny_handle.sources[2]))
    with pytest.raises(ModelFileError, match="both a qwen_image_vae"):
        build_pipeline(double)


def test_a_text_encoder_needs_a_tokenizer(tiny_handle):
    with pytest.raises(ModelFileError, match="vocab.json, merges.txt"):
        build_pipeline(dataclasses.replace(tiny_handle, tokenizer=None))
    parts = dataclasses.replace(tiny_handle, tokenizer=None, sources=tiny_handle.sources[1:])
    assert build_pipeline(parts).text_encoder is None


def test_weights_go_with_the_last_handle_that_is_tied(workshop):
    owner = workshop.owner()
    first, second = handle("a", "1"), handle("a", "1")
    for tied in (first, second):
        owner.get(tied)
        owner.tie(tied)
    del tied, first
    assert sorted(workshop.alive) == ["a"], "a later handle of the slot is held"
    del second
    assert not workshop.alive


def test_a_tie_of_the_past_frees_nothing_of_another_slot(workshop):
    owner = workshop.owner()
    gone = handle("a", "1")
    owner.get(gone)
    owner.tie(gone)
    owner.get(handle("a", "2"))
    del gone
    assert sorted(workshop.alive) == ["a"]
