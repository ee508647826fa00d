"""In ComfyUI's page, in English and Chinese: what nodes, tooltips and help say, and what the search finds."""
from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.browser.page import FIT, READY
from tests.browser.test_denoise_text import SET, WITH_VRAM
from tests.browser.test_memory_map import TAB
from tests.helpers.pack import ROOT

TOOLTIPS = [("Denoise", "title", ""), ("Denoise", "input", "latent"), ("Denoise", "output", "0"),
            ("Denoise", "widget", "cfg"), ("Denoise", "widget", "schedule"), ("Denoise", "widget", "schedule.denoise"),
            ("ModelLoader", "input", "vram"), ("ModelLoader", "input", "extras.extra0"),
            ("ModelLoader", "widget", "model")]
SEARCHES = {"low vram": "VramConfig", "offload": "VramConfig", "显存": "VramConfig", "qwen": "ModelLoader",
            "edit": "EditImages", "换装": "EditImages", "采样器": "Denoise", "提示词": "PromptEncode", "图层": "Layers"}
QUICKSTART = ROOT / "example_workflows/quickstart.json"
WORDS = {language: json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
         for language in ("en", "zh")}
SETTLED = "() => app.graph._nodes.find(n => n.type === 'DiffSynthBackend_VramConfig').widgets.find(w => " \
          "w.name === 'result')?.element.textContent ?? ''"
# What stands in the sidebar and below the nodes, in each language.
SAID = {"en": {"plan": "dit at 128×128: 0 stay on the device", "limit": "limit: 0 GiB of cpu",
               "sidebar": "DiffSynth memory", "free": "Free everything", "step": "cross per step from disk",
               "empty": "No model is loaded."},
        "zh": {"plan": "dit（128×128）：0 常驻显卡", "limit": "上限：0 GiB（cpu）", "sidebar": "DiffSynth 内存图",
               "free": "全部释放", "step": "每步从硬盘传输", "empty": "没有已加载的模型。"}}
VUE = "async on => { await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on); }"
LOCALE = "async locale => { await app.extensionManager.setting.set('Comfy.Locale', locale); }"
# What a node shows: its title, its sockets and widgets by the names that they have for the program. Widgets that are
# not saved are no inputs, but texts and buttons that our scripts add.
SHOWN = """async () => {
    const shown = {};
    for (const node of app.graph._nodes) {
        const slot = s => s.label || s.localized_name || s.name;
        shown[node.type] = { title: node.title, inputs: Object.fromEntries([
            ...node.inputs.map(i => [i.name, slot(i)]),
            ...(node.widgets ?? []).filter(w => w.serialize !== false).map(w => [w.name, w.label ?? w.name])]),
            outputs: node.outputs.map(slot) };
    }
    return shown;
}"""
EVERY_NODE = """() => {
    const types = Object.keys(LiteGraph.registered_node_types).filter(t => t.startsWith('DiffSynthBackend_')).sort();
    types.forEach((type, i) => {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        node.pos = [400 * (i % 5), 450 * Math.floor(i / 5)];
    });
}"""
CHOOSE = """([type, name, value]) => {
    const node = app.graph._nodes.find(n => n.type === `DiffSynthBackend_${type}`);
    const widget = node.widgets.find(w => w.name === name);
    widget.value = value; widget.callback?.(value);
}"""
# A place on a node, in pixels of the page: of a widget or socket by its name, or of the title.
PLACE = """([type, kind, name]) => {
    const node = app.graph._nodes.find(n => n.type === `DiffSynthBackend_${type}`);
    const at = { widget: () => [60, node.widgets.find(w => w.name === name).y + 10],
                 input: () => { const p = node.getInputPos(node.inputs.findIndex(i => i.name === name));
                                return [p[0] - node.pos[0], p[1] - node.pos[1]]; },
                 output: () => { const p = node.getOutputPos(Number(name));
                                 return [p[0] - node.pos[0], p[1] - node.pos[1]]; },
                 title: () => [60, -15] }[kind]();
    const box = app.canvas.canvas.getBoundingClientRect(), view = app.canvas.ds;
    return [0, 1].map(i => (node.pos[i] + at[i] + view.offset[i]) * view.scale + [box.left, box.top][i]);
}"""


def speak(ui, language: str) -> None:
    ui.page.evaluate(LOCALE, language)
    ui.page.wait_for_timeout(300)
    ui.page.goto(ui.url)
    ui.page.wait_for_function(READY)
    ui.page.wait_for_timeout(1500)


@pytest.fixture(scope="module", params=["en", "zh"])
def language(ui, request) -> Iterator[str]:
    """The page's language, one after the other."""
    if request.param != "en":
        speak(ui, request.param)
    yield request.param
    if request.param != "en":
        speak(ui, "en")


@pytest.fixture(params=[False, True], ids=["classic", "vue"])
def renderer(ui, request) -> Iterator[bool]:
    """Whether nodes are drawn by Vue rather than on the canvas."""
    ui.page.evaluate(VUE, request.param)
    yield request.param
    ui.page.evaluate(VUE, False)


def words(node_type: str, language: str) -> dict:
    return WORDS[language][f"DiffSynthBackend_{node_type}"]


def shown(ui) -> dict:
    return {name.removeprefix("DiffSynthBackend_"): node for name, node in ui.page.evaluate(SHOWN).items()
            if name.startswith("DiffSynthBackend_")}


def check(node: str, seen: dict, language: str) -> None:
    """What the page shows of a node is what the locale says."""
    known = words(node, language)
    assert seen["title"] == known["display_name"]
    assert seen["outputs"] == [output["name"] for output in known["outputs"].values()]
    for name, label in seen["inputs"].items():
        if name != "control_after_generate":  # which is the page's own
            assert label == known["inputs"][name.replace(".", "_")]["name"], f"{node}: {name}"


def hover(ui, node: str, kind: str, name: str) -> str:
    """The tooltip that appears over a place of a node."""
    ui.page.mouse.move(5, 5)
    ui.page.wait_for_timeout(100)
    x, y = ui.page.evaluate(PLACE, [node, kind, name])
    ui.page.mouse.move(x - 3, y)
    ui.page.mouse.move(x, y, steps=3)
    tooltip = ui.page.locator(".node-tooltip")
    tooltip.wait_for(state="visible", timeout=5000)
    return tooltip.inner_text()


def put_every_node(ui) -> None:
    ui.load({"nodes": [], "links": [], "version": 0.4})
    ui.page.evaluate(EVERY_NODE)
    ui.page.wait_for_timeout(300)


def test_every_node_speaks_the_language(ui, language, shots):
    put_every_node(ui)
    for node, what in shown(ui).items():
        check(node, what, language)
    ui.load(ui.page.evaluate("() => app.graph.serialize()"))
    for node, what in shown(ui).items():
        check(node, what, language)
    ui.page.evaluate("() => { app.canvas.ds.scale = 0.62; app.canvas.ds.offset = [60, 60]; "
                     "app.canvas.setDirty(true, true); }")
    ui.page.wait_for_timeout(300)
    ui.shot(shots / f"nodes_{language}.png")


def test_inputs_inside_choices_and_those_that_grow_do(ui, language):
    put_every_node(ui)
    for node, name, values in (("Denoise", "schedule", ("sigmas", "lightning", "fixed shift", "steps")),
                               ("ModelLoader", "model", ("model configs",)), ("LoraStack", "count", ("8",)),
                               ("VramConfig", "vram_limit", ("GiB",)), ("Inpaint", "blur", ("on",)),
                               ("VaeDecode", "tiling", ("on",)), ("VaeEncode", "tiling", ("on",))):
        for value in values:
            ui.page.evaluate(CHOOSE, [node, name, value])
            check(node, shown(ui)[node], language)
    assert "model.configs.config0" in shown(ui)["ModelLoader"]["inputs"]


def test_a_workflow_that_was_saved_in_english_does(ui, language, renderer, shots):
    ui.load(QUICKSTART)
    for node, what in shown(ui).items():
        check(node, what, language)
    ui.page.wait_for_timeout(500)
    ui.shot(shots / f"quickstart_{language}_{'vue' if renderer else 'classic'}.png")
    if renderer:  # whose text is in the page itself
        text = ui.page.locator("[data-node-id]").all_inner_texts()
        assert any(words("ModelLoader", language)["inputs"]["vram"]["name"] in part for part in text), text


def test_a_label_given_by_hand_stays(ui, language):
    workflow = json.loads(QUICKSTART.read_text(encoding="utf-8"))
    workflow["nodes"][0]["inputs"][0]["label"] = "my own"
    ui.load(workflow)
    assert shown(ui)["ModelLoader"]["inputs"]["vram"] == "my own"


def test_tooltips_speak_the_language(ui, language, shots):
    ui.load(QUICKSTART)
    for node, kind, name in TOOLTIPS:
        known = words(node, language)
        wanted = known["description"] if kind == "title" else (
            known["outputs" if kind == "output" else "inputs"][name.replace(".", "_")]["tooltip"])
        seen = hover(ui, node, kind, name)
        ui.shot(shots / f"tooltip_{language}_{node}_{kind}_{name}.png")
        assert seen.split() == wanted.split()


def test_help_speaks_the_language(ui, language, shots):
    ui.load(QUICKSTART)
    ui.page.evaluate("""() => app.canvas.selectNode(
        app.graph._nodes.find(n => n.type === 'DiffSynthBackend_Denoise'))""")
    ui.page.wait_for_timeout(300)
    ui.page.locator("[data-testid=info-button], .p-button:has(.icon-\\\\[lucide--info\\\\])").first.click()
    page = (ROOT / "web/docs/DiffSynthBackend_Denoise" / f"{language}.md").read_text(encoding="utf-8")
    sentence = page.splitlines()[2]
    ui.page.wait_for_function("sentence => document.body.innerText.includes(sentence)", arg=sentence)
    ui.page.wait_for_timeout(300)
    ui.shot(shots / f"help_{language}.png")


def test_plan_and_sidebar_speak_the_language(ui, language, shots):
    said = SAID[language]
    ui.load(QUICKSTART)
    ui.page.evaluate(WITH_VRAM)
    for name, value in (("preset", "disk"), ("vram_limit", "GiB"), ("vram_limit.gib", 0)):
        ui.page.evaluate(SET, [name, value])
    ui.page.wait_for_function(f"words => ({SETTLED})().includes(words)", arg=said["plan"])
    assert said["limit"] in ui.page.evaluate(SETTLED)
    ui.page.evaluate(FIT)
    ui.page.wait_for_timeout(300)
    ui.shot(shots / f"plan_{language}.png")
    ui.page.locator(TAB).first.click()
    try:
        assert ui.queue()["status"]["status_str"] == "success"
        ui.page.wait_for_function("words => document.querySelector('.diffsynth-plan')?.textContent.includes(words)",
                                  arg=said["step"])
        sidebar = ui.page.locator(".diffsynth-memory").inner_text()
        assert said["sidebar"] in sidebar and said["free"] in sidebar
        ui.shot(shots / f"sidebar_{language}.png")
        ui.page.locator(".diffsynth-free").click()
        ui.page.locator(".diffsynth-memory").get_by_text(said["empty"]).wait_for()
        other = "en" if language == "zh" else "zh"
        ui.page.evaluate(LOCALE, other)
        ui.page.locator(".diffsynth-memory").get_by_text(SAID[other]["empty"]).wait_for()
        ui.page.wait_for_function(f"words => ({SETTLED})().includes(words)", arg=SAID[other]["plan"])
    finally:
        ui.page.evaluate(LOCALE, language)
        ui.page.locator(TAB).first.click()


def test_what_people_type_finds_the_node(ui, language, shots):
    ui.load({"nodes": [], "links": [], "version": 0.4})
    for typed, node in SEARCHES.items():
        ui.page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        box = ui.page.locator("[role=dialog] input").first
        box.fill(typed)
        found = ui.page.locator("[role=dialog]").get_by_text(words(node, language)["display_name"]).first
        found.wait_for(state="visible", timeout=5000)
        ui.shot(shots / f"search_{language}_{typed}.png")
        ui.page.keyboard.press("Escape")
        box.wait_for(state="hidden")


REGISTRY = "api.comfy.org"  # where the page itself asks which pack a node is from, if it may


def test_the_page_has_no_complaint(ui, language):
    assert ui.blocked == []
    ours = [text for kind, text in ui.console if kind in ("error", "pageerror") and "diffsynth" in text.lower()
            and REGISTRY not in text]
    assert ours == []
