"""What was published stays: nodes, inputs, choices and outputs, and above all the order of widgets.

tests/workflows/<version>/object_info.json is the interface of each version. Workflows hold a widget's value by position
alone, so a widget may come only behind all others, those that a choice opens included.
"""
from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.pack import ROOT
from tests.host.test_object_info import by_need

VERSIONS = sorted((ROOT / "tests/workflows").glob("*/object_info.json"))
WIDGETS = {"INT", "FLOAT", "BOOLEAN", "STRING", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
Inputs = dict[str, dict[str, list]]


def in_order(inputs: Inputs) -> list[tuple[str, str, dict[str, Any]]]:
    """Name, type and options of each input, as the page lays them out: the optional behind the required."""
    return [(name, *spec) for need in ("required", "optional") for name, spec in inputs.get(need, {}).items()]


def differences(before: Inputs, after: Inputs, behind: bool = False) -> Iterator[str]:
    """What breaks a workflow that was saved with `before`. `behind`: more widgets come behind these."""
    now = {name: (kind, options) for name, kind, options in in_order(after)}
    old, new = ([name for name, kind, _ in in_order(inputs) if kind in WIDGETS] for inputs in (before, after))
    if new[:len(old)] != old:
        yield f"the widgets were {old} and are {new}: more may only be appended"
    elif behind and len(new) > len(old):
        yield f"{new[len(old):]} would push the widgets behind them: no widget may be added here"
    for name, kind, options in in_order(before):
        if name not in now:
            yield f"{name} is gone"
        elif now[name][0] != kind:
            yield f"{name} was {kind} and is {now[name][0]}"
        else:
            yield from (f"{name}: {what}" for what in choices(options, now[name][1], behind or name != new[-1]))
    for name in now.keys() - {name for name, *_ in in_order(before)}:
        if name in after.get("required", {}) and now[name][0] not in WIDGETS:
            yield f"{name} is a new socket that must be connected: make it optional"


def choices(before: dict[str, Any], after: dict[str, Any], behind: bool) -> Iterator[str]:
    """As `differences`, for the options of a choice, which may open inputs of their own."""
    if "template" in before and (before["template"]["prefix"], True) != (
            after["template"]["prefix"], before["template"]["max"] <= after["template"]["max"]):
        yield "sockets were renamed, or there are fewer"
    now = {option["key"]: option["inputs"] for option in after.get("options", []) if isinstance(option, dict)}
    for option in before.get("options", []):
        if not isinstance(option, dict):
            if option not in after["options"]:
                yield f"the option {option!r} is gone"
        elif option["key"] not in now:
            yield f"the option {option['key']!r} is gone"
        else:
            yield from differences(option["inputs"], now[option["key"]], behind)


@pytest.fixture(scope="module")
def interface(nodes) -> dict[str, dict[str, Any]]:
    """What the nodes declare now, in the server's form."""
    schemas = [node.define_schema() for node in nodes.values()]
    return {schema.node_id: {"input": json.loads(json.dumps(by_need(schema.inputs))),
                             "output": [output.io_type for output in schema.outputs]} for schema in schemas}


@pytest.mark.parametrize("path", VERSIONS, ids=lambda path: path.parent.name)
def test_everything_that_a_version_had_is_there(interface, path):
    for name, before in json.loads(path.read_text(encoding="utf-8")).items():
        assert name in interface, f"{name} is gone: give it an entry in nodes/replacements.py"
        assert list(differences(before["input"], interface[name]["input"])) == []
        assert interface[name]["output"][:len(before["output"])] == before["output"]


def changed(inputs: Inputs, need: str, *, front: dict | None = None, back: dict | None = None) -> Inputs:
    return {**inputs, need: {**(front or {}), **inputs.get(need, {}), **(back or {})}}


WIDGET, SOCKET = {"new": ["INT", {}]}, {"new": ["IMAGE", {}]}


def test_an_inserted_widget_is_seen(interface):
    """The proof that the test above can fail, and that it lets an append through."""
    before = interface["DiffSynthBackend_Denoise"]["input"]
    assert list(differences(before, before)) == []
    assert list(differences(before, changed(before, "required", back=WIDGET))) == []
    assert list(differences(before, changed(before, "optional", back=SOCKET))) == []
    assert "may only be appended" in "".join(differences(before, changed(before, "required", front=WIDGET)))
    assert "must be connected" in "".join(differences(before, changed(before, "required", front=SOCKET)))


def test_a_widget_inside_a_choice_pushes_those_behind_it(interface):
    for name, choice, fine in (("Denoise", "schedule", False), ("VaeDecode", "tiling", True)):
        before = interface[f"DiffSynthBackend_{name}"]["input"]
        after = copy.deepcopy(before)
        option = after["required"][choice][1]["options"][-1]
        option["inputs"] = changed(option["inputs"], "required", back=WIDGET)
        assert (list(differences(before, after)) == []) is fine


def test_what_is_gone_is_named(interface):
    before = interface["DiffSynthBackend_Denoise"]["input"]
    after = copy.deepcopy(before)
    del after["required"]["latent"]
    after["required"]["cfg"][0] = "INT"
    after["required"]["schedule"][1]["options"].pop(0)
    found = list(differences(before, after))
    assert found == ["latent is gone", "cfg was FLOAT and is INT", "schedule: the option 'steps' is gone"]
