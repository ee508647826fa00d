"""Image to LoRA: what the encoders see, what the nets get, and the published files in full size."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth_backend.configs.vram_management_module_maps import module_map_of
from diffsynth_backend.core import load_model
from diffsynth_backend.core.vram import iter_managed
from diffsynth_backend.models.dinov3_image_encoder import DINOv3ImageEncoder
from diffsynth_backend.models.qwen_image_image2lora import QwenImageImage2LoRAModel
from diffsynth_backend.models.qwen_image_text_encoder import QwenImageTextEncoder
from diffsynth_backend.models.siglip2_image_encoder import Siglip2ImageEncoder
from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline
from diffsynth_backend.pipelines.qwen_image_image_to_lora import (
    MAX_PICTURES,
    QwenImageUnit_Image2LoRADecode,
    QwenImageUnit_Image2LoRAEncode,
    dinov3_pixels,
    images_to_lora,
    siglip2_pixels,
    square,
)
from diffsynth_backend.pipelines.qwen_image_prompts import PICTURE_TEMPLATE, TextPrompts

# In the order of their ids in the published tokenizer.
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
SIGLIP2 = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 12, "image_size": 384}
TEXT_ENCODER = {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 48,
                "vocab_size": 320, "vision_hidden_size": 16, "vision_depth": 1, "vision_num_heads": 1,
                "vision_intermediate_size": 20}
DINOV3 = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 12}
NET = {"num_blocks": 2, "compress_dim": 4, "rank": 2, "residual_mid_dim": 3, "dim": 8, "image_dim": 24,
       "residual_dim": 64}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Smooth, so that filters have something to average, and neither square nor symmetric."""
    coarse = np.random.default_rng(0).integers(0, 256, (7, 10, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((300, 210), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pictures(picture) -> list[Image.Image]:
    return [picture, picture.rotate(90, expand=True), picture.crop((10, 20, 110, 120))]


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)


# ---- what the encoders see ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(300, 210), (210, 300), (224, 224), (101, 77), (77, 1001)], ids=str)
@pytest.mark.parametrize("side", [224, 1024])
def test_the_square_is_torchvisions(picture, size, side):
    """Its resize and center_crop of a Pillow picture, written out; compared with the package itself once."""
    picture = picture.resize(size)
    scale = max(side / size[0], side / size[1])
    larger = picture.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BILINEAR)
    left, top = (int(round((length - side) / 2)) for length in larger.size)
    expected = larger.crop((left, top, left + side, top + side))
    assert np.array_equal(np.asarray(square(picture, side)), np.asarray(expected))


def test_siglip2_sees_what_its_processor_gives(picture):
    """Settings of preprocessor_config.json in SigLIP2-G384."""
    module = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    processor = module.SiglipImageProcessorPil(
        do_resize=True, size={"height": 384, "width": 384}, resample=2, do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])
    expected = processor(images=[picture], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(siglip2_pixels(picture, 384), expected, rtol=0, atol=1e-6)


def test_dinov3_sees_what_its_processor_gives(picture):
    """Settings of preprocessor_config.json in DINOv3-7B."""
    pytest.importorskip("torchvision")
    module = pytest.importorskip("transformers.models.dinov3_vit.image_processing_dinov3_vit")
    processor = module.DINOv3ViTImageProcessor(
        do_resize=True, size={"height": 224, "width": 224}, resample=2, do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
    expected = processor(images=picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(dinov3_pixels(picture), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("see", [lambda picture: siglip2_pixels(square(picture, 1024), 384),
                                 lambda picture: dinov3_pixels(square(picture, 1024))], ids=["siglip2", "dinov3"])
def test_a_tensor_looks_like_the_picture(picture, see):
    """A Pillow picture is rounded to 8 bits once or twice on its way: by less than 1/255 of its range each time."""
    torch.testing.assert_close(see(as_tensor(picture)), see(picture), rtol=0, atol=2 / 255 / 0.224)


def test_a_tensor_is_not_rounded():
    flat = torch.full((30, 40, 3), 0.50123)
    assert (siglip2_pixels(square(flat, 64), 32) - (0.50123 - 0.5) / 0.5).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "LA"])
def test_other_modes_are_seen_in_colour(picture, mode):
    converted = picture.convert(mode)
    assert square(converted, 64).mode == "RGB"
    assert np.array_equal(np.asarray(square(converted, 64)), np.asarray(square(converted.convert("RGB"), 64)))


def test_alpha_of_a_tensor_is_dropped(picture):
    tensor = as_tensor(picture)
    with_alpha = torch.cat([tensor, torch.rand(*tensor.shape[:2], 1)], dim=-1)
    assert torch.equal(square(with_alpha, 64), square(tensor, 64))


@pytest.mark.parametrize("size", [(1, 21), (2000, 99)])
def test_too_long_a_strip_raises(size):
    with pytest.raises(ValueError, match=f"a picture of {size[0]}×{size[1]} is more than 20 times as long"):
        square(Image.new("RGB", size), 1024)


# ---- units ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def picture_prompts(tokenizer_folder) -> TextPrompts:
    prompts = TextPrompts.load(tokenizer_folder)
    prompts.tokenizer.add_special_tokens({"additional_special_tokens": VISION_TOKENS})
    return prompts


@pytest.fixture(scope="module")
def state_lengths(picture_prompts) -> dict[str, int]:
    """Tokens of a picture between the marks of its begin and end, and the rest of the template."""
    tail = len(picture_prompts.tokenizer(PICTURE_TEMPLATE.partition("{}")[2])["input_ids"])
    return {"coarse": 1 + (224 // 28) ** 2 + 1 + tail, "fine": 1 + 37**2 + 1 + tail}


def randomized(model: nn.Module) -> nn.Module:
    """Every weight moved away from its initial value: norms that start at one would hide a swapped pair."""
    for parameter in model.requires_grad_(False).parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def models(picture_prompts, state_lengths) -> dict[str, nn.Module]:
    first = picture_prompts.tokenizer.convert_tokens_to_ids(VISION_TOKENS[0])
    torch.manual_seed(0)
    return {name: randomized(model) for name, model in {
        "siglip2_image_encoder": Siglip2ImageEncoder(**SIGLIP2), "dinov3_image_encoder": DINOv3ImageEncoder(**DINOV3),
        "text_encoder": QwenImageTextEncoder(**TEXT_ENCODER, first_vision_token=first),
        "image2lora_style": QwenImageImage2LoRAModel(**NET, use_residual=False),
        "image2lora_coarse": QwenImageImage2LoRAModel(**NET, residual_length=state_lengths["coarse"]),
        "image2lora_fine": QwenImageImage2LoRAModel(**NET, residual_length=state_lengths["fine"])}.items()}


@pytest.fixture
def make_pipe(models, picture_prompts) -> Callable[..., QwenImagePipeline]:
    """A float32 pipeline with the named models only, `image2lora_` left out."""
    def make(*names: str) -> QwenImagePipeline:
        pipe = QwenImagePipeline(device="cpu", torch_dtype=torch.float32)
        pipe.prompts = picture_prompts
        for name, model in models.items():
            if name.removeprefix("image2lora_") in names:
                setattr(pipe, name, model)
        return pipe
    return make


ENCODERS = ("siglip2_image_encoder", "dinov3_image_encoder")


def update(lora: dict[str, Tensor], layer: str) -> Tensor:
    """What it adds to the weight of a layer."""
    return lora[f"{layer}.lora_B.default.weight"] @ lora[f"{layer}.lora_A.default.weight"]


def encode(pipe: QwenImagePipeline, pictures: object) -> dict:
    shared, _, _ = pipe.unit_runner(QwenImageUnit_Image2LoRAEncode(), pipe, {"image2lora_images": pictures}, {}, {})
    return {name: value for name, value in shared.items() if name != "image2lora_images"}


def test_embeddings_are_both_encoders_vectors(make_pipe, models, pictures, relative_error):
    embeddings = encode(make_pipe(*ENCODERS), pictures)
    for picture, vector in zip(pictures, embeddings["image2lora_x"]):
        siglip2 = models[ENCODERS[0]](siglip2_pixels(square(picture, 1024), 384))
        dinov3 = models[ENCODERS[1]](dinov3_pixels(square(picture, 1024)))
        assert relative_error(vector[None], torch.cat([siglip2, dinov3], dim=1)) <= 1e-5


def test_more_pictures_than_go_through_at_once(make_pipe, picture, relative_error):
    pictures = [picture.rotate(5 * i) for i in range(9)]
    together = encode(make_pipe(*ENCODERS), pictures)["image2lora_x"]
    assert relative_error(together[8:], encode(make_pipe(*ENCODERS), pictures[8])["image2lora_x"]) <= 1e-5


def test_only_the_states_that_a_net_reads_are_made(make_pipe, picture, state_lengths):
    shapes = {}
    for net in ("style", "coarse", "fine"):
        embeddings = encode(make_pipe(*ENCODERS, "text_encoder", net), [picture, picture])
        shapes[net] = [None if value is None else tuple(value.shape) for value in list(embeddings.values())[1:]]
    assert shapes == {"style": [None, None], "coarse": [(2, state_lengths["coarse"], 64), None],
                      "fine": [None, (2, state_lengths["fine"], 64)]}


def test_states_equal_transformers(make_pipe, models, picture_prompts, picture, relative_error):
    """Its own image processor and model, on the filled template; what stands before the picture is cut off."""
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    images = module.Qwen2VLImageProcessorPil()(images=[square(picture, 224)], return_tensors="pt")
    head, _, tail = PICTURE_TEMPLATE.partition("{}")
    filled = f"{head}<|vision_start|>{'<|image_pad|>' * 64}<|vision_end|>{tail}"
    ids = picture_prompts.tokenizer(filled, return_tensors="pt")["input_ids"]
    kinds = (ids == picture_prompts.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    states = models["text_encoder"].model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds,
                                          **images).last_hidden_state
    start = int((ids[0] == picture_prompts.tokenizer.convert_tokens_to_ids("<|vision_start|>")).nonzero())
    embeddings = encode(make_pipe(*ENCODERS, "text_encoder", "coarse"), picture)
    assert relative_error(embeddings["image2lora_residual"], states[:, start:]) <= 1e-5


@pytest.mark.parametrize("nets", [("style",), ("coarse", "fine"), ("style", "coarse", "fine")], ids=" ".join)
def test_the_lora_is_the_mean_over_pictures_of_the_sum_over_nets(make_pipe, models, pictures, relative_error, nets):
    pipe = make_pipe(*ENCODERS, "text_encoder", *nets)
    embeddings = encode(pipe, pictures)
    merged = QwenImageUnit_Image2LoRADecode().process(pipe, **embeddings)["lora"]
    states = {"style": None, "coarse": embeddings["image2lora_residual"],
              "fine": embeddings["image2lora_residual_highres"]}
    singles = [models[f"image2lora_{net}"](embeddings["image2lora_x"][i:i + 1],
                                           None if states[net] is None else states[net][i:i + 1])
               for net in nets for i in range(3)]
    for layer in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.txt_mod.1"):
        assert relative_error(update(merged, layer), sum(update(one, layer) for one in singles) / 3) <= 1e-5
    assert merged["transformer_blocks.0.attn.to_q.lora_A.default.weight"].shape == (2 * 3 * len(nets), 8)


def test_the_bias_is_added_whole(make_pipe, pictures, relative_error):
    pipe = make_pipe(*ENCODERS, "style")
    plain = images_to_lora(pipe, pictures)
    bias = {name: torch.randn(3, tensor.shape[1]) if ".lora_A." in name else torch.randn(tensor.shape[0], 3)
            for name, tensor in plain.items()}
    layer = "transformer_blocks.1.img_mlp.net.2"
    expected = update(plain, layer) + update(bias, layer)
    assert relative_error(update(images_to_lora(pipe, pictures, bias), layer), expected) <= 1e-5


def test_the_result_can_be_saved_and_outlives_inference_mode(make_pipe, picture, tmp_path):
    with torch.inference_mode():
        made = images_to_lora(make_pipe(*ENCODERS, "style"), picture)
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in made.values())
    save_file(made, tmp_path / "lora.safetensors")


def test_nothing_given_is_nothing_done(make_pipe):
    assert encode(make_pipe(), None) == {}
    assert QwenImageUnit_Image2LoRADecode().process(make_pipe(), None, None, None) == {}


# ---- errors ---------------------------------------------------------------------------------------------------------

def test_missing_models_are_named_before_any_runs(make_pipe, picture):
    with pytest.raises(ValueError, match="needs one of image2lora_style, image2lora_coarse, image2lora_fine"):
        images_to_lora(make_pipe(*ENCODERS), picture)
    with pytest.raises(ValueError, match="needs dinov3_image_encoder, which is not loaded"):
        images_to_lora(make_pipe("siglip2_image_encoder", "style"), picture)
    with pytest.raises(ValueError, match="needs text_encoder, which is not loaded"):
        images_to_lora(make_pipe(*ENCODERS, "coarse"), picture)


def test_a_net_that_came_after_the_embeddings_raises(make_pipe, picture):
    embeddings = encode(make_pipe(*ENCODERS), picture)
    with pytest.raises(ValueError, match="takes states of the text encoder"):
        QwenImageUnit_Image2LoRADecode().process(make_pipe("coarse"), **embeddings)


@pytest.mark.parametrize("pictures, error, message", [
    ([], ValueError, "has 0 pictures; expected 1 to"), ([Image.new("RGB", (9, 9))] * (MAX_PICTURES + 1), ValueError,
                                                        f"has {MAX_PICTURES + 1} pictures; expected 1 to"),
    ([Image.new("RGB", (9, 9)), "photo.png"], TypeError, r"image2lora_images\[1\] must be a PIL image or a tensor"),
    (torch.rand(2, 9, 9, 3), ValueError, r"image2lora_images\[0\] is a .* of shape \(2, 9, 9, 3\)"),
], ids=["none", "too many", "a path", "a batch"])
def test_what_are_no_pictures_raises(make_pipe, pictures, error, message):
    with pytest.raises(error, match=message):
        images_to_lora(make_pipe(*ENCODERS, "style"), pictures)


def test_a_broken_bias_raises_before_any_model_runs(make_pipe, picture):
    with pytest.raises(ValueError, match="x.lora_B.weight is not: the LoRA is incomplete"):
        images_to_lora(make_pipe(*ENCODERS, "style"), picture, {"x.lora_A.weight": torch.ones(1, 1)})


# ---- memory ---------------------------------------------------------------------------------------------------------

ON_DISK = {"computation_dtype": torch.float32, "computation_device": "cpu",
           **{f"{state}_{part}": "disk" for state in ("offload", "onload") for part in ("dtype", "device")},
           "preparing_dtype": torch.float32, "preparing_device": "cpu"}
CONFIGS = {"siglip2_image_encoder": SIGLIP2, "dinov3_image_encoder": DINOV3,
           "image2lora_style": {**NET, "use_residual": False}}


@pytest.fixture
def managed(models, tmp_path) -> QwenImagePipeline:
    """The style net and its encoders with their weights on disk."""
    pipe = QwenImagePipeline(device="cpu", torch_dtype=torch.float32)
    for name, config in CONFIGS.items():
        path, model_class = str(tmp_path / f"{name}.safetensors"), type(models[name])
        save_file(models[name].state_dict(), path)
        setattr(pipe, name, load_model(model_class, path, config, module_map=module_map_of(model_class),
                                       vram_config=ON_DISK, vram_limit=0))
    return pipe


def test_weights_on_disk_give_the_same_bits(make_pipe, managed, pictures, one_thread):
    expected = images_to_lora(make_pipe(*ENCODERS, "style"), pictures)
    made = images_to_lora(managed, pictures)
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert_offloaded(managed)


def test_a_failure_leaves_nothing_onloaded(managed, picture):
    managed.dinov3_image_encoder.patch_size = 13  # 224 is no multiple of it
    with pytest.raises(ValueError, match="multiples of 13"):
        images_to_lora(managed, picture)
    assert_offloaded(managed)


class Stopped(BaseException):
    """What a host's interrupt is."""


def test_it_can_be_stopped_between_encoders_and_nets(managed, picture):
    stages = []

    def until_the_second(units):
        for unit in units:
            stages.append(type(unit).__name__)
            if len(stages) == 2:
                raise Stopped
            yield unit

    with pytest.raises(Stopped):
        images_to_lora(managed, picture, progress_bar_cmd=until_the_second)
    assert stages == ["QwenImageUnit_Image2LoRAEncode", "QwenImageUnit_Image2LoRADecode"]
    assert_offloaded(managed)


def assert_offloaded(pipe: QwenImagePipeline) -> None:
    assert all(layer.state == 0 for name in CONFIGS for layer in iter_managed(getattr(pipe, name)))
