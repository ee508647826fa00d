"""In ComfyUI's page: every node can be put on the canvas, what LoRAs fit is shown, a missing ControlNet is named."""
from __future__ import annotations

import pytest

from tests.browser.test_page import fails
from tests.helpers.models_folder import CONTROLNET, LIGHTNING_LORA, LORA
from tests.helpers.pack import ROOT

QUICKSTART = ROOT / "example_workflows/quickstart.json"
ADD = """([type, x, y, widgets]) => {
    const node = LiteGraph.createNode(`DiffSynthBackend_${type}`) ?? LiteGraph.createNode(type);
    app.graph.add(node);
    node.pos = [x, y];
    for (const [name, value] of Object.entries(widgets)) {
        const widget = node.widgets.find(w => w.name === name);
        widget.value = value; widget.callback?.(value);
    }
    return String(node.id);
}"""
CONNECT = """([from, slot, to, name]) => {
    const target = app.graph.getNodeById(to);
    app.graph.getNodeById(from).connect(slot, target, target.inputs.findIndex(i => i.name === name));
}"""
FIND = "type => app.graph._nodes.find(n => n.type === `DiffSynthBackend_${type}`).id.toString()"
SLOTS = "id => app.graph.getNodeById(id).inputs.map(i => i.name)"
WIDGETS = "id => app.graph.getNodeById(id).widgets.map(w => w.name)"
TEXT = "id => app.graph.getNodeById(id).widgets.find(w => w.name === 'result')?.element.textContent ?? null"


@pytest.fixture
def graph(ui):
    """The quickstart, with few steps."""
    ui.load(QUICKSTART)
    ui.page.evaluate("""() => { app.graph._nodes.find(n => n.type === 'DiffSynthBackend_Denoise')
        .widgets.find(w => w.name === 'schedule.steps').value = 2; }""")
    return Graph(ui.page)


class Graph:
    """The graph in the page, to add nodes to."""

    def __init__(self, page) -> None:
        self.page = page

    def add(self, kind: str, x: int, y: int, **widgets) -> str:
        named = {name.replace("__", "."): value for name, value in widgets.items()}
        return self.page.evaluate(ADD, [kind, x, y, named])

    def connect(self, source: str, target: str, name: str) -> None:
        """Connect a node's first output to an input; nodes are named by id, or by kind."""
        ids = [node if node.isdigit() else self.find(node) for node in (source, target)]
        self.page.evaluate(CONNECT, [ids[0], 0, ids[1], name])

    def find(self, kind: str) -> str:
        return self.page.evaluate(FIND, kind)


def test_every_node_can_be_put_on_the_canvas(ui, shots):
    ui.load({"nodes": [], "links": [], "version": 0.4})
    types = ui.page.evaluate("() => Object.keys(LiteGraph.registered_node_types).filter("
                             "t => t.startsWith('DiffSynthBackend_'))")
    assert len(types) == 27
    for i, kind in enumerate(sorted(types)):
        ui.page.evaluate(ADD, [kind, 380 * (i % 5), 430 * (i // 5), {}])
    assert ui.missing() == []
    ui.page.wait_for_timeout(300)
    saved = ui.page.evaluate("() => app.graph.serialize()")
    ui.load(saved)
    ui.shot(shots / "nodes.png")
    assert [text for kind, text in ui.console if kind == "pageerror" or "input socket" in text] == []


def test_inputs_grow(graph, ui, shots):
    picture = graph.add("EmptyImage", 0, 500)
    edit = graph.add("EditImages", 380, 500)
    for name in ("images.image0", "images.image1"):
        graph.connect(picture, edit, name)
    assert "images.image2" in ui.page.evaluate(SLOTS, edit)
    loader = graph.find("ModelLoader")
    graph.connect(graph.add("ModelConfig", 0, 250, model=CONTROLNET), loader, "extras.extra0")
    assert "extras.extra1" in ui.page.evaluate(SLOTS, loader)
    stack = graph.add("LoraStack", 800, 500, count="3")
    assert ui.page.evaluate(WIDGETS, stack)[:7] == [
        "count", *(f"count.{name}_{i}" for i in (1, 2, 3) for name in ("lora", "strength"))]
    ui.shot(shots / "inputs_grow.png")
    sent = ui.api_prompt()[str(loader)]["inputs"]
    assert sent["model"] == "demo" and "extras.extra0" in sent


def test_what_a_lora_fits_is_shown(graph, ui, shots):
    lora = graph.add("LoraLoader", 380, 500, lora=LORA, strength=0.5)
    graph.connect("ModelLoader", lora, "pipeline")
    stack = graph.add("LoraStack", 800, 500, count="1", count__lora_1=LIGHTNING_LORA)
    graph.connect(lora, stack, "pipeline")
    graph.connect(stack, "Denoise", "pipeline")
    entry = ui.queue()
    assert entry["status"]["status_str"] == "success", entry["status"]
    ui.shot(shots / "lora.png")
    assert "strength 0.5" in ui.page.evaluate(TEXT, lora) and "strength 1" in ui.page.evaluate(TEXT, stack)
    assert "choose the Lightning schedule" in ui.page.evaluate(TEXT, graph.find("Denoise"))


def test_a_picture_that_controls_without_a_controlnet(graph, ui, shots):
    control, apply = graph.add("Control", 380, 500), graph.add("ControlNetApply", 800, 500)
    graph.connect(graph.add("EmptyImage", 0, 500), control, "image")
    graph.connect(control, apply, "controls.control0")
    graph.connect("PromptEncode", apply, "conditioning")
    graph.connect(apply, "Denoise", "conditioning")
    fails(ui, shots, "no_controlnet", "DiffSynthBackend_ControlNetApply", "qwen-image/controlnet-canny")
