"""Units and their runner: three modes, three dicts, and no value that vanishes."""
from __future__ import annotations

import copy

import pytest

from diffsynth_backend.diffusion import PipelineUnit, PipelineUnitRunner


class Area(PipelineUnit):
    """Direct: two shared inputs, one shared output."""

    def __init__(self, **declared) -> None:
        super().__init__(**{"input_params": ("height", "width"), "output_params": ("area",), **declared})

    def process(self, pipe, height, width):
        return {"area": height * width}


class Length(PipelineUnit):
    """CFG-separate: counts a prompt's letters, times a shared factor; notes what it was called with."""

    def __init__(self) -> None:
        super().__init__(seperate_cfg=True, input_params=("factor",), input_params_posi={"text": "prompt"},
                         input_params_nega={"text": "negative_prompt"}, output_params=("length",))
        self.seen: list[str] = []

    def process(self, pipe, factor, text):
        self.seen.append(text)
        return {"length": len(text) * (factor or 1)}


class Swap(PipelineUnit):
    """Take-over: does as it likes with the dicts."""

    def __init__(self) -> None:
        super().__init__(take_over=True)

    def process(self, pipe, inputs_shared, inputs_posi, inputs_nega):
        inputs_shared["swapped"] = True
        return inputs_shared, inputs_nega, inputs_posi


@pytest.fixture
def run():
    def apply(unit, shared=None, posi=None, nega=None):
        return PipelineUnitRunner()(unit, None, shared or {}, posi or {}, nega or {})
    return apply


# ---- modes ----------------------------------------------------------------------------------------------------------

def test_direct_reads_and_writes_shared_inputs(run):
    shared, posi, nega = run(Area(), {"height": 3, "width": 4, "other": 1}, {"p": 1}, {"n": 1})
    assert shared == {"height": 3, "width": 4, "other": 1, "area": 12}
    assert (posi, nega) == ({"p": 1}, {"n": 1})


def test_separate_cfg_runs_once_a_side_and_writes_to_that_side(run):
    unit = Length()
    shared, posi, nega = run(unit, {"factor": 2, "cfg_scale": 4}, {"prompt": "abc"}, {"negative_prompt": "z"})
    assert (posi["length"], nega["length"]) == (6, 2)
    assert unit.seen == ["abc", "z"]
    assert "length" not in shared


@pytest.mark.parametrize("cfg_scale", [1, 1.0])
def test_separate_cfg_without_guidance_copies_the_positive_side(run, cfg_scale):
    unit = Length()
    _, posi, nega = run(unit, {"cfg_scale": cfg_scale}, {"prompt": "abc"}, {"negative_prompt": "z"})
    assert unit.seen == ["abc"]
    assert nega == {"negative_prompt": "z", "length": posi["length"]}


@pytest.mark.parametrize("shared", [{}, {"cfg_scale": None}, {"cfg_scale": 0}, {"cfg_scale": 1.001}])
def test_separate_cfg_computes_both_sides_unless_the_scale_is_one(run, shared):
    """A graph knows the scale only when it denoises, so an absent one must not cost the negative side."""
    _, posi, nega = run(Length(), shared, {"prompt": "abc"}, {"negative_prompt": "z"})
    assert (posi["length"], nega["length"]) == (3, 1)


def test_take_over_gets_and_returns_all_three(run):
    assert run(Swap(), {"s": 1}, {"p": 1}, {"n": 1}) == ({"s": 1, "swapped": True}, {"n": 1}, {"p": 1})


@pytest.mark.parametrize("unit", [Area(), Length(), Swap()], ids=["direct", "separate", "take_over"])
def test_the_dicts_that_come_in_are_never_written(run, unit):
    dicts = ({"height": 3, "width": 4, "factor": 1}, {"prompt": "abc"}, {"negative_prompt": "z"})
    before = copy.deepcopy(dicts)
    returned = run(unit, *dicts)
    assert dicts == before
    assert all(new is not old for new in returned for old in dicts)


def test_the_runner_hands_the_pipeline_to_the_unit():
    class Named(PipelineUnit):
        def process(self, pipe):
            return {"name": pipe}

    shared, _, _ = PipelineUnitRunner()(Named(), "the pipeline", {}, {}, {})
    assert shared == {"name": "the pipeline"}


def test_an_input_that_nobody_gave_is_none(run):
    class Default(PipelineUnit):
        def process(self, pipe, seed):
            return {"seed": 0 if seed is None else seed}

    assert run(Default(input_params=("seed",)))[0] == {"seed": 0}


@pytest.mark.parametrize("nothing", [None, {}])
def test_a_unit_may_return_nothing(run, nothing):
    class Idle(PipelineUnit):
        def process(self, pipe):
            return nothing

    assert run(Idle(output_params=("x",)), {"a": 1}) == ({"a": 1}, {}, {})


# ---- declarations ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("unit", [Area(output_params=("size",)), Area(output_params=("size", "volume"))])
def test_an_undeclared_output_raises_with_its_name(run, unit):
    with pytest.raises(ValueError, match="Area returned area, which its output_params"):
        run(unit, {"height": 1, "width": 1})


def test_an_undeclared_output_of_one_side_raises_too(run):
    unit = Length()
    unit.output_params = ("letters",)
    with pytest.raises(ValueError, match="Length returned length"):
        run(unit, {"cfg_scale": 4}, {"prompt": "a"}, {"negative_prompt": "b"})


@pytest.mark.parametrize("name", ["input_params", "output_params", "onload_model_names"])
def test_a_string_instead_of_a_tuple_raises(name):
    with pytest.raises(TypeError, match=f"{name} must be a tuple of names, got the string 'dit': a comma is missing"):
        PipelineUnit(**{name: ("dit")})


def test_a_unit_has_one_mode():
    with pytest.raises(ValueError, match="either seperate_cfg or take_over"):
        PipelineUnit(seperate_cfg=True, take_over=True)


def test_a_unit_without_process_says_which(run):
    class Unfinished(PipelineUnit):
        pass

    with pytest.raises(NotImplementedError, match="Unfinished"):
        run(Unfinished())


def test_reads_names_the_keys_of_all_sides():
    assert Length().reads() == {"factor", "prompt", "negative_prompt"}
    assert PipelineUnit().reads() == set()
