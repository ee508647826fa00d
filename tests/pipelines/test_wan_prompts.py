"""Wan's prompts: texts are cleaned as published, embeddings are diffusers', a tokenizer's files run no code; pictures
reach the image encoder through the published filter."""
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan import pipeline_wan
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffsynth_backend.models.wan_video_image_encoder import IMAGE_MEAN, IMAGE_STD
from diffsynth_backend.models.wan_video_text_encoder import WanTextEncoder
from diffsynth_backend.pipelines.wan_prompts import MAX_TOKENS, TextPrompts, clean, clip_pixels, load_tokenizer
from diffsynth_backend.utils.state_dict_converters.wan_video_text_encoder import WanTextEncoderFromDiffusers

SPECIAL = ("<pad>", "</s>", "<unk>")
PIECES = ("▁", "▁a", "▁red", "▁circle", "▁blue", "▁square", *"abcdefghijklmnopqrstuvwxyz,.&<>红圆")
VOCAB = len(SPECIAL) + len(PIECES)
TEXTS = ["a red circle", "", "  a   blue\n\tsquare,\u3000red &amp;amp; blue &lt;b&gt; 红圆 "]

pytestmark = pytest.mark.usefixtures("one_thread")


def write_tokenizer(folder: Path, padded_to: int | None = None) -> Path:
    """A tiny vocabulary in the published file's form: pieces with scores, white space as ▁, an end behind each text."""
    vocabulary = [(token, 0.0) for token in SPECIAL] + [(piece, -float(i)) for i, piece in enumerate(PIECES)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(list(SPECIAL))
    if padded_to is not None:
        tokenizer.enable_padding(length=padded_to)
        tokenizer.enable_truncation(padded_to)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("umt5"))


@pytest.fixture(scope="module")
def prompts(folder) -> TextPrompts:
    return TextPrompts.load(folder)


@pytest.fixture(scope="module")
def theirs(folder) -> WanPipeline:
    """diffusers' pipeline with a tiny text encoder and nothing else."""
    torch.manual_seed(0)
    encoder = UMT5EncoderModel(UMT5Config(d_ff=40, d_kv=16, d_model=24, feed_forward_proj="gated-gelu", num_heads=2,
                                          num_layers=2, vocab_size=VOCAB + 5)).eval().requires_grad_(False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>",
                                        eos_token="</s>", unk_token="<unk>")
    return WanPipeline(tokenizer, encoder, vae=None, scheduler=None)


@pytest.fixture(scope="module")
def encoder(theirs) -> WanTextEncoder:
    model = WanTextEncoder(vocab=VOCAB + 5, dim=24, dim_attn=32, dim_ffn=40, num_heads=2, num_layers=2)
    state_dict = theirs.text_encoder.state_dict()
    state_dict.pop("encoder.embed_tokens.weight")
    model.load_state_dict(WanTextEncoderFromDiffusers(state_dict))
    return model.eval().requires_grad_(False)


# ---- cleaning -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, cleaned", [
    ("  two\tcats \r\n\u3000in\u00a0 boxing\u2028gear ", "two cats in boxing gear"),
    ("a &amp; b &amp;lt;i&amp;gt; &ldquo;c&rdquo; &nbsp;", 'a & b <i> "c"'),
    ("“a cat’s” ‘dog’ „x‟", "\"a cat's\" 'dog' \"x\""),
    ("色调艳丽，过曝：静态！（ａ）", "色调艳丽,过曝:静态!(a)"),
    ("ﬁne oﬀer", "fine offer"),
    ("cafe\u0301 ｶﾞ", "café ガ"),
    ("\ufeffa\x00b\x1fc\x7f", "abc"),
    ("Ünïcödé — «ok» ½ ² 4k…", "Ünïcödé — «ok» ½ ² 4k…"),
    ("", ""),
])
def test_a_text_is_cleaned_as_published(text, cleaned):
    """Expected values are those of ftfy 6.3 and the published steps after it."""
    assert clean(text) == cleaned


# ---- tokens ---------------------------------------------------------------------------------------------------------

def test_tokens_are_the_cleaned_text_and_its_end(prompts):
    ids, mask = prompts.tokenize(["  a &amp;\nred   circle "])
    assert [prompts.tokenizer.id_to_token(i) for i in ids[0].tolist()] == [
        "▁a", "▁", "&", "▁red", "▁circle", "</s>"]
    assert ids.dtype == mask.dtype == torch.int64 and mask.all()


def test_batches_are_padded_on_the_right(prompts):
    ids, mask = prompts.tokenize(TEXTS)
    single = [prompts.tokenize([text])[0][0] for text in TEXTS]
    assert ids.shape == mask.shape == (3, max(map(len, single)))
    assert mask.sum(dim=1).tolist() == [len(tokens) for tokens in single]
    assert all(torch.equal(row[:len(tokens)], tokens) for row, tokens in zip(ids, single))


def test_a_length_in_the_file_has_no_say(prompts, tmp_path):
    other = TextPrompts.load(write_tokenizer(tmp_path, padded_to=4))
    assert torch.equal(other.tokenize(TEXTS)[0], prompts.tokenize(TEXTS)[0])


def test_the_longest_text_is_taken_and_a_longer_one_raises_with_both_numbers(prompts, encoder):
    embedding, mask = prompts.embed(encoder, ["a " * (MAX_TOKENS - 1)])
    assert embedding.shape[1] == MAX_TOKENS == 512 and mask.all()
    with pytest.raises(ValueError, match="the prompt has 513 tokens, the text encoder takes 512: shorten it"):
        prompts.tokenize(["fine", "a " * MAX_TOKENS])


@pytest.mark.parametrize("text", [None, 5, b"bytes", ["nested"]])
def test_what_is_no_text_raises(prompts, text):
    with pytest.raises(TypeError, match=f"a prompt must be a text, got {type(text).__name__}"):
        prompts.tokenize(["fine", text])


# ---- embeddings -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("texts", [[text] for text in TEXTS] + [TEXTS], ids=["short", "empty", "dirty", "batch"])
def test_embeddings_equal_diffusers(prompts, encoder, theirs, relative_error, monkeypatch, texts):
    """They run 512 tokens through the encoder and zero the padding; ours sees the text alone. (Its ftfy has nothing to
    do in these texts.)"""
    monkeypatch.setattr(pipeline_wan, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    embedding, mask = prompts.embed(encoder, texts)
    expected = theirs._get_t5_prompt_embeds(texts, max_sequence_length=MAX_TOKENS)
    assert embedding.shape == (len(texts), 512, 24) and mask.shape == (len(texts), 512)
    assert relative_error(embedding, expected) <= 1e-5
    assert torch.equal(mask.bool(), expected.abs().sum(dim=-1) > 0)
    assert not embedding[mask == 0].any()


def test_embeddings_keep_the_encoders_dtype(prompts, encoder):
    half = WanTextEncoder(vocab=VOCAB, dim=24, dim_attn=32, dim_ffn=40, num_heads=2, num_layers=1).bfloat16()
    assert prompts.embed(half, TEXTS)[0].dtype == torch.bfloat16


def test_a_tokenizer_with_more_tokens_than_the_encoder_raises_with_both_numbers(prompts):
    small = WanTextEncoder(vocab=VOCAB - 1, dim=24, dim_attn=32, dim_ffn=40, num_heads=2, num_layers=1)
    with pytest.raises(ValueError, match=f"tokenizer has {VOCAB} tokens and the text encoder {VOCAB - 1}"):
        prompts.embed(small, ["a"])


# ---- files ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("present", [(), ("spiece.model", "tokenizer_config.json")], ids=["empty", "other files"])
def test_a_missing_file_raises_with_its_name(tmp_path, present):
    for name in present:
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match="tokenizer.json missing; get the folder google/umt5-xxl/"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[1, 2", '{"model": "evil"}'])
def test_a_damaged_file_raises_with_its_name(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer: "):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_another_model_raises(tmp_path):
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="is of another model: umT5's tokenizer ends each text by </s>"):
        load_tokenizer(tmp_path)


def test_files_have_no_say_over_code(prompts, tmp_path, monkeypatch):
    write_tokenizer(tmp_path)
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path(__file__).with_name('executed').touch()\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil",
        "trust_remote_code": True}))
    monkeypatch.chdir(tmp_path)  # where a careless import would find it
    assert torch.equal(TextPrompts.load(tmp_path).tokenize(TEXTS)[0], prompts.tokenize(TEXTS)[0])
    assert not (tmp_path / "executed").exists()


# ---- pictures -------------------------------------------------------------------------------------------------------

def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


def weights(length: int, side: int) -> Tensor:
    """(side, length) of the bicubic filter with a = −0.75 (Keys, 1981) over the four nearest pixels, borders repeated,
    whatever the scale."""
    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = torch.zeros(side, length, dtype=torch.float64)
    for row in range(side):
        centre = (row + 0.5) * length / side - 0.5
        for pixel in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[row, min(max(pixel, 0), length - 1)] += kernel(centre - pixel)
    return matrix


def normalised(image: Tensor) -> Tensor:
    """(H, W, 3) in 0…1 → (1, 3, H, W)."""
    return ((image.double() - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)).movedim(-1, 0)[None].float()


@pytest.mark.parametrize("width, height", [(832, 480), (100, 60), (224, 300), (50, 224)])
def test_pixels_are_filtered_as_published(relative_error, width, height):
    image = as_tensor(picture(width, height))
    expected = torch.einsum("yh,hwc,xw->yxc", weights(height, 224), image.double(), weights(width, 224))
    pixels = clip_pixels(image, width, height, 224)
    assert pixels.shape == (1, 3, 224, 224) and pixels.dtype == torch.float32
    assert relative_error(pixels, normalised(expected)) <= 1e-4


def test_a_square_of_the_right_size_is_only_normalised(relative_error):
    """By the published processor's arithmetic, from a Pillow image."""
    image = picture(224, 224)
    expected = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"]
    assert relative_error(clip_pixels(image, 224, 224, 224), expected) <= 1e-6


def test_the_picture_takes_the_videos_size_first():
    """Its own proportions are gone then, so the result is that of the picture in the video's size."""
    image = picture(90, 60)
    resized = image.resize((64, 80), Image.Resampling.BICUBIC)
    assert torch.equal(clip_pixels(image, 64, 80, 28), clip_pixels(resized, 64, 80, 28))
    assert not torch.allclose(clip_pixels(image, 64, 80, 28), clip_pixels(image, 90, 60, 28), atol=0.1)


def test_a_tensor_is_not_rounded_to_8_bits():
    flat = torch.full((80, 64, 4), 0.50123)
    pixels = clip_pixels(flat, 96, 96, 28)
    assert torch.allclose(pixels[0, 0], torch.tensor((0.50123 - IMAGE_MEAN[0]) / IMAGE_STD[0]), atol=1e-5)


@pytest.mark.parametrize("given, error", [("a path", TypeError), (None, TypeError), (torch.zeros(3, 8, 8), ValueError)])
def test_what_is_no_picture_raises(given, error):
    with pytest.raises(error, match="the picture"):
        clip_pixels(given, 64, 64, 28)
