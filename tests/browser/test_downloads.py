"""In ComfyUI's page: what of a known model is here, the Download button, its question, and the settings."""
from __future__ import annotations

import pytest
from playwright.sync_api import TimeoutError

from tests.browser.test_features import ADD
from tests.helpers.pack import ROOT

BOX = """id => { const node = app.graph.getNodeById(id), box = node.widgets.find(w => w.name === 'files')?.element;
    return box && !box.hidden ? box.textContent : null; }"""
PRESS = "id => app.graph.getNodeById(id).widgets.find(w => w.name === 'files').element.querySelector('button').click()"
CHOOSE = """async value => {  // until the server has it, which the page does not wait for
    await app.extensionManager.setting.set('DiffSynth.Downloads', value);
    for (let waits = 0; waits < 200; waits++) {
        if (((await (await app.api.fetchApi('/settings')).json())['DiffSynth.Downloads'] ?? 'off') === value) return;
        await new Promise(done => setTimeout(done, 50));
    }
    throw new Error(`the server does not learn that the setting is ${value}`); }"""
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
    try:
        page.wait_for_function(f"([id, words]) => (({BOX})(id) ?? '').includes(words)", arg=[node, words],
                               timeout=20_000)
    except TimeoutError:
        raise AssertionError(f"{words!r} expected, the box says {page.evaluate(BOX, node)!r}") from None


def test_what_is_missing_stands_below_the_loader(page, ui, shots):
    loader = page.evaluate(ADD, ["ModelLoader", 0, 0, {"model": "qwen-image"}])
    wait_for(page, loader, "missing: text_encoder, transformer, vae")
    assert "about 57.7 GB · Apache-2.0" in page.evaluate(BOX, loader)
    page.evaluate(PRESS, loader)
    wait_for(page, loader, "Settings, DiffSynth, Downloads")
    page.wait_for_timeout(300)
    assert page.evaluate("""id => { const e = app.graph.getNodeById(id).widgets.find(w => w.name === 'files').element;
        return e.scrollHeight <= e.clientHeight + 1; }""", loader), "all of it is seen"
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


def workflow_with(kind: str, widgets: list, models: list | None = None) -> dict:
    """A workflow of one node, as the page saves it."""
    properties = {"Node name for S&R": kind, **({"models": models} if models else {})}
    return {"version": 0.4, "last_node_id": 1, "last_link_id": 0, "links": [], "nodes": [
        {"id": 1, "type": kind, "pos": [100, 100], "size": [400, 200], "flags": {}, "order": 0, "mode": 0, "inputs": [],
         "outputs": [], "properties": properties, "widgets_values": widgets}]}


def test_a_workflow_that_is_opened_without_its_models_leads_to_a_download(page, ui, server, shots):
    """ComfyUI's own dialog is silent, since the choice is a name: ours says what is missing, and the button brings it.
    """
    page.evaluate(CHOOSE, "known")
    ui.load(workflow_with("DiffSynthBackend_LoraLoader", [NAME, 1.0]))
    page.get_by_text("This workflow's models are not all here").wait_for()
    assert page.get_by_text("The button Download below the node brings them.").is_visible()
    ui.shot(shots / "missing_models.png")
    wait_for(page, 1, f"missing: {NAME}")
    page.evaluate(PRESS, 1)
    wait_for(page, 1, "complete")
    assert (server.base / "models/diffsynth" / FILE).is_file()


def test_an_example_whose_models_are_missing_says_how_large_they_are_until_the_next_does(page, ui):
    for workflow, model in (("qwen_image_edit", "qwen-image-edit-2511"), ("qwen_image_layered", "qwen-image-layered")):
        ui.load(ROOT / f"example_workflows/{workflow}.json", drop=True)
        page.get_by_text(f"{model} (about").first.wait_for()
    page.get_by_text("qwen-image-edit-2511 (about").wait_for(state="detached")


def test_the_pages_own_list_of_missing_models_knows_files(page, ui, hub, shots):
    """A file that a Model Config names: the page compares names of files with the lists of the server."""
    url = f"{hub.url.replace('127.0.0.1', 'localhost')}/x/y/resolve/main/gone.safetensors"
    ui.load(workflow_with("DiffSynthBackend_ModelConfig", ["vae/gone.safetensors"], [
        {"name": "vae/gone.safetensors", "url": url, "directory": "vae"}]))
    page.get_by_text("View details").first.click()
    page.get_by_text("vae/gone.safetensors").first.wait_for()
    ui.shot(shots / "missing_files.png")
    assert page.locator("[data-testid=missing-model-download]").count() == 1


def test_the_settings_can_be_found(page, ui, shots):
    page.evaluate("() => app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    page.locator("[role=dialog]").get_by_text("DiffSynth", exact=True).first.click()
    page.get_by_text("Downloads").first.wait_for()
    page.wait_for_timeout(300)
    ui.shot(shots / "downloads_settings.png")
    page.keyboard.press("Escape")
