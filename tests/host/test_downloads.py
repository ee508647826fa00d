"""Downloads in a real ComfyUI, from a hub on this machine: by the node, interrupted and continued, and not allowed."""
from __future__ import annotations

import os
import time

import pytest
import torch
from safetensors.torch import save

from tests.helpers import http_hub
from tests.helpers.pack import ROOT
from tests.host.comfy_client import ComfyClient
from tests.host.comfy_server import ComfyServer
from tests.host.graphs import node

NAME, MODEL = "qwen-image-eligen", "DiffSynth-Studio/Qwen-Image-EliGen"
WEIGHTS = save({"w": torch.arange(500_000, dtype=torch.float32)})
FILE = "model.safetensors"
GRAPH = {"get": node("DownloadModels", model=NAME)}
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@pytest.fixture(scope="module")
def hub():
    pytest.importorskip("modelscope_hub")
    with http_hub.serve(MODEL, {FILE: WEIGHTS}) as server:
        yield server


@pytest.fixture(scope="module")
def server(hub, tmp_path_factory):
    """A ComfyUI of its own, whose hub is ours and which has no settings of this machine."""
    base = tmp_path_factory.mktemp("downloads")
    with pytest.MonkeyPatch.context() as patch:
        for name in [*PROXIES, *(name for name in os.environ if name.startswith("DIFFSYNTH_"))]:
            patch.delenv(name, raising=False)
        patch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        patch.setenv("MODELSCOPE_HOME", str(base / "home"))
        with ComfyServer({"diffsynth_backend": ROOT}, base) as running:
            yield running


@pytest.fixture
def client(server):
    with ComfyClient(server.url) as connected:
        yield connected


@pytest.fixture(autouse=True)
def fresh(server, hub):
    """Nothing was downloaded, nothing asked for."""
    for path in (server.base / "models/diffsynth").rglob("*"):
        if path.is_file():
            path.unlink()
    hub.faults.clear()
    hub.requests.clear()
    hub.stalled.clear()
    hub.go_on.clear()


def choose(client, policy: str) -> None:
    """As the page does when somebody changes the setting."""
    client.request("/settings/DiffSynth.Downloads", policy)


def target(server):
    return server.base / "models/diffsynth" / MODEL / FILE


def test_off_is_how_it_begins(client, server, hub):
    choose(client, "off")
    run = client.run(GRAPH)
    assert run.status == "error" and "downloads are off" in run.error["exception_message"]
    assert "settings under DiffSynth, Downloads" in run.error["exception_message"]
    assert hub.requests == [] and not target(server).exists()


def test_known_downloads_with_progress(client, server, hub):
    choose(client, "known")
    run = client.run(GRAPH)
    assert run.status == "success", run.error
    assert target(server).read_bytes() == WEIGHTS
    assert "came now" in run.outputs["get"]["text"][0]
    assert [state for state in run.progress if state[0] == "get" and state[1:] == (len(WEIGHTS), len(WEIGHTS))]
    said = [data for _, kind, data in run.events if kind == "diffsynth.download"]
    assert said and said[-1]["file"] == FILE and said[-1]["done_bytes"] == said[-1]["total_bytes"] == len(WEIGHTS)
    assert client.run(GRAPH).status == "success" and hub.starts(FILE) == [0], "it is here"


def test_ask_takes_the_users_word_and_not_the_workflows(client, server, hub):
    choose(client, "ask")
    for extra in ({}, {"extra_pnginfo": {"workflow": {"extra": {"diffsynth_download": NAME}},
                                         "diffsynth_download": NAME}}, {"diffsynth_download": "qwen-image"}):
        run = client.run(GRAPH, **extra)
        assert run.status == "error" and "Download button" in run.error["exception_message"]
    assert hub.requests == []
    assert client.run(GRAPH, diffsynth_download=NAME).status == "success" and target(server).exists()


def test_an_interrupt_stops_at_once_and_the_next_run_continues(client, server, hub):
    choose(client, "known")
    hub.faults[FILE] = [http_hub.stall(700_000)]
    run = client.queue(GRAPH)
    assert hub.stalled.wait(30)
    began = time.monotonic()
    client.interrupt(run.prompt_id)
    client.follow(run)
    assert run.status == "interrupted" and time.monotonic() - began <= 1
    assert not target(server).exists()
    hub.go_on.set()
    again = client.run(GRAPH)
    assert again.status == "success", again.error
    assert target(server).read_bytes() == WEIGHTS
    first, second = hub.starts(FILE)
    assert first == 0 and 0 < second <= 700_000, "what had come was kept"


def test_the_page_hears_what_is_here(client, server):
    ask = f"/diffsynth_backend/models?name={NAME}"
    choose(client, "known")
    assert [part["bytes"] for part in client.get(ask)["parts"]] == [None]
    assert client.run(GRAPH).status == "success"
    answer = client.get(ask)
    assert answer["policy"] == "known" and [part["bytes"] for part in answer["parts"]] == [len(WEIGHTS)]
    assert str(server.base) not in str(answer)
    assert client.get("/diffsynth_backend/models?name=../../etc/passwd") is None


def test_what_was_downloaded_is_found(client):
    """The LoRA Loader names the node, and after it is content with the file."""
    choose(client, "known")
    graph = {"load": node("ModelLoader", model="demo", dtype="automatic"),
             "lora": node("LoraLoader", pipeline=["load", 0], lora=NAME, strength=1.0),
             "text": node("PromptEncode", pipeline=["lora", 0], positive="", negative=""),
             "latent": node("EmptyLatent", width=64, height=64, batch_size=1),
             "draw": node("Denoise", pipeline=["lora", 0], conditioning=["text", 0], latent=["latent", 0], seed=1,
                          cfg=1.0, cfg_norm=False, schedule="steps", schedule__steps=1, schedule__denoise=1.0),
             "show": node("SaveLatent", samples=["draw", 0], filename_prefix="latents/x")}
    before = client.run(graph).error["exception_message"]
    assert "Download Models (DiffSynth)" in before
    assert client.run(GRAPH).status == "success"
    after = client.run(graph).error["exception_message"]
    assert "none of its 1 keys fits" in after, "the file is found, and read; it is no LoRA"


@pytest.mark.parametrize("name", ["demo", "Qwen/Qwen-Image", "../../x"])
def test_other_names_are_not_even_queued(client, name):
    from tests.host.comfy_client import PromptRejected

    with pytest.raises(PromptRejected, match="not in list"):
        client.queue({"get": node("DownloadModels", model=name)})
