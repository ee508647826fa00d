"""A tiny Wan with random weights in a real ComfyUI: to a video file through native nodes, with previews, interrupts."""
from __future__ import annotations

import io
from typing import Any

import av
import pytest
from PIL import Image

from tests.helpers.models_folder import WAN_FILES
from tests.host.graphs import Graph, denoise, loader, node
from tests.host.test_interrupt import SECONDS, interrupted_at, progress_of

SHAPE = "Wan 2.1, Wan 2.2 A14B"


def text_to_video(frames: int = 9, width: int = 160, height: int = 96, **changes: Any) -> Graph:
    """From a prompt to a file; `changes` are Denoise's."""
    schedule = {"schedule": "video", "schedule__shift": 5.0, "schedule__steps": 3}
    return {**loader(*WAN_FILES, family="wan"),
            "prompt": node("PromptEncode", pipeline=["load", 0], positive="a red circle", negative=""),
            "empty": node("EmptyVideoLatent", model=SHAPE, model__width=width, model__height=height,
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
    with av.open(io.BytesIO(client.fetch(run.files("save")[0]))) as file:
        stream = file.streams.video[0]
        pictures = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
        assert stream.average_rate == 16
    assert [picture.shape for picture in pictures] == [(96, 160, 3)] * 9
    assert pictures[0].std() > 1 and (pictures[0] != pictures[-1]).any()


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
