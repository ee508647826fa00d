"""Each feature with its weights anywhere: unmanaged, balanced, on disk, streamed under a limit, in fp8. The same bits.

Notable: the models are random and small, but files that the registry finds, so that everything between a file and a
picture takes part. Pictures are compared bit by bit, and so are the latents after each step.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth_backend.configs import demo_model as sizes, model_configs
from diffsynth_backend.core import ModelConfig, hash_model_file
from diffsynth_backend.core.vram.presets import vram_preset
from diffsynth_backend.diffusion import Step
from diffsynth_backend.models.qwen_image_controlnet import QwenImageBlockWiseControlNet
from diffsynth_backend.models.qwen_image_dit import QwenImageDiT
from diffsynth_backend.models.qwen_image_vae import QwenImageVAE
from diffsynth_backend.pipelines.qwen_image import ControlNetInput, QwenImagePipeline
from tests.helpers.vram_fields import cpu_fields
from tests.pipelines.test_lora import round_to_fp8, write_lora

HEIGHT, WIDTH, STEPS = 32, 48, 2
F32, MIB = torch.float32, 1 / 1024  # GiB
LAYERED = {"use_layer3d_rope": True, "use_additional_t_cond": True}
PLAIN_MODELS = ("text_encoder", "transformer", "vae", "control_0", "control_1", "control_inpaint")
LAYERED_MODELS = ("text_encoder", "layered_transformer", "layered_vae")

LIMIT = 12 * MIB  # above what any of the computations here needs, below that plus all weights
# Where weights are, and the limit. Files hold bfloat16: whatever waits as such is cast on its way, without loss.
MANAGEMENT: dict[str, tuple[dict[str, Any], float | None]] = {
    "none": ({}, None),
    "balanced": (vram_preset("balanced", F32, "cpu"), None),
    "disk": (vram_preset("disk", F32, "cpu"), None),
    "all from disk": (vram_preset("disk", F32, "cpu"), 0),
    "some from disk": (vram_preset("disk", F32, "cpu"), LIMIT),
    "some from RAM": (cpu_fields(torch.bfloat16, torch.bfloat16, F32, F32), LIMIT),
    "fp8": (vram_preset("fp8", F32, "cpu"), None),
}

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- files ----------------------------------------------------------------------------------------------------------

def random_models() -> dict[str, tuple[str, nn.Module, dict]]:
    """By the names of their files: the registry's name, the model, and its constructor's arguments."""
    dit, vae, inpaint = {**sizes.DIT, **LAYERED}, {**sizes.VAE, "image_channels": 4}, {
        **sizes.CONTROLNET, "additional_in_dim": 4}
    net = "qwen_image_blockwise_controlnet"
    return {"control_0": (net, QwenImageBlockWiseControlNet(**sizes.CONTROLNET), sizes.CONTROLNET),
            "control_1": (net, QwenImageBlockWiseControlNet(**sizes.CONTROLNET), sizes.CONTROLNET),
            "control_inpaint": (net, QwenImageBlockWiseControlNet(**inpaint), inpaint),
            "layered_transformer": ("qwen_image_dit", QwenImageDiT(**dit), dit),
            "layered_vae": ("qwen_image_vae", QwenImageVAE(**vae), vae)}


@pytest.fixture(scope="module")
def files(tiny_files, tmp_path_factory) -> Iterator[dict[str, str]]:
    """By name; the registry knows all of them as long as the module's tests run."""
    folder, rows = tmp_path_factory.mktemp("features"), []
    found = {name: tiny_files.file(name) for name in ("text_encoder", "transformer", "vae")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        models = random_models()
    for name, (registered, model, arguments) in models.items():
        found[name] = str(folder / f"{name}.safetensors")
        save_file({key: tensor.detach().bfloat16() for key, tensor in model.state_dict().items()}, found[name])
        model_hash = hash_model_file(found[name])
        if not model_configs.find_configs(model_hash):
            rows.append({"model_hash": model_hash, "model_name": registered, "model_class": type(model),
                         "extra_kwargs": arguments})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_configs, "MODEL_CONFIGS", [*model_configs.MODEL_CONFIGS, *rows])
        yield found


@pytest.fixture(scope="module")
def load(tiny_files, files) -> Callable[..., QwenImagePipeline]:
    """A pipeline on the CPU, computing in float32, its models kept as a row of MANAGEMENT says."""
    def load(management: str = "none", models: tuple[str, ...] = PLAIN_MODELS) -> QwenImagePipeline:
        fields, limit = MANAGEMENT[management]
        return QwenImagePipeline.from_pretrained(
            torch_dtype=F32, device="cpu", vram_limit=limit,
            model_configs=[ModelConfig(path=files[name], **fields) for name in models],
            tokenizer_config=ModelConfig(path=tiny_files.tokenizer))
    return load


@pytest.fixture(scope="module")
def lora_file(files, load, tmp_path_factory) -> str:
    """Every kind of adapter, on every linear layer of denoiser and text encoder."""
    pipe = load(models=PLAIN_MODELS[:2])
    return str(write_lora(tmp_path_factory.mktemp("lora") / "all.safetensors",
                          {"transformer": pipe.dit, "text_encoder": pipe.text_encoder},
                          ("lora", "dora", "loha", "lokr")))


# ---- features -------------------------------------------------------------------------------------------------------

def picture(seed: int = 0, mode: str = "RGB", height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    channels = () if mode == "L" else (len(mode),)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8))


def box(left: int, top: int, right: int, bottom: int) -> Image.Image:
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (left, top, right, bottom))
    return mask


def keys_and_values() -> dict[str, tuple[Tensor, Tensor]]:
    heads, dim = sizes.DIT["num_attention_heads"], sizes.DIT["attention_head_dim"]
    generator = torch.Generator().manual_seed(2)
    return {f"block_{number}": tuple(torch.randn(2, 1, heads, 3, dim, generator=generator)) for number in (0, 3)}


IMAGE_TO_IMAGE = {"input_image": [picture(), picture(1)], "denoising_strength": 0.7}
INPAINT = {"input_image": picture(), "inpaint_mask": box(16, 8, 40, 24), "inpaint_blur_size": 1,
           "inpaint_blur_sigma": 0.8}
CONTROL = {"blockwise_controlnet_inputs": [  # the second net has another picture in each of the two steps
    ControlNetInput(0, 0.8, image=picture(2)), ControlNetInput(1, 0.5, start=0.4, image=picture(3)),
    ControlNetInput(1, 0.3, end=0.6, image=picture(4))]}
INPAINT_CONTROL = {"blockwise_controlnet_inputs": [ControlNetInput(2, image=picture(5),
                                                                   inpaint_mask=box(0, 0, 24, 16))]}
LORA = {"lora": 0.8}  # the strength of this module's, not an argument of the pipeline
FEATURES: dict[str, dict[str, Any]] = {
    "image to image, a batch": IMAGE_TO_IMAGE,
    "inpaint, blurred": INPAINT,
    "edit a list, zero_cond_t": {"edit_image": [picture(6), picture(7, height=48, width=16)],
                                 "edit_image_auto_resize": False, "zero_cond_t": True},
    "edit one, rope interpolation": {"edit_image": picture(8, height=16, width=32), "edit_image_auto_resize": False,
                                     "edit_rope_interpolation": True},
    "in context": {"context_image": picture(9)},
    "control": CONTROL,
    "inpaint control": INPAINT_CONTROL,
    "entities, on both sides": {"eligen_entity_prompts": ["a red circle", "a green square"],
                                "eligen_entity_masks": [box(0, 0, 24, 32), box(16, 8, 48, 24)],
                                "eligen_enable_on_negative": True},
    "cached tokens": {"kv_cache": keys_and_values()},
    "layers of a picture, in context": {"layer_num": 2, "layer_input_image": picture(10, "RGBA"),
                                        "context_image": picture(11, "RGBA")},
    "LoRA": LORA,
    "control, LoRA, inpaint": CONTROL | LORA | INPAINT,
}
WITHOUT = {False: {}, True: {"layer_num": 2}}  # by whether there are layers


def is_layered(feature: dict[str, Any]) -> bool:
    return "layer_num" in feature


@contextmanager
def with_lora(pipe: QwenImagePipeline, path: str, strength: float | None) -> Iterator[None]:
    """On the denoiser and the text encoder while the block runs; None: no LoRA."""
    if strength is None:
        yield
        return
    try:
        for model in (pipe.dit, pipe.text_encoder):
            pipe.load_lora(model, path, alpha=strength)
        yield
    finally:
        pipe.clear_lora()


@pytest.fixture(scope="module")
def draw(lora_file) -> Callable[..., tuple[Tensor, bytes]]:
    def draw(pipe: QwenImagePipeline, feature: dict[str, Any], cfg_scale: float, steps: int = STEPS
             ) -> tuple[Tensor, bytes]:
        """The latents after each step, and the pictures."""
        seen: list[Tensor] = []

        def note(step: Step) -> None:
            seen.append(step.latents.clone())

        options = {name: value for name, value in feature.items() if name != "lora"}
        with with_lora(pipe, lora_file, feature.get("lora")):
            made = pipe("a red circle", "a blue square", height=HEIGHT, width=WIDTH, seed=1, cfg_scale=cfg_scale,
                        num_inference_steps=steps, progress_bar_cmd=list, step_callback=note, **options)
        pictures = made if isinstance(made, list) else [made]
        return torch.stack(seen), b"".join(one.tobytes() for one in pictures)
    return draw


def assert_same(found: tuple[Tensor, bytes], expected: tuple[Tensor, bytes]) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


# ---- the matrix -----------------------------------------------------------------------------------------------------

both_scales = pytest.mark.parametrize("cfg_scale", [1.0, 4.0])


@pytest.fixture(scope="module")
def pipelines(load) -> Callable[..., QwenImagePipeline]:
    """By management and by whether there are layers; each is loaded once, and draws one feature after the other."""
    @cache
    def get(management: str, layered: bool = False) -> QwenImagePipeline:
        return load(management, LAYERED_MODELS if layered else PLAIN_MODELS)
    return get


@pytest.fixture(scope="module")
def expected(pipelines, draw) -> Callable[[str, float], tuple[Tensor, bytes]]:
    """What the unmanaged pipeline draws."""
    @cache
    def get(name: str, cfg_scale: float) -> tuple[Tensor, bytes]:
        return draw(pipelines("none", is_layered(FEATURES[name])), FEATURES[name], cfg_scale)
    return get


@pytest.fixture(scope="module")
def plain(pipelines, draw) -> Callable[[bool, float], tuple[Tensor, bytes]]:
    """What it drew without a feature, before any was used."""
    drawn = {(layered, cfg_scale): draw(pipelines("none", layered), WITHOUT[layered], cfg_scale)
             for layered in WITHOUT for cfg_scale in (1.0, 4.0)}
    return lambda layered, cfg_scale: drawn[layered, cfg_scale]


@both_scales
@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_has_an_effect_and_leaves_no_trace(pipelines, plain, expected, draw, name, cfg_scale):
    """Else equal pictures would prove nothing."""
    layered = is_layered(FEATURES[name])
    before, found = plain(layered, cfg_scale), expected(name, cfg_scale)
    assert (found[0] - before[0]).abs().max() > 1e-3 and found[0].isfinite().all()
    assert_same(draw(pipelines("none", layered), WITHOUT[layered], cfg_scale), before)


@pytest.mark.parametrize("management", ["balanced", "disk", "all from disk"])
@both_scales
@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_is_the_same_wherever_the_weights_are(pipelines, expected, draw, name, cfg_scale, management):
    pipe = pipelines(management, is_layered(FEATURES[name]))
    assert_same(draw(pipe, FEATURES[name], cfg_scale), expected(name, cfg_scale))


@pytest.fixture(scope="module")
def rounded(load, pipelines) -> Callable[[bool], QwenImagePipeline]:
    """Unmanaged, with the weights that are left of those that fp8 stores."""
    @cache
    def get(layered: bool) -> QwenImagePipeline:
        pipe = load("none", LAYERED_MODELS if layered else PLAIN_MODELS)
        round_to_fp8(pipe, pipelines("fp8", layered))
        return pipe
    return get


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_with_fp8_storage_is_that_of_the_rounded_weights(pipelines, rounded, expected, draw, name):
    feature, layered = FEATURES[name], is_layered(FEATURES[name])
    found = draw(pipelines("fp8", layered), feature, 4.0)
    assert_same(found, draw(rounded(layered), feature, 4.0))
    assert not torch.equal(found[0], expected(name, 4.0)[0])


# ---- within a limit -------------------------------------------------------------------------------------------------

def assert_within_the_limit(pipe: QwenImagePipeline) -> None:
    """By the plan, and by what the engine counted; some layers stayed and the others streamed."""
    plan, traffic, limit = pipe.last_loop.plan, pipe.last_loop.traffic, int(LIMIT * 2**30)
    assert plan.resident and plan.host | plan.disk and traffic.moved_bytes
    assert plan.resident_bytes + plan.ring_bytes + plan.table_bytes + plan.activation_bytes <= limit
    assert plan.resident_bytes < traffic.peak_device_bytes <= limit - plan.activation_bytes


@pytest.mark.parametrize("management", ["some from disk", "some from RAM"])
@both_scales
@pytest.mark.parametrize("name", ["edit a list, zero_cond_t", "control, LoRA, inpaint"])
def test_under_a_limit_a_part_streams(pipelines, expected, draw, name, cfg_scale, management):
    """Twice: the second time the order of the layers is known."""
    pipe = pipelines(management)
    for _ in range(2):
        assert_same(draw(pipe, FEATURES[name], cfg_scale), expected(name, cfg_scale))
        assert_within_the_limit(pipe)


TURNS = {
    "one after the other": [ControlNetInput(0, end=0.6, image=picture(2)), ControlNetInput(1, start=0.4,
                                                                                           image=picture(3))],
    "in between": [ControlNetInput(0, image=picture(2)), ControlNetInput(1, start=0.7, end=0.6, image=picture(3))],
    "both, none, both": [ControlNetInput(number, start=start, end=end, image=picture(number))
                         for number in (0, 1) for start, end in ((1.0, 0.9), (0.1, 0.0))],
}


@pytest.mark.parametrize("management", ["all from disk", "some from RAM"])
@both_scales
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_nets_that_take_turns(pipelines, draw, turns, cfg_scale, management):
    """Passes differ in the layers that they visit, and the nets' layers are of equal sizes and names."""
    feature = {"blockwise_controlnet_inputs": turns}
    wanted = draw(pipelines("none"), feature, cfg_scale, steps=4)
    for _ in range(2):
        assert_same(draw(pipelines(management), feature, cfg_scale, steps=4), wanted)
