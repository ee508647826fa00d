"""ComfyUI's own schedulers, pictures, videos and attention around our nodes; more of this is in test_native_nodes."""
from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image

from tests.host.graphs import denoise, node, text_to_image

ATTENTION = "/settings/DiffSynth.Attention"


# ---- schedules ------------------------------------------------------------------------------------------------------

def by_sigmas(latent: str, link: list, add_noise: bool) -> dict:
    """A Denoise that is given its sigmas."""
    made = denoise(latent=latent, schedule="sigmas")
    steps = ("schedule.steps", "schedule.denoise")
    inputs = {name: value for name, value in made["inputs"].items() if name not in steps}
    return {**made, "inputs": {**inputs, "schedule.sigmas": link, "schedule.add_noise": add_noise}}


@pytest.mark.parametrize("scheduler", ["simple", "normal", "sgm_uniform", "beta", "kl_optimal", "linear_quadratic"])
def test_native_schedulers_make_sigmas_for_us(probe, scheduler):
    """Split in two by a native node they draw what they draw in one."""
    graph = {**text_to_image(), "model": node("ProbeSampling"),
             "sigmas": node("BasicScheduler", model=["model", 0], scheduler=scheduler, steps=4, denoise=1.0),
             "split": node("SplitSigmas", sigmas=["sigmas", 0], step=2),
             "denoise": by_sigmas("empty", ["sigmas", 0], True), "first": by_sigmas("empty", ["split", 0], True),
             "second": by_sigmas("first", ["split", 1], False),
             "decode2": node("VaeDecode", pipeline=["load", 0], samples=["second", 0], tiling="off")}
    result = probe("ProbeDifference", graph, a=["decode", 0], b=["decode2", 0])
    assert result["shape"] == [1, 64, 64, 3] and result["difference"] <= 1e-3


def test_a_native_schedule_for_the_end_changes_a_picture_a_little(probe):
    """SplitSigmasDenoise gives the last steps; native VAE Encode the latent."""
    graph = {**text_to_image(), "vae": node("VAELoader", vae_name="tiny_vae.safetensors"),
             "picture": node("EmptyImage", width=64, height=64, batch_size=1, color=0xFF0000),
             "latent": node("VAEEncode", pixels=["picture", 0], vae=["vae", 0]), "model": node("ProbeSampling"),
             "sigmas": node("BasicScheduler", model=["model", 0], scheduler="simple", steps=8, denoise=1.0),
             "split": node("SplitSigmasDenoise", sigmas=["sigmas", 0], denoise=0.25),
             "denoise": by_sigmas("latent", ["split", 1], True)}
    less = probe("ProbeDifference", graph, a=["decode", 0], b=["picture", 0])["difference"]
    assert 0 < less <= 1


# ---- pictures -------------------------------------------------------------------------------------------------------

def test_our_picture_goes_through_native_nodes_and_back(probe):
    """Scaled there and back, inverted twice, batched and taken out again: it is still the one that was drawn."""
    graph = {**text_to_image(),
             "large": node("ImageScale", image=["decode", 0], upscale_method="nearest-exact", width=128, height=128,
                           crop="disabled"),
             "small": node("ImageScale", image=["large", 0], upscale_method="nearest-exact", width=64, height=64,
                           crop="disabled"),
             "inverse": node("ImageInvert", image=["small", 0]), "again": node("ImageInvert", image=["inverse", 0]),
             "batch": node("RepeatImageBatch", image=["again", 0], amount=2),
             "one": node("ImageFromBatch", image=["batch", 0], batch_index=1, length=1)}
    assert probe("ProbeDifference", graph, a=["one", 0], b=["decode", 0])["difference"] <= 1e-6


def test_a_native_mask_out_of_our_picture_is_a_mask_for_us(client):
    """Image To Mask, thresholded and grown by native nodes, says where Denoise may draw."""
    graph = {**text_to_image(seed=5),
             "mask": node("ImageToMask", image=["decode", 0], channel="red"),
             "sharp": node("ThresholdMask", mask=["mask", 0], value=0.5),
             "grown": node("GrowMask", mask=["sharp", 0], expand=2, tapered_corners=True),
             "inpaint": node("Inpaint", conditioning=["prompt", 0], mask=["grown", 0], blur="off"),
             "again": denoise(prompt="inpaint", latent="denoise", seed=6, schedule__denoise=0.5),
             "decode2": node("VaeDecode", pipeline=["load", 0], samples=["again", 0], tiling="off"),
             "show2": node("PreviewImage", images=["decode2", 0])}
    run = client.run(graph)
    assert run.status == "success", run.error
    assert len(run.files("show2")) == 1


# ---- video ----------------------------------------------------------------------------------------------------------

def test_our_frames_become_a_native_video(client):
    """A batch of pictures and a rate, into Create Video and Save Video; the file has these frames."""
    graph = {**text_to_image(batch=3, seed=7),
             "video": node("CreateVideo", images=["decode", 0], fps=8.0),
             "save": node("SaveVideo", video=["video", 0], filename_prefix="video/ours", format="mp4",
                          format__codec="h264", codec="h264"),
             "parts": node("GetVideoComponents", video=["video", 0]),
             "frames": node("PreviewImage", images=["parts", 0])}
    run = client.run(graph)
    assert run.status == "success", run.error
    with av.open(io.BytesIO(client.fetch(run.files("save")[0]))) as container:
        assert container.streams.video[0].average_rate == 8
        shapes = {frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)}
        assert shapes == {(64, 64, 3)} and container.streams.video[0].frames == 3
    ours, theirs = ([picture(client, file) for file in run.files(name)] for name in ("show", "frames"))
    assert len(theirs) == 3 and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def picture(client, file: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(client.fetch(file))))


# ---- attention ------------------------------------------------------------------------------------------------------

@pytest.fixture
def attention(client):
    """Choose an implementation as the page does; afterwards the setting is what it was."""
    yield lambda name: client.request(ATTENTION, name)
    client.request(ATTENTION, "auto")


def test_comfyuis_own_attention_by_setting(client, probe, attention):
    def draw() -> tuple[np.ndarray, int]:
        client.free()
        probe("ProbeAttention")
        run = client.run(text_to_image(seed=9))
        assert run.status == "success", run.error
        return picture(client, run.files("show")[0]).astype(int), probe("ProbeAttention")

    attention("auto")
    ours, none = draw()
    attention("comfyui")
    theirs, calls = draw()
    assert none == 0 and calls > 0
    assert np.abs(ours - theirs).max() <= 1


def test_attention_without_its_package_names_the_pip_line(client, attention):
    attention("flash_attention_2")
    run = client.run(text_to_image(seed=10))
    assert run.status == "error" and "pip install flash-attn" in run.error["exception_message"]
    attention("auto")
    assert client.run(text_to_image(seed=10)).status == "success"


def test_an_attention_that_nobody_knows_is_an_error(client, attention):
    attention("flesh")
    run = client.run(text_to_image(seed=11))
    assert run.status == "error" and "DiffSynth.Attention='flesh'" in run.error["exception_message"]
