"""Where weights are, as every page is told by a real ComfyUI; and what a plan would be, before anything is loaded."""
from __future__ import annotations

import json
import urllib.error
import urllib.parse

import pytest

from tests.host.graphs import text_to_image, vram

EVENT = "diffsynth.memory"
ROUTES = ("/diffsynth_backend/memory", "/diffsynth_backend/estimate")


def told(run) -> list[dict]:
    return [data for _, kind, data in run.events if kind == EVENT]


def free(client) -> None:
    """Free everything, and see that it is said: the server does it when it next looks, which takes a busy one a while.
    """
    for _ in range(10):
        client.free()
        if client.get(ROUTES[0])["pipelines"] == []:
            return
    raise AssertionError("what was freed is still shown")


def test_load_steps_and_free_are_told(client):
    free(client)
    graph = {**text_to_image(seed=500, schedule__steps=30), "vram": vram("disk", "GiB", vram_limit__gib=0.0)}
    graph["load"]["inputs"]["vram"] = ["vram", 0]
    run = client.run(graph)
    assert run.status == "success", run.error
    [pipeline] = told(run)[-1]["pipelines"]
    assert pipeline["traffic"]["passes"] > 30 and pipeline["plan"]["resident_bytes"] == 0
    assert pipeline["limit_bytes"] == 0
    assert {model["name"] for model in pipeline["models"]} == {"text_encoder", "dit", "vae"}
    assert all(model["disk_bytes"] > 0 for model in pipeline["models"])
    assert any(model["ring_bytes"] for state in told(run) for loaded in state["pipelines"]
               for model in loaded["models"]), "told while the loop runs"
    assert client.get(ROUTES[0]) == told(run)[-1], "a page that opens later sees what was said last"
    free(client)


def test_events_are_few(client):
    run = client.run(text_to_image(seed=510, schedule__steps=200))
    assert run.status == "success", run.error
    seconds = run.events[-1][0]
    assert len(told(run)) <= 4 * seconds + 12


def test_loading_is_told_below_the_loader(client):
    free(client)
    run = client.run(text_to_image(seed=520))
    steps = [data for _, kind, data in run.events if kind == "diffsynth.loading"]
    assert {data["node"] for data in steps} == {"load"}
    assert [(data["title"], data["number"], data["count"]) for data in steps if data["done_bytes"] == 0] == [
        ("text_encoders/tiny_text_encoder.safetensors", 1, 3), ("diffusion_models/tiny_dit.safetensors", 2, 3),
        ("vae/tiny_vae.safetensors", 3, 3)]
    assert all(0 <= data["done_bytes"] <= data["total_bytes"] and data["room_bytes"] is None for data in steps)


def estimated(client, **query: str) -> dict:
    return client.get(f"{ROUTES[1]}?{urllib.parse.urlencode(query)}")


def test_an_estimate_loads_nothing(client, probe):
    free(client)
    figures = estimated(client, model="demo", preset="disk", limit="0.02")["estimate"]
    assert figures["plans"]["dit"]["activation_bytes"] > 0 and (figures["width"], figures["height"]) == (128, 128)
    assert probe("ProbeState")["pipelines"] == 0


def test_an_estimate_names_no_path(server, client):
    for query in ({"model": "qwen-image", "preset": "low"}, {"family": "qwen-image", "preset": "low", "file0": "vae/x"},
                  {"family": "qwen-image", "preset": "low", "file0": "vae/../../../etc/passwd"}):
        reply = estimated(client, **query)
        assert "problem" in reply and str(server.base) not in json.dumps(reply)


@pytest.mark.parametrize("route", ROUTES)
def test_routes_only_answer(client, route):
    with pytest.raises(urllib.error.HTTPError) as refused:
        client.request(route, {"model": "demo"})
    assert refused.value.code == 405
