"""Finding known models and tokenizers, and saying what is missing."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import save

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
from diffsynth_backend.pipelines.presets import LORA_PRESETS, MODEL_PRESETS, LoraPreset

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


def test_a_tokenizer_is_found_in_each_place_in_turn(encoder, tmp_path):
    base, other = tmp_path / "base", tmp_path / "other"
    places = [tmp_path / "a/b", tmp_path / "a/b/tokenizer", tmp_path / "a/tokenizer",
              base / "Qwen/Qwen-Image/tokenizer", other]
    for place in reversed(places):
        place.mkdir(parents=True, exist_ok=True)
        for name in ("vocab.json", "merges.txt"):
            (place / name).write_text("{}")
        assert find_tokenizer("qwen-image", [encoder], [str(base)], [str(other)]) == str(place)


def test_half_a_tokenizer_is_none(encoder, tmp_path):
    (tmp_path / "a/b/vocab.json").write_text("{}")
    with pytest.raises(MissingFile, match="vocab.json and merges.txt.*https://huggingface.co/Qwen/Qwen-Image"):
        find_tokenizer("qwen-image", [encoder], [str(tmp_path)])


def test_no_encoder_needs_no_tokenizer(tiny_files):
    assert find_tokenizer("qwen-image", [ModelSource("vae", (tiny_files.file("vae"),))], []) is None
