"""Pickles in a real ComfyUI: Wan's files as `.pth`, as they are published, and one that nobody knows."""
from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.models_folder import WAN_FILES
from tests.host.graphs import node
from tests.host.test_video import text_to_video

UNKNOWN = "vae/unknown.pth"
AS_PICKLES = {name: name.replace(".safetensors", ".pth") for name in (WAN_FILES[0], WAN_FILES[2])}


@pytest.fixture
def models(server) -> Iterator[None]:
    """Wan's text encoder and autoencoder as pickles, beside the files that they are made of, and an unknown one."""
    folder = server.base / "models"
    for name, pickle in AS_PICKLES.items():
        torch.save(load_file(folder / name), folder / pickle)
    torch.save({"w": torch.ones(2)}, folder / UNKNOWN)
    yield
    for name in (*AS_PICKLES.values(), UNKNOWN):
        (folder / name).unlink()


@pytest.fixture
def allow_all(server, models) -> Iterator[None]:
    """The user's setting, in the file in which ComfyUI keeps it."""
    path = server.base / "user/default/comfy.settings.json"
    before = path.read_text(encoding="utf-8")
    path.write_text(json.dumps({**json.loads(before), "DiffSynth.Pickles": "all"}), encoding="utf-8")
    yield
    path.write_text(before, encoding="utf-8")


def unknown_vae(seed: int) -> dict:
    """Wan with the unknown file in the autoencoder's place."""
    graph = text_to_video(seed=seed)
    config = next(name for name, entry in graph.items() if entry["inputs"].get("model") == WAN_FILES[2])
    graph[config] = node("ModelConfig", model=UNKNOWN)
    return graph


def test_known_models_load_from_pickles(client, models):
    graph = text_to_video(seed=600)
    for entry in graph.values():
        if entry["inputs"].get("model") in AS_PICKLES:
            entry["inputs"]["model"] = AS_PICKLES[entry["inputs"]["model"]]
    run = client.run(graph)
    assert run.status == "success" and run.files("save"), run.error
    assert "tiny_vae.pth" in run.outputs["load"]["text"][0]


def test_an_unknown_one_is_refused_at_its_node(client, models):
    graph = unknown_vae(601)
    run = client.run(graph)
    assert run.status == "error" and graph[run.error["node_id"]]["inputs"]["model"] == UNKNOWN
    for part in ("unknown.pth is a pickle", "diffsynth_backend convert IN OUT.safetensors",
                 "settings under DiffSynth, Pickles, choose all"):
        assert part in run.error["exception_message"]


def test_the_users_setting_lets_it_in(client, allow_all):
    """It is read then, and found to be no model that there is."""
    run = client.run(unknown_vae(602))
    assert run.status == "error" and "unknown layout" in run.error["exception_message"], run.error
