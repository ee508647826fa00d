"""Prompts: the template is cut off exactly, batches equal single texts, pictures become the published processor's
patches, and a tokenizer's files run no code.
"""
from __future__ import annotations

import copy
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL import Image
from tokenizers import Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from diffsynth_backend.pipelines.qwen_image_prompts import (
    MAX_PIXELS,
    MAX_TOKENS,
    MIN_PIXELS,
    NUMBERED_AREA,
    PICTURE_TEMPLATE,
    TEXT_TEMPLATE,
    PicturePrompts,
    TextPrompts,
    fitted_size,
    load_tokenizer,
    picture_patches,
    seen_size,
)

TEXTS = ["a red circle", "", "a very long text about a blue square, 12 green triangles and — «ünïcödé» ☂ — nothing"]
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]


# ---- template -------------------------------------------------------------------------------------------------------

def test_the_template_is_the_published_one(theirs):
    assert theirs.prompt_template_encode == TEXT_TEMPLATE


def test_the_template_head_is_counted_with_the_tokenizer(prompts, theirs):
    assert prompts.prefix_length == theirs.prompt_template_encode_start_idx


@pytest.mark.parametrize("text", [*TEXTS, "{}", "{0} {x}", "%s", "two\nlines", " leading blank"])
def test_the_whole_text_and_nothing_else_follows_the_head(prompts, text):
    ids, mask = prompts.tokenize([text])
    assert mask.all()
    assert prompts.tokenizer.decode(ids[0, prompts.prefix_length:]) == text + TAIL
    assert prompts.tokenizer.decode(ids[0]) == TEXT_TEMPLATE.replace("{}", text)


def test_special_tokens_are_one_token_each(prompts):
    ids, _ = prompts.tokenize(["x"])
    start = prompts.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert int((ids == start).sum()) == 3  # system, user, assistant


def test_batches_are_padded_on_the_right(prompts):
    ids, mask = prompts.tokenize(TEXTS)
    lengths = [len(prompts.tokenize([text])[0][0]) for text in TEXTS]
    assert ids.shape == mask.shape == (3, max(lengths))
    assert mask.tolist() == [[1] * length + [0] * (max(lengths) - length) for length in lengths]


# ---- embeddings -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("index", range(len(TEXTS)))
def test_a_batch_equals_single_prompts(pipe, prompts, relative_error, index):
    batch, batch_mask = prompts.embed(pipe.text_encoder, TEXTS)
    single, single_mask = prompts.embed(pipe.text_encoder, [TEXTS[index]])
    assert single_mask.all() and int(batch_mask[index].sum()) == single.shape[1]
    assert relative_error(batch[index, :single.shape[1]], single[0]) <= 1e-5


def test_embeddings_begin_at_the_text(pipe, prompts, theirs, relative_error):
    """transformers' own run over the filled template; what belongs to the template's head is cut off."""
    tokens = theirs.tokenizer(TEXT_TEMPLATE.format("a red circle"), return_tensors="pt")
    states = theirs.text_encoder(**tokens, output_hidden_states=True).hidden_states[-1]
    head = theirs.tokenizer("".join(TEXT_TEMPLATE.partition("{}")[:1]), return_tensors="pt").input_ids.shape[1]
    embedding, mask = prompts.embed(pipe.text_encoder, ["a red circle"])
    assert relative_error(embedding, states[:, head:]) <= 1e-5
    assert mask.shape == embedding.shape[:2]


# ---- errors ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [None, 5, b"bytes", ["nested"]])
def test_what_is_no_text_raises(prompts, text):
    with pytest.raises(TypeError, match=f"a prompt must be a text, got {type(text).__name__}"):
        prompts.tokenize(["fine", text])


def test_a_text_that_is_too_long_raises_with_both_numbers(prompts):
    tail = len(prompts.tokenizer(TAIL)["input_ids"])
    with pytest.raises(ValueError, match=f"the prompt has {4100 + tail} tokens, the text encoder takes {MAX_TOKENS}"):
        prompts.tokenize(["fine", "1" * 4100])


def test_the_longest_text_is_taken_whole(prompts):
    tail = len(prompts.tokenizer(TAIL)["input_ids"])
    ids, _ = prompts.tokenize(["1" * (MAX_TOKENS - tail)])
    assert ids.shape[1] == prompts.prefix_length + MAX_TOKENS


# ---- pictures: tokens -----------------------------------------------------------------------------------------------

@pytest.fixture
def picture_prompts(prompts) -> PicturePrompts:
    tokenizer = copy.deepcopy(prompts.tokenizer)
    tokenizer.add_tokens(VISION_TOKENS, special_tokens=True)
    return PicturePrompts(tokenizer)


def test_the_template_with_pictures_is_the_published_one():
    """As its pipelines hold it; there is no need to load one."""
    parts = dict.fromkeys(["scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer"])
    picture = "<|vision_start|><|image_pad|><|vision_end|>{}"
    assert QwenImageEditPipeline(**parts).prompt_template_encode == PICTURE_TEMPLATE.format(picture)
    assert QwenImageEditPlusPipeline(**parts).prompt_template_encode == PICTURE_TEMPLATE


@pytest.mark.parametrize("text", TEXTS[:2])
@pytest.mark.parametrize("numbered, shown", [
    (False, "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"),
    (True, "Picture 1: <|vision_start|><|image_pad|><|image_pad|><|vision_end|>"),
])
def test_a_picture_and_the_text_follow_the_head(picture_prompts, text, numbered, shown):
    ids = picture_prompts.tokenize(text, [2], numbered)
    assert picture_prompts.tokenizer.decode(ids[0, picture_prompts.prefix_length:]) == shown + text + TAIL
    assert picture_prompts.tokenizer.decode(ids[0]) == PICTURE_TEMPLATE.format(shown + text)


def test_pictures_of_a_list_are_numbered_and_have_a_token_for_each_four_patches(picture_prompts):
    ids = picture_prompts.tokenize("x", [3, 1, 2], numbered=True)
    shown = picture_prompts.tokenizer.decode(ids[0, picture_prompts.prefix_length:])
    assert re.findall(r"Picture (\d): <\|vision_start\|>((?:<\|image_pad\|>)+)<\|vision_end\|>", shown) == [
        (str(number), "<|image_pad|>" * count) for number, count in ((1, 3), (2, 1), (3, 2))]


def test_a_tokenizer_without_tokens_for_pictures_raises_and_names_the_file(prompts):
    with pytest.raises(ValueError, match=r"no <\|vision_start\|>, <\|image_pad\|>, <\|vision_end\|>.*config.json"):
        PicturePrompts(prompts.tokenizer)


def test_tokens_of_pictures_are_read_from_the_tokenizers_files(picture_prompts, tmp_path):
    picture_prompts.tokenizer.save_pretrained(tmp_path)
    loaded = PicturePrompts(load_tokenizer(tmp_path))
    assert torch.equal(loaded.tokenize("x", [3], True), picture_prompts.tokenize("x", [3], True))


@pytest.mark.parametrize("text", ["a <|image_pad|> b", "<|image_pad|>"])
def test_a_text_with_a_pictures_token_raises(picture_prompts, text):
    with pytest.raises(ValueError, match=r"contains <\|image_pad\|>, which stands for a picture: remove"):
        picture_prompts.tokenize(text, [4], numbered=False)


def test_a_long_text_beside_a_picture_raises_without_counting_the_picture(picture_prompts):
    around = picture_prompts.tokenize("", [0], False).shape[1] - picture_prompts.prefix_length
    picture_prompts.tokenize("1" * (MAX_TOKENS - around), [9000], numbered=False)
    with pytest.raises(ValueError, match=f"{MAX_TOKENS + 1} tokens besides its pictures, .* takes {MAX_TOKENS}"):
        picture_prompts.tokenize("1" * (MAX_TOKENS - around + 1), [9000], numbered=False)


def test_tokens_of_another_text_encoder_raise(picture_prompts):
    encoder = SimpleNamespace(config=SimpleNamespace(image_token_id=151655))
    with pytest.raises(ValueError, match="is token 307 of the tokenizer and token 151655 of the text encoder"):
        picture_prompts.embed(encoder, "x", [Image.new("RGB", (56, 56))], numbered=False)


@pytest.mark.parametrize("text", [None, 5])
def test_what_is_no_text_raises_beside_a_picture_too(picture_prompts, text):
    with pytest.raises(TypeError, match="a prompt must be a text"):
        picture_prompts.tokenize(text, [4], numbered=False)


# ---- pictures: patches ----------------------------------------------------------------------------------------------

SIZES = [(56, 56), (300, 431), (1024, 1024), (640, 20), (20, 640), (5, 7), (1, 200)]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


@pytest.mark.parametrize("width, height", SIZES)
def test_patches_equal_the_published_processors(width, height):
    processor = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    expected = processor(picture(width, height), return_tensors="pt")
    patches, grid = picture_patches(picture(width, height))
    assert [[1, *grid]] == expected["image_grid_thw"].tolist()
    assert torch.allclose(patches, expected["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "LA"])
def test_other_modes_are_seen_in_their_colours(mode):
    """Alpha is dropped, as on the way to the VAE; versions of the published processor differ there."""
    image = picture(90, 60, "RGBA").convert(mode)
    expected = Qwen2VLImageProcessorPil()(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    assert torch.allclose(picture_patches(image)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width, height", [(84, 56), (300, 431), (40, 41)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_tensor_equals_the_picture_up_to_rounding(width, height, mode):
    """Pillow rounds to 8 bits after each of its two passes; without resizing nothing is rounded."""
    image = Image.fromarray(np.linspace(0, 255, width * height * len(mode)).reshape(height, width, -1).astype("uint8"))
    expected, grid = picture_patches(image)
    patches, same_grid = picture_patches(as_tensor(image))
    step = 1 / 255 / 0.26  # one level of 256, normalised
    assert grid == same_grid
    assert float((patches - expected).abs().max()) <= (1.6 * step if (width, height) != (84, 56) else 1e-6)


def test_a_tensor_is_not_rounded_to_8_bits():
    flat = torch.full((56, 56, 3), 0.50123)
    patches, _ = picture_patches(flat)
    assert torch.allclose(patches[0, :196], torch.tensor((0.50123 - 0.48145466) / 0.26862954), atol=1e-5)


def test_patches_of_a_token_follow_one_another_and_hold_channel_frame_row_column():
    """Read off a picture whose three channels count rows, columns and nothing."""
    rows, columns = torch.meshgrid(torch.arange(84.0), torch.arange(56.0), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros_like(rows)], dim=-1) / 100
    patches, grid = picture_patches(image)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    values = patches.reshape(-1, 3, 2, 14, 14) * std[:, None, None, None] + mean[:, None, None, None]
    assert grid == (6, 4)
    assert torch.equal(values[:, :, 0], values[:, :, 1])
    corners = (values[:, :2, 0, 0, 0] * 100 / 14).round().int().tolist()
    assert corners[:6] == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]
    assert corners[8] == [2, 0]
    assert torch.allclose(values[0, 0, 0, :, 0] * 100, torch.arange(14.0), atol=1e-3)


@pytest.mark.parametrize("width, height", [*SIZES, (5000, 4000), (16384, 16384), (100, 14000), (3584, 3584)])
def test_the_seen_size_is_the_published_one(width, height):
    rows, columns = smart_resize(height, width, 28, MIN_PIXELS, MAX_PIXELS)
    assert seen_size(width, height) == (columns, rows)
    assert MIN_PIXELS <= columns * rows <= MAX_PIXELS


@pytest.mark.parametrize("area", [NUMBERED_AREA, 1024 * 1024])
@pytest.mark.parametrize("width, height", [*SIZES, (1328, 1328), (1664, 928), (1044, 2306), (3000, 16)])
def test_the_fitted_size_is_the_published_one(width, height, area):
    assert fitted_size(width, height, area) == calculate_dimensions(area, width / height)[:2]


@pytest.mark.parametrize("width, height", [(1, 201), (4020, 20)])
def test_a_strip_raises_with_its_size(width, height):
    with pytest.raises(ValueError, match=f"is {width}×{height} .*200 times the other at most; crop it"):
        picture_patches(picture(width, height))


@pytest.mark.parametrize("given, error", [
    ("a path", TypeError), (None, TypeError), (np.zeros((28, 28, 3)), TypeError),
    (torch.zeros(1, 28, 28, 3), ValueError), (torch.zeros(3, 28, 28), ValueError), (torch.zeros(0, 28, 3), ValueError),
])
def test_what_is_no_picture_raises(given, error):
    with pytest.raises(error, match="a picture of the prompt"):
        picture_patches(given)


# ---- files ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("present, missing", [((), "vocab.json, merges.txt"), (("vocab.json",), "merges.txt")])
def test_missing_files_raise_with_their_names(tmp_path, present, missing):
    for name in present:
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"{missing} missing; get the folder"):
        load_tokenizer(tmp_path)


def test_a_missing_folder_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer in .*absent"):
        load_tokenizer(tmp_path / "absent")


def test_tokenizer_json_alone_is_enough(prompts, tmp_path):
    prompts.tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}')
    alone = TextPrompts.load(tmp_path)
    assert torch.equal(alone.tokenize(TEXTS)[0], prompts.tokenize(TEXTS)[0])


def test_ids_equal_those_of_the_tokenizers_library(prompts, tmp_path):
    """The library beneath, without transformers between."""
    prompts.tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = TEXT_TEMPLATE.format("a red circle")
    assert prompts.tokenize(["a red circle"])[0][0].tolist() == library.encode(text).ids


CODE = "import pathlib\npathlib.Path(__file__).with_name('executed').touch()\nclass Evil:\n    pass\n"


@pytest.mark.parametrize("config", [
    {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
    {"auto_map": ["evil.Evil", None]},
    {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil", "trust_remote_code": True},
    {"tokenizer_class": "Evil"},
    {"tokenizer_class": "AlbertTokenizer"},
], ids=["auto_map", "auto_map_list", "trust_remote_code", "unknown_class", "another_class"])
def test_files_have_no_say_over_code(make_tokenizer, prompts, monkeypatch, config):
    folder = make_tokenizer(**config)
    (folder / "evil.py").write_text(CODE)
    (folder / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoTokenizer": "evil.Evil"}}')
    monkeypatch.chdir(folder)  # where a careless import would find it
    loaded = TextPrompts.load(folder)
    assert type(loaded.tokenizer) is type(prompts.tokenizer)
    assert torch.equal(loaded.tokenize(TEXTS)[0], prompts.tokenize(TEXTS)[0])
    assert not (folder / "executed").exists()


def test_a_chat_template_in_the_files_is_not_rendered(make_tokenizer, prompts):
    loaded = TextPrompts.load(make_tokenizer(chat_template="{{ raise_exception('rendered') }}"))
    assert torch.equal(loaded.tokenize(TEXTS)[0], prompts.tokenize(TEXTS)[0])


def test_a_long_prompt_raises_no_alarm_of_the_tokenizers_own_limit(make_tokenizer, caplog):
    """`model_max_length` is about a chat; this encoder's limit is MAX_TOKENS."""
    loaded = TextPrompts.load(make_tokenizer(model_max_length=50))
    with caplog.at_level(logging.WARNING):
        ids, _ = loaded.tokenize(["1" * 200])
    assert ids.shape[1] > 200
