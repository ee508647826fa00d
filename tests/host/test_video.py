"""A tiny Wan with random weights in a real ComfyUI: to a video file through native nodes, with previews, interrupts."""
from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.helpers.models_folder import WAN_FILES, WAN_RELATIVES
from tests.host.graphs import Graph, denoise, loader, node
from tests.host.test_interrupt import SECONDS, interrupted_at, progress_of

SMALL, LARGE = "Wan 2.1, Wan 2.2 A14B", "Wan 2.2 TI2V-5B"
TEXT_ENCODER, _, VAE = WAN_FILES


def text_to_video(*files: str, shape: str = SMALL, frames: int = 9, width: int = 160, height: int = 96,
                  **changes: Any) -> Graph:
    """From a prompt to a file, with the tiny files unless others are named; `changes` are Denoise's."""
    schedule = {"schedule": "video", "schedule__shift": 5.0, "schedule__steps": 3}
    return {**loader(*(files or WAN_FILES), family="wan"),
            "prompt": node("PromptEncode", pipeline=["load", 0], positive="a red circle", negative=""),
            "empty": node("EmptyVideoLatent", model=shape, model__width=width, model__height=height,
                          model__frames=frames, batch_size=1),
            "denoise": denoise(**{**schedule, **changes}),
            "decode": node("VaeDecode", pipeline=["load", 0], samples=["denoise", 0], tiling="off"),
            "video": node("CreateVideo", images=["decode", 0], fps=16.0),
            "save": node("SaveVideo", video=["video", 0], filename_prefix="tiny", format="mp4", format__codec="h264")}


def test_a_prompt_becomes_a_video_file(client):
    run = client.run(text_to_video(), preview_method="latent2rgb")
    assert run.status == "success", run.error
    assert "WanModel" in run.outputs["load"]["text"][0]
    assert [event for event in run.progress if event[0] == "denoise"] == [("denoise", step, 3) for step in (1, 2, 3)]
    assert len(run.previews) == 3 and Image.open(io.BytesIO(run.previews[-1].data)).format == "JPEG"
    pictures = saved_frames(client, run)
    assert [picture.shape for picture in pictures] == [(96, 160, 3)] * 9
    assert pictures[0].std() > 1 and (pictures[0] != pictures[-1]).any()


def saved_frames(client, run) -> list[np.ndarray]:
    """The frames of the file that a run has saved."""
    with av.open(io.BytesIO(client.fetch(run.files("save")[0]))) as file:
        stream = file.streams.video[0]
        assert stream.average_rate == 16
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]


def test_a_video_is_changed(client):
    """Frames go through VAE Encode into Denoise, and a second seed draws another video of them."""
    graph = text_to_video(seed=500, schedule__denoise=0.5, latent="encode")
    graph["frames"] = node("EmptyImage", width=160, height=96, batch_size=9, color=0x3366ff)
    graph["encode"] = node("VaeEncode", pipeline=["load", 0], pixels=["frames", 0], tiling="off")
    graph.pop("empty")
    run = client.run(graph)
    assert run.status == "success" and run.files("save"), run.error


@pytest.mark.parametrize("name, changes", [
    ("denoise", {"frames": 41, "schedule__steps": 200}), ("decode", {"frames": 161, "schedule__steps": 1})])
def test_an_interrupt_ends_it_within_a_second_and_the_next_run_works(client, name, changes):
    assert interrupted_at(client, text_to_video(seed=510, **changes), progress_of(name)) < SECONDS
    assert client.run(text_to_video(seed=511)).status == "success"


def test_what_is_given_reaches_the_models(client):
    """Each node for videos is accepted with its widgets; what this model is not made for is said at Denoise."""
    picture = {"picture": node("EmptyImage", width=160, height=96, batch_size=9, color=0)}
    guides = {"ImageToVideo": ({"image": ["one", 0]}, "draws from text alone"),
              "VideoControl": ({"video": ["picture", 0]}, "Fun-Control models"),
              "VACE": ({"video": ["picture", 0], "scale": 1.0}, "wan2.1-vace-1.3b/transformer"),
              "Camera": ({"direction": "LeftUp", "speed": 0.02}, "no camera adapter"),
              "VideoOptions": ({"experts": "on", "experts__boundary": 0.9, "windows": "on", "windows__size": 2,
                                "windows__stride": 1, "cache": "on", "cache__calibration": "Wan2.1-T2V-1.3B",
                                "cache__threshold": 0.1, "motion": "off", "cfg_merge": True},
                               "neither with sliding windows")}
    for kind, (inputs, message) in guides.items():
        graph = {**text_to_video(prompt="guide"), **picture,
                 "one": node("ImageFromBatch", image=["picture", 0], batch_index=0, length=1),
                 "guide": node(kind, conditioning=["prompt", 0], **inputs)}
        run = client.run(graph)
        assert run.status == "error" and message in run.error["exception_message"], (kind, run.error)


# ---- relatives ------------------------------------------------------------------------------------------------------

PICTURES = {"first": node("EmptyImage", width=160, height=96, batch_size=1, color=0xff0000),
            "last": node("EmptyImage", width=64, height=64, batch_size=1, color=0x0000ff),
            "clip": node("EmptyImage", width=160, height=96, batch_size=41, color=0x3366ff),
            "mask": node("SolidMask", value=1.0, width=160, height=96)}
FIRST = {"image": ["first", 0]}
NO_OPTIONS = {"windows": "off", "cache": "off", "motion": "off", "cfg_merge": False}
# Models besides the text encoder, the node that guides and its inputs, and the model that the loader is to name.
RELATIVES = {
    "I2V": (("image_encoder", "i2v"), "ImageToVideo", {**FIRST, "end_image": ["last", 0]}, "WanImageEncoder"),
    "VACE": (("vace",), "VACE", {"video": ["clip", 0], "mask": ["mask", 0], "references.reference0": ["first", 0],
                                 "scale": 0.8}, "VaceWanModel"),
    "Control": (("image_encoder", "control"), "VideoControl", {"video": ["clip", 0], "reference": ["first", 0]},
                "WanModel"),
    "Camera": (("image_encoder", "camera"), "Camera", {"direction": "RightUp", "speed": 0.05}, "WanModel"),
    "TI2V-5B": (("ti2v", "vae_2.2"), "ImageToVideo", FIRST, "WanVideoVAE38"),
    "A14B": (("experts/low_noise_model/dit", "experts/high_noise_model/dit"), "VideoOptions",
             {"experts": "on", "experts__boundary": 0.9, **NO_OPTIONS}, "dit2: WanModel"),
}


def relative(name: str, **changes: Any) -> Graph:
    """From a prompt and what guides to a file."""
    models, kind, inputs, _ = RELATIVES[name]
    files = [TEXT_ENCODER, *(WAN_RELATIVES[model] for model in models), *([] if "vae_2.2" in models else [VAE])]
    graph = {**text_to_video(*files, shape=LARGE if "vae_2.2" in models else SMALL, prompt="guide", **changes),
             **PICTURES, "guide": node(kind, conditioning=["prompt", 0], **inputs)}
    if kind == "Camera":  # its models begin with a picture
        graph["begin"] = node("ImageToVideo", conditioning=["prompt", 0], **FIRST)
        graph["guide"]["inputs"]["conditioning"] = ["begin", 0]
    return graph


@pytest.mark.parametrize("name", RELATIVES)
def test_each_relative_draws_a_file(client, name):
    run = client.run(relative(name, seed=600))
    assert run.status == "success", run.error
    assert RELATIVES[name][-1] in run.outputs["load"]["text"][0]
    pictures = saved_frames(client, run)
    assert [picture.shape for picture in pictures] == [(96, 160, 3)] * 9 and pictures[0].std() > 1
    again = client.run(relative(name, seed=601))
    assert again.status == "success", again.error
    assert (saved_frames(client, again)[0] != pictures[0]).any()


@pytest.mark.parametrize("name", ["I2V", "VACE", "A14B"])
def test_an_interrupted_relative_leaves_nothing_behind(client, name):
    assert interrupted_at(client, relative(name, seed=610, frames=41, schedule__steps=200),
                          progress_of("denoise")) < SECONDS
    assert client.run(relative(name, seed=611)).status == "success"
