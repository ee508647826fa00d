"""An interrupt ends what is going on within a second, in a real ComfyUI with the demo model, and the next run works."""
from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.host.graphs import Graph, node, text_to_image, vram

SECONDS = 1.0


def demo(size: int = 128, preset: str | None = None, **changes: Any) -> Graph:
    """From a prompt to a picture with the embedded model."""
    graph = {**text_to_image(size=size, **changes), "load": node("ModelLoader", model="demo", dtype="automatic")}
    if preset is not None:
        graph["vram"] = vram(preset)
        graph["load"]["inputs"]["vram"] = ["vram", 0]
    return {name: entry for name, entry in graph.items() if entry["class_type"] != "DiffSynthBackend_ModelConfig"}


def interrupted_at(client, graph: Graph, moment: Callable[[str, Any], bool]) -> float:
    """Interrupt a run at the first event that is the moment; the seconds until it ended."""
    asked: list[float] = []
    ended: list[float] = []

    def watch(run, kind, data):
        if not asked and moment(kind, data):
            asked.append(time.monotonic())
            client.interrupt(run.prompt_id)
        if kind == "execution_interrupted":
            ended.append(time.monotonic())

    run = client.run(graph, on_event=watch)
    assert run.status == "interrupted", (run.status, run.error)
    return ended[0] - asked[0]


def progress_of(name: str) -> Callable[[str, Any], bool]:
    return lambda kind, data: kind == "progress" and data["node"] == name


@pytest.mark.parametrize("preset", ["full", "low", "fp8"])
def test_while_a_model_is_loaded(client, probe, preset):
    client.free()
    probe("ProbeLoad", wait_at=2)
    graph = demo(seed=400, preset=preset)
    assert interrupted_at(client, graph, lambda kind, data: kind == "diffsynth.loading") < SECONDS
    assert probe("ProbeState")["pipelines"] == 0, "nothing remains of it"
    assert client.run(graph).status == "success"


def demo_loader_of(graph: Graph) -> Graph:
    """The loader alone, with what it needs."""
    return {name: entry for name, entry in graph.items() if name in ("load", "vram")} | {
        "empty": node("EmptyLatent", width=128, height=128, batch_size=1),
        "decode": node("VaeDecode", pipeline=["load", 0], samples=["empty", 0], tiling="off"),
        "show": node("PreviewImage", images=["decode", 0])}


@pytest.mark.parametrize("preset", ["full", "disk"])
def test_while_it_denoises(client, probe, preset):
    graph = demo(size=256, seed=410, preset=preset, schedule__steps=200)
    assert interrupted_at(client, graph, progress_of("denoise")) < SECONDS
    state = probe("ProbeState", others=demo_loader_of(graph))
    assert state["onloaded"] == 0
    assert client.run(demo(seed=411, preset=preset)).status == "success"


@pytest.mark.parametrize("kind", ["decode", "encode"])
def test_while_it_works_tile_by_tile(client, kind):
    tiles = {"tiling": "on", "tiling__tile_size": 128, "tiling__overlap": 32}
    graph = {"load": node("ModelLoader", model="demo", dtype="automatic"),
             "picture": node("EmptyImage", width=1536, height=1536, batch_size=1, color=0xff0000),
             "empty": node("EmptyLatent", width=1536, height=1536, batch_size=1),
             "encode": node("VaeEncode", pipeline=["load", 0], pixels=["picture", 0], **tiles),
             "decode": node("VaeDecode", pipeline=["load", 0], samples=["empty", 0], **tiles)}
    latent = [kind, 0] if kind == "encode" else ["empty", 0]
    graph["decode"]["inputs"]["samples"] = latent
    graph["show"] = node("PreviewImage", images=["decode", 0])
    assert interrupted_at(client, graph, progress_of(kind)) < SECONDS
    assert client.run(demo(seed=420)).status == "success"
