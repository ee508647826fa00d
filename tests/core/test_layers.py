"""VRAM management on the CPU: every documented combination gives the bits of an unmanaged model of the same storage."""
from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth_backend.core.vram import (
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    DiskMap,
    ResidencyBudget,
    enable_vram_management,
    iter_managed,
    offload_model,
    onload_model,
)
from diffsynth_backend.core.vram.placement import Placements
from tests.helpers.vram_fields import cpu_fields

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
DIM = 16
GIB = 2**30


class Norm(nn.Module):
    """Parameters beside a persistent buffer, one that only the constructor knows, and an integer one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_buffer("offset", torch.linspace(-1, 1, dim))
        self.register_buffer("table", torch.arange(dim) / 3, persistent=False)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight + self.offset + self.table.to(x.dtype)) / self.steps


class Mlp(nn.Module):
    """Managed as a whole: its forward reads a child's parameter itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype)) * self.scale


class Block(nn.Module):
    """Bare parameters next to children."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(dim))
        self.norm = Norm(dim)
        self.linear = nn.Linear(dim, dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.mlp(torch.tanh(self.linear(self.norm(x))))


class Net(nn.Module):
    """Everything above, a bare parameter of the root, and a module outside the map."""

    def __init__(self, dim: int = DIM, num_blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, dim)
        self.scale = nn.Parameter(torch.ones(dim))
        self.blocks = nn.ModuleList(Block(dim) for _ in range(num_blocks))
        self.outside = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.out(self.outside(x))


MAP = {
    nn.Linear: AutoWrappedLinear,
    "torch.nn.Embedding": AutoWrappedModule,
    Norm: AutoWrappedModule,
    Mlp: AutoWrappedModule,
    Block: AutoWrappedNonRecurseModule,
}
NUM_LAYERS = 2 + 3 * 4

# Storage dtype of offload, onload, preparing; None is the disk.
COMBINATIONS = {
    "cpu offload": (BF16, BF16, BF16),
    "fp8 storage": (FP8, FP8, FP8),
    "fp8 at rest": (FP8, BF16, BF16),
    "float32 at rest": (torch.float32, BF16, BF16),
    "disk, bf16 in RAM": (None, BF16, BF16),
    "disk, fp8 in RAM": (None, FP8, FP8),
    "full disk": (None, None, BF16),
    "full disk, fp8 prepared": (None, None, FP8),
    "always disk": (None, None, None),
}
LIMITS = {"unlimited": None, "none": 0, "small": 3000 / GIB}
IDS = torch.tensor([[1, 5, 2], [0, 7, 7]])


def config(offload, onload, preparing, computation=BF16) -> dict:
    return cpu_fields(offload, onload, preparing, computation)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_()
    return model


@pytest.fixture
def disk_map(net: Net, tmp_path: Path) -> DiskMap:
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    return DiskMap(str(tmp_path / "net.safetensors"))


def managed_copy(net: Net, disk_map: DiskMap | None, dtypes: tuple, vram_limit=None, module_map=MAP) -> Net:
    on_disk = None in dtypes
    return enable_vram_management(copy.deepcopy(net), module_map, config(*dtypes), vram_limit,
                                  disk_map if on_disk else None)


def reference(net: Net, managed: Net, dtypes: tuple) -> Net:
    """The unmanaged model whose layers went through the storage dtypes of the states they are in."""
    plain = copy.deepcopy(net)
    layers = {name: layer for name, layer in managed.named_modules() if layer in set(iter_managed(managed))}
    for name, module in plain.named_modules():
        owner = next((layers[prefix] for prefix in _prefixes(name) if prefix in layers
                      and (prefix == name or layers[prefix].recurse)), None)
        chain = [dtype for dtype in dtypes[:owner.state + 1] if dtype] if owner else []
        for parameter in module._parameters.values():
            for dtype in (*chain, BF16) if parameter is not None else ():
                parameter.data = parameter.data.to(dtype)
        if isinstance(module, Norm):
            module.offset = module.offset.to(BF16)
    return plain


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def budget_of(model: nn.Module) -> ResidencyBudget:
    return next(iter_managed(model))._managed.budget


@torch.inference_mode()
def assert_same_bits(net: Net, managed: Net, dtypes: tuple) -> None:
    out = managed(IDS)
    assert out.dtype == BF16
    assert torch.equal(out, reference(net, managed, dtypes)(IDS))


@pytest.mark.parametrize("vram_limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("dtypes", COMBINATIONS.values(), ids=COMBINATIONS)
def test_same_bits_as_unmanaged_in_every_state(net, disk_map, dtypes, vram_limit):
    model = managed_copy(net, disk_map, dtypes, vram_limit)
    assert len(list(iter_managed(model))) == NUM_LAYERS
    for _ in range(2):
        assert_same_bits(net, model, dtypes)
        assert {layer.state for layer in iter_managed(model)} == {0}
        onload_model(model)
        for _ in range(2):
            assert_same_bits(net, model, dtypes)
            assert budget_of(model).used_bytes <= (float("inf") if vram_limit is None else vram_limit * GIB)
        offload_model(model)
        assert budget_of(model).used_bytes == 0


def test_bits_of_fp8_storage_are_those_of_a_model_cast_to_fp8_and_back(net):
    net.outside, net.scale = nn.Identity(), nn.Parameter(torch.ones(DIM))  # every other parameter is in a layer
    model = managed_copy(net, None, (FP8, FP8, FP8), 0)
    plain = copy.deepcopy(net).to(FP8)
    for name, buffer in net.named_buffers():
        plain.get_buffer(name).data = buffer.to(BF16) if name.endswith("offset") else buffer
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(BF16)
    assert torch.equal(model(IDS), plain(IDS))


def test_states(net, disk_map):
    model = managed_copy(net, disk_map, (None, FP8, BF16), 0)
    layer = model.out
    assert layer.state == 0 and layer.weight.is_meta and layer.weight.dtype == BF16
    onload_model(model)
    assert layer.state == 1 and layer.weight.dtype == FP8 and not layer.weight.is_meta
    model(IDS)
    assert layer.state == 1
    budget_of(model).limit_bytes = None
    model(IDS)
    assert layer.state == 2 and layer.weight.dtype == BF16
    offload_model(model)
    assert layer.state == 0 and layer.weight.is_meta


def test_wrapping_changes_neither_keys_nor_attributes_nor_classes(net, disk_map):
    keys, names = list(net.state_dict()), [name for name, _ in net.named_modules()]
    shapes = {name: p.shape for name, p in net.named_parameters()}
    for dtypes in (COMBINATIONS["fp8 storage"], COMBINATIONS["full disk"]):
        model = managed_copy(net, disk_map, dtypes)
        assert list(model.state_dict()) == keys and [name for name, _ in model.named_modules()] == names
        assert {name: p.shape for name, p in model.named_parameters()} == shapes
        linear, norm, block = model.out, model.blocks[0].norm, model.blocks[0]
        assert isinstance(linear, AutoWrappedLinear) and isinstance(linear, nn.Linear) and linear.in_features == DIM
        assert isinstance(norm, AutoWrappedModule) and isinstance(norm, Norm) and norm.weight.shape == (DIM,)
        assert isinstance(block, AutoWrappedNonRecurseModule) and isinstance(block, Block)
        assert "AutoWrapped" not in repr(model)


def test_buffers_stay_real_and_keep_their_precision(net, disk_map):
    model = managed_copy(net, disk_map, COMBINATIONS["full disk"])
    norm = model.blocks[1].norm
    for change in (onload_model, offload_model):
        change(model)
        assert norm.table.dtype == torch.float32 and torch.equal(norm.table, torch.arange(DIM) / 3)
        assert norm.offset.dtype == BF16 and norm.steps.item() == 3


def test_parameters_outside_the_map_are_ready_at_any_time(net, disk_map):
    for dtypes in (COMBINATIONS["fp8 storage"], COMBINATIONS["full disk"]):
        model = managed_copy(net, disk_map, dtypes)
        assert torch.equal(model.scale, net.scale.to(BF16)) and model.outside.weight.dtype == BF16


def test_limit_admits_layers_until_it_is_reached():
    linear_bytes = 2 * (DIM * DIM + DIM)
    model = nn.Sequential(*(nn.Linear(DIM, DIM) for _ in range(3)))
    enable_vram_management(model, {nn.Linear: AutoWrappedLinear}, config(FP8, FP8, BF16), 2.5 * linear_bytes / GIB)
    onload_model(model)
    model(torch.zeros(1, DIM, dtype=BF16))
    assert [linear.state for linear in model] == [2, 2, 1]
    assert budget_of(model).used_bytes == 2 * linear_bytes
    offload_model(model)
    model[0].onload()
    assert [linear.state for linear in model] == [1, 0, 0] and budget_of(model).used_bytes == 0


def test_models_can_share_one_budget(net):
    budget = ResidencyBudget(3000)
    models = [managed_copy(net, None, (FP8, FP8, BF16), budget) for _ in range(2)]
    for model in models:
        onload_model(model)
        model(IDS)
        assert budget.used_bytes <= 3000
    offload_model(models[0])
    models[1](IDS)
    assert 1500 < budget.used_bytes <= 3000


@pytest.mark.parametrize("dtypes", [COMBINATIONS["fp8 storage"], COMBINATIONS["full disk"]])
def test_a_failing_forward_leaves_nothing_behind(net, disk_map, dtypes):
    model = managed_copy(net, disk_map, dtypes, 0)
    onload_model(model)
    before = model(IDS)
    tensors = dict(model.named_parameters())
    with pytest.raises(RuntimeError):
        model.blocks[0](torch.zeros(2, DIM + 1, dtype=BF16))
    assert all(p is tensors[name] for name, p in model.named_parameters())
    assert torch.equal(model(IDS), before)


def test_a_failing_onload_leaves_the_model_offloaded(net, tmp_path):
    path = tmp_path / "net.safetensors"
    save_file(net.state_dict(), path)
    model = managed_copy(net, DiskMap(str(path)), (None, BF16, BF16))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 600)
    with pytest.raises(ValueError, match=r"net\.safetensors"):
        onload_model(model)
    assert {layer.state for layer in iter_managed(model)} == {0} and budget_of(model).used_bytes == 0
    assert all(p.is_meta for p in model.blocks.parameters())


def test_model_without_a_map_is_one_block(net, disk_map, caplog):
    caplog.set_level("INFO")
    for module_map in (None, {}, {Net: AutoWrappedModule, nn.Linear: AutoWrappedLinear}):
        model = managed_copy(net, disk_map, (None, FP8, FP8), None, module_map)
        assert [layer is model for layer in iter_managed(model)] == [True]
        plain = copy.deepcopy(net)
        for tensor in (*plain.parameters(), *(block.norm.offset for block in plain.blocks)):
            tensor.data = tensor.to(BF16)
        assert torch.equal(model(IDS), plain(IDS))
        onload_model(model)
        assert model.out.weight.dtype == BF16 and torch.equal(model.out(plain.scale), plain.out(plain.scale))
    assert caplog.text.count("one block") == 3


@pytest.mark.parametrize("vram_limit", [0, None])
def test_two_threads_may_run_one_model(net, disk_map, vram_limit):
    model = managed_copy(net, disk_map, (None, FP8, BF16), vram_limit)
    onload_model(model)
    results: dict[int, list[Tensor]] = {0: [], 1: []}
    threads = [threading.Thread(target=lambda n=n: [results[n].append(model(torch.full((1, 2), n))) for _ in range(30)])
               for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {n: reference(net, model, (None, FP8, BF16))(torch.full((1, 2), n)) for n in range(2)}
    assert all(len(results[n]) == 30 and all(torch.equal(out, expected[n]) for out in results[n]) for n in range(2))
    if vram_limit is None:
        held = sum(p.numel() for layer in iter_managed(model) for p in layer.parameters(recurse=layer.recurse))
        assert 2 * held <= budget_of(model).used_bytes <= 2 * held + 12 * DIM * 3


def test_weights_made_in_inference_mode_are_ordinary_tensors(net, disk_map):
    with torch.inference_mode():
        model = managed_copy(net, disk_map, (None, FP8, BF16))
        onload_model(model)
        model(IDS)
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtypes", [COMBINATIONS["full disk"], COMBINATIONS["fp8 storage"]])
def test_memory_does_not_grow(tmp_path, dtypes):
    big = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)))
    save_file(big.state_dict(), tmp_path / "big.safetensors")
    disk_map = DiskMap(str(tmp_path / "big.safetensors"))
    model = managed_copy(big, disk_map, dtypes, 0, {nn.Linear: AutoWrappedLinear})
    x, process = torch.zeros(1, 512, dtype=BF16), psutil.Process()
    for step in range(50):
        onload_model(model)
        model(x)
        offload_model(model)
        if step == 4:
            before = process.memory_info().rss
    assert process.memory_info().rss - before < 4 * 2**20


def test_module_that_reports_its_dtype_reports_the_computation(disk_map):
    class Reporting(Net):
        @property
        def dtype(self) -> torch.dtype:
            return next(self.parameters()).dtype

        @property
        def device(self) -> torch.device:
            return next(self.parameters()).device

    model = enable_vram_management(Reporting(), MAP, config(FP8, FP8, FP8))
    assert model.embed.weight.dtype == FP8 and model.dtype == BF16 and model.device == torch.device("cpu")
    assert str(type(model)) == str(Reporting) and isinstance(model, Reporting)


# ---- what cannot be honoured ----------------------------------------------------------------------------------------

def test_unset_fields():
    placements = Placements.from_config({"offload_dtype": "disk", "onload_device": "cuda", "computation_dtype": BF16,
                                         "computation_device": "cuda:1"})
    offload, onload, preparing = placements.states
    assert offload.on_disk
    assert onload == preparing == placements.computation
    assert placements.computation.device == torch.device("cuda:1")


@pytest.mark.parametrize(("change", "message"), [
    ({"offload_dtypes": FP8}, "unknown field.*offload_dtypes"),
    ({"offload_dtype": "disk"}, "offload_dtype='disk' with offload_device='cpu'"),
    ({"preparing_dtype": "disk", "preparing_device": "disk"}, "preparing is 'disk' although"),
    ({"computation_device": None}, "computation_dtype must be a torch dtype"),
    ({"onload_dtype": "bfloat16"}, "onload_dtype must be a torch dtype"),
    ({"onload_device": "gpu"}, "unknown device 'gpu'"),
])
def test_contradictory_configurations(net, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        enable_vram_management(net, MAP, config(FP8, FP8, FP8) | change)


def test_limit_below_what_the_states_keep_on_the_accelerator(net):
    on_cuda = config(BF16, BF16, BF16) | {f"{state}_device": "cuda" for state in ("onload", "preparing", "computation")}
    with pytest.raises(ValueError, match=r"vram_limit is 0\.00 GiB, but Net in use keeps .* on cuda"):
        enable_vram_management(net, MAP, on_cuda, vram_limit=1e-6)


@pytest.mark.parametrize("vram_limit", [-1, float("nan")])
def test_limit_must_be_a_size(net, vram_limit):
    with pytest.raises(ValueError, match="vram_limit must be at least 0"):
        enable_vram_management(net, MAP, config(BF16, BF16, BF16), vram_limit)


def test_disk_without_weights_on_disk(net, disk_map):
    with pytest.raises(ValueError, match="have no weights to start from"):
        enable_vram_management(net, MAP, config(None, BF16, BF16))
    partial: Mapping[str, Tensor] = {name: disk_map[name] for name in disk_map if name != "out.weight"}
    with pytest.raises(ValueError, match=r"1 of \d+ tensors .* out\.weight"):
        enable_vram_management(net, MAP, config(None, BF16, BF16), disk_map=partial)


def test_maps_that_do_not_fit(net):
    plain = config(BF16, BF16, BF16)
    with pytest.raises(TypeError, match=r"Embedding computes something else than torch\.nn\.Linear"):
        enable_vram_management(copy.deepcopy(net), {nn.Embedding: AutoWrappedLinear}, plain)
    with pytest.raises(TypeError, match="expected AutoWrappedLinear"):
        enable_vram_management(net, {nn.Linear: nn.Linear}, plain)
    with pytest.raises(ImportError, match=r"no class torch\.nn\.Gone or torch\.gone\.Gone in the installed version"):
        enable_vram_management(net, {("torch.nn.Gone", "torch.gone.Gone"): AutoWrappedModule}, plain)
    enable_vram_management(net, {("torch.nn.Gone", "torch.nn.Linear"): AutoWrappedLinear}, plain)
    assert isinstance(net.out, AutoWrappedLinear)
    with pytest.raises(ValueError, match="managed already"):
        enable_vram_management(net, MAP, plain)


def test_the_most_specific_class_of_a_map_wins():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(2, 2), nn.Linear(2, 2))
    expected = copy.deepcopy(model).to(BF16)
    module_map = {nn.Linear: AutoWrappedLinear, Doubled: AutoWrappedModule}
    enable_vram_management(model, module_map, config(torch.float32, torch.float32, BF16), 0)
    x = torch.ones(1, 2, dtype=BF16)
    assert torch.equal(model(x), expected(x)) and not isinstance(model[0], AutoWrappedLinear)
