"""The estimate that the page asks for: what the widgets say, checked; answers without paths."""
from __future__ import annotations

import pytest

from tests.helpers.models_folder import FILES
from tests.helpers.pack import submodule

DEMO = {"model": "demo", "preset": "disk", "limit": "0.02"}


@pytest.fixture
def answer(pack):
    return submodule("nodes.estimate").answer


def test_a_preset(answer):
    lines = answer(DEMO)["lines"]
    assert lines[0].endswith("of weights in float32, on disk") and lines[1] == "limit: 0.02 GiB of cpu"
    assert any(line.startswith("dit at 128×128: ") for line in lines)
    assert answer({**DEMO, "width": "64", "height": "32"})["lines"][3].startswith("dit at 64×32: ")


def test_the_plan_follows_the_limit(answer):
    def resident(limit):
        line = next(line for line in answer({**DEMO, "limit": limit})["lines"] if line.startswith("dit"))
        return float(line.split(": ")[1].split()[0])

    assert resident("0") == 0 < resident("0.015") < resident("none")


def test_a_limit_below_the_floor_says_what_is_needed(answer):
    assert "the floor is" in answer({**DEMO, "limit": "0.001"})["lines"][-1]


def test_auto_says_what_it_came_to(answer):
    assert answer({"model": "demo", "preset": "auto"})["lines"][1].startswith("auto: full, because ")


def test_files_of_model_configs(answer):
    files = {f"file{i}": name for i, name in enumerate(FILES)}
    lines = answer({"family": "qwen-image", "preset": "fp8", **files})["lines"]
    assert "float8_e4m3fn" in lines[0]
    more = answer({**DEMO, "file0": FILES[1]})["lines"]
    assert more[0] != answer(DEMO)["lines"][0], "files besides a preset's count"


def test_fields_replace_the_presets(answer):
    query = {"model": "demo", "preset": "low", "offload_dtype": "bfloat16"}
    assert "in bfloat16, rests on cpu" in answer(query)["lines"][0]


@pytest.mark.parametrize("query,sentence", [
    ({"model": "qwen-image", "preset": "low"}, "some of the model's files are missing"),
    ({"family": "qwen-image", "preset": "low"}, "no model"),
    ({**DEMO, "preset": "fast"}, "preset is 'fast'"),
    ({"model": "demo"}, "preset is None"),
    ({**DEMO, "model": "../demo"}, "model is '../demo'"),
    ({**DEMO, "limit": "nan"}, "limit is 'nan'"),
    ({**DEMO, "limit": "-1"}, "a number from 0 to 1024"),
    ({**DEMO, "limit": "inf"}, "limit is 'inf'"),
    ({**DEMO, "width": "1e9"}, "width is '1e9'"),
    ({**DEMO, "height": "many"}, "height is 'many'"),
    ({**DEMO, "dtype": "int8"}, "dtype is 'int8'"),
    ({**DEMO, "onload_device": "cuda:7"}, "onload_device is 'cuda:7'"),
    ({**DEMO, "preset": "full"}, "choose a preset whose layers move"),
    ({**DEMO, **{f"file{i}": FILES[0] for i in range(17)}}, "17 files")])
def test_what_cannot_be_honoured_is_a_problem(answer, query, sentence):
    assert sentence in answer(query)["problem"]
