"""In ComfyUI's page: the example workflows, the loader's result, help, and errors as people see them."""
from __future__ import annotations

import io
import json
import urllib.parse
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth_backend.demo.judge import is_right
from diffsynth_backend.demo.scenes import Scene, Thing
from tests.helpers.models_folder import FILES, OTHER_DIT
from tests.helpers.pack import ROOT

EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
LOADER_TEXT = "() => document.querySelector('.diffsynth-result')?.textContent ?? ''"
OVERLAPS = """() => { const box = n => [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]];
    const meet = ([a, b, c, d], [e, f, g, h]) => a < g && e < c && b < h && f < d;
    return app.graph._nodes.flatMap((one, i) => app.graph._nodes.slice(i + 1).filter(
        other => meet(box(one), box(other))).map(other => `${one.title} and ${other.title}`)); }"""
RED = "() => app.graph._nodes.filter(n => n.has_errors).map(n => n.type)"


def pictures(ui, entry) -> list[Image.Image]:
    """The pictures that a finished run has saved, in the order of the nodes."""
    found = []
    for _, output in sorted(entry["outputs"].items(), key=lambda item: int(item[0])):
        for file in output.get("images", []):
            query = urllib.parse.urlencode({key: file[key] for key in ("filename", "subfolder", "type")})
            with urllib.request.urlopen(f"{ui.url}/view?{query}", timeout=30) as reply:
                found.append(Image.open(io.BytesIO(reply.read())).convert("RGB"))
    return found


def shows(picture: Image.Image, scene: Scene) -> bool:
    return is_right(torch.from_numpy(np.array(picture)).float(), scene)


@pytest.fixture
def example_picture(server, ui) -> None:
    """The picture that ComfyUI comes with, or one in its place, which the page has yet to hear of."""
    Image.new("RGB", (96, 96), "orange").save(server.base / "input/example.png")
    ui.page.evaluate("() => app.refreshComboInNodes()")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_opens_whole(ui, shots, example_picture, path):
    before = len(ui.console)
    ui.load(path, drop=True)
    ui.shot(shots / f"opened_{path.stem}.png")
    assert ui.missing() == []
    assert [text for kind, text in ui.console[before:] if kind in ("error", "pageerror")] == []
    assert ui.page.evaluate(RED) == [] and ui.page.evaluate(OVERLAPS) == []
    saved = {node["id"]: node for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]}
    sent = ui.api_prompt()
    assert set(sent) == {str(key) for key, node in saved.items() if node["type"] != "MarkdownNote"}
    for key, node in sent.items():
        named = saved[int(key)].get("widgets_values_named", {})
        assert {name: node["inputs"][name] for name in named if name in node["inputs"]} == {
            name: value for name, value in named.items() if name in node["inputs"]}


def test_the_quickstart_draws_what_its_prompt_says(ui, shots):
    ui.load(ROOT / "example_workflows/quickstart.json", drop=True)
    entry = ui.queue()
    assert entry["status"]["status_str"] == "success", entry["status"]
    ui.shot(shots / "quickstart.png")
    assert "QwenImageDiT" in ui.page.evaluate(LOADER_TEXT)
    [picture] = pictures(ui, entry)
    things = Thing("red", "circle", "top left"), Thing("blue", "square", "bottom right")
    assert shows(picture, Scene(things, "white"))


def test_the_video_demo_is_played(ui, shots):
    ui.load(ROOT / "example_workflows/wan_demo.json", drop=True)
    entry = ui.queue()
    assert entry["status"]["status_str"] == "success", entry["status"]
    ui.page.wait_for_function("() => document.querySelector('video')?.readyState >= 2")
    ui.shot(shots / "wan_demo.png")
    assert "WanModel" in ui.page.evaluate(LOADER_TEXT)


def test_image_to_image_changes_the_colour_and_keeps_the_place(ui, shots):
    ui.load(ROOT / "example_workflows/image_to_image.json", drop=True)
    entry = ui.queue()
    assert entry["status"]["status_str"] == "success", entry["status"]
    ui.shot(shots / "image_to_image.png")
    for picture, name in zip(pictures(ui, entry), ("red", "green"), strict=True):
        assert shows(picture, Scene((Thing(name, "circle", "center"),), "white"))


def tiny_workflow(ui, **models: str) -> None:
    """The quickstart with Model Configs of the tiny files in place of the demo, built in the page."""
    ui.load(ROOT / "example_workflows/quickstart.json")
    ui.page.evaluate("""files => {
        const loader = app.graph._nodes.find(n => n.type === 'DiffSynthBackend_ModelLoader');
        const choice = loader.widgets.find(w => w.name === 'model');
        choice.value = 'model configs'; choice.callback?.(choice.value);
        files.forEach((file, index) => {
            const config = LiteGraph.createNode('DiffSynthBackend_ModelConfig');
            app.graph.add(config);
            config.pos = [0, 520 + 100 * index];
            config.widgets[0].value = file;
            const slot = loader.inputs.findIndex(i => i.name === `model.configs.config${index}`);
            config.connect(0, loader, slot);
        });
        app.graph._nodes.find(n => n.type === 'DiffSynthBackend_Denoise')
            .widgets.find(w => w.name === 'schedule.steps').value = 2;
    }""", list(models.values()))


def details(ui, sentence: str) -> None:
    """Open what the page has to say about an error, and find the sentence there."""
    ui.page.get_by_text("View details").first.click()
    ui.page.wait_for_timeout(500)
    for more in ui.page.locator("button[aria-label^='Info for'][aria-expanded=false]").all():
        more.click()
    ui.page.wait_for_function("words => document.body.innerText.includes(words)", arg=sentence)


def test_model_configs_grow_as_they_are_connected(ui, shots):
    tiny_workflow(ui, **dict(zip("abc", FILES)))
    entry = ui.queue()
    assert entry["status"]["status_str"] == "success", entry["status"]
    ui.shot(shots / "model_configs.png")
    text = ui.page.evaluate(LOADER_TEXT)
    for part in ("tiny_dit.safetensors", "MiB float32", "on cpu", "tokenizer"):
        assert part in text
    assert pictures(ui, entry)[0].size == (128, 128)


def fails(ui, shots, name: str, node_type: str, sentence: str) -> None:
    """Run what is loaded: it ends in an error of that node, and the page says what to do."""
    entry = ui.queue()
    assert entry["status"]["status_str"] == "error"
    failed = dict(entry["status"]["messages"])["execution_error"]
    assert failed["node_type"] == node_type and sentence in failed["exception_message"]
    details(ui, sentence)
    ui.shot(shots / f"{name}.png")


def test_no_vae_was_loaded(ui, shots):
    tiny_workflow(ui, **dict(zip("ab", FILES)))
    fails(ui, shots, "no_vae", "DiffSynthBackend_VaeDecode", "qwen_image_vae to the Model Loader")


def test_a_latent_of_the_wrong_channels(ui, shots):
    tiny_workflow(ui, **dict(zip("abc", FILES)))
    ui.page.evaluate("""() => {
        const denoise = app.graph._nodes.find(n => n.type === 'DiffSynthBackend_Denoise');
        const latent = LiteGraph.createNode('EmptyLatentImage');
        app.graph.add(latent);
        latent.pos = [denoise.pos[0], denoise.pos[1] + 420];
        latent.connect(0, denoise, denoise.inputs.findIndex(i => i.name === 'latent'));
    }""")
    fails(ui, shots, "wrong_channels", "DiffSynthBackend_Denoise", "Empty SD3 Latent Image")


def test_a_missing_tokenizer(ui, shots, server, probe):
    folder = server.base / "models/text_encoders/tokenizer"
    hidden = folder.rename(folder.with_name("hidden"))
    probe("ProbeFailure", fail_in_call=0, hide_tokenizers=True)
    try:
        tiny_workflow(ui, **dict(zip("abc", FILES)))
        ui.page.evaluate("""() => {
            const loader = app.graph._nodes.find(n => n.type === 'DiffSynthBackend_ModelLoader');
            loader.widgets.find(w => w.name === 'dtype').value = 'float16';  // not the loader's last result
        }""")
        fails(ui, shots, "no_tokenizer", "DiffSynthBackend_ModelLoader", "vocab.json and merges.txt")
    finally:
        probe("ProbeFailure", fail_in_call=0, hide_tokenizers=False)
        hidden.rename(folder)


def test_files_that_do_not_belong_together(ui, shots):
    tiny_workflow(ui, **dict(zip("abcd", (*FILES, OTHER_DIT))))
    fails(ui, shots, "two_denoisers", "DiffSynthBackend_ModelLoader", "leave one of them out")


def test_a_file_that_is_gone_is_red_before_anything_runs(ui, shots):
    tiny_workflow(ui, a=FILES[0], b="diffusion_models/gone.safetensors", c=FILES[2])
    known = ui.page.evaluate("async () => Object.keys(await (await fetch('/history')).json()).length")
    ui.queue(wait=False)
    ui.page.wait_for_function("() => app.graph._nodes.some(n => n.has_errors)")
    assert "DiffSynthBackend_ModelConfig" in ui.page.evaluate(RED)
    details(ui, "press R to refresh the list")
    ui.shot(shots / "missing_file.png")
    assert ui.page.evaluate("async () => Object.keys(await (await fetch('/history')).json()).length") == known


def test_help_opens_beside_the_graph(ui, shots):
    ui.load(ROOT / "example_workflows/quickstart.json")
    ui.page.evaluate("""() => {
        const node = app.graph._nodes.find(n => n.type === 'DiffSynthBackend_Denoise');
        app.canvas.selectNode(node);
    }""")
    ui.page.wait_for_timeout(300)
    ui.page.locator("[data-testid=info-button], .p-button:has(.icon-\\\\[lucide--info\\\\])").first.click()
    ui.page.wait_for_function("() => document.body.innerText.includes('All of them are run')")
    ui.page.wait_for_timeout(300)
    ui.shot(shots / "help.png")


def test_nothing_left_the_machine(ui):
    assert ui.blocked == []
    ours = [text for kind, text in ui.console if kind in ("error", "pageerror") and "loader_text" in text]
    assert ours == []
