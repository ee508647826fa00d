"""The engine on a real device: the bits of resident weights, and never more memory than the limit says."""
from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffsynth_backend.configs.vram_management_module_maps import module_map_of
from diffsynth_backend.core.loader.model import load_model
from diffsynth_backend.core.vram import Loop, Residency, iter_managed
from diffsynth_backend.core.vram.placement import ResidencyBudget
from diffsynth_backend.core.vram.presets import vram_preset
from diffsynth_backend.core.vram.timestep_table import Schedule
from diffsynth_backend.models.qwen_image_dit import QwenImageDiT

GIB = 2**30
SIZES = {"num_layers": 8, "num_attention_heads": 8, "attention_head_dim": 128, "joint_attention_dim": 512}
BF16, CUDA = torch.bfloat16, torch.device("cuda")
STEPS = 4


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """About 0.8 GB of random weights in Qwen-Image's layout."""
    torch.manual_seed(0)
    model = QwenImageDiT(**SIZES).to(BF16)
    path: Path = tmp_path_factory.mktemp("cuda") / "dit.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def inputs() -> list[tuple[Tensor, Tensor]]:
    """Latents and prompt embedding of both sides."""
    generator = torch.Generator(CUDA).manual_seed(0)
    latents = torch.randn(1, 16, 64, 64, generator=generator, device=CUDA, dtype=BF16)
    return [(latents, torch.randn(1, length, 512, generator=generator, device=CUDA, dtype=BF16)) for length in (20, 7)]


def predictions(model: QwenImageDiT, residency: Residency, inputs) -> list[Tensor]:
    """The predictions of each step and side."""
    timesteps = torch.linspace(1000, 100, STEPS)
    latents = inputs[0][0]
    activations = model.activation_bytes(1, 64, 64, 20, BF16)
    loop = Loop(STEPS, 2, activations, Schedule(tuple(timesteps), 1, BF16))
    found = []
    with torch.inference_mode(), residency.loop(loop):
        for timestep in timesteps:
            at_device = timestep.reshape(1).to(CUDA)
            residency.now_at(at_device, float(timestep))
            found += residency.run([partial(model, latents, at_device, prompt) for _, prompt in inputs])
    return found


def load(file: str, preset: str, limit: float | None) -> QwenImageDiT:
    if preset == "full":
        return load_model(QwenImageDiT, file, SIZES, torch_dtype=BF16, device=CUDA)
    return load_model(QwenImageDiT, file, SIZES, module_map=module_map_of(QwenImageDiT),
                      vram_config=vram_preset(preset, BF16, CUDA), vram_limit=limit)


@pytest.mark.parametrize("limit", [0, 0.35, 0.6, None])
@pytest.mark.parametrize("preset", ["low", "disk"])
def test_same_bits_within_the_limit(file, inputs, preset, limit):
    resident = load(file, "full", None)
    expected = predictions(resident, Residency([resident]), inputs)
    del resident
    model = load(file, preset, limit)
    residency = Residency([model])
    for _ in range(2):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        got = predictions(model, residency, inputs)
        for index, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert torch.equal(a, b), f"prediction {index}"
        if limit:
            assert torch.cuda.max_memory_allocated() - before <= 1.02 * limit * GIB


def test_what_waits_in_ram_is_pinned_and_read_once(file, inputs):
    resident = load(file, "full", None)
    expected = predictions(resident, Residency([resident]), inputs)
    del resident
    model = load_model(QwenImageDiT, file, SIZES, module_map=module_map_of(QwenImageDiT),
                       vram_config=vram_preset("disk", BF16, CUDA), vram_limit=ResidencyBudget(0, 4 * GIB))
    residency = Residency([model])
    waiting = [layer.management for layer in iter_managed(model)]
    seen: list[bool] = []
    model.transformer_blocks[-1].register_forward_hook(lambda *_: seen.extend(
        tensor.is_pinned() for managed in waiting if managed.waits for tensor in managed.current
        if tensor is not None and tensor.device.type == "cpu"))
    for index, (a, b) in enumerate(zip(predictions(model, residency, inputs), expected, strict=True)):
        assert torch.equal(a, b), f"prediction {index}"
    assert seen and all(seen)
    assert residency.traffic.read_bytes <= 1.05 * Path(file).stat().st_size


def test_fp8_crosses_as_fp8(file, inputs):
    model = load(file, "low", 0)
    wide = Residency([model])
    predictions(model, wide, inputs)
    fp8 = torch.float8_e4m3fn
    fields = vram_preset("low", BF16, CUDA) | {"offload_dtype": fp8, "onload_dtype": fp8}
    narrow = Residency([load_model(QwenImageDiT, file, SIZES, module_map=module_map_of(QwenImageDiT),
                                   vram_config=fields, vram_limit=0)])
    predictions(narrow.models[0], narrow, inputs)
    assert narrow.traffic.moved_bytes <= 0.51 * wide.traffic.moved_bytes


def test_fifty_runs_do_not_grow(file, inputs):
    model = load(file, "disk", 0.35)
    residency = Residency([model])
    predictions(model, residency, inputs)
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        predictions(model, residency, inputs)
    assert torch.cuda.memory_allocated() == before
