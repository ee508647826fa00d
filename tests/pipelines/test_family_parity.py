"""Whole pipelines of the family against diffusers': same weights, pictures, prompts and noise, final latents, float32.

Notable: where the two differ by intent, the tests bring them together and say which side is ours by default:

* guidance: diffusers rescales it to the positive prediction's length (Layered: on request); here that is `cfg_norm`,
  off by default, as in the documents.
* the shift of Layered: diffusers takes √(tokens/256), the documents what the whole family has; given as
  `exponential_shift_mu` here.
* strength: diffusers leaves out steps, the documents squeeze all of them below it; given as `sigmas` there.
* the schedule's last digits: see `PreciseSchedule`.
* pictures: diffusers resizes with Lanczos, the documents with the bicubic filter; and it samples the autoencoder's
  distribution for image to image and inpainting, where the documents take the mode. Both sides do as documented.

Neither side rounds timesteps to bfloat16, which the published code does. Layers with `zero_cond_t` are not compared:
diffusers would take all layers but the first for conditions, and no published model has both.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    QwenImageTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_plus,
    pipeline_qwenimage_layered,
)
from PIL import Image
from torch import Tensor

from diffsynth_backend.models.qwen_image_dit import QwenImageDiT
from diffsynth_backend.models.qwen_image_vae import QwenImageVAE
from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline
from diffsynth_backend.pipelines.qwen_image_prompts import PICTURE_TEMPLATE, TEXT_TEMPLATE
from tests.helpers.qwen_image_seeing import PictureProcessor, picture, picture_processor
from tests.pipelines.conftest import DIT, SCHEDULER, randomized, with_weights

TOLERANCE = 1e-5
HEIGHT, WIDTH, STEPS, SEED = 64, 96, 3, 5
PROMPT, NEGATIVE = "a red circle", "blue, blurred"
LAYERED = {"use_layer3d_rope": True, "use_additional_t_cond": True}

pytestmark = pytest.mark.usefixtures("one_thread")
with_and_without_guidance = pytest.mark.parametrize("cfg_scale", [1.0, 4.0])


@pytest.fixture
def pipe(seeing_pipe) -> QwenImagePipeline:
    return seeing_pipe


class PreciseSchedule(FlowMatchEulerDiscreteScheduler):
    """Theirs, computed in float64: their float32 is off by 2e-7, which the sines of a timestep enlarge to 3e-5."""

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None,
                      sigmas: list[float] | None = None, mu: float | None = None) -> None:
        super().set_timesteps(num_inference_steps, device, sigmas, mu)
        rounded = self.sigmas
        shifted = np.exp(mu) / (np.exp(mu) + 1 / np.asarray(sigmas, dtype=np.float64) - 1)
        stretched = 1 - (1 - shifted) * (1 - self.config.shift_terminal) / (1 - shifted[-1])
        self.sigmas = torch.from_numpy(np.append(stretched, 0.0)).float()
        self.timesteps = torch.from_numpy(1000 * stretched).float()
        torch.testing.assert_close(self.sigmas, rounded, rtol=1e-5, atol=0)


@pytest.fixture
def make_theirs(theirs, seeing, seeing_tokenizer, monkeypatch) -> Callable[..., DiffusionPipeline]:
    """One of diffusers' pipelines around the tiny models, of which `components` replace some."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())

    def make(cls: type[DiffusionPipeline], template: str = TEXT_TEMPLATE, **components: Any) -> DiffusionPipeline:
        made = cls(**{"scheduler": PreciseSchedule(**SCHEDULER), "vae": theirs.vae, "text_encoder": seeing,
                      "tokenizer": seeing_tokenizer, "transformer": theirs.transformer, **components})
        made.image_processor = VaeImageProcessor(vae_scale_factor=16, resample="bicubic")
        made.set_progress_bar_config(disable=True)
        made.prompt_template_encode_start_idx = len(seeing_tokenizer(template.partition("{}")[0]).input_ids)
        return made
    return make


@pytest.fixture(scope="module")
def processor(seeing_tokenizer) -> PictureProcessor:
    return picture_processor(seeing_tokenizer)


def their_tokens(pipe: DiffusionPipeline, cfg_scale: float, pictures: int = 1, **options: Any) -> Tensor:
    """The latents after the last step, packed; with the noise that the seed gives on either side."""
    negative, after = {"negative_prompt": [NEGATIVE] * pictures} if cfg_scale > 1 else {}, []

    def note(pipe: DiffusionPipeline, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        after.append(values["latents"])
        return {}

    pipe(prompt=[PROMPT] * pictures, true_cfg_scale=cfg_scale, num_inference_steps=STEPS, output_type="pt",
         generator=torch.Generator().manual_seed(SEED), callback_on_step_end=note, **negative, **options)
    assert len(after) == STEPS
    return after[-1]


def one_picture(tokens: Tensor) -> Tensor:
    """Their tokens as latents (B, 16, h, w)."""
    return QwenImageEditPipeline._unpack_latents(tokens, HEIGHT, WIDTH, 8)[:, :, 0]


@pytest.fixture
def our_latents(draw) -> Callable[..., Tensor]:
    def run(pipe: QwenImagePipeline, cfg_scale: float, **options: Any) -> Tensor:
        settings = {"negative_prompt": NEGATIVE, "cfg_norm": True, "num_inference_steps": STEPS, "seed": SEED,
                    "height": HEIGHT, "width": WIDTH, **options}
        return draw(pipe, PROMPT, cfg_scale=cfg_scale, **settings)["latents"]
    return run


# ---- editing --------------------------------------------------------------------------------------------------------

@with_and_without_guidance
@pytest.mark.parametrize("size", [(96, 64), (64, 80)], ids=["of the size drawn", "of another size"])
def test_editing_one_picture(pipe, make_theirs, processor, our_latents, relative_error, monkeypatch, cfg_scale, size):
    """Qwen-Image-Edit. On either side pictures become about 1024² by default; here they stay small on both."""
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (*size, None))
    edit = picture(*size)
    theirs = make_theirs(QwenImageEditPipeline, PICTURE_TEMPLATE, processor=processor)
    expected = one_picture(their_tokens(theirs, cfg_scale, image=edit, height=HEIGHT, width=WIDTH))
    ours = our_latents(pipe, cfg_scale, edit_image=edit, edit_image_auto_resize=False)
    assert relative_error(ours, expected) <= TOLERANCE
    assert relative_error(our_latents(pipe, cfg_scale), expected) > 1e-3


@with_and_without_guidance
@pytest.mark.parametrize("zero_cond_t", [False, True], ids=["2509", "2511"])
def test_editing_several_pictures(pipe, make_theirs, theirs, processor, our_latents, relative_error, monkeypatch,
                                  cfg_scale, zero_cond_t):
    """Qwen-Image-Edit-2509 and -2511; to them this is a property of the transformer, here an argument."""
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 96 * 64)
    edits = [picture(96, 64), picture(64, 96, seed=1)]
    transformer = QwenImageTransformer2DModel.from_config(theirs.transformer.config, zero_cond_t=zero_cond_t)
    with_weights(transformer, theirs.transformer)
    plus = make_theirs(QwenImageEditPlusPipeline, PICTURE_TEMPLATE, processor=processor, transformer=transformer)
    expected = one_picture(their_tokens(plus, cfg_scale, image=edits, height=HEIGHT, width=WIDTH))
    ours, other = (our_latents(pipe, cfg_scale, edit_image=edits, edit_image_auto_resize=False, zero_cond_t=switch)
                   for switch in (zero_cond_t, not zero_cond_t))
    assert relative_error(ours, expected) <= TOLERANCE
    assert relative_error(other, expected) > 1e-3


# ---- layers ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def their_layered_models() -> tuple[QwenImageTransformer2DModel, AutoencoderKLQwenImage]:
    transformer = QwenImageTransformer2DModel(in_channels=64, out_channels=16, **DIT, **LAYERED)
    return randomized(transformer), randomized(AutoencoderKLQwenImage(base_dim=8, input_channels=4))


@pytest.mark.parametrize("cfg_scale, cfg_norm", [(1.0, False), (4.0, False), (4.0, True)])
def test_taking_a_picture_apart(pipe, make_theirs, theirs, their_layered_models, our_latents, relative_error,
                                monkeypatch, cfg_scale, cfg_norm):
    """Qwen-Image-Layered: the whole picture and two layers, of a source with alpha."""
    monkeypatch.setattr(pipeline_qwenimage_layered, "calculate_dimensions", lambda area, ratio: (WIDTH, HEIGHT))
    transformer, vae = their_layered_models
    pipe.dit = with_weights(QwenImageDiT(**DIT, **LAYERED), transformer)
    pipe.vae = with_weights(QwenImageVAE(base_dim=8, image_channels=4), vae)
    source = picture(WIDTH, HEIGHT, "RGBA")
    layered = make_theirs(QwenImageLayeredPipeline, processor=None, transformer=transformer, vae=vae)
    tokens = their_tokens(layered, cfg_scale, image=source, layers=2, cfg_normalize=cfg_norm)
    expected = layered._unpack_latents(tokens, HEIGHT, WIDTH, 2, 8)
    mu = math.sqrt((HEIGHT // 16) * (WIDTH // 16) / 256)
    ours, without_alpha = (our_latents(pipe, cfg_scale, layer_input_image=image, layer_num=2, exponential_shift_mu=mu,
                                       cfg_norm=cfg_norm) for image in (source, source.convert("RGB")))
    assert ours.shape == (1, 16, 3, HEIGHT // 8, WIDTH // 8)
    assert relative_error(ours, expected) <= TOLERANCE
    assert relative_error(without_alpha, expected) > 1e-3


# ---- pictures to start from -----------------------------------------------------------------------------------------

def sigmas(strength: float) -> list[float]:
    """Before the shift: all steps below the strength, where theirs would leave some out."""
    return np.linspace(strength, strength / STEPS, STEPS).tolist()


@with_and_without_guidance
def test_a_batch_of_image_to_image(pipe, make_theirs, our_latents, relative_error, cfg_scale):
    pictures = [picture(WIDTH, HEIGHT), picture(WIDTH, HEIGHT, seed=1)]
    theirs = make_theirs(QwenImageImg2ImgPipeline)
    expected = one_picture(their_tokens(theirs, cfg_scale, 2, image=pictures, height=HEIGHT, width=WIDTH, strength=1.0,
                                        sigmas=sigmas(0.6)))
    ours = our_latents(pipe, cfg_scale, input_image=pictures, denoising_strength=0.6)
    assert relative_error(ours, expected) <= TOLERANCE
    assert relative_error(ours.flip(0), expected) > 1e-2


@with_and_without_guidance
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting(pipe, make_theirs, our_latents, relative_error, cfg_scale, strength):
    """A mask with hard edges between latents, which is on either side what it is; soft ones differ by intent."""
    mask = np.zeros((HEIGHT // 8, WIDTH // 8), dtype=np.uint8)
    mask[2:6, 3:9] = 255
    theirs = make_theirs(QwenImageInpaintPipeline)
    expected = one_picture(their_tokens(
        theirs, cfg_scale, image=picture(WIDTH, HEIGHT), mask_image=Image.fromarray(mask.repeat(8, 0).repeat(8, 1)),
        height=HEIGHT, width=WIDTH, strength=1.0, sigmas=sigmas(strength)))
    ours = our_latents(pipe, cfg_scale, input_image=picture(WIDTH, HEIGHT), inpaint_mask=Image.fromarray(mask),
                       denoising_strength=strength)
    assert relative_error(ours, expected) <= TOLERANCE
