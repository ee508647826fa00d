"""The example workflows in a real ComfyUI: it accepts each, and those of the demo model draw what their notes say."""
from __future__ import annotations

import io
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth_backend.demo.examine_features import is_blueprint
from diffsynth_backend.demo.judge import is_right
from diffsynth_backend.demo.judge_video import faults
from diffsynth_backend.demo.moving import Motion
from diffsynth_backend.demo.scenes import Scene, Thing
from diffsynth_backend.pipelines.locate import known_loras, preset_parts
from diffsynth_backend.pipelines.presets import MODEL_PRESETS
from tests.helpers.pack import ROOT
from tests.host.graphs import PREFIX, Graph

EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
NOTE = "MarkdownNote"  # which only the page has


def scene(*things: tuple[str, str, str], on: str = "white") -> Scene:
    return Scene(tuple(Thing(*thing) for thing in things), on)


CIRCLE, APART = ("red", "circle", "top left"), "bottom right"
BESIDE = scene(("red", "circle", "left"), ("yellow", "triangle", "right"))
# Of each workflow that runs without a download: what its pictures show, in the order of the nodes. None: no scene.
SHOWN = {
    "quickstart": [(is_right, scene(CIRCLE, ("blue", "square", APART)))],
    "image_to_image": [(is_right, scene((colour, "circle", "center"))) for colour in ("red", "green")],
    "inpaint": [(is_right, scene(CIRCLE, thing, on="gray"))
                for thing in (("blue", "square", APART), ("yellow", "ring", APART))],
    "lora": [(is_right, BESIDE), (is_blueprint, BESIDE)],
    "entities": [(is_right, scene(("blue", "triangle", "top left"), ("red", "ring", APART)))],
    "controlnet": [(is_right, scene(("red", "diamond", "top right"))), None,
                   (is_right, scene(("orange", "diamond", "top right"), on="navy"))],
}
MOVED = {"wan_demo": Motion("blue", "triangle", "left")}  # the same of videos
FOREIGN = [path for path in EXAMPLES if path.stem not in {*SHOWN, *MOVED}]


def nodes_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["nodes"]


def prompt_of(path: Path) -> Graph:
    """What the page sends for a workflow, from the names of widgets and links that are saved in it."""
    origins = {link[0]: [str(link[1]), link[2]] for link in json.loads(path.read_text(encoding="utf-8"))["links"]}
    prompt = {}
    for node in nodes_of(path):
        slots, values = node.get("inputs", []), node.get("widgets_values_named", {})
        inputs = {slot["name"]: values[slot["name"]] for slot in slots if "widget" in slot and slot["name"] in values}
        inputs |= {slot["name"]: origins[slot["link"]] for slot in slots if slot["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return {key: node for key, node in prompt.items() if node["class_type"] != NOTE}


@pytest.fixture(scope="module", autouse=True)
def example_picture(server) -> None:
    """The picture that ComfyUI comes with, or one in its place."""
    Image.new("RGB", (96, 96), "orange").save(server.base / "input/example.png")


@pytest.mark.parametrize("name", SHOWN)
def test_the_demo_draws_what_is_promised(client, name):
    run = client.run(prompt_of(ROOT / f"example_workflows/{name}.json"))
    assert run.status == "success", run.error
    pictures = [Image.open(io.BytesIO(client.fetch(run.files(node)[0]))).convert("RGB")
                for node in sorted(run.outputs, key=int) if run.files(node)]
    for picture, expected in zip(pictures, SHOWN[name], strict=True):
        if expected:
            judge, shown = expected
            assert judge(torch.from_numpy(np.array(picture)).float(), shown), f"not {shown}"


@pytest.mark.parametrize("name", MOVED)
def test_the_video_demo_moves_as_is_promised(client, name):
    run = client.run(prompt_of(ROOT / f"example_workflows/{name}.json"))
    assert run.status == "success", run.error
    file, = (file for node in run.outputs for file in run.files(node))
    with av.open(io.BytesIO(client.fetch(file))) as video:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")).float() for frame in video.decode(video=0)]
    assert len(frames) == 17 and not faults(frames, MOVED[name])


@pytest.mark.parametrize("path", FOREIGN, ids=lambda path: path.stem)
def test_a_workflow_without_its_files_says_what_to_get(client, path):
    """The server has taken the prompt, so every node, name and value in it is valid."""
    run = client.run(prompt_of(path))
    assert run.status == "error" and run.error["node_type"].startswith(PREFIX)
    assert "https://huggingface.co/" in run.error["exception_message"]


def sources_of(node: dict[str, Any]) -> list[dict[str, str]]:
    """The published files that a node's choice stands for."""
    values = node.get("widgets_values_named", {})
    sources = {"ModelLoader": lambda: MODEL_PRESETS[values["model"]].parts.values(),
               "ModelConfig": lambda: [preset_parts()[values["model"]]],
               "LoraLoader": lambda: [known_loras()[values["lora"]]]}.get(node["type"].removeprefix(PREFIX), list)()
    return [source for source in sources if "model_id" in source]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_links_are_those_of_the_known_models(path):
    """Every file with a name of its own is linked; of files in parts, those that are linked are such parts."""
    for node in nodes_of(path):
        links, sources = node["properties"].get("models", []), sources_of(node)
        for link in links:
            assert link["url"].startswith("https://huggingface.co/") and link["directory"] == "diffsynth"
            repository, file = link["url"].removeprefix("https://huggingface.co/").split("/resolve/main/")
            assert link["name"] == f"{repository}/{file}"
            assert any(source["model_id"] == repository and fnmatchcase(file, source["origin_file_pattern"])
                       for source in sources), link
        whole = {f"{source['model_id']}/{source['origin_file_pattern']}" for source in sources
                 if "*" not in source["origin_file_pattern"]}
        assert whole <= {link["name"] for link in links}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_there_is_a_note_and_a_thumbnail(path):
    assert [node["type"] for node in nodes_of(path)].count(NOTE) == 1
    thumbnail = path.with_suffix(".jpg")
    assert thumbnail.stat().st_size <= 60_000 and Image.open(thumbnail).format == "JPEG"
