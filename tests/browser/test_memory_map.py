"""In ComfyUI's page: the sidebar with what is loaded, the plan below VRAM Config, and how far a load is."""
from __future__ import annotations

import pytest

from tests.browser.page import FIT
from tests.browser.test_denoise_text import SET, WITH_VRAM
from tests.helpers.pack import ROOT

TAB = ".diffsynth-memory-tab-button"
PLAN = """() => app.graph._nodes.find(n => n.type === 'DiffSynthBackend_VramConfig')
    .widgets.find(w => w.name === 'result')?.element.textContent ?? ''"""
LOADER = PLAN.replace("VramConfig", "ModelLoader")
MODELS = "() => [...document.querySelectorAll('.diffsynth-model')].map(e => e.textContent)"


@pytest.fixture
def graph(ui):
    """The quickstart with a VRAM Config and few steps."""
    ui.load(ROOT / "example_workflows/quickstart.json")
    ui.page.evaluate(WITH_VRAM)
    yield ui
    if ui.page.locator(".diffsynth-memory").count():
        ui.page.locator(TAB).first.click()


def choose(ui, **values) -> None:
    for name, value in values.items():
        ui.page.evaluate(SET, [name.replace("__", "."), value])


def waits_for(ui, function: str, argument=None) -> None:
    ui.page.wait_for_function(function, arg=argument, timeout=90_000)


def test_the_sidebar_shows_what_is_loaded_until_it_is_freed(graph, shots):
    choose(graph, preset="disk", vram_limit="GiB", vram_limit__gib=0)
    graph.page.locator(TAB).first.click()
    graph.page.wait_for_selector(".diffsynth-memory")
    entry = graph.queue()
    assert entry["status"]["status_str"] == "success", entry["status"]
    waits_for(graph, "() => document.querySelectorAll('.diffsynth-model').length === 3")
    waits_for(graph, "() => document.querySelector('.diffsynth-traffic')?.textContent.includes('iB/s')")
    models = graph.page.evaluate(MODELS)
    assert any("QwenImageDiT" in text and "disk 7.0 MiB" in text for text in models), models
    assert "cross per step" in graph.page.locator(".diffsynth-plan").first.inner_text()
    graph.shot(shots / "memory_map.png")
    graph.page.locator(".diffsynth-free").click()
    waits_for(graph, "() => document.querySelector('.diffsynth-memory').textContent.includes('No model is loaded')")
    graph.shot(shots / "memory_map_freed.png")
    assert graph.page.evaluate(MODELS) == []


def test_a_sidebar_that_opens_later_shows_it_too(graph):
    assert graph.queue()["status"]["status_str"] == "success"
    loaded = graph.page.evaluate("async () => (await (await fetch('/diffsynth_backend/memory')).json()).pipelines")
    assert loaded
    graph.page.locator(TAB).first.click()
    graph.page.wait_for_selector(".diffsynth-model")
    assert len(graph.page.evaluate(MODELS)) == sum(len(pipeline["models"]) for pipeline in loaded)


def test_the_plan_follows_what_is_edited(graph, shots):
    choose(graph, preset="disk", vram_limit="none")
    waits_for(graph, f"() => ({PLAN})().includes('dit at 128×128: 14.0 MiB stay')")
    choose(graph, vram_limit="GiB", vram_limit__gib=0)
    waits_for(graph, f"() => ({PLAN})().includes('dit at 128×128: 0 stay')")
    graph.page.evaluate(FIT)
    graph.page.wait_for_timeout(300)
    graph.shot(shots / "vram_plan.png")
    choose(graph, vram_limit__gib=0.5)
    waits_for(graph, f"() => ({PLAN})().includes('dit at 128×128: 14.0 MiB stay')")
    graph.page.evaluate("""() => { app.graph._nodes.find(n => n.type === 'DiffSynthBackend_ModelLoader')
        .widgets.find(w => w.name === 'model').value = 'qwen-image'; }""")
    waits_for(graph, f"() => ({PLAN})().includes('missing')")
    graph.page.evaluate("""() => { const loader = app.graph._nodes.find(n => n.type === 'DiffSynthBackend_ModelLoader');
        loader.disconnectInput(loader.inputs.findIndex(i => i.name === 'vram')); }""")
    waits_for(graph, f"() => ({PLAN})() === ''")


def test_the_plan_is_seen_in_either_renderer(ui, shots):
    ui.page.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    try:
        ui.load(ROOT / "example_workflows/quickstart.json")
        ui.page.evaluate(WITH_VRAM)
        choose(ui, preset="disk", vram_limit="none")
        ui.page.evaluate(FIT)
        waits_for(ui, "() => [...document.querySelectorAll('.diffsynth-result')].some(e => e.textContent.includes("
                      "'14.0 MiB stay') && e.getBoundingClientRect().height > 10)")
        ui.shot(shots / "vram_plan_vue.png")
    finally:
        ui.page.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def test_how_far_a_load_is_gives_way_to_its_result(graph):
    graph.page.evaluate("""() => { window.loaderTexts = [];
        app.api.addEventListener('diffsynth.loading', () => setTimeout(() => window.loaderTexts.push(
            app.graph._nodes.find(n => n.type === 'DiffSynthBackend_ModelLoader').widgets
                .find(w => w.name === 'result')?.element.textContent), 0)); }""")
    graph.page.evaluate("""async () => fetch('/free', {method: 'POST', headers: {'Content-Type': 'application/json'},
        body: JSON.stringify({unload_models: true, free_memory: true})})""")
    waits_for(graph, "async () => !(await (await fetch('/diffsynth_backend/memory')).json()).pipelines.length")
    choose(graph, preset="fp8", vram_limit="automatic")
    assert graph.queue()["status"]["status_str"] == "success"
    seen = graph.page.evaluate("() => window.loaderTexts")
    assert any((text or "").startswith("loading demo/") for text in seen), seen
    text = graph.page.evaluate(LOADER)
    assert "QwenImageDiT" in text and "loading" not in text


def test_nothing_of_ours_is_an_error_in_the_console(ui):
    ours = [text for kind, text in ui.console if kind in ("error", "pageerror", "warning")
            and any(name in text for name in ("diffsynth", "memory_map", "vram_plan", "loader_text", "node_text"))]
    assert ours == [] and ui.blocked == []
