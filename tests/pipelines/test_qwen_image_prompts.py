"""Prompts: the template is cut off exactly, batches equal single texts, and a tokenizer's files run no code."""
from __future__ import annotations

import logging

import pytest
import torch
from tokenizers import Tokenizer

from diffsynth_backend.pipelines.qwen_image_prompts import (
    MAX_TOKENS,
    TEXT_TEMPLATE,
    TextPrompts,
    load_tokenizer,
)

TEXTS = ["a red circle", "", "a very long text about a blue square, 12 green triangles and — «ünïcödé» ☂ — nothing"]
TAIL = "<|im_end|>\n<|im_start|>assistant\n"


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
