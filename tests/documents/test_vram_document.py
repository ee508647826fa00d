"""The examples of the document on `core.vram`, run as written on a published checkpoint in full size."""
from __future__ import annotations

import torch

from tests.helpers.documents import run
from tests.helpers.sparse import memory_growth

MIB = 2**20

SLOW = """
from diffsynth.core import load_state_dict
from diffsynth.models.qwen_image_controlnet import QwenImageBlockWiseControlNet

model = QwenImageBlockWiseControlNet() # Slow
path = "models/DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny/model.safetensors"
state_dict = load_state_dict(path, device="cpu")
model.load_state_dict(state_dict, assign=True)
"""

FAST = """
from diffsynth.core import load_state_dict, skip_model_initialization
from diffsynth.models.qwen_image_controlnet import QwenImageBlockWiseControlNet

with skip_model_initialization():
    model = QwenImageBlockWiseControlNet() # Fast
path = "models/DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny/model.safetensors"
state_dict = load_state_dict(path, device="cpu")
model.load_state_dict(state_dict, assign=True)
"""

LOAD_ALL = """
from diffsynth.core import load_state_dict

path = "models/DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny/model.safetensors"
state_dict = load_state_dict(path, device="cpu") # Slow
print(state_dict["img_in.weight"])
"""

DISK_MAP = """
from diffsynth.core import DiskMap

path = "models/DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny/model.safetensors"
state_dict = DiskMap(path, device="cpu") # Fast
print(state_dict["img_in.weight"])
"""


def is_filled_from_the_file(model: torch.nn.Module) -> bool:
    """The sparse file holds zeros in bf16."""
    return all(p.dtype == torch.bfloat16 and not p.is_meta for p in model.parameters()) and not model.img_in.bias.any()


def test_default_model_loading(full_size):
    # How slow torch is here needs no test: with meta as torch's default device it fills no weights, which spares 4.5 GB
    # and half a minute. The code is as written.
    with torch.device("meta"):
        model = run(SLOW)["model"]
    assert is_filled_from_the_file(model)


def test_model_loading_that_skips_initialization(full_size):
    with memory_growth() as growth:
        model = run(FAST)["model"]
    assert is_filled_from_the_file(model)
    assert growth.peak is None or growth.peak < 300 * MIB  # of 4.5 GB


def test_default_weight_loading(full_size, capsys):
    weight = run(LOAD_ALL)["state_dict"]["img_in.weight"]
    assert capsys.readouterr().out == f"{weight}\n"
    assert weight.shape == (3072, 64)


def test_disk_map_reads_the_tensor_that_is_asked_for(full_size, capsys):
    with memory_growth() as growth:
        state_dict = run(DISK_MAP)["state_dict"]
    assert capsys.readouterr().out == f"{torch.zeros(3072, 64, dtype=torch.bfloat16)}\n"
    assert "controlnet_blocks.59.output_proj.weight" in state_dict and len(state_dict) == 362
    assert growth.peak is None or growth.peak < 100 * MIB  # of 2 GB
