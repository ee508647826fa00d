"""Edit images, layer sources and context images against diffusers' pipelines: same weights, same pictures, float32.

The oracle's text encoder is told which tokens are pictures' (transformers 5 needs that; diffusers does not do it).
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, DiffusionPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffsynth_backend.configs.vram_management_module_maps import module_map_of
from diffsynth_backend.core import load_model
from diffsynth_backend.diffusion import PipelineUnitRunner
from diffsynth_backend.models.qwen_image_text_encoder import QwenImageTextEncoder
from diffsynth_backend.models.qwen_image_vae import QwenImageVAE, normalize_latents
from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline
from diffsynth_backend.pipelines.qwen_image_editing import (
    QwenImageUnit_ContextImageEmbedder,
    QwenImageUnit_EditImageEmbedder,
    QwenImageUnit_LayerInputImageEmbedder,
    QwenImageUnit_PromptEmbedder,
    edit_pictures,
)
from diffsynth_backend.pipelines.qwen_image_prompts import PICTURE_TEMPLATE
from tests.helpers.qwen_image_seeing import SEEING_TEXT_ENCODER, picture, picture_processor
from tests.helpers.vram_fields import cpu_fields

TOLERANCE, VAE_TOLERANCE = 1e-5, 1e-4
EDIT_SIZES = [(224, 224), (304, 128), (96, 320), (16, 2000)]  # the first as the vision tower takes it
PROMPT, NEGATIVE = "a red circle", "blue, blurred"


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


# ---- theirs ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def their_edit(theirs, seeing, seeing_tokenizer) -> Callable[[type[DiffusionPipeline]], DiffusionPipeline]:
    """One of diffusers' editing pipelines around the tiny models; its template head is as long as in this tokenizer."""
    processor = picture_processor(seeing_tokenizer)

    def make(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
        pipe = cls(scheduler=theirs.scheduler, vae=theirs.vae, text_encoder=seeing, tokenizer=seeing_tokenizer,
                   processor=processor, transformer=theirs.transformer)
        pipe.prompt_template_encode_start_idx = len(seeing_tokenizer(PICTURE_TEMPLATE.partition("{}")[0]).input_ids)
        return pipe
    return make


# ---- ours -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def pipe(seeing_pipe) -> QwenImagePipeline:
    return seeing_pipe


def embedded(pipe: QwenImagePipeline, prompt: str, **shared) -> Tensor:
    """The positive side's embedding, which begins where the template's head ends; nothing of it is masked."""
    _, positive, _ = PipelineUnitRunner()(QwenImageUnit_PromptEmbedder(), pipe, {"cfg_scale": 1, **shared},
                                          {"prompt": prompt}, {"negative_prompt": ""})
    assert positive["prompt_emb_mask"].all()
    assert positive["prompt_emb_mask"].shape == positive["prompt_emb"].shape[:2]
    return positive["prompt_emb"]


def latents_of(pipe: QwenImagePipeline, **shared) -> tuple[Tensor, ...]:
    shared, _, _ = PipelineUnitRunner()(QwenImageUnit_EditImageEmbedder(), pipe, shared, {}, {})
    return shared["edit_latents"]


# ---- the prompt -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", EDIT_SIZES)
@pytest.mark.parametrize("prompt", [PROMPT, ""])
def test_a_prompt_with_one_picture_equals_diffusers(pipe, their_edit, relative_error, size, prompt):
    expected, mask = their_edit(QwenImageEditPipeline)._get_qwen_prompt_embeds(prompt, picture(*size))
    assert mask.all()
    result = embedded(pipe, prompt, edit_image=picture(*size), edit_image_auto_resize=False)
    assert relative_error(result, expected) <= TOLERANCE


@pytest.mark.parametrize("sizes", [[(256, 256)], [(320, 128), (96, 304)], [(64, 64), (64, 128), (400, 32)]])
def test_a_prompt_with_a_list_of_pictures_equals_diffusers(pipe, their_edit, relative_error, sizes):
    """diffusers shrinks before it asks for the prompt's states; the filter here is Pillow's bicubic one."""
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    shrunk = [each.resize(calculate_dimensions(384 * 384, each.width / each.height)[:2]) for each in pictures]
    expected, _ = their_edit(QwenImageEditPlusPipeline)._get_qwen_prompt_embeds(PROMPT, shrunk)
    result = embedded(pipe, PROMPT, edit_image=pictures, edit_image_auto_resize=False)
    assert relative_error(result, expected) <= TOLERANCE


def test_the_prompt_sees_the_resized_picture(pipe, their_edit, relative_error):
    size = calculate_dimensions(1024 * 1024, 60 / 40)[:2]
    expected, _ = their_edit(QwenImageEditPipeline)._get_qwen_prompt_embeds(PROMPT, picture(60, 40).resize(size))
    assert relative_error(embedded(pipe, PROMPT, edit_image=picture(60, 40)), expected) <= TOLERANCE


def test_one_picture_and_a_list_of_one_differ(pipe):
    one, listed = (embedded(pipe, PROMPT, edit_image=given, edit_image_auto_resize=False)
                   for given in (picture(64, 64), [picture(64, 64)]))
    assert one.shape != listed.shape


def test_the_order_of_pictures_counts(pipe, relative_error):
    first, second = picture(64, 64), picture(64, 64, seed=1)
    ordered, turned = (embedded(pipe, PROMPT, edit_image=given, edit_image_auto_resize=False)
                       for given in ([first, second], [second, first]))
    assert relative_error(ordered, turned) > 1e-3


def test_a_tensor_is_seen_as_the_picture(pipe, relative_error):
    """112×112 is a size that the vision tower takes as it is, after which only the float's own rounding is left."""
    image = picture(112, 112)
    assert relative_error(*(embedded(pipe, PROMPT, edit_image=given, edit_image_auto_resize=False)
                            for given in (as_tensor(image), image))) <= TOLERANCE


def test_without_a_picture_the_prompt_is_a_text(pipe):
    expected, _ = pipe.prompts.embed(pipe.text_encoder, [PROMPT])
    assert torch.equal(embedded(pipe, PROMPT), expected)


def test_both_sides_see_the_pictures(pipe):
    shared = {"cfg_scale": 4.0, "edit_image": picture(64, 64), "edit_image_auto_resize": False}
    _, _, negative = PipelineUnitRunner()(QwenImageUnit_PromptEmbedder(), pipe, shared, {"prompt": PROMPT},
                                          {"negative_prompt": NEGATIVE})
    expected = embedded(pipe, NEGATIVE, edit_image=picture(64, 64), edit_image_auto_resize=False)
    assert torch.equal(negative["prompt_emb"], expected)


def test_what_the_unit_reads_is_left_as_it_was(pipe):
    given = [picture(60, 40)]
    shared = {"cfg_scale": 1, "edit_image": given}
    after, _, _ = PipelineUnitRunner()(QwenImageUnit_PromptEmbedder(), pipe, shared, {"prompt": PROMPT}, {})
    assert after == shared and after["edit_image"] is given


@pytest.mark.parametrize("prompt", [None, 5])
def test_what_is_no_text_raises(pipe, prompt):
    with pytest.raises(TypeError, match="a prompt must be a text"):
        embedded(pipe, prompt, edit_image=picture(64, 64))


def test_a_tokenizer_without_tokens_for_pictures_raises(pipe, prompts):
    pipe.prompts = prompts
    with pytest.raises(ValueError, match=r"the tokenizer has no <\|vision_start\|>"):
        embedded(pipe, PROMPT, edit_image=picture(64, 64))


# ---- managed weights ------------------------------------------------------------------------------------------------

F32 = torch.float32
PLACEMENTS = {"balanced": (cpu_fields(F32, F32, F32, F32), None), "low": (cpu_fields(F32, F32, F32, F32), 0),
              "disk": (cpu_fields(None, None, F32, F32), 0)}


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("given", [picture(160, 48), [picture(64, 64), picture(32, 96)]], ids=["one", "list"])
@torch.inference_mode()
def test_managed_weights_give_the_same_bits(pipe, tmp_path, name, given):
    fields, vram_limit = PLACEMENTS[name]
    shared = {"edit_image": given, "edit_image_auto_resize": False}
    expected = embedded(pipe, PROMPT, **shared)
    path = tmp_path / "text_encoder.safetensors"
    save_file(pipe.text_encoder.state_dict(), path)
    pipe.text_encoder = load_model(QwenImageTextEncoder, str(path), SEEING_TEXT_ENCODER, vram_config=fields,
                                   vram_limit=vram_limit, module_map=module_map_of(QwenImageTextEncoder))
    assert pipe.check_vram_management_state()
    for _ in range(2):
        assert torch.equal(embedded(pipe, PROMPT, **shared), expected)
        pipe.load_models_to_device([])


# ---- edit latents ---------------------------------------------------------------------------------------------------

def their_tokens(pipe: DiffusionPipeline, images: list[Image.Image]) -> Tensor:
    """diffusers' edit latents, packed as tokens (1, S, 64)."""
    tensors = [torch.from_numpy(np.asarray(image) / 127.5 - 1).float().permute(2, 0, 1)[None, :, None]
               for image in images]
    given = tensors if isinstance(pipe, QwenImageEditPlusPipeline) else tensors[0]
    return pipe.prepare_latents(given, 1, 16, 64, 64, torch.float32, torch.device("cpu"),
                                torch.Generator().manual_seed(0))[1]


@pytest.mark.parametrize("sizes", [[(64, 64)], [(96, 32)], [(32, 80), (64, 48), (16, 16)]])
def test_edit_latents_equal_diffusers(pipe, their_edit, relative_error, sizes):
    images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    cls = QwenImageEditPlusPipeline if len(images) > 1 else QwenImageEditPipeline
    latents = latents_of(pipe, edit_image=images, edit_image_auto_resize=False)
    assert [latent.shape for latent in latents] == [(1, 16, h // 8, w // 8) for w, h in sizes]
    tokens = torch.cat([pipe.dit.patchify(latent) for latent in latents], dim=1)
    assert relative_error(tokens, their_tokens(their_edit(cls), images)) <= VAE_TOLERANCE


def test_one_picture_and_a_list_of_one_have_the_same_latents(pipe):
    one, listed = (latents_of(pipe, edit_image=given, edit_image_auto_resize=False)
                   for given in (picture(64, 48), (picture(64, 48),)))
    assert len(one) == len(listed) == 1 and torch.equal(one[0], listed[0])


def test_tensors_have_the_same_latents(pipe, relative_error):
    ours, expected = (latents_of(pipe, edit_image=given, edit_image_auto_resize=False)[0]
                      for given in (as_tensor(picture(64, 48)), picture(64, 48)))
    assert relative_error(ours, expected) <= TOLERANCE


def test_tiles_reach_the_vae(pipe, monkeypatch):
    seen = {}
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda image, **options: seen.update(options) or encode(image, **options))
    latents_of(pipe, edit_image=picture(64, 48), edit_image_auto_resize=False, tiled=True, tile_size=4, tile_stride=2)
    assert (seen["tiled"], seen["tile_size"], seen["tile_stride"]) == (True, 4, 2)


# ---- sizes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(60, 40), (1328, 1328), (500, 1300), (20, 1700), (1, 150)])
@pytest.mark.parametrize("kind", ["picture", "tensor"])
@pytest.mark.parametrize("auto_resize", [True, None])
def test_auto_resize_is_the_published_one(size, kind, auto_resize):
    image = picture(*size)
    edited, = edit_pictures(image if kind == "picture" else as_tensor(image), auto_resize)
    width, height = calculate_dimensions(1024 * 1024, size[0] / size[1])[:2]
    found = edited.size if kind == "picture" else (edited.shape[1], edited.shape[0])
    assert found == (width, height)
    expected = as_tensor(image.resize((width, height), Image.Resampling.BICUBIC))
    ours = as_tensor(edited) if kind == "picture" else edited
    assert float((ours - expected).abs().max()) <= (0 if kind == "picture" else 1.6 / 255)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_other_modes_are_resized_in_their_colours(mode):
    image = picture(60, 40, "RGBA").convert("RGB" if mode == "CMYK" else "RGBA").convert(mode)
    edited, = edit_pictures(image)
    assert list(edited.get_flattened_data()) == list(edit_pictures(image.convert("RGB"))[0].get_flattened_data())


def test_alpha_of_a_tensor_is_dropped():
    edited, = edit_pictures(torch.rand(32, 48, 4), auto_resize=False)
    assert edited.shape == (32, 48, 3)


@pytest.mark.parametrize("size", [(100, 64), (64, 100), (8, 8)])
def test_an_odd_size_raises_without_auto_resize(size):
    with pytest.raises(ValueError, match=f"edit_image 2 is {size[0]}×{size[1]} .*multiples of 16.*leave edit"):
        edit_pictures([picture(64, 64), picture(*size)], auto_resize=False)


def test_a_huge_picture_raises_without_auto_resize():
    huge = torch.zeros(()).expand(16400, 16400, 3)  # no memory behind it
    with pytest.raises(ValueError, match="edit_image is 16400×16400 .*268435456 pixels at most"):
        edit_pictures(huge, auto_resize=False)


@pytest.mark.parametrize("size", [(1, 201), (4020, 20), (1, 190)])
@pytest.mark.parametrize("auto_resize", [True, False])
def test_a_strip_raises(size, auto_resize):
    """1×190 would be 64×14432 after resizing, which the vision tower does not take."""
    with pytest.raises(ValueError, match="^edit_image.*(crop it|resize it)"):
        edit_pictures(picture(*size), auto_resize)


@pytest.mark.parametrize("given, error, message", [
    ([], ValueError, "edit_image is an empty list"),
    ((), ValueError, "edit_image is an empty list"),
    ("picture.png", TypeError, "edit_image must be a PIL image"),
    ([Image.new("RGB", (64, 64)), None], TypeError, "edit_image 2 must be a PIL image"),
    (torch.zeros(2, 64, 64, 3), ValueError, "edit_image is a torch.float32 tensor of shape"),
])
@pytest.mark.parametrize("unit", [QwenImageUnit_EditImageEmbedder, QwenImageUnit_PromptEmbedder])
def test_what_is_no_picture_raises_before_a_model_runs(pipe, unit, given, error, message):
    pipe.vae = pipe.text_encoder = None
    with pytest.raises(error, match=message):
        PipelineUnitRunner()(unit(), pipe, {"edit_image": given}, {"prompt": PROMPT}, {"negative_prompt": ""})


# ---- layers, context ------------------------------------------------------------------------------------------------

@pytest.fixture
def layered(pipe) -> tuple[QwenImagePipeline, AutoencoderKLQwenImage]:
    """A pipeline whose autoencoder knows alpha, and diffusers' autoencoder with its weights."""
    torch.manual_seed(0)
    theirs = AutoencoderKLQwenImage(base_dim=8, input_channels=4).eval()
    pipe.vae = QwenImageVAE(base_dim=8, image_channels=4).eval()
    pipe.vae.load_state_dict(theirs.state_dict(), strict=True)
    return pipe, theirs


def their_latents(vae: AutoencoderKLQwenImage, image: Image.Image) -> Tensor:
    tensor = torch.from_numpy(np.asarray(image) / 127.5 - 1).float().permute(2, 0, 1)[None, :, None]
    return normalize_latents(vae.encode(tensor).latent_dist.mode()[:, :, 0])


def layer_latents(pipe: QwenImagePipeline, image) -> Tensor:
    unit = QwenImageUnit_LayerInputImageEmbedder()
    return PipelineUnitRunner()(unit, pipe, {"layer_input_image": image}, {}, {})[0]["layer_input_latents"]


def context_latents(pipe: QwenImagePipeline, image, height: int = 48, width: int = 64) -> Tensor:
    shared = {"context_image": image, "height": height, "width": width}
    return PipelineUnitRunner()(QwenImageUnit_ContextImageEmbedder(), pipe, shared, {}, {})[0]["context_latents"]


def test_a_layer_source_is_encoded_with_its_alpha(layered, relative_error):
    pipe, theirs = layered
    image = picture(64, 48, "RGBA")
    assert relative_error(layer_latents(pipe, image), their_latents(theirs, image)) <= VAE_TOLERANCE
    assert relative_error(layer_latents(pipe, as_tensor(image)), their_latents(theirs, image)) <= VAE_TOLERANCE


def test_a_layer_source_without_alpha_is_opaque(layered):
    pipe, _ = layered
    image = picture(64, 48)
    assert torch.equal(layer_latents(pipe, image), layer_latents(pipe, image.convert("RGBA")))


def test_a_layer_source_needs_the_layered_vae(pipe):
    with pytest.raises(ValueError, match="VAE of Qwen-Image-Layered, which has 4 image channels; .* loaded has 3"):
        layer_latents(pipe, picture(64, 48, "RGBA"))


def test_a_layer_source_of_an_odd_size_raises(layered):
    with pytest.raises(ValueError, match="layer_input_image is 60×48 .*multiples of 16.*resize it$"):
        layer_latents(layered[0], picture(60, 48, "RGBA"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_context_image_is_resized_to_the_picture(pipe, theirs, relative_error, mode):
    image = picture(50, 90, "RGBA").convert(mode)
    expected = their_latents(theirs.vae, image.convert("RGB").resize((64, 48), Image.Resampling.BICUBIC))
    result = context_latents(pipe, image)
    assert result.shape == (1, 16, 6, 8)
    assert relative_error(result, expected) <= VAE_TOLERANCE


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_context_image_has_alpha_for_the_layered_vae(layered, relative_error, mode):
    pipe, theirs = layered
    image = picture(50, 90, mode)
    expected = their_latents(theirs, image.convert("RGBA").resize((64, 48), Image.Resampling.BICUBIC))
    assert relative_error(context_latents(pipe, image), expected) <= VAE_TOLERANCE


@pytest.mark.parametrize("encode", [layer_latents, context_latents])
@pytest.mark.parametrize("given, error", [("picture.png", TypeError), (torch.zeros(1, 48, 64, 3), ValueError)])
def test_what_is_no_layer_source_or_context_image_raises(pipe, encode, given, error):
    with pytest.raises(error, match="^(layer_input|context)_image "):
        encode(pipe, given)


@pytest.mark.parametrize("unit", [QwenImageUnit_EditImageEmbedder, QwenImageUnit_LayerInputImageEmbedder,
                                  QwenImageUnit_ContextImageEmbedder])
def test_nothing_given_is_nothing_made(pipe, unit):
    pipe.vae = None
    assert PipelineUnitRunner()(unit(), pipe, {"height": 64, "width": 64}, {}, {})[0] == {"height": 64, "width": 64}


@pytest.mark.parametrize("unit, name", [(QwenImageUnit_EditImageEmbedder, "edit_image"),
                                        (QwenImageUnit_ContextImageEmbedder, "context_image"),
                                        (QwenImageUnit_LayerInputImageEmbedder, "layer_input_image")])
def test_a_missing_vae_is_named(pipe, unit, name):
    pipe.vae = None
    with pytest.raises(ValueError, match="needs vae, which is not loaded"):
        PipelineUnitRunner()(unit(), pipe, {name: picture(64, 64), "height": 64, "width": 64}, {}, {})
