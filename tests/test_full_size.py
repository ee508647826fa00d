"""The published checkpoints in full size: recognised, mapped and loaded strictly, in next to no memory."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffsynth_backend.configs.model_configs import QWEN_IMAGE_CONFIGS, resolve
from diffsynth_backend.core import hash_model_file, load_model
from diffsynth_backend.core.loader.file import CorruptFile, MissingShards, ModelFileError
from diffsynth_backend.core.loader.model import build_on_meta
from diffsynth_backend.models.model_loader import ModelPool
from diffsynth_backend.models.qwen_image_controlnet import QwenImageBlockWiseControlNet
from tests.helpers.sparse import CANNY, CHECKPOINTS, DIT, Checkpoint, memory_growth

GIB = 2**30
REPACKAGED_VAE = "ccc42284ea13e1ad04693284c7a09be6"  # by others: the same weights in another layout
STATES = ("offload", "onload", "preparing")
ON_DISK = {"computation_dtype": torch.bfloat16, "computation_device": "cpu",
           **{f"{state}_{part}": "disk" for state in STATES for part in ("dtype", "device")}}
BY_STEM = pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=[checkpoint.stem for checkpoint in CHECKPOINTS])


@BY_STEM
def test_hash_is_the_registered_one(full_size, checkpoint: Checkpoint):
    assert hash_model_file(checkpoint.files) == checkpoint.model_hash


def test_files_have_the_published_size_and_take_no_space(full_size):
    stats = [Path(file).stat() for checkpoint in CHECKPOINTS for file in checkpoint.files]
    assert sum(stat.st_size for stat in stats) > 150e9
    assert sum(stat.st_blocks * 512 for stat in stats) < 8e6


@BY_STEM
def test_pool_loads_from_disk_under_one_gibibyte(full_size, checkpoint: Checkpoint):
    pool = ModelPool()
    names = [row["model_name"] for row in QWEN_IMAGE_CONFIGS if row["model_hash"] == checkpoint.model_hash]
    with memory_growth() as growth:  # Wan's autoencoder in the layout of Diffusers has the hash of Qwen-Image's
        pool.auto_load_model(checkpoint.files, vram_config=ON_DISK, vram_limit=0, wanted=names)
    loaded, = pool.loaded
    wanted = build_on_meta(resolve(checkpoint.model_class), checkpoint.extra_kwargs)
    assert loaded.model.state_dict().keys() == wanted.state_dict().keys()
    assert loaded.model.vram_management_enabled and all(parameter.is_meta for parameter in loaded.model.parameters())
    assert growth.anonymous is None or max(growth.anonymous, growth.peak) < GIB


def test_every_published_layout_of_the_family_is_here():
    assert {checkpoint.model_hash for checkpoint in CHECKPOINTS} | {REPACKAGED_VAE} == {
        row["model_hash"] for row in QWEN_IMAGE_CONFIGS}


def test_missing_shards_are_named(full_size):
    given = [file for file in DIT.files if "-00003-" not in file and "-00007-" not in file]
    with pytest.raises(MissingShards, match=r"9 of 9 shards expected, 2 missing: diffusion_pytorch_model-00003-of-00009"
                                            r"\.safetensors, diffusion_pytorch_model-00007-of-00009\.safetensors"):
        ModelPool().auto_load_model(given, vram_config=ON_DISK)


def extra_key(layout: dict) -> dict:
    return {**layout, "lora.weight": torch.empty(4, 4, device="meta")}


def wrong_shape(layout: dict) -> dict:
    return {**layout, "img_in.weight": torch.empty(3072, 65, device="meta")}


def missing_key(layout: dict) -> dict:
    return {name: tensor for name, tensor in layout.items() if name != "img_in.bias"}


VARIANTS = pytest.mark.parametrize("variant, difference", [
    (extra_key, r"1 unexpected: lora\.weight"),
    (missing_key, r"1 missing: img_in\.bias"),
    (wrong_shape, r"1 of wrong shape or type: img_in\.weight \(expected \[3072, 64\] \w+, found \[3072, 65\] \w+\)"),
])


@VARIANTS
def test_unknown_layout_names_hash_nearest_model_and_difference(full_size_folder, tmp_path, variant, difference):
    files = CANNY.write(tmp_path, variant(CANNY.layout()))
    message = (f"unknown layout {hash_model_file(files)}: .* nearest: qwen_image_blockwise_controlnet, "
               f"1 of its 362 keys differ: {difference}")
    with pytest.raises(ModelFileError, match=message):
        ModelPool().auto_load_model(files)


@VARIANTS
@pytest.mark.parametrize("vram_config", [None, ON_DISK], ids=["in memory", "on disk"])
def test_files_that_do_not_fit_are_refused_at_load(full_size_folder, tmp_path, variant, difference, vram_config):
    files = CANNY.write(tmp_path, variant(CANNY.layout()))
    with pytest.raises(ModelFileError, match=f"does not fit QwenImageBlockWiseControlNet: {difference}"):
        load_model(QwenImageBlockWiseControlNet, files, vram_config=vram_config)


def test_truncated_shard_is_named(full_size_folder, tmp_path):
    files = DIT.write(tmp_path, DIT.layout())
    with open(files[4], "r+b") as file:
        file.truncate(10**9)
    with pytest.raises(CorruptFile, match="00005-of-00009.safetensors: its header describes [0-9]+ bytes, the file has "
                                          "1000000000. The file is damaged or incomplete: delete it and download it"):
        ModelPool().auto_load_model(files, vram_config=ON_DISK)
