"""In ComfyUI's page: workflows that people saved with earlier versions still open whole, with every value in its place.

tests/workflows/<version>/ holds them as they were saved, with the interface of that time (object_info.json, which
tests/nodes/test_frozen.py reads); nothing there is ever brought up to date.
"""
from __future__ import annotations

import json

import pytest

from tests.helpers.pack import ROOT

SAVED = [path for path in sorted((ROOT / "tests/workflows").glob("*/*.json")) if path.stem != "object_info"]
LINKS = """() => app.graph._nodes.flatMap(node => node.inputs.filter(i => i.link != null).map(i => {
    const link = app.graph.getLink(i.link);
    return [String(link.origin_id), link.origin_slot, String(node.id), i.name];
}))"""


def links_of(workflow: dict) -> set[tuple[str, int, str, str]]:
    """Every connection as (from, output, to, input's name)."""
    inputs = {(str(node["id"]), i): slot["name"] for node in workflow["nodes"] for i, slot in enumerate(node["inputs"])}
    return {(str(source), slot, str(target), inputs[str(target), i])
            for _, source, slot, target, i, _ in workflow["links"]}


def test_there_are_some():
    assert {path.parent.name for path in SAVED} >= {"0.1.0"}


@pytest.mark.parametrize("named", [True, False], ids=["with-names", "by-position"])
@pytest.mark.parametrize("path", SAVED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_saved_workflow_opens_whole(ui, path, named):
    """Also where the page that saved it gave no names to values, so that their positions alone count."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    saved = {str(node["id"]): node.get("widgets_values_named", {}) for node in workflow["nodes"]
             if node["type"] != "MarkdownNote"}
    for node in workflow["nodes"]:
        node.setdefault("inputs", [])
        if not named:
            node.pop("widgets_values_named", None)
    ui.load(workflow)
    assert ui.missing() == []
    assert {tuple(link) for link in ui.page.evaluate(LINKS)} == links_of(workflow)
    sent = ui.api_prompt()
    for key, values in saved.items():
        for name, value in values.items():
            assert name == "control_after_generate" or sent[key]["inputs"][name] == value, f"node {key}: {name}"
