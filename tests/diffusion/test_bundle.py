"""Bundles: units run as soon as their inputs exist, in whatever order those come, and nothing is written into."""
from __future__ import annotations

import itertools

import pytest

from diffsynth_backend.diffusion import BasePipeline, PipelineUnit
from diffsynth_backend.diffusion.bundle import InputBundle, run_pending, run_ready, run_settled, unit_name


class Round(PipelineUnit):
    def __init__(self):
        super().__init__(input_params=("size",), output_params=("size",))

    def process(self, pipe, size):
        pipe.calls.append("Round")
        return {"size": (size + 15) // 16 * 16}


class Noise(PipelineUnit):
    def __init__(self):
        super().__init__(input_params=("size", "seed"), output_params=("noise",))

    def process(self, pipe, size, seed):
        pipe.calls.append("Noise")
        return {"noise": (size, seed)}


class Embed(PipelineUnit):
    def __init__(self):
        super().__init__(seperate_cfg=True, input_params_posi={"text": "prompt"},
                         input_params_nega={"text": "negative_prompt"}, output_params=("embedding",))

    def process(self, pipe, text):
        pipe.calls.append("Embed")
        return {"embedding": f"<{text}>"}


class Everything(PipelineUnit):
    def __init__(self):
        super().__init__(take_over=True)

    def process(self, pipe, inputs_shared, inputs_posi, inputs_nega):
        pipe.calls.append("Everything")
        inputs_shared["sides"] = (sorted(inputs_posi), sorted(inputs_nega))
        return inputs_shared, inputs_posi, inputs_nega


@pytest.fixture
def pipe() -> BasePipeline:
    pipe = BasePipeline(device="cpu")
    pipe.units = [Round(), Noise(), Embed(), Everything()]
    pipe.calls = []
    return pipe


TEXTS = {"positive": {"prompt": "cat"}, "negative": {"negative_prompt": "dog"}}
SIZE, SEED = {"shared": {"size": 20}}, {"shared": {"seed": 3}}


def test_a_unit_runs_when_its_inputs_exist(pipe):
    bundle = run_ready(pipe, InputBundle.empty(pipe).given(pipe, **TEXTS))
    assert pipe.calls == ["Embed", "Embed"]
    assert bundle.pending == ("Round", "Noise", "Everything")
    assert bundle.dicts()[1:] == ({"prompt": "cat", "embedding": "<cat>"},
                                  {"negative_prompt": "dog", "embedding": "<dog>"})


class Check(PipelineUnit):
    def __init__(self):
        super().__init__(input_params=("size",), awaited_models=("dit",))

    def process(self, pipe, size):
        pipe.calls.append("Check")
        return {}


def test_a_unit_waits_for_a_pipeline_with_the_models_that_it_awaits(pipe):
    pipe.units = [Check(), Round(), Noise()]
    bundle = run_ready(pipe, InputBundle.empty(pipe).given(pipe, **SIZE))
    assert pipe.calls == ["Round"] and bundle.pending == ("Check", "Noise")
    pipe.dit = object()
    bundle = run_ready(pipe, bundle.given(pipe, **SEED))
    assert pipe.calls == ["Round", "Check", "Noise"] and not bundle.pending
    assert bundle.unchecked(pipe).pending == ("Check",), "with other models it is checked again"
    run_pending(pipe, bundle.unchecked(pipe))
    assert pipe.calls == ["Round", "Check", "Noise", "Check"]


def test_what_depends_on_nothing_still_to_come_runs_without_what_nobody_gives(pipe):
    class Guide(PipelineUnit):
        def __init__(self):
            super().__init__(input_params=("picture", "size", "tiled"), output_params=("guide",))

        def process(self, pipe, picture, size, tiled):
            pipe.calls.append("Guide")
            return {"guide": (picture, size, tiled)}

    pipe.units = [Round(), Noise(), Guide(), Everything()]
    bundle = InputBundle.empty(pipe).given(pipe, shared={"size": 20, "picture": "cat"})
    settled = run_settled(pipe, bundle, to_come=("seed",))
    assert pipe.calls == ["Round", "Guide"] and settled.pending == ("Noise", "Everything")
    assert dict(settled.shared)["guide"] == ("cat", 32, None) and bundle.pending == ("Round", "Noise", "Guide",
                                                                                     "Everything")
    one, other = (run_pending(pipe, settled.given(pipe, shared={"seed": seed}))[0] for seed in (1, 2))
    assert pipe.calls.count("Guide") == 1 and one["guide"] is other["guide"] and one["noise"] != other["noise"]


def test_a_unit_waits_for_one_that_may_change_its_input(pipe):
    bundle = InputBundle.empty(pipe).given(pipe, **SEED)
    bundle = run_ready(pipe, bundle)
    assert pipe.calls == []
    shared, _, _ = run_ready(pipe, bundle.given(pipe, **SIZE)).dicts()
    assert pipe.calls == ["Round", "Noise"] and shared["noise"] == (32, 3)


@pytest.mark.parametrize("order", list(itertools.permutations([TEXTS, SIZE, SEED])))
def test_the_order_of_inputs_changes_nothing(pipe, order):
    bundle = InputBundle.empty(pipe)
    for inputs in order:
        bundle = run_ready(pipe, bundle.given(pipe, **inputs))
    shared, posi, nega = run_pending(pipe, bundle)
    assert shared == {"size": 32, "seed": 3, "noise": (32, 3),
                      "sides": (["embedding", "prompt"], ["embedding", "negative_prompt"])}
    assert (posi["embedding"], nega["embedding"]) == ("<cat>", "<dog>")
    assert sorted(pipe.calls) == ["Embed", "Embed", "Everything", "Noise", "Round"]


def test_a_later_input_makes_its_unit_run_again(pipe):
    bundle = run_ready(pipe, InputBundle.empty(pipe).given(pipe, **TEXTS))
    changed = bundle.given(pipe, positive={"prompt": "bird"})
    assert "Embed" in changed.pending and "Embed" not in bundle.pending
    assert run_ready(pipe, changed).dicts()[1]["embedding"] == "<bird>"


def test_and_so_do_the_units_behind_it(pipe):
    bundle = run_ready(pipe, InputBundle.empty(pipe).given(pipe, shared={"size": 20, "seed": 3}))
    changed = run_ready(pipe, bundle.given(pipe, shared={"size": 40}))
    assert changed.dicts()[0]["noise"] == (48, 3)


def test_nothing_is_written_into_a_bundle(pipe):
    bundle = InputBundle.empty(pipe).given(pipe, shared={"size": 20, "seed": 3}, **TEXTS)
    before = bundle.dicts()
    run_ready(pipe, bundle)
    run_pending(pipe, bundle)
    bundle.dicts()[0]["size"] = 7
    assert bundle.dicts() == before and len(bundle.pending) == 4


def test_an_input_that_nobody_gave_is_none(pipe):
    pipe.units = [Noise()]
    assert run_pending(pipe, InputBundle.empty(pipe).given(pipe, **SIZE))[0]["noise"] == (20, None)


def test_the_negative_side_costs_nothing_without_guidance(pipe):
    bundle = InputBundle.empty(pipe).given(pipe, shared={"cfg_scale": 1, "size": 16, "seed": 0}, **TEXTS)
    _, posi, nega = run_pending(pipe, bundle)
    assert pipe.calls.count("Embed") == 1 and nega["embedding"] == posi["embedding"]


def test_units_go_by_the_name_of_their_class(pipe):
    assert [unit_name(unit) for unit in pipe.units] == ["Round", "Noise", "Embed", "Everything"]


class Caption(PipelineUnit):
    """Needs a text; takes a picture too."""

    def __init__(self) -> None:
        super().__init__(input_params=("text", "picture"), output_params=("caption",), optional_params=("picture",))

    def process(self, pipe, text, picture):
        return {"caption": (text, picture)}


def test_a_unit_does_not_wait_for_an_optional_input_but_runs_again_for_it(pipe):
    pipe.units = [Caption()]
    bundle = run_ready(pipe, InputBundle.empty(pipe).given(pipe, shared={"text": "cat"}))
    assert bundle.dicts()[0]["caption"] == ("cat", None)
    assert run_ready(pipe, bundle.given(pipe, shared={"picture": 7})).dicts()[0]["caption"] == ("cat", 7)


def test_an_optional_input_has_to_be_one():
    with pytest.raises(ValueError, match="optional_params sound are not among its inputs"):
        PipelineUnit(input_params=("text",), optional_params=("sound",))
