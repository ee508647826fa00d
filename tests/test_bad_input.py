"""What people get wrong, through the public API: each has a message that names the thing, and what to do.

The pipeline is a real one with random weights. Values are refused before any model runs.
"""
from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth_backend.core import ModelConfig
from diffsynth_backend.core.environment import EnvironmentValueError
from diffsynth_backend.core.loader.download import HUBS
from diffsynth_backend.core.loader.file import CorruptFile, MissingFile, MissingShards, ModelFileError
from diffsynth_backend.core.vram.presets import vram_preset
from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline, model_fn_qwen_image
from tests.helpers.tiny import MODELS, TinyFiles

NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def loaded(tiny_files: TinyFiles) -> QwenImagePipeline:
    return tiny_files.load()


@pytest.fixture
def pipe(loaded: QwenImagePipeline, no_settings: None) -> QwenImagePipeline:
    return loaded


def draw(pipe: QwenImagePipeline, prompt="a red circle", **options) -> Image.Image:
    return pipe(prompt, **{"height": 32, "width": 32, "num_inference_steps": 1, "seed": 0, "cfg_scale": 1.0,
                           "progress_bar_cmd": iter, **options})


def must_not_run(*_: object, **__: object) -> None:
    raise AssertionError("refused too late")


# ---- texts ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt, negative_prompt", [("", ""), ("", "blue"), ("red", ""), (" \n", "\U0001f642")])
def test_empty_and_strange_texts_draw(pipe, prompt, negative_prompt):
    picture = draw(pipe, prompt, negative_prompt=negative_prompt, cfg_scale=4.0)
    assert picture.size == (32, 32)


@pytest.mark.parametrize("text", [None, 7, b"red", ["red"]])
@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_what_is_no_text(pipe, name, text):
    with pytest.raises(TypeError, match=f"a prompt must be a text, got {type(text).__name__}"):
        draw(pipe, **{name: text})


def test_text_longer_than_the_encoders_limit(pipe):
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, the text encoder takes \d+: shorten it"):
        draw(pipe, "0 " * 5000)


# ---- numbers --------------------------------------------------------------------------------------------------------

VALUES = [
    *[({side: value}, f"{side} must be a positive whole number of pixels, got {value!r}")
      for side in ("height", "width") for value in (NAN, INFINITY, -32, 0, 32.5, "32", None)],
    ({"height": 10**6, "width": 10**6}, "more than 268435456 pixels; ask for a smaller picture"),
    ({"num_inference_steps": 0}, r"num_inference_steps must be a whole number in 1…\d+, got 0"),
    ({"num_inference_steps": -3}, r"num_inference_steps must be a whole number in 1…\d+, got -3"),
    ({"num_inference_steps": 2.5}, r"num_inference_steps must be a whole number in 1…\d+, got 2\.5"),
    ({"cfg_scale": NAN}, "cfg_scale must be a finite number, got nan"),
    ({"cfg_scale": INFINITY}, "cfg_scale must be a finite number, got inf"),
    ({"seed": 2**64}, "seed must be a whole number in -9223372036854775808…18446744073709551615, got 1844"),
    ({"seed": -2**63 - 1}, "seed must be a whole number in"),
    ({"seed": 1.5}, "seed must be a whole number in .*, got 1.5"),
    ({"denoising_strength": 0.5}, "denoising_strength 0.5 needs an input_image"),
    ({"denoising_strength": 0.0, "input_image": Image.new("RGB", (32, 32))}, "denoising_strength must lie above 0"),
    ({"denoising_strength": NAN, "input_image": Image.new("RGB", (32, 32))}, "denoising_strength must lie .* got nan"),
    ({"tiled": True, "tile_stride": 0}, r"tile_stride must lie in 1..tile_size \(128\), got 0"),
    ({"rand_device": "gpu"}, "unknown device 'gpu'.*: expected a name such as"),
]


@pytest.mark.parametrize("options, message", VALUES, ids=[str(options)[:60] for options, _ in VALUES])
def test_values_out_of_range_are_refused_before_any_model_runs(pipe, monkeypatch, options, message):
    for model in (pipe.text_encoder, pipe.dit, pipe.vae):
        monkeypatch.setattr(model, "forward", must_not_run)
    monkeypatch.setattr(pipe.vae, "encode", must_not_run)
    with pytest.raises(ValueError, match=message):
        draw(pipe, **options)


@pytest.mark.parametrize("seed", [-2**63, -1, 0, 2**64 - 1])
def test_all_seeds_of_torch_draw(pipe, seed):
    assert draw(pipe, seed=seed).size == (32, 32)


def test_sizes_are_rounded_up_and_it_is_said(pipe, caplog):
    caplog.set_level(logging.INFO)
    assert draw(pipe, height=17, width=33).size == (48, 32)
    assert "height × width 17×33 rounded up to 32×48 (multiples of 16 and 16)" in caplog.messages


# ---- pictures and latents -------------------------------------------------------------------------------------------

def test_picture_of_another_size(pipe):
    with pytest.raises(ValueError, match=r"input_image is 64×48 but the picture to draw is 32×32 \(width × height\)"):
        draw(pipe, input_image=Image.new("RGB", (64, 48)), denoising_strength=0.5)


def test_picture_of_another_kind(pipe):
    with pytest.raises(ValueError, match=r"input_image is a .* tensor of shape \(1, 3, 32, 32\); expected floats"):
        draw(pipe, input_image=torch.zeros(1, 3, 32, 32), denoising_strength=0.5)
    with pytest.raises(TypeError, match="input_image must be a PIL image or a tensor .*, got str"):
        draw(pipe, input_image="picture.png", denoising_strength=0.5)


WRONG_LATENTS = pytest.mark.parametrize("shape", [(1, 4, 4, 4), (16, 4, 4), (1, 16, 1, 4, 4), (1, 16, 0, 4),
                                                  (0, 16, 4, 4)])


def expectation(shape: tuple[int, ...], channels: int = 16) -> str:
    numbers = ", ".join(map(str, shape))
    return rf"has shape \({numbers}\); expected \(batch, {channels}, height, width\)"


@WRONG_LATENTS
def test_latents_of_wrong_shape_are_not_decoded(pipe, shape):
    with pytest.raises(ValueError, match="the latent " + expectation(shape)):
        pipe.decode_latents(torch.zeros(shape))


@WRONG_LATENTS
def test_latents_of_wrong_shape_are_not_denoised(pipe, shape):
    pipe.set_schedule(32, 32, 1)
    sides = [{"prompt_emb": torch.zeros(1, 3, 128)}, {}]
    with pytest.raises(ValueError, match="the latent " + expectation(shape)):
        pipe.denoise({"latents": torch.zeros(shape)}, *sides)


def test_latents_with_odd_sides_are_not_denoised(pipe):
    with pytest.raises(ValueError, match=expectation((1, 16, 5, 4)) + " with sides above 0 that are multiples of 2"):
        model_fn_qwen_image(pipe.dit, torch.zeros(1, 16, 5, 4), torch.ones(1), torch.zeros(1, 3, 128))


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (3, 32, 32), (1, 3, 33, 32)])
def test_images_of_wrong_shape_are_not_encoded(pipe, shape):
    with pytest.raises(ValueError, match="the image " + expectation(shape, 3)):
        pipe.encode_image(torch.zeros(shape))


# ---- models ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("absent, name", [*zip(MODELS, ("text_encoder", "dit", "vae"))])
def test_model_that_is_needed_and_not_loaded(tiny_files, absent, name):
    pipe = tiny_files.load(tuple(model for model in MODELS if model != absent))
    with pytest.raises(ValueError, match=f"needs {name}, which is not loaded: add its files to model_configs"):
        draw(pipe)


def from_files(*paths: str | list[str] | None, **fields) -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(device="cpu", model_configs=[ModelConfig(path=p, **fields) for p in paths])


def test_missing_shard(tmp_path):
    shards = [str(tmp_path / f"model-0000{i}-of-00003.safetensors") for i in (1, 2, 3)]
    for path in shards[:2]:
        save_file({Path(path).name: torch.zeros(2)}, path)
    with pytest.raises(MissingShards, match=r"3 of 3 shards expected, 1 missing: model-00003-of-00003\.safetensors"):
        from_files(shards[:2])
    with pytest.raises(MissingShards, match=r"1 missing: model-00003-of-00003\.safetensors"):
        from_files(shards)


def test_missing_file(tmp_path):
    with pytest.raises(MissingFile, match=r"gone\.safetensors does not exist; check the path or download the model"):
        from_files(str(tmp_path / "gone.safetensors"))


@pytest.mark.parametrize("kept, message", [
    (1000, "a header of [0-9]+ bytes expected, the file has 1000. The file is damaged or incomplete: delete it and"),
    (-1, "its header describes [0-9]+ bytes, the file has [0-9]+. The file is damaged or incomplete: delete it and"),
    (5, "8 bytes of header length expected, the file has 5"),
    (0, r"is empty \(0 bytes\): its download failed; delete it and download it again"),
])
def test_truncated_file(tiny_files, tmp_path, kept, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(Path(tiny_files.file("vae")).read_bytes()[:kept])
    with pytest.raises(CorruptFile, match=message):
        from_files(str(path))


def test_unknown_layout(tiny_files, tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_file({**load_file(tiny_files.file("transformer")), "extra": torch.zeros(1)}, path)
    with pytest.raises(ModelFileError, match=r"unknown layout [0-9a-f]{32}: .*; nearest: qwen_image_dit, 1 of its \d+ "
                                             "keys differ: 1 unexpected: extra"):
        from_files(path)


def test_folder_without_safetensors(tmp_path):
    (tmp_path / "readme.md").write_text("nothing here")
    with pytest.raises(MissingFile, match=r"is a folder without \.safetensors files; pass the model's files"):
        from_files(str(tmp_path))


def test_pattern_that_matches_nothing(tmp_path, no_settings):
    config = ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="vae/*.safetensors", skip_download=True,
                         local_model_path=str(tmp_path))
    with pytest.raises(MissingFile, match=r"no file in .*Qwen-Image matches 'vae/\*\.safetensors'; set local"):
        QwenImagePipeline.from_pretrained(device="cpu", model_configs=[config])


@pytest.mark.parametrize("path", [None, "", []])
def test_unset_path(path):
    with pytest.raises(ModelFileError, match=r'unset path: use ModelConfig\(path="…"\) for local files'):
        from_files(path)


def test_missing_tokenizer(tiny_files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*: vocab\.json, merges\.txt missing; get"):
        tiny_files.load(tokenizer=str(tmp_path))


# ---- settings -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, value, allowed", [
    ("DIFFSYNTH_SKIP_DOWNLOAD", "ture", "1, true, yes, on, 0, false, no, off"),
    ("DIFFSYNTH_DOWNLOAD_SOURCE", "hugingface", "modelscope, huggingface"),
])
def test_misspelt_environment_value_of_the_loader(monkeypatch, no_settings, tmp_path, name, value, allowed):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(HUBS, "modelscope", must_not_run)
    monkeypatch.setenv(name, value)
    config = ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="vae/*.safetensors")
    with pytest.raises(EnvironmentValueError, match=f"{name}='{value}' is not understood.*one of {allowed}"):
        QwenImagePipeline.from_pretrained(device="cpu", model_configs=[config])


def test_misspelt_environment_value_of_the_attention(pipe, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "flash_attention_33")
    with pytest.raises(ValueError, match="DIFFSYNTH_ATTENTION_IMPLEMENTATION='flash_attention_33' is not understood"):
        draw(pipe)


def test_unknown_vram_preset():
    with pytest.raises(ValueError, match="unknown VRAM preset 'lowest'; known: full, balanced, low, fp8, disk"):
        vram_preset("lowest", torch.bfloat16, "cpu")


def test_unknown_device():
    with pytest.raises(ValueError, match="unknown device 'gpu'.*: expected a name such as 'cuda', 'cuda:1', 'mps'"):
        QwenImagePipeline.from_pretrained(device="gpu")


@pytest.mark.parametrize("device", ["cuda:99", "mps:7", "xpu:99"])
def test_device_that_is_not_there(device):
    message = rf"device '{device}' is not there: torch .* sees \d+ devices of the kind '{device.partition(':')[0]}'"
    with pytest.raises(ValueError, match=message):
        QwenImagePipeline.from_pretrained(device=device)


def test_vram_limit_without_management(tiny_files):
    with pytest.raises(ValueError, match="vram_limit is 4, but no model is managed: set offload_dtype"):
        tiny_files.load(("vae",), vram_limit=4)


def test_ram_limit_where_nothing_is_read_from_disk(tiny_files):
    with pytest.raises(ValueError, match="ram_limit is 4, but no model reads its layers from disk while it is in use"):
        tiny_files.load(("vae",), ram_limit=4, **vram_preset("low", torch.float32, "cpu"))


@pytest.mark.parametrize("limit", [-1, NAN])
def test_vram_limit_that_is_no_amount(tiny_files, limit):
    with pytest.raises(ValueError, match="vram_limit must be at least 0 GiB, or None for no limit"):
        tiny_files.load(("vae",), vram_limit=limit, **vram_preset("disk", torch.float32, "cpu"))
