"""In ComfyUI's page: the pack's subgraph blueprints are offered, and stand on the canvas as one node that works."""
from __future__ import annotations

import json

import pytest

from diffsynth_backend.demo.scenes import Scene, Thing
from tests.browser.test_page import pictures, shows
from tests.helpers.pack import ROOT

FILES = sorted((ROOT / "subgraphs").glob("*.json"))
NAMES = ["DiffSynth Edit", "DiffSynth Text to Image", "DiffSynth low VRAM"]
# The node of the blueprint: what it shows, and which of the nodes inside it this server lacks.
LOOK = """() => {
    const [node] = app.graph._nodes.filter(n => n.subgraph);
    const label = s => s.label || s.localized_name || s.name;
    return { title: node.title, inputs: node.inputs.filter(i => !i.widget).map(label),
             widgets: node.widgets.map(w => w.label || w.name), outputs: node.outputs.map(label),
             missing: node.subgraph.nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type) };
}"""
DRAW = ["model", "prompt", "negative prompt", "width", "height", "seed", "steps", "cfg"]
SHOWN = {
    "DiffSynth Text to Image": {"inputs": [], "widgets": DRAW},
    "DiffSynth Edit": {"inputs": ["image 1", "image 2 (optional)", "image 3 (optional)"],
                       "widgets": ["model", "variant", *DRAW[1:]]},
    "DiffSynth low VRAM": {"inputs": [], "widgets": ["model", "preset", "VRAM limit (GiB)", *DRAW[1:]]},
}
CONNECT = """([from, to]) => {
    const source = app.graph._nodes.find(n => from === null ? n.subgraph : n.type === from);
    const target = app.graph._nodes.find(n => to === null ? n.subgraph : n.type === to);
    source.connect(0, target, 0);
}"""


def insert(ui, name: str) -> None:
    """Look for a blueprint as a person would, and put it on an empty canvas."""
    ui.load({"nodes": [], "links": [], "version": 0.4})
    ui.page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    box = ui.page.locator("[role=dialog] input").first
    box.fill(name)
    ui.page.locator("[role=dialog]").get_by_text(name).first.click(timeout=30_000)
    box.wait_for(state="hidden")
    ui.page.mouse.move(500, 300)
    ui.page.mouse.click(500, 300)
    ui.page.wait_for_function("() => app.graph._nodes.some(n => n.subgraph)")
    ui.page.wait_for_timeout(300)


def put(ui, kind: str, x: int, y: int) -> None:
    ui.page.evaluate("""([kind, x, y]) => {
        const node = LiteGraph.createNode(kind);
        app.graph.add(node);
        node.pos = [x, y];
    }""", [kind, x, y])


def test_these_are_the_blueprints():
    assert [path.stem for path in FILES] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_is_offered_and_stands_whole(ui, shots, name):
    insert(ui, name)
    ui.shot(shots / f"blueprint_{name}.png")
    assert ui.page.evaluate(LOOK) == {"title": name, "outputs": ["image"], "missing": [], **SHOWN[name]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_sent_is_what_was_saved(ui, path):
    """Each widget inside arrives at its own input: nothing has moved since the file was written."""
    insert(ui, path.stem)
    put(ui, "SaveImage", 1200, 0)
    ui.page.evaluate(CONNECT, [None, "SaveImage"])
    saved = json.loads(path.read_text(encoding="utf-8"))["definitions"]["subgraphs"][0]
    sent = {node["class_type"]: node["inputs"] for node in ui.api_prompt().values()}
    assert sent.keys() == {"SaveImage", *(node["type"] for node in saved["nodes"])}
    for node in saved["nodes"]:
        for key, value in node["widgets_values_named"].items():
            assert key == "control_after_generate" or sent[node["type"]][key] == value, f"{node['type']}: {key}"


def test_the_first_one_draws_at_once(ui, shots):
    insert(ui, "DiffSynth Text to Image")
    put(ui, "SaveImage", 1200, 0)
    ui.page.evaluate(CONNECT, [None, "SaveImage"])
    ui.page.evaluate("() => { app.graph._nodes.find(n => n.subgraph).widgets.find(w => w.name === 'seed').value = 1; }")
    entry = ui.queue()
    ui.shot(shots / "blueprint_run.png")
    assert entry["status"]["status_str"] == "success", entry["status"]
    outside = {key: output for key, output in entry["outputs"].items() if ":" not in key}
    [picture] = pictures(ui, {"outputs": outside})
    assert shows(picture, Scene((Thing("red", "circle", "top left"), Thing("blue", "square", "bottom right")), "white"))


def test_pictures_that_are_not_connected_are_left_out(ui):
    insert(ui, "DiffSynth Edit")
    put(ui, "EmptyImage", 0, 0)
    put(ui, "SaveImage", 1200, 0)
    ui.page.evaluate(CONNECT, ["EmptyImage", None])
    ui.page.evaluate(CONNECT, [None, "SaveImage"])
    [edit] = [node["inputs"] for node in ui.api_prompt().values()
              if node["class_type"] == "DiffSynthBackend_EditImages"]
    assert [key for key in edit if key.startswith("images.")] == ["images.image0"]


def test_the_page_has_no_complaint(ui):
    assert ui.blocked == []
    assert [text for kind, text in ui.console if kind == "pageerror" or "blueprint" in text.lower()] == []
