"""The command line: a picture at the printed path, or exit status 1 and one line that says what is wrong."""
from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth_backend.__main__ import main
from diffsynth_backend.configs.model_configs import MODEL_CONFIGS
from diffsynth_backend.core import hash_model_file
from diffsynth_backend.core.vram.presets import AUTO, VRAM_PRESETS
from tests.helpers.tiny import MODELS, TinyFiles

ROOT = Path(__file__).parents[1]


@pytest.fixture
def arguments(tiny_files: TinyFiles, tmp_path: Path, no_settings: None) -> list[str]:
    """A command that draws with the tiny model; later options replace its own."""
    files = [part for model in MODELS for part in ("--files", tiny_files.file(model))]
    output = str(tmp_path / "out" / "picture.png")
    return ["generate", "--prompt", "a red circle", "--output", output, "--device", "cpu", "--width", "32",
            "--height", "32", "--steps", "1", "--cfg", "1", "--seed", "1",
            "--tokenizer", tiny_files.tokenizer, *files]


def drawn(arguments: list[str], capsys: pytest.CaptureFixture) -> Image.Image:
    assert main(arguments) == 0
    return Image.open(capsys.readouterr().out.strip())


def error_of(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line of an error, after checking that there is nothing else to it."""
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert output.out == "" and "Traceback" not in output.err
    lines = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and output.err.endswith(f"{lines[0]}\n")
    return lines[0]


# ---- pictures -------------------------------------------------------------------------------------------------------

def test_a_program_prints_the_path_and_nothing_else(arguments):
    result = subprocess.run([sys.executable, "-m", "diffsynth_backend", *arguments], cwd=ROOT, capture_output=True,
                            text=True, check=False)
    assert result.returncode == 0, result.stderr
    path = arguments[arguments.index("--output") + 1]
    assert result.stdout == f"{path}\n"
    assert Image.open(path).size == (32, 32)
    assert "Loaded model: {" in result.stderr and "1/1" in result.stderr  # what is loaded, and progress


def test_the_same_seed_draws_the_same_picture_with_every_preset_of_equal_storage(arguments, capsys):
    pictures = {preset: drawn([*arguments, "--vram", preset], capsys).tobytes() for preset in VRAM_PRESETS}
    assert len({pictures[preset] for preset in VRAM_PRESETS if preset != "fp8"}) == 1
    assert drawn([*arguments, "--seed", "2"], capsys).tobytes() != pictures["full"]


def test_size_steps_guidance_and_tiling_are_passed_on(arguments, capsys):
    picture = drawn([*arguments, "--width", "48", "--steps", "2", "--cfg", "3", "--cfg-norm", "--tiled",
                     "--negative-prompt", "blue"], capsys)
    assert picture.size == (48, 32)


def test_input_image_is_resized_to_the_rounded_size(arguments, capsys, tmp_path):
    image = str(tmp_path / "input.png")
    Image.new("RGBA", (100, 70), "red").save(image)
    picture = drawn([*arguments, "--input-image", image, "--denoise", "0.5", "--width", "33"], capsys)
    assert picture.size == (48, 32)


def test_vram_limit_with_a_preset_that_looks_at_it(arguments, capsys):
    assert drawn([*arguments, "--vram", "low", "--vram-limit", "0"], capsys).size == (32, 32)


def logged(arguments: list[str], caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a command that draws says about memory."""
    caplog.set_level(logging.INFO)
    assert main(arguments) == 0
    return [line for line in caplog.messages if not line.startswith("Load")]


def test_auto_is_the_default_and_says_why(arguments, caplog):
    [line] = logged(arguments, caplog)
    assert line.startswith("auto: full, because ")


def test_auto_takes_the_disk_where_the_weights_do_not_fit(arguments, caplog, monkeypatch):
    monkeypatch.setattr("diffsynth_backend.core.device.memory_info", lambda device: (2.0, 16.0))
    decision, _, dit, *_ = logged(arguments, caplog)
    assert decision.startswith("auto: disk, because ") and "2.0 GiB of free RAM" in decision
    assert dit.startswith("dit at 32×32: ")


def test_auto_takes_a_limit(arguments, caplog):
    assert logged([*arguments, "--vram-limit", "0"], caplog)[0].startswith("auto: low, because vram_limit is 0 GiB")


def test_layers_of_the_disk_may_wait_in_ram(arguments, caplog):
    lines = logged([*arguments, "--vram", "disk", "--vram-limit", "0", "--ram-limit", "1"], caplog)
    assert all("0.0 MiB on disk" in line for line in lines[:3])


def test_the_plan_is_logged_before_the_run(arguments, caplog):
    lines = logged([*arguments, "--vram", "disk", "--vram-limit", "0.02", "--cfg", "3"], caplog)
    assert [line.split(":")[0] for line in lines[:3]] == ["text_encoder", "dit at 32×32", "vae"]
    assert all("stay on the device" in line for line in lines[:3])


# ---- errors ---------------------------------------------------------------------------------------------------------

ERRORS = [
    (["--model", "qwen-imag"], "unknown model 'qwen-imag'; known: demo, qwen-image"),
    (["--vram", "low", "--ram-limit", "4"], "no layer is read from disk while its model is in use"),
    (["--vram", "disk", "--ram-limit", "-1"], "ram_limit must be a number of GiB"),
    (["--vram", "full", "--vram-limit", "4"],
     "--vram full does not look at --vram-limit; presets that do: low, disk, auto"),
    (["--vram", "fp8", "--vram-limit", "4"], "--vram fp8 does not look at --vram-limit"),
    (["--vram", "low", "--vram-limit", "nan"], "vram_limit must be at least 0 GiB"),
    (["--vram-limit", "-1"], "vram_limit must be at least 0 GiB"),
    (["--vram", "disk", "--vram-limit", "0.001"], "but the floor is"),
    (["--width", "0"], "width must be a positive whole number of pixels, got 0"),
    (["--height", "-16"], "height must be a positive whole number of pixels, got -16"),
    (["--steps", "0"], "num_inference_steps must be a whole number"),
    (["--cfg", "nan"], "cfg_scale must be a finite number, got nan"),
    (["--seed", str(2**64)], "seed must be a whole number in"),
    (["--denoise", "0.5"], "denoising_strength 0.5 needs an input_image"),
    (["--device", "gpu"], "unknown device 'gpu'"),
    (["--device", "cuda:99"], "device 'cuda:99' is not there"),
    (["--input-image", "gone.png"], "gone.png"),
    (["--tokenizer", "gone"], "no tokenizer in gone: vocab.json, merges.txt missing"),
    (["--files", "gone.safetensors"], "gone.safetensors does not exist"),
]


@pytest.mark.parametrize("options, message", ERRORS, ids=[" ".join(options) for options, _ in ERRORS])
def test_errors_are_one_line(arguments, capsys, options, message):
    assert message in error_of([*arguments, *options], capsys)


def test_an_input_image_that_is_none(arguments, capsys, tmp_path):
    (tmp_path / "input.png").write_text("not a picture")
    assert "input.png" in error_of([*arguments, "--input-image", str(tmp_path / "input.png")], capsys)


def test_nothing_is_written_after_an_error(arguments, capsys, tmp_path):
    error_of([*arguments, "--width", "0"], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, message", [
    ([], "COMMAND"), (["generate"], "--prompt"),
    (["generate", "--prompt", "x", "--vram", "lowest"], "invalid choice: 'lowest'"),
    (["generate", "--prompt", "x", "--vram", "custom"], "invalid choice: 'custom'"),
    (["generate", "--prompt", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
    (["generate", "--prompt", "x", "--steps", "many"], "invalid int value: 'many'"),
])
def test_options_that_do_not_parse_exit_with_usage(capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2
    output = capsys.readouterr().err
    assert output.startswith("usage: python -m diffsynth_backend") and message in output


def test_help_names_every_preset(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in (*VRAM_PRESETS, AUTO))


# ---- files ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def pickle(tiny_files: TinyFiles, tmp_path: Path, no_settings: None) -> str:
    """The tiny denoiser as a pickle."""
    torch.save(load_file(tiny_files.file("transformer")), tmp_path / "dit.pth")
    return str(tmp_path / "dit.pth")


def test_inspect_says_what_files_are(tiny_files, pickle, capsys):
    assert main(["inspect", pickle, tiny_files.file("vae")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == pickle and lines[1] == f"  hash     {hash_model_file(pickle)}"
    assert "  model    qwen_image_dit" in lines and "  model    qwen_image_vae" in lines
    assert "  tensors  205: 205 bfloat16" in lines
    assert any(line.startswith("  format   pickle; convert it: ") for line in lines)


def test_inspect_groups_shards_and_sees_through_repackaging(tiny_files, tmp_path, capsys, no_settings):
    weights = {f"model.diffusion_model.{name}": tensor
               for name, tensor in load_file(tiny_files.file("transformer")).items()}
    for i, names in enumerate((sorted(weights)[:100], sorted(weights)[100:]), 1):
        save_file({name: weights[name] for name in names}, tmp_path / f"m-0000{i}-of-00002.safetensors")
    assert main(["inspect", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.count("hash") == 1 and "(and 1 more shards)" in output
    assert "  model    qwen_image_dit, repackaged under 'model.diffusion_model.'" in output


def test_inspect_names_the_nearest_of_an_unknown_file(tiny_files, tmp_path, capsys, no_settings):
    weights = load_file(tiny_files.file("transformer"))
    weights.pop("img_in.bias")
    save_file(weights, tmp_path / "m.safetensors")
    assert main(["inspect", str(tmp_path / "m.safetensors")]) == 1
    output = capsys.readouterr()
    assert "  nearest  qwen_image_dit, 1 of its 205 keys differ: 1 missing: img_in.bias" in output.out
    assert output.err.startswith("error: 1 of the models are unknown: ") and "--registry" in output.err


def test_inspect_with_a_registry_file(tmp_path, capsys, no_settings):
    save_file({"w": torch.ones(1)}, tmp_path / "m.safetensors")
    row = {"model_hash": hash_model_file(tmp_path / "m.safetensors"), "model_name": "my_vae",
           "model_class": "models.qwen_image_vae.QwenImageVAE"}
    (tmp_path / "registry.json").write_text(json.dumps({"models": [row]}))
    rows = list(MODEL_CONFIGS)
    try:
        assert main(["inspect", str(tmp_path / "m.safetensors"), "--registry", str(tmp_path / "registry.json")]) == 0
    finally:
        MODEL_CONFIGS[:] = rows
    assert "  model    my_vae" in capsys.readouterr().out


def test_convert_writes_safetensors_of_the_same_hash(pickle, tmp_path, capsys):
    output = str(tmp_path / "dit.safetensors")
    assert main(["convert", pickle, output]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert hash_model_file(output) == hash_model_file(pickle)
    assert "exists already; choose another name" in error_of(["convert", pickle, output], capsys)


@pytest.mark.parametrize("arguments, message", [
    (["inspect", "gone.safetensors"], "gone.safetensors does not exist"),
    (["inspect", "x.gguf"], "x.gguf does not exist"),
    (["convert", "gone.pth", "out.safetensors"], "gone.pth does not exist"),
    (["inspect", "gone.safetensors", "--registry", "gone.json"], "gone.json cannot be read"),
])
def test_errors_about_files_are_one_line(capsys, arguments, message):
    assert message in error_of(arguments, capsys)


def test_a_model_that_makes_videos_is_refused_before_anything_is_loaded(capsys):
    assert "makes videos, and this command draws pictures" in error_of(
        ["generate", "--prompt", "a dog", "--model", "wan2.1-t2v-1.3b"], capsys)
