"""In ComfyUI's page: what Denoise has moved is written below it, until a run that moves nothing."""
from __future__ import annotations

from tests.helpers.pack import ROOT

TEXT = """() => { const node = app.graph._nodes.find(n => n.type === 'DiffSynthBackend_Denoise');
    return node.widgets.find(w => w.name === 'result')?.element.textContent ?? null; }"""
WITH_VRAM = """() => {
    const config = LiteGraph.createNode('DiffSynthBackend_VramConfig');
    app.graph.add(config);
    config.pos = [0, 600];
    const loader = app.graph._nodes.find(n => n.type === 'DiffSynthBackend_ModelLoader');
    config.connect(0, loader, loader.inputs.findIndex(i => i.name === 'vram'));
    app.graph._nodes.find(n => n.type === 'DiffSynthBackend_Denoise')
        .widgets.find(w => w.name === 'schedule.steps').value = 2;
}"""
SET = """([name, value]) => {
    const config = app.graph._nodes.find(n => n.type === 'DiffSynthBackend_VramConfig');
    const widget = config.widgets.find(w => w.name === name);
    widget.value = value; widget.callback?.(value);
}"""


def test_what_was_streamed_is_shown_until_the_next_run(ui, shots):
    ui.load(ROOT / "example_workflows/quickstart.json")
    ui.page.evaluate(WITH_VRAM)
    for name, value in (("preset", "disk"), ("vram_limit", "GiB"), ("vram_limit.gib", 0)):
        ui.page.evaluate(SET, [name, value])
    assert ui.page.evaluate(TEXT) is None
    entry = ui.queue()
    assert entry["status"]["status_str"] == "success", entry["status"]
    ui.shot(shots / "denoise_text.png")
    assert "GiB streamed in" in ui.page.evaluate(TEXT)
    for name, value in (("preset", "auto"), ("vram_limit", "automatic")):
        ui.page.evaluate(SET, [name, value])
    entry = ui.queue()
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert ui.page.evaluate(TEXT) == ""
    saved = ui.page.evaluate("() => app.graph._nodes.find(n => n.type === 'DiffSynthBackend_Denoise').serialize()")
    assert "streamed" not in str(saved["widgets_values"])
