"""In ComfyUI's page: what of a known model is here, the Download button, its question, and the settings."""
from __future__ import annotations

import pytest

from tests.browser.test_features import ADD

BOX = """id => { const node = app.graph.getNodeById(id), box = node.widgets.find(w => w.name === 'files')?.element;
    return box && !box.hidden ? box.textContent : null; }"""
PRESS = "id => app.graph.getNodeById(id).widgets.find(w => w.name === 'files').element.querySelector('button').click()"
CHOOSE = "value => app.extensionManager.setting.set('DiffSynth.Downloads', value)"
NAME, FILE = "qwen-image-eligen", "DiffSynth-Studio/Qwen-Image-EliGen/model.safetensors"


@pytest.fixture
def page(ui, server, hub):
    """An empty graph, nothing downloaded, nothing asked for."""
    (server.base / "models/diffsynth" / FILE).unlink(missing_ok=True)
    hub.requests.clear()
    ui.load({"nodes": [], "links": [], "version": 0.4})
    yield ui.page
    ui.page.evaluate(CHOOSE, "off")


def wait_for(page, node: str, words: str) -> None:
    page.wait_for_function(f"([id, words]) => (({BOX})(id) ?? '').includes(words)", arg=[node, words], timeout=20_000)


def test_what_is_missing_stands_below_the_loader(page, ui, shots):
    loader = page.evaluate(ADD, ["ModelLoader", 0, 0, {"model": "qwen-image"}])
    wait_for(page, loader, "missing: text_encoder, transformer, vae")
    assert "about 57.7 GB · Apache-2.0" in page.evaluate(BOX, loader)
    page.evaluate(PRESS, loader)
    wait_for(page, loader, "Settings, DiffSynth, Downloads")
    page.wait_for_timeout(300)
    ui.shot(shots / "downloads_off.png")
    page.evaluate("""id => { const w = app.graph.getNodeById(id).widgets.find(w => w.name === 'model');
        w.value = 'demo'; w.callback?.('demo'); }""", loader)
    page.wait_for_function(f"id => ({BOX})(id) === null", arg=loader)


def test_the_question_comes_first_and_no_means_no(page, ui, hub, shots):
    page.evaluate(CHOOSE, "ask")
    node = page.evaluate(ADD, ["DownloadModels", 0, 0, {"model": NAME}])
    wait_for(page, node, f"missing: {NAME}")
    page.evaluate(PRESS, node)
    page.get_by_text("Download models?").wait_for()
    page.wait_for_timeout(300)
    ui.shot(shots / "downloads_ask.png")
    assert "DiffSynth-Studio/Qwen-Image-EliGen" in page.locator("[role=dialog]").last.inner_text()
    page.keyboard.press("Escape")
    page.wait_for_timeout(1000)
    assert hub.requests == []
    entry = ui.queue()
    assert entry["status"]["status_str"] == "error", "running the workflow is not asking for a download"
    assert hub.requests == []


def test_yes_brings_the_file(page, ui, server, shots):
    page.evaluate(CHOOSE, "ask")
    node = page.evaluate(ADD, ["LoraLoader", 0, 0, {"lora": NAME}])
    wait_for(page, node, f"missing: {NAME}")
    page.evaluate(PRESS, node)
    page.locator("[role=dialog] button", has_text="Confirm").last.click()
    wait_for(page, node, "complete")
    page.wait_for_timeout(300)
    ui.shot(shots / "downloads_done.png")
    assert (server.base / "models/diffsynth" / FILE).is_file()


def test_the_settings_can_be_found(page, ui, shots):
    page.evaluate("() => app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    page.locator("[role=dialog]").get_by_text("DiffSynth", exact=True).first.click()
    page.get_by_text("Downloads").first.wait_for()
    page.wait_for_timeout(300)
    ui.shot(shots / "downloads_settings.png")
    page.keyboard.press("Escape")
