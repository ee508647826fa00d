"""What people get wrong: each is an error on the node where it happened, in a sentence that says what to do."""
from __future__ import annotations

import pytest

from tests.helpers.models_folder import CONTROLNET, DIT, FILES, LORA, OTHER_DIT, TEXT_ENCODER, VAE
from tests.host.comfy_client import PromptRejected
from tests.host.graphs import loader, node, text_to_image, vram


def failure(client, graph) -> tuple[str, str]:
    """The node on which a run failed, and the sentence."""
    run = client.run(graph)
    assert run.status == "error", run.status
    return run.error["node_id"], run.error["exception_message"]


def test_no_vae_was_loaded(client):
    place, sentence = failure(client, text_to_image(TEXT_ENCODER, DIT))
    assert place == "decode" and "qwen_image_vae to the Model Loader" in sentence


def test_a_latent_of_the_wrong_channels(client):
    graph = {**text_to_image(), "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1)}
    place, sentence = failure(client, graph)
    assert place == "denoise" and "4 channels" in sentence and "Empty SD3 Latent Image" in sentence


def test_a_file_that_is_not_there(client):
    with pytest.raises(PromptRejected) as rejected:
        client.run(text_to_image(TEXT_ENCODER, "diffusion_models/gone.safetensors", VAE))
    details = rejected.value.node_errors["load1"]["errors"][0]["details"]
    assert "gone.safetensors" in details and "press R" in details


@pytest.mark.parametrize("path", ["vae/../../../etc/passwd", "checkpoints/x.safetensors", "/etc/passwd"])
def test_a_path_that_leads_elsewhere(client, path):
    with pytest.raises(PromptRejected):
        client.run(text_to_image(TEXT_ENCODER, path, VAE))


def test_a_link_that_leads_out_of_the_folders(server, client, tmp_path):
    outside, link = tmp_path / "outside.safetensors", server.base / "models/vae/link.safetensors"
    outside.write_bytes((server.base / "models" / VAE).read_bytes())
    link.symlink_to(outside)
    try:
        place, sentence = failure(client, text_to_image(TEXT_ENCODER, DIT, "vae/link.safetensors"))
    finally:
        link.unlink()
    assert place == "load2" and "refused" in sentence and "model folder" in sentence


def test_no_tokenizer(server, client, probe):
    folder = server.base / "models/text_encoders/tokenizer"
    hidden = folder.rename(folder.with_name("hidden"))
    probe("ProbeFailure", fail_in_call=0, hide_tokenizers=True)
    try:
        place, sentence = failure(client, text_to_image(seed=200, cfg=3.0) | {"other": node("EmptyImage")})
        assert place == "load" and "vocab.json and merges.txt" in sentence and "huggingface.co" in sentence
    finally:
        probe("ProbeFailure", fail_in_call=0, hide_tokenizers=False)
        hidden.rename(folder)


def test_a_tokenizer_of_another_model(server, client):
    """ComfyUI's own tokenizer is looked at, and is not the tiny text encoder's."""
    folder = server.base / "models/text_encoders/tokenizer"
    hidden = folder.rename(folder.with_name("hidden"))
    try:
        place, sentence = failure(client, text_to_image(seed=201))
    finally:
        hidden.rename(folder)
    assert place == "load" and "another model's): get vocab.json and merges.txt" in sentence
    assert "qwen25_tokenizer knows 15" in sentence


def test_two_denoisers(client):
    place, sentence = failure(client, text_to_image(*FILES, OTHER_DIT))
    assert place == "load" and "both a qwen_image_dit" in sentence and "leave one of them out" in sentence


def test_a_known_model_that_is_not_here(client):
    graph = text_to_image()
    graph["load"] = node("ModelLoader", model="qwen-image", dtype="automatic")
    place, sentence = failure(client, graph)
    assert place == "load"
    for part in ("57.7 GB", "transformer/", "vae/", "https://huggingface.co/Qwen/Qwen-Image", "/Qwen/Qwen-Image"):
        assert part in sentence


def test_a_model_that_only_a_newer_version_knows(client):
    graph = text_to_image()
    graph["load"] = node("ModelLoader", model="from-the-future", dtype="automatic")
    place, sentence = failure(client, graph)
    assert place == "load" and "update the pack" in sentence


def test_a_file_of_no_known_layout(server, client):
    from safetensors.torch import load_file, save_file

    state = load_file(server.base / "models" / VAE)
    state.pop(next(iter(state)))
    unknown = server.base / "models/vae/unknown.safetensors"
    save_file(state, unknown)
    try:
        place, sentence = failure(client, text_to_image(TEXT_ENCODER, DIT, "vae/unknown.safetensors"))
    finally:
        unknown.unlink()
    assert place == "load" and "unknown layout" in sentence and "qwen_image_vae" in sentence


def test_a_noise_mask_over_an_empty_latent(client):
    masked = {"first": node("EmptyLatent", width=64, height=64, batch_size=1),
              "mask": node("SolidMask", value=1.0, width=64, height=64),
              "empty": node("SetLatentNoiseMask", samples=["first", 0], mask=["mask", 0])}
    place, sentence = failure(client, {**text_to_image(), **masked})
    assert place == "denoise" and "the latent is empty" in sentence and "VAE Encode" in sentence


def controlled(**changes):
    """The usual graph with a picture that controls."""
    return {**text_to_image(prompt="apply"),
            "picture": node("EmptyImage", width=64, height=64, batch_size=1, color=0xff0000),
            "control": node("Control", **{"image": ["picture", 0], "net": 0, "scale": 1.0, "start_percent": 0.0,
                                          "end_percent": 1.0, **changes}),
            "apply": node("ControlNetApply", conditioning=["prompt", 0], controls__control0=["control", 0])}


def test_a_picture_that_controls_without_a_controlnet(client):
    place, sentence = failure(client, controlled())
    assert place == "apply" and "qwen_image_blockwise_controlnet to the Model Loader" in sentence
    assert "qwen-image/controlnet-canny" in sentence


def test_a_controlnet_of_a_number_that_is_not_there(client):
    place, sentence = failure(client, {**controlled(net=3), **loader(*FILES, CONTROLNET)})
    assert place == "apply" and "controlnet_id 3, and 1 ControlNet(s) are loaded" in sentence


def test_layers_of_a_model_without_layers(client):
    graph = {**text_to_image(prompt="layers"),
             "picture": node("EmptyImage", width=64, height=64, batch_size=1, color=0xff0000),
             "layers": node("Layers", conditioning=["prompt", 0], image=["picture", 0], layers=2)}
    place, sentence = failure(client, graph)
    assert place == "layers" and "VAE of Qwen-Image-Layered" in sentence


@pytest.mark.parametrize("path", ["loras/../../../etc/passwd", "vae/tiny_vae.safetensors", "/etc/passwd", "demo/gone"])
@pytest.mark.parametrize("kind", ["LoraLoader", "LoraStack"])
def test_a_lora_that_leads_elsewhere(client, kind, path):
    inputs = {"lora": path, "strength": 1.0} if kind == "LoraLoader" else \
        {"count": "1", "count__lora_1": path, "count__strength_1": 1.0}
    with pytest.raises(PromptRejected):
        client.run({**text_to_image(load="lora"), "lora": node(kind, pipeline=["load", 0], **inputs)})


def test_a_lora_that_links_out_of_the_folder(server, client, tmp_path):
    outside, link = tmp_path / "outside.safetensors", server.base / "models/loras/link.safetensors"
    outside.write_bytes((server.base / "models" / LORA).read_bytes())
    link.symlink_to(outside)
    try:
        place, sentence = failure(client, {**text_to_image(load="lora"), "lora": node(
            "LoraLoader", pipeline=["load", 0], lora="loras/link.safetensors", strength=1.0)})
    finally:
        link.unlink()
    assert place == "lora" and "refused" in sentence


@pytest.mark.parametrize("prefix", ["../outside/x", "/tmp/outside/x", "a/../../outside/x"])
def test_a_new_lora_stays_in_the_output_folder(server, client, prefix):
    graph = {**text_to_image(), "picture": node("EmptyImage", width=64, height=64, batch_size=1, color=0),
             "lora": node("ImageToLora", pipeline=["load", 0], images=["picture", 0], filename_prefix=prefix)}
    place, sentence = failure(client, graph)
    assert place == "lora" and "refused" in sentence
    assert not (server.base / "outside").exists()


def test_image_to_lora_without_its_nets(client):
    graph = {**text_to_image(), "picture": node("EmptyImage", width=64, height=64, batch_size=1, color=0),
             "lora": node("ImageToLora", pipeline=["load", 0], images=["picture", 0], filename_prefix="loras/x")}
    place, sentence = failure(client, graph)
    assert place == "lora" and "image to LoRA needs one of image2lora_style" in sentence


def test_a_picture_of_a_size_that_does_not_fit(client):
    picture = {"picture": node("EmptyImage", width=100, height=64, batch_size=1, color=0),
               "empty": node("VaeEncode", pipeline=["load", 0], pixels=["picture", 0], tiling="off")}
    place, sentence = failure(client, {**text_to_image(), **picture})
    assert place == "empty" and "100×64" in sentence and "Upscale Image" in sentence


def test_a_vram_limit_where_nothing_moves(client):
    graph = {**text_to_image(), "vram": vram("full", "GiB", vram_limit__gib=4.0)}
    graph["load"]["inputs"]["vram"] = ["vram", 0]
    place, sentence = failure(client, graph)
    assert place == "load" and "4.0 GiB" in sentence and "low" in sentence
