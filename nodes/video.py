"""Nodes that only videos need: the empty latent, pictures and videos to draw by, the camera, options of the loop."""
from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io
from torch import Tensor

from ..diffsynth_backend.models.wan_video_camera_controller import DIRECTIONS, ORIGIN, SPEED
from ..diffsynth_backend.pipelines.latents import empty_video_latents
from ..diffsynth_backend.pipelines.steps import Conditioning, give
from ..diffsynth_backend.pipelines.wan_video_cache import POLYNOMIALS
from ..diffsynth_backend.pipelines.wan_video_control import SPEEDS
from ..diffsynth_backend.pipelines.wan_video_vace import MAX_REFERENCES
from . import types
from .sampling import MAX_SIDE
from .values import every, one

MAX_FRAMES = 4097
MAX_LATENT_FRAMES = 1025
MAX_VIDEOS = 64
MAX_ORIGIN = 1000  # characters of a camera's numbers
# Channels of a latent and pixels per latent pixel, by the name of the choice.
LATENT_SHAPES = {"Wan 2.1, Wan 2.2 A14B": (16, 8), "Wan 2.2 TI2V-5B": (48, 16)}


def size_inputs(width: int, height: int, frames: int, multiple: int) -> list:
    """Size and length of a video, by default these."""
    tooltip = "Pixels of the video, in steps of 16; for TI2V-5B of 32."
    return [
        io.Int.Input("width", default=width, min=multiple, max=MAX_SIDE, step=multiple, tooltip=tooltip),
        io.Int.Input("height", default=height, min=multiple, max=MAX_SIDE, step=multiple, tooltip=tooltip),
        io.Int.Input("frames", default=frames, min=1, max=MAX_FRAMES, step=4, tooltip=(
            "How many frames: a multiple of 4, plus 1. Wan 2.1 and A14B draw 16 a second, TI2V-5B 24.")),
    ]


def mask_frames(mask: Tensor | None) -> Tensor | list[Tensor] | None:
    """A MASK (H, W) or (frames, H, W) as VACE takes it: one for all frames, or one for each."""
    if mask is None or mask.ndim == 2:
        return mask
    return mask[0] if len(mask) == 1 else list(mask)


def numbers(what: str, text: str) -> tuple[float, ...]:
    """The numbers of a text, between commas or spaces. Raises ValueError for what is none."""
    if len(text) > MAX_ORIGIN:
        raise ValueError(f"{what} has {len(text)} characters, at most {MAX_ORIGIN} expected")
    try:
        return tuple(map(float, text.replace(",", " ").split()))
    except ValueError as error:
        raise ValueError(f"{what} has to be numbers between commas: {error}") from error


class EmptyVideoLatent(io.ComfyNode):
    """Where a video from nothing begins."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        shapes, large = LATENT_SHAPES
        return io.Schema(
            node_id="DiffSynthBackend_EmptyVideoLatent",
            display_name="Empty Video Latent (DiffSynth)",
            category=types.CATEGORY,
            description="An empty latent for the size and the length of the video. Denoise fills it with noise.",
            search_aliases=["diffsynth", "empty hunyuan latent video", "empty latent video", "wan", "frames", "length",
                            "video size", "text to video", "t2v", "视频", "空视频latent", "文生视频", "帧数"],
            inputs=[
                io.DynamicCombo.Input("model", options=[
                    io.DynamicCombo.Option(shapes, size_inputs(832, 480, 81, 16)),
                    io.DynamicCombo.Option(large, size_inputs(1248, 704, 121, 32)),
                ], tooltip="Which kind of latents the model draws: TI2V-5B has larger ones, with more channels."),
                io.Int.Input("batch_size", default=1, min=1, max=MAX_VIDEOS, tooltip="How many videos at once."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Zeros of the right shape, for Denoise.")],
        )

    @classmethod
    def execute(cls, model: dict[str, Any], batch_size: int) -> io.NodeOutput:
        channels, factor = LATENT_SHAPES[model["model"]]
        return io.NodeOutput({"samples": empty_video_latents(model["width"], model["height"], model["frames"],
                                                             batch_size, channels, factor)})


class ImageToVideo(io.ComfyNode):
    """The frames that a video begins and ends with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffSynthBackend_ImageToVideo",
            display_name="Image to Video (DiffSynth)",
            category=types.CATEGORY,
            description="The picture that a video begins with, and for some models the one that it ends with. Size "
                        "and length come from the latent at Denoise.",
            search_aliases=["diffsynth", "wan image to video", "i2v", "first frame", "last frame", "flf2v",
                            "animate picture", "start image", "图生视频", "首帧", "尾帧", "首尾帧"],
            inputs=[
                types.Conditioning.Input("conditioning", tooltip="What happens in the video, from Prompt Encode."),
                io.Image.Input("image", tooltip="The first frame. It is resized to the video's size."),
                io.Image.Input("end_image", optional=True, tooltip=(
                    "The last frame, for models that take one: FLF2V, I2V of Wan 2.1 and A14B, InP.")),
            ],
            outputs=[types.Conditioning.Output(display_name="conditioning", tooltip=(
                "With the pictures, for Denoise."))],
        )

    @classmethod
    def execute(cls, conditioning: Conditioning, image: Tensor, end_image: Tensor | None = None) -> io.NodeOutput:
        inputs = {"input_image": one("image", image)}
        if end_image is not None:
            inputs["end_image"] = one("end_image", end_image)
        return io.NodeOutput(give(conditioning.handle, inputs, conditioning=conditioning))


class Vace(io.ComfyNode):
    """A video to change, where it changes, and pictures of what is to appear."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        references = io.Autogrow.Input(
            "references", optional=True, tooltip="Pictures of what is to appear: people, things, a background.",
            template=io.Autogrow.TemplatePrefix(
                io.Image.Input("reference", optional=True, tooltip=(
                    "A picture of something that is to appear, best on white. A batch is several.")),
                prefix="reference", min=0, max=MAX_REFERENCES))
        return io.Schema(
            node_id="DiffSynthBackend_VACE",
            display_name="VACE (DiffSynth)",
            category=types.CATEGORY,
            description="Changes a video, all of it or where a mask is white, follows one (edges, depth, poses), and "
                        "shows what is in reference pictures. For pipelines with VACE.",
            search_aliases=["diffsynth", "wan vace to video", "vace", "video inpaint", "video edit", "reference video",
                            "video to video", "v2v", "outpaint", "视频编辑", "视频重绘", "参考图", "视频生视频"],
            inputs=[
                types.Conditioning.Input("conditioning", tooltip="What to draw, from Prompt Encode."),
                io.Image.Input("video", optional=True, tooltip=(
                    "Frames to change or to follow, at least as many as are drawn. They are resized.")),
                io.Mask.Input("mask", optional=True, tooltip=(
                    "White is what changes: one mask for all frames, or one for each. Without it everything changes.")),
                io.Float.Input("scale", default=1.0, min=0.0, max=10.0, step=0.05, tooltip=(
                    "How much all of this counts. 0: not at all.")),
                references,
            ],
            outputs=[types.Conditioning.Output(display_name="conditioning", tooltip=(
                "With what VACE draws by, for Denoise."))],
        )

    @classmethod
    def execute(cls, conditioning: Conditioning, scale: float, video: Tensor | None = None, mask: Tensor | None = None,
                references: dict[str, Any] | None = None) -> io.NodeOutput:
        pictures = [picture for batch in every(references or {}) for picture in batch]
        given = {"vace_video": video, "vace_video_mask": mask_frames(mask), "vace_reference_image": pictures or None}
        inputs = {name: value for name, value in given.items() if value is not None}
        if not inputs:
            raise ValueError("VACE has nothing to draw by: connect a video, a mask or a reference, or leave it out")
        return io.NodeOutput(give(conditioning.handle, {**inputs, "vace_scale": scale}, conditioning=conditioning))


class VideoControl(io.ComfyNode):
    """A video that controls what is drawn, by a model made for that."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffSynthBackend_VideoControl",
            display_name="Video Control (DiffSynth)",
            category=types.CATEGORY,
            description="A video of edges, depth or poses that a Fun-Control model draws after, and a picture of what "
                        "it looks like.",
            search_aliases=["diffsynth", "wan fun control to video", "fun control", "control video", "pose", "depth",
                            "canny", "video controlnet", "控制视频", "姿态", "深度图", "线稿"],
            inputs=[
                types.Conditioning.Input("conditioning", tooltip="What to draw, from Prompt Encode."),
                io.Image.Input("video", tooltip=(
                    "Frames that control, at least as many as are drawn. They are resized.")),
                io.Image.Input("reference", optional=True, tooltip=(
                    "A picture of what the video looks like, for Fun-V1.1-Control and Fun-A14B-Control.")),
            ],
            outputs=[types.Conditioning.Output(display_name="conditioning", tooltip=(
                "With the video that controls, for Denoise."))],
        )

    @classmethod
    def execute(cls, conditioning: Conditioning, video: Tensor, reference: Tensor | None = None) -> io.NodeOutput:
        inputs = {"control_video": video}
        if reference is not None:
            inputs["reference_image"] = one("reference", reference)
        return io.NodeOutput(give(conditioning.handle, inputs, conditioning=conditioning))


class Camera(io.ComfyNode):
    """How the camera moves."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DiffSynthBackend_Camera",
            display_name="Camera (DiffSynth)",
            category=types.CATEGORY,
            description="Moves the camera in a direction, for Fun-Control-Camera models. They begin with a picture, "
                        "from Image to Video.",
            search_aliases=["diffsynth", "wan camera embedding", "camera control", "pan", "zoom", "tilt",
                            "camera motion", "镜头", "运镜", "相机", "推拉摇移"],
            inputs=[
                types.Conditioning.Input("conditioning", tooltip=(
                    "With the prompt and the picture, from Image to Video.")),
                io.Combo.Input("direction", options=list(DIRECTIONS), tooltip="Where the camera turns or goes."),
                io.Float.Input("speed", default=round(SPEED, 4), min=0.0, max=1.0, step=0.0005, tooltip=(
                    "How far it moves from one frame to the next. 0.0185 is what the models were shown.")),
                io.String.Input("origin", optional=True, advanced=True, default=", ".join(map(str, ORIGIN)), tooltip=(
                    "Where the camera begins: 19 numbers, a time, focal lengths and centre as parts of the picture's "
                    "sides, two unused, and the world-to-camera matrix (3×4) row by row.")),
            ],
            outputs=[types.Conditioning.Output(display_name="conditioning", tooltip=(
                "With the camera's path, for Denoise."))],
        )

    @classmethod
    def execute(cls, conditioning: Conditioning, direction: str, speed: float,
                origin: str | None = None) -> io.NodeOutput:
        inputs = {"camera_control_direction": direction, "camera_control_speed": speed}
        if origin is not None:
            inputs["camera_control_origin"] = numbers("origin", origin)
        return io.NodeOutput(give(conditioning.handle, inputs, conditioning=conditioning))


class VideoOptions(io.ComfyNode):
    """What else there is to say about how a video is drawn."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        off = io.DynamicCombo.Option("off", [])
        return io.Schema(
            node_id="DiffSynthBackend_VideoOptions",
            display_name="Video Options (DiffSynth)",
            category=types.CATEGORY,
            description="Options of how a video is drawn: where A14B's second denoiser takes over, longer videos in "
                        "windows, steps that are skipped, how fast things move.",
            search_aliases=["diffsynth", "wan options", "sliding window", "long video", "teacache", "context windows",
                            "a14b boundary", "motion bucket", "speed control", "长视频", "滑动窗口", "加速",
                            "运动速度"],
            inputs=[
                types.Conditioning.Input("conditioning", tooltip="From Prompt Encode or any node behind it."),
                io.DynamicCombo.Input("experts", options=[
                    off, io.DynamicCombo.Option("on", [io.Float.Input(
                        "boundary", default=0.875, min=0.0, max=1.0, step=0.005, tooltip=(
                            "The noise below which the second denoiser draws. T2V-A14B: 0.875, I2V-A14B: 0.9."))]),
                ], tooltip="on: where A14B's second denoiser takes over is set here. off: at 0.875."),
                io.DynamicCombo.Input("windows", options=[off, io.DynamicCombo.Option("on", [
                    io.Int.Input("size", default=21, min=1, max=MAX_LATENT_FRAMES, tooltip=(
                        "Latent frames of a window; one stands for 4 frames. 21 are 81 frames.")),
                    io.Int.Input("stride", default=14, min=1, max=MAX_LATENT_FRAMES, tooltip=(
                        "Latent frames from one window to the next, at most the size. Less hides the seams better.")),
                ])], tooltip="on: windows that overlap, for videos longer than the model was trained for."),
                io.DynamicCombo.Input("cache", options=[off, io.DynamicCombo.Option("on", [
                    io.Combo.Input("calibration", options=list(POLYNOMIALS), tooltip="The model that draws."),
                    io.Float.Input("threshold", default=0.1, min=0.005, max=10.0, step=0.005, tooltip=(
                        "How much change is skipped: 0.05 to 0.3. More is faster and coarser.")),
                ])], tooltip="on: TeaCache skips steps that change little. For the models that it is calibrated for."),
                io.DynamicCombo.Input("motion", options=[off, io.DynamicCombo.Option("on", [io.Int.Input(
                    "speed", default=50, min=SPEEDS[0], max=SPEEDS[1], tooltip="0 is slow, 100 is fast.")])], tooltip=(
                        "on: how fast things move, with the motion controller of Wan2.1-T2V-1.3B as an extra model of "
                        "the Model Loader.")),
                io.Boolean.Input("cfg_merge", default=False, tooltip=(
                    "Both prompts in one batch: more memory, at times faster.")),
            ],
            outputs=[types.Conditioning.Output(display_name="conditioning", tooltip="With the options, for Denoise.")],
        )

    @classmethod
    def execute(cls, conditioning: Conditioning, experts: dict[str, Any], windows: dict[str, Any],
                cache: dict[str, Any], motion: dict[str, Any], cfg_merge: bool) -> io.NodeOutput:
        inputs: dict[str, Any] = {"cfg_merge": cfg_merge}
        if experts["experts"] == "on":
            inputs["switch_DiT_boundary"] = experts["boundary"]
        if windows["windows"] == "on":
            inputs |= {"sliding_window_size": windows["size"], "sliding_window_stride": windows["stride"]}
        if cache["cache"] == "on":
            inputs |= {"tea_cache_l1_thresh": cache["threshold"], "tea_cache_model_id": cache["calibration"]}
        if motion["motion"] == "on":
            inputs["motion_bucket_id"] = motion["speed"]
        return io.NodeOutput(give(conditioning.handle, inputs, conditioning=conditioning))
