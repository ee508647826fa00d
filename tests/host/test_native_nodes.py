"""ComfyUI's own nodes before and behind ours: latents, VAE, sigmas."""
from __future__ import annotations

import pytest

from tests.host.graphs import denoise, node, text_to_image

VAE = {"vae": node("VAELoader", vae_name="tiny_vae.safetensors")}


def with_latent(latent: dict, **changes) -> dict:
    return {**text_to_image(**changes), **VAE, "empty": latent}


def test_our_latent_has_a_frame_axis(probe):
    assert probe("ProbeLatent", text_to_image(batch=2), latent=["denoise", 0]) == {
        "shape": [2, 16, 1, 8, 8], "dtype": "torch.float32", "device": "cpu"}


def test_the_native_vae_decodes_our_latent_to_the_same_picture(probe):
    graph = {**text_to_image(batch=2), **VAE, "native": node("VAEDecode", samples=["denoise", 0], vae=["vae", 0])}
    result = probe("ProbeDifference", graph, a=["native", 0], b=["decode", 0])
    assert result["shape"] == [2, 64, 64, 3] and result["difference"] <= 1e-4


def test_the_native_vae_encodes_what_we_encode(probe):
    """Native latents go into our VAE Decode and come out as the pictures that our own latents give."""
    graph = {**text_to_image(batch=1), **VAE,
             "theirs": node("VAEEncode", pixels=["decode", 0], vae=["vae", 0]),
             "ours": node("VaeEncode", pipeline=["load", 0], pixels=["decode", 0], tiling="off"),
             "from_theirs": node("VaeDecode", pipeline=["load", 0], samples=["theirs", 0], tiling="off"),
             "from_ours": node("VaeDecode", pipeline=["load", 0], samples=["ours", 0], tiling="off")}
    assert probe("ProbeDifference", graph, a=["from_theirs", 0], b=["from_ours", 0])["difference"] <= 1e-4


def test_native_empty_latents_are_as_good_as_ours(probe):
    graph = {**with_latent(node("EmptySD3LatentImage", width=64, height=64, batch_size=1)),
             "ours": node("EmptyLatent", width=64, height=64, batch_size=1),
             "denoise2": denoise(latent="ours"),
             "decode2": node("VaeDecode", pipeline=["load", 0], samples=["denoise2", 0], tiling="off")}
    assert probe("ProbeDifference", graph, a=["decode", 0], b=["decode2", 0])["difference"] == 0


def test_a_picture_through_the_native_vae_encode_can_be_changed(client):
    picture = {"picture": node("EmptyImage", width=64, height=64, batch_size=1, color=0xff0000)}
    graph = {**with_latent(node("VAEEncode", pixels=["picture", 0], vae=["vae", 0]), schedule__denoise=0.6), **picture}
    run = client.run(graph)
    assert run.status == "success", run.error


def test_pictures_that_became_frames_are_refused(client):
    pictures = {"pictures": node("EmptyImage", width=64, height=64, batch_size=5, color=0)}
    run = client.run({**with_latent(node("VAEEncode", pixels=["pictures", 0], vae=["vae", 0])), **pictures})
    assert run.status == "error" and run.error["node_id"] == "denoise"
    assert "2 frames" in run.error["exception_message"] and "VAE Encode" in run.error["exception_message"]


def test_a_batch_through_our_vae_encode_stays_a_batch(probe):
    pictures = {"pictures": node("EmptyImage", width=64, height=64, batch_size=5, color=0)}
    graph = {**with_latent(node("VaeEncode", pipeline=["load", 0], pixels=["pictures", 0], tiling="off"),
                           schedule__denoise=0.5), **pictures}
    assert probe("ProbeLatent", graph, latent=["denoise", 0])["shape"] == [5, 16, 1, 8, 8]


def test_a_picture_out_of_a_batch_is_drawn_as_in_the_batch(probe):
    batch = text_to_image(batch=3)
    graph = {**batch, "one": node("LatentFromBatch", samples=["empty", 0], batch_index=2, length=1),
             "denoise2": denoise(latent="one"),
             "decode2": node("VaeDecode", pipeline=["load", 0], samples=["denoise2", 0], tiling="off"),
             "third": node("ImageFromBatch", image=["decode", 0], batch_index=2, length=1)}
    assert probe("ProbeDifference", graph, a=["third", 0], b=["decode2", 0])["difference"] <= 1e-4


@pytest.mark.parametrize("split", [1, 2])
def test_a_native_schedule_can_be_split_between_two_denoise_nodes(probe, split):
    sigmas = {"sigmas": node("ManualSigmas", sigmas="1.0, 0.8, 0.5, 0.2, 0.0"),
              "split": node("SplitSigmas", sigmas=["sigmas", 0], step=split)}

    def part(latent, link, add_noise):
        inputs = {"pipeline": ["load", 0], "conditioning": ["prompt", 0], "latent": [latent, 0], "seed": 1, "cfg": 4.0,
                  "cfg_norm": False, "schedule": "sigmas", "schedule__sigmas": link, "schedule__add_noise": add_noise}
        return node("Denoise", **inputs)

    graph = {**text_to_image(), **sigmas, "denoise": part("empty", ["sigmas", 0], True),
             "first": part("empty", ["split", 0], True), "second": part("first", ["split", 1], False),
             "decode2": node("VaeDecode", pipeline=["load", 0], samples=["second", 0], tiling="off")}
    assert probe("ProbeDifference", graph, a=["decode", 0], b=["decode2", 0])["difference"] <= 1e-3
