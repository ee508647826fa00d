"""Finding known models and tokenizers, and saying what is missing."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from diffsynth_backend.configs.demo_model import TEXT_ENCODER
from diffsynth_backend.core.loader.file import MissingFile, MissingShards
from diffsynth_backend.diffusion.flow_match import TEMPLATES
from diffsynth_backend.pipelines.families import FAMILIES
from diffsynth_backend.pipelines.handle import ModelSource
from diffsynth_backend.pipelines.locate import (
    find_tokenizer,
    is_later_shard,
    locate_preset,
    locate_source,
    preset_parts,
    whole_set,
)
from diffsynth_backend.pipelines.presets import DEMO_WEIGHTS, LORA_PRESETS, MODEL_PRESETS, LoraPreset
from diffsynth_backend.pipelines.tokenizer_files import fits

SHARDS = [f"transformer/diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
TRANSFORMER = MODEL_PRESETS["qwen-image"].parts["transformer"]


def put(base, *names):
    for name in names:
        path = base / "Qwen/Qwen-Image" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(save({"w": torch.ones(1)}))


def test_the_first_folder_that_has_the_files_is_taken(tmp_path):
    put(tmp_path / "second", *SHARDS)
    put(tmp_path / "third", *SHARDS)
    found = locate_source("t", TRANSFORMER, [str(tmp_path / name) for name in ("first", "second", "third")])
    assert found.files == tuple(str(tmp_path / "second/Qwen/Qwen-Image" / shard) for shard in SHARDS)


def test_an_incomplete_set_is_named(tmp_path):
    put(tmp_path, *SHARDS[:2])
    with pytest.raises(MissingShards, match="00003-of-00003"):
        locate_source("t", TRANSFORMER, [str(tmp_path)])


def test_everything_that_is_missing_is_named_at_once(tmp_path):
    put(tmp_path, "vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(MissingFile) as error:
        locate_preset("qwen-image", [str(tmp_path)])
    message = str(error.value)
    assert "57.7 GB" in message and "text_encoder/model" in message and "transformer/" in message
    assert "vae/" not in message and str(tmp_path / "Qwen/Qwen-Image") in message


def test_nobody_is_contacted(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "false")
    monkeypatch.setattr("diffsynth_backend.core.loader.config.download", lambda *_: pytest.fail("a download"))
    with pytest.raises(MissingFile):
        locate_preset("qwen-image", [str(tmp_path)])


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="known: demo"):
        locate_preset("nothing", [])


def test_every_part_of_every_preset_has_a_name():
    parts = preset_parts()
    assert list(parts)[:6] == ["demo/text_encoder", "demo/transformer", "demo/vae", "qwen-image/text_encoder",
                               "qwen-image/transformer", "qwen-image/vae"]
    assert "qwen-image/controlnet-depth" in parts and "qwen-image-i2l/image2lora_fine" in parts


@pytest.mark.parametrize("preset", [*MODEL_PRESETS.values(), *LORA_PRESETS.values()], ids=lambda preset: preset.title)
def test_presets_fit_together(preset):
    assert preset.family in FAMILIES
    if isinstance(preset, LoraPreset):
        assert preset.model in MODEL_PRESETS and preset.template in (None, *TEMPLATES)
        assert preset.source["origin_file_pattern"].endswith(".safetensors")


def test_a_shard_stands_for_its_set(tmp_path):
    put(tmp_path, *SHARDS, "transformer/other-00001-of-00003.safetensors", "transformer/alone.safetensors")
    folder = tmp_path / "Qwen/Qwen-Image/transformer"
    first = str(folder / "diffusion_pytorch_model-00001-of-00003.safetensors")
    assert whole_set(first) == tuple(str(tmp_path / "Qwen/Qwen-Image" / shard) for shard in SHARDS)
    assert whole_set(str(folder / "alone.safetensors")) == (str(folder / "alone.safetensors"),)
    assert [is_later_shard(shard) for shard in (*SHARDS, "alone.safetensors")] == [False, True, True, False]


# ---- tokenizer -------------------------------------------------------------------------------------------------------

@pytest.fixture
def encoder(tiny_files, tmp_path) -> ModelSource:
    """A text encoder with no tokenizer near it."""
    path = tmp_path / "a/b/encoder.safetensors"
    path.parent.mkdir(parents=True)
    path.symlink_to(tiny_files.file("text_encoder"))
    return ModelSource("encoder", (str(path),))


TABLE = TEXT_ENCODER["vocab_size"]


def put_tokenizer(folder: Path, tokens: int, whole: bool = False, added: int = 0) -> None:
    """A tokenizer's files with so many tokens, of which some are added ones; `whole`: in one file, else in parts."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"token{i}" for i in range(tokens)]
    known, more = names[:tokens - added], [{"content": name} for name in names[tokens - added:]]
    if whole:
        content = {"added_tokens": [*more, {"content": known[0]}], "model": {"vocab": [[name, 0.0] for name in known]}}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(known)}))
    (folder / "merges.txt").write_text("")
    config = {"added_tokens_decoder": {str(i): token for i, token in enumerate(more)}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("whole", [False, True])
def test_another_models_tokenizer_is_passed_over(encoder, tmp_path, whole):
    near, base = tmp_path / "a/b", tmp_path / "base/Qwen/Qwen-Image/tokenizer"
    put_tokenizer(near, TABLE + 1, whole)
    put_tokenizer(base, TABLE // 2, whole)
    with pytest.raises(MissingFile, match=f"for {TABLE} tokens .the one in {near} knows {TABLE + 1}, the one in {base} "
                                          f"knows {TABLE // 2}: another model's.: get vocab.json and merges.txt"):
        find_tokenizer("qwen-image", [encoder], [str(tmp_path / "base")])
    put_tokenizer(base, TABLE - 2, whole, added=5)
    assert find_tokenizer("qwen-image", [encoder], [str(tmp_path / "base")]) == str(base)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "1", '{"model": {"vocab": 3}}', '{"model": {"vocab": [1]}}',
                                     '{"model": []}', '{"added_tokens": 3, "model": {"vocab": {}}}', "[" * 100000])
def test_what_cannot_be_read_is_no_tokenizer(encoder, tmp_path, content):
    (tmp_path / "a/b/tokenizer.json").write_text(content)
    with pytest.raises(MissingFile, match=r"no tokenizer for \S+encoder.safetensors: get"):
        find_tokenizer("qwen-image", [encoder], [str(tmp_path)])


def test_the_tokenizers_of_the_demo_and_of_comfyui_fit(tiny_files):
    [demo] = [source for source in locate_preset("demo", []) if source.title == "demo/text_encoder"]
    assert find_tokenizer("qwen-image", [demo], []) == str(DEMO_WEIGHTS / "tokenizer")
    assert fits(151665, 152064) and fits(256300, 256384), "Qwen2.5-VL's and umT5's"
    assert not fits(32100, 256384) and not fits(151665, 256384) and not fits(256300, 152064), "T5's, and each other's"
    assert not fits(131072, 152064) and not fits(128256, 152064), "Mistral's, Llama's"
    assert not fits(250112, 256384), "mT5's"
    assert fits(56, 64) and fits(448, 512) and not fits(447, 512)


def test_a_tokenizer_is_found_in_each_place_in_turn(encoder, tmp_path):
    base, other = tmp_path / "base", tmp_path / "other"
    places = [tmp_path / "a/b", tmp_path / "a/b/tokenizer", tmp_path / "a/tokenizer",
              base / "Qwen/Qwen-Image/tokenizer", other]
    for place in reversed(places):
        put_tokenizer(place, TABLE)
        assert find_tokenizer("qwen-image", [encoder], [str(base)], [str(other)]) == str(place)


def test_half_a_tokenizer_is_none(encoder, tmp_path):
    (tmp_path / "a/b/vocab.json").write_text("{}")
    with pytest.raises(MissingFile, match="vocab.json and merges.txt.*https://huggingface.co/Qwen/Qwen-Image"):
        find_tokenizer("qwen-image", [encoder], [str(tmp_path)])


def test_no_encoder_needs_no_tokenizer(tiny_files):
    assert find_tokenizer("qwen-image", [ModelSource("vae", (tiny_files.file("vae"),))], []) is None
