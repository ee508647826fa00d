"""The estimate that the page asks for: what the widgets say, checked; answers without paths."""
from __future__ import annotations

import json

import pytest

from tests.helpers.models_folder import FILES
from tests.helpers.pack import submodule

DEMO = {"model": "demo", "preset": "disk", "limit": "0.02"}


@pytest.fixture
def answer(pack):
    return submodule("nodes.estimate").answer


def plan(answer, **query) -> dict:
    return answer({**DEMO, **query})["estimate"]["plans"]["dit"]


def test_a_preset(answer):
    figures = answer(DEMO)["estimate"]
    assert (figures["dtype"], figures["rests_on"], figures["device"]) == ("float32", "disk", "cpu")
    assert (figures["limit_gib"], figures["width"], figures["height"]) == (0.02, 128, 128)
    assert set(figures["plans"]) == {"text_encoder", "dit", "vae"} and figures["decision"] is None
    smaller = answer({**DEMO, "width": "64", "height": "32"})["estimate"]
    assert (smaller["width"], smaller["height"]) == (64, 32)
    assert smaller["plans"]["dit"]["activation_bytes"] < figures["plans"]["dit"]["activation_bytes"]


def test_it_is_json(answer):
    for query in (DEMO, {"model": "demo", "preset": "auto"}):
        assert json.loads(json.dumps(answer(query)))["estimate"]


def test_the_plan_follows_the_limit(answer):
    resident = [plan(answer, limit=limit)["resident_bytes"] for limit in ("0", "0.015", "none")]
    assert resident[0] == 0 < resident[1] < resident[2]


def test_a_limit_below_the_floor_says_what_is_needed(answer):
    figures = answer({**DEMO, "limit": "0.001"})["estimate"]
    assert figures["plans"] == {} and 0.001 < figures["floor_gib"] < 0.1
    assert answer({**DEMO, "limit": str(figures["floor_gib"])})["estimate"]["plans"], "what is said is enough"


def test_the_plan_follows_the_limit_of_ram(answer):
    without, some, all_of_it = (plan(answer, ram=ram) for ram in ("none", "0.001", "1"))
    assert without["host_bytes"] == 0 < some["host_bytes"] < all_of_it["host_bytes"] == all_of_it["bytes_per_step"]
    assert answer({**DEMO, "ram": "1"})["estimate"]["ram_limit_gib"] == 1
    assert "ram is '2000'" in answer({**DEMO, "ram": "2000"})["detail"]
    assert answer({"model": "demo", "preset": "low", "ram": "1"}) == {"problem": "nothing_read"}


def test_auto_says_what_it_came_to(answer):
    decision = answer({"model": "demo", "preset": "auto"})["estimate"]["decision"]
    assert decision["preset"] == "full" and decision["fits_ram"] and decision["weight_bytes"] < decision["ram_bytes"]


def test_files_of_model_configs(answer):
    files = {f"file{i}": name for i, name in enumerate(FILES)}
    assert answer({"family": "qwen-image", "preset": "fp8", **files})["estimate"]["dtype"] == "float8_e4m3fn"
    more = answer({**DEMO, "file0": FILES[1]})["estimate"]
    assert more["weight_bytes"] > answer(DEMO)["estimate"]["weight_bytes"], "files besides a preset's count"


def test_fields_replace_the_presets(answer):
    figures = answer({"model": "demo", "preset": "low", "offload_dtype": "bfloat16"})["estimate"]
    assert (figures["dtype"], figures["rests_on"]) == ("bfloat16", "cpu")


@pytest.mark.parametrize("query,name", [
    ({"model": "qwen-image", "preset": "low"}, "missing"),
    ({"family": "qwen-image", "preset": "low"}, "no_model"),
    ({**DEMO, "file0": "../../etc/passwd"}, "missing"),
    ({**DEMO, "preset": "full"}, "nothing_moves")])
def test_what_people_run_into_has_a_name(answer, query, name):
    said = answer(query)
    assert said["problem"] == name and said.get("presets", "low, disk") == "low, disk"


@pytest.mark.parametrize("query,sentence", [
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
    ({**DEMO, **{f"file{i}": FILES[0] for i in range(17)}}, "17 files")])
def test_what_cannot_be_honoured_is_a_problem(answer, query, sentence):
    said = answer(query)
    assert said["problem"] == "other" and sentence in said["detail"]
