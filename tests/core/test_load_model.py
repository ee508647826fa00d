"""load_model: every way from a file into a model, and one clear error, before any run, for files that do not fit."""
from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth_backend.core import AutoWrappedLinear, AutoWrappedModule, load_model
from diffsynth_backend.core.loader.file import ModelFileError
from diffsynth_backend.core.loader.model import build_on_meta
from diffsynth_backend.core.vram import DiskMap, iter_managed, onload_model
from diffsynth_backend.models.qwen_image_dit import QwenImageDiT, RMSNorm

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


class Rotary(nn.Module):
    """Frequencies that no file holds, a persistent buffer and an integer one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 1 / 10000 ** (torch.arange(4) / 4), persistent=False)
        self.register_buffer("shift", torch.zeros(4))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.frequencies.cos().to(x.dtype) + self.shift + self.count


class Net(nn.Module):
    def __init__(self, dim: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=bias)
        self.rotary = Rotary()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.rotary(self.linear(x)) * self.scale


MAP = {nn.Linear: AutoWrappedLinear, Rotary: AutoWrappedModule}
ON_DISK = {"offload_dtype": "disk", "offload_device": "disk", "onload_dtype": "disk", "onload_device": "disk",
           "computation_dtype": BF16, "computation_device": "cpu"}
IN_RAM = {"offload_dtype": BF16, "offload_device": "cpu", "computation_dtype": BF16, "computation_device": "cpu"}
X = torch.linspace(-1, 1, 8, dtype=BF16).reshape(2, 4)


@pytest.fixture
def source() -> Net:
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    net.scale.normal_()
    net.rotary.shift.normal_()
    net.rotary.count.fill_(2)
    return net


@pytest.fixture
def path(source: Net, tmp_path: Path) -> str:
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    return str(tmp_path / "net.safetensors")


def expected(source: Net) -> Tensor:
    """The unmanaged model in bfloat16, with the frequencies as the constructor computes them."""
    plain = Net(bias=source.linear.bias is not None).to(BF16)
    plain.load_state_dict(source.state_dict())
    plain.rotary.frequencies = source.rotary.frequencies
    return plain(X)


WAYS = {
    "plain": {},
    "disk map": {"use_disk_map": True},
    "in RAM": {"module_map": MAP, "vram_config": IN_RAM},
    "in RAM, through a disk map": {"module_map": MAP, "vram_config": IN_RAM, "use_disk_map": True},
    "on disk": {"module_map": MAP, "vram_config": ON_DISK},
    "on disk, nothing resident": {"module_map": MAP, "vram_config": ON_DISK, "vram_limit": 0},
    "one block": {"vram_config": IN_RAM},
    "config that asks for no management": {"module_map": MAP, "vram_config": {"computation_dtype": BF16}},
}


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_gives_the_same_model(source, path, way, inference_mode):
    with torch.inference_mode(inference_mode):
        model = load_model(Net, path, **way)
        assert torch.equal(model(X), expected(source))
        onload_model(model)
        assert torch.equal(model(X), expected(source))
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    assert model.rotary.frequencies.dtype == torch.float32 and model.rotary.count.item() == 2
    assert model.scale.dtype == BF16


def test_dtype_of_the_files_is_kept_on_request(source, path):
    model = load_model(Net, path, torch_dtype=None)
    assert torch.equal(model.linear.weight, source.linear.weight)


def test_config_converter_and_several_files(tmp_path):
    net = Net(bias=False)
    state_dict = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    for name, tensor in state_dict.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    paths = sorted(str(file) for file in tmp_path.iterdir())

    def converter(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix("net."): state_dict[name] for name in state_dict}

    for way in ({}, {"use_disk_map": True}, {"module_map": MAP, "vram_config": ON_DISK}):
        model = load_model(Net, paths, {"bias": False}, BF16, state_dict_converter=converter, **way)
        assert torch.equal(model(X), expected(net))
    model = load_model(Net, None, {"bias": False}, state_dict_converter=converter, state_dict=state_dict)
    assert torch.equal(model.linear.weight, net.linear.weight.to(BF16))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_files_that_do_not_fit_are_refused_before_any_run(source, tmp_path, way):
    state_dict = source.state_dict()
    state_dict["linear.weight"] = torch.zeros(4, 5)
    state_dict["rotary.count"] = torch.tensor(1.5)
    del state_dict["linear.bias"]
    state_dict |= {f"extra.{n}": torch.zeros(1) for n in range(7)}
    save_file(state_dict, tmp_path / "other.safetensors")
    with pytest.raises(ModelFileError) as error:
        load_model(Net, str(tmp_path / "other.safetensors"), **way)
    message = str(error.value)
    assert "other.safetensors does not fit Net" in message and "1 missing: linear.bias" in message
    assert "7 unexpected: " in message and message.count("extra.") == 5
    assert "linear.weight (expected [4, 4] float32, found [4, 5] float32)" in message
    assert "rotary.count (expected [] int64, found [] float32)" in message


def test_settings_that_contradict_each_other(path, source):
    with pytest.raises(ValueError, match="module_map is given without vram_config"):
        load_model(Net, path, module_map=MAP)
    with pytest.raises(ValueError, match="vram_limit is given, but nothing is managed"):
        load_model(Net, path, vram_limit=4)
    with pytest.raises(ValueError, match="state dict cannot be kept on"):
        load_model(Net, None, module_map=MAP, vram_config=ON_DISK, state_dict=source.state_dict())
    with pytest.raises(ValueError, match="no model file given"):
        load_model(Net, [])


def test_buffers_computed_from_parameters_are_refused(path):
    class Derived(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("norm", self.linear.weight.norm(), persistent=False)

    with pytest.raises(ModelFileError, match=r"Derived computes buffers from parameters .*: norm"):
        load_model(Derived, path)


def test_weights_in_ram_do_not_keep_the_files(path):
    model = load_model(Net, path, module_map=MAP, vram_config=IN_RAM, use_disk_map=True)
    assert not any(isinstance(layer._managed.source, DiskMap) for layer in iter_managed(model))


def sparse_shards(prefix: str, count: int) -> None:
    """The full-size Qwen-Image transformer as files with a true header and a hole for data."""
    tensors = list(build_on_meta(QwenImageDiT).state_dict().items())
    Path(prefix).parent.mkdir(parents=True)
    for shard in range(count):
        header, end = {}, 0
        for name, tensor in tensors[shard::count]:
            start, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with Path(f"{prefix}-{shard + 1:05d}-of-{count:05d}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(file.tell() + end)


def test_documented_example_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prefix = "models/Qwen/Qwen-Image/transformer/diffusion_pytorch_model"
    sparse_shards(prefix, 9)
    model_path = [prefix + f"-0000{i}-of-00009.safetensors" for i in range(1, 10)]

    model = load_model(
        QwenImageDiT,
        model_path,
        module_map={
            torch.nn.Linear: AutoWrappedLinear,
            RMSNorm: AutoWrappedModule,
        },
        vram_config={
            "offload_dtype": "disk",
            "offload_device": "disk",
            "onload_dtype": "disk",
            "onload_device": "disk",
            "preparing_dtype": torch.bfloat16,
            "preparing_device": "cuda",
            "computation_dtype": torch.bfloat16,
            "computation_device": "cuda",
        },
        vram_limit=0,
    )

    assert len(list(iter_managed(model))) == 1087 and all(p.is_meta for p in model.parameters())
