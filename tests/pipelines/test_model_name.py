"""Files of a layout that nobody knows exactly, taken for a known model by name."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth_backend.core import ModelConfig
from diffsynth_backend.core.loader.file import ModelFileError
from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline


@pytest.fixture
def fine_tune(tiny_files, tmp_path) -> str:
    """The denoiser with a tensor that its model does not have."""
    path = tmp_path / "fine_tune.safetensors"
    save_file({**load_file(tiny_files.file("transformer")), "training_step": torch.ones(1)}, path)
    return str(path)


def load(path: str, **options) -> QwenImagePipeline:
    return QwenImagePipeline.from_pretrained(torch.float32, "cpu", [ModelConfig(path=path, **options)])


def test_a_fine_tune_is_named_with_its_nearest_model(fine_tune):
    with pytest.raises(ModelFileError, match="nearest: qwen_image_dit, 1 of its .* keys differ: 1 unexpected"):
        load(fine_tune)


def test_a_name_says_what_it_is(fine_tune, tiny_files):
    ours, known = load(fine_tune, model_name="qwen_image_dit").dit, load(tiny_files.file("transformer")).dit
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), known.parameters(), strict=True))
