"""Runs in a real ComfyUI: progress, previews, caching, interruption, failure, several models."""
from __future__ import annotations

import io
import time

import psutil
import pytest
import torch
from PIL import Image

from tests.helpers.models_folder import DIT, FILES, OTHER_DIT, TEXT_ENCODER, VAE
from tests.host.graphs import loader, node, text_to_image, vram

STEPS = [("denoise", step, 3) for step in (1, 2, 3)]


def denoising(run) -> list:
    return [event for event in run.progress if event[0] == "denoise"]


def loads(server) -> int:
    return server.log().count("Loaded model:")


def test_the_pack_is_there(server, client):
    assert server.failed_imports() == []
    names = [name for name in client.object_info() if name.startswith("DiffSynthBackend_")]
    assert len(names) == 27


def test_one_progress_event_a_step_and_previews_when_they_are_on(client):
    run = client.run(text_to_image(seed=10), preview_method="latent2rgb")
    assert run.status == "success", run.error
    assert denoising(run) == STEPS and len(run.previews) == 3
    assert Image.open(io.BytesIO(run.previews[0].data)).format == "JPEG"
    assert Image.open(io.BytesIO(client.fetch(run.files("show")[0]))).size == (64, 64)
    quiet = client.run(text_to_image(seed=11), preview_method="none")
    assert denoising(quiet) == STEPS and quiet.previews == []


def test_the_loader_says_what_it_found_also_when_it_is_cached(client):
    for seed in (20, 21):
        text = client.run(text_to_image(seed=seed)).outputs["load"]["text"][0]
        assert "QwenImageDiT" in text and "float32, on cpu" in text and DIT.split("/")[1] in text


def test_a_new_seed_runs_denoise_and_decode_alone(server, client):
    client.run(text_to_image(seed=30))
    before = loads(server)
    again = client.run(text_to_image(seed=31))
    assert again.executed == ["denoise", "decode", "show"] and loads(server) == before
    assert client.run(text_to_image(seed=31)).executed == []
    assert client.run(text_to_image(seed=31, cfg=2.0)).executed == ["denoise", "decode", "show"]


def test_an_interrupt_stops_within_a_step_and_the_next_run_works(client):
    seen = []

    def interrupt(run, kind, data):
        if not seen and denoising(run):
            client.interrupt(run.prompt_id)  # answered at once, while the next step computes
            seen.append(len(denoising(run)))

    stopped = client.run(text_to_image(seed=40, size=384, schedule__steps=60), on_event=interrupt)
    assert stopped.status == "interrupted" and len(denoising(stopped)) <= seen[0] + 1
    assert client.run(text_to_image(seed=41)).status == "success"


@pytest.mark.parametrize("preset", ["full", "low"])
def test_an_exception_in_a_step_leaves_a_pipeline_that_works(client, probe, preset):
    graph = text_to_image(seed=50)
    graph["vram"] = vram(preset)
    graph["load"]["inputs"]["vram"] = ["vram", 0]
    probe("ProbeFailure", fail_in_call=4, hide_tokenizers=False)
    failed = client.run(graph)
    assert failed.status == "error" and failed.error["node_id"] == "denoise"
    assert "pulled the plug" in failed.error["exception_message"] and len(denoising(failed)) == 1
    state = probe("ProbeState")
    assert state["onloaded"] == 0 and (state["layers"] > 0) == (preset == "low")
    assert client.run(graph).status == "success"


def test_another_model_in_the_same_loader_replaces_the_first(server, client, probe):
    client.free()
    first = text_to_image(seed=60)
    assert client.run(first).status == "success"
    mark = len(server.log())
    assert client.run(text_to_image(TEXT_ENCODER, OTHER_DIT, VAE, seed=60)).status == "success"
    log = server.log()[mark:]
    assert 0 <= log.index("Freeing ") < log.index("Loading models from")
    assert probe("ProbeState")["pipelines"] == 1


def test_two_loaders_with_different_models_work_in_one_graph(server, client, probe):
    def both(seed):
        one, other = text_to_image(seed=seed), text_to_image(seed=seed)
        other.update(loader(TEXT_ENCODER, OTHER_DIT, VAE))
        renamed = {f"b_{key}": {**entry, "inputs": {
            name: [f"b_{value[0]}", value[1]] if isinstance(value, list) else value
            for name, value in entry["inputs"].items()}} for key, entry in other.items()}
        return {**one, **renamed}

    run = client.run(both(70))
    assert run.status == "success", run.error
    pictures = [client.fetch(run.files(name)[0]) for name in ("show", "b_show")]
    assert pictures[0] != pictures[1] and probe("ProbeState", others=both(70))["pipelines"] == 2
    before = loads(server)
    assert client.run(both(71)).status == "success" and loads(server) == before


def test_equal_loaders_share_their_weights(client, probe):
    client.free()
    graph = text_to_image(seed=80)
    graph |= loader(*FILES, name="second")
    graph["decode"]["inputs"]["pipeline"] = ["second", 0]
    assert client.run(text_to_image(TEXT_ENCODER, OTHER_DIT, VAE, seed=80)).status == "success"
    assert client.run(graph).status == "success"
    alive = probe("ProbeState")["pipelines"]
    assert client.run({**graph, **text_to_image(seed=81)}).status == "success"
    assert probe("ProbeState")["pipelines"] == alive


def test_runs_after_everything_was_freed(client):
    assert client.run(text_to_image(seed=90)).status == "success"
    client.free()
    began = time.monotonic()
    assert client.run(text_to_image(seed=91)).status == "success"
    assert time.monotonic() - began < 60


def test_a_batch_with_previews_and_tiles(client):
    graph = text_to_image(seed=100, batch=2, size=192)
    graph["decode"]["inputs"] |= {"tiling": "on", "tiling.tile_size": 128, "tiling.overlap": 64}
    run = client.run(graph, preview_method="latent2rgb")
    assert run.status == "success", run.error
    assert len(run.files("show")) == 2 and len(run.previews) == 3


def test_folders_of_extra_model_paths_are_searched(server, client):
    info = client.object_info("DiffSynthBackend_ModelConfig")["DiffSynthBackend_ModelConfig"]
    assert {VAE, "vae/far_vae.safetensors"} <= set(info["input"]["required"]["model"][1]["options"])
    run = client.run(text_to_image(TEXT_ENCODER, DIT, "vae/far_vae.safetensors", seed=110))
    assert run.status == "success" and "far_vae.safetensors" in run.outputs["load"]["text"][0]


def test_known_models_are_looked_for_in_every_folder_of_ours(server, client):
    graph = text_to_image()
    graph["load"] = node("ModelLoader", model="qwen-image", dtype="automatic")
    sentence = client.run(graph).error["exception_message"]
    for folder in ("elsewhere/hub", "models/diffsynth"):
        assert str(server.base / folder / "Qwen/Qwen-Image") in sentence


def test_free_empties_us(client, probe):
    client.free()
    graph = text_to_image(seed=95)
    assert client.run(graph).status == "success"
    assert probe("ProbeState", others=graph)["pipelines"] == 1
    client.free()
    assert probe("ProbeState")["pipelines"] == 0


def test_fifty_queued_runs_do_not_grow(server, client):
    process, sizes = psutil.Process(server.process.pid), []
    for seed in range(50):
        graph = text_to_image(seed=1000 + seed, schedule__steps=1)
        graph["vram"] = vram("disk", "GiB", vram_limit__gib=0.0)
        graph["load"]["inputs"]["vram"] = ["vram", 0]
        assert client.run(graph).status == "success"
        sizes.append(process.memory_info().rss)
    settled = torch.tensor(sizes[5:], dtype=torch.float64) / 2**20
    runs = torch.arange(len(settled), dtype=torch.float64)
    slope = ((runs - runs.mean()) * (settled - settled.mean())).sum() / (runs - runs.mean()).square().sum()
    assert slope <= 1, f"{slope:.2f} MiB a run: {[round(size) for size in settled.tolist()[::9]]}"
