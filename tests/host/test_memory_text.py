"""What the nodes say about memory in a real ComfyUI: the decision, the plan, and what a run has moved."""
from __future__ import annotations

from tests.host.graphs import Graph, text_to_image, vram


def with_vram(preset: str, limit: str = "automatic", seed: int = 300, **more) -> Graph:
    graph = {**text_to_image(seed=seed), "vram": vram(preset, limit, **more)}
    graph["load"]["inputs"]["vram"] = ["vram", 0]
    return graph


def test_the_loader_decides_by_itself(client):
    for graph in (text_to_image(seed=301), with_vram("auto", seed=301)):
        run = client.run(graph)
        assert run.status == "success", run.error
        assert "\nauto: full, because " in run.outputs["load"]["text"][0]
        assert "text" not in run.outputs.get("denoise", {}), "nothing was streamed"


def test_the_plan_and_what_was_streamed_are_said_also_when_they_are_cached(client):
    graph = with_vram("disk", "GiB", vram_limit__gib=0.5)
    for _ in range(2):
        run = client.run(graph)
        assert run.status == "success", run.error
        assert "\ndit at 1328×1328: " in run.outputs["load"]["text"][0]
    graph = with_vram("disk", "GiB", vram_limit__gib=0.0)
    for _ in range(2):
        run = client.run(graph)
        assert "GiB streamed in" in run.outputs["denoise"]["text"][0]


def test_a_limit_below_the_floor_says_what_is_needed(client):
    run = client.run(with_vram("disk", "GiB", vram_limit__gib=0.001))
    assert run.status == "error" and "the floor is" in run.error["exception_message"]


def test_custom_without_fields_takes_no_limit(client):
    run = client.run(with_vram("custom", "GiB", vram_limit__gib=4.0))
    assert run.status == "error" and "choose a preset whose layers move" in run.error["exception_message"]
    assert client.run(with_vram("custom", seed=302)).status == "success"
