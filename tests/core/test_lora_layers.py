"""Additions to linear layers under VRAM management: where their tensors are, what they cost, what they cost not."""
from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth_backend.core.vram import (
    AutoWrappedLinear,
    AutoWrappedModule,
    DiskMap,
    Loop,
    Residency,
    ResidencyBudget,
    enable_vram_management,
    iter_managed,
    offload_model,
    onload_model,
)
from diffsynth_backend.core.vram.adapters import LinearLayers
from diffsynth_backend.core.vram.placement import Placements
from tests.helpers.fake_accelerator import FakeAccelerator
from tests.helpers.vram_fields import cpu_fields

FP8, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
DIM, LAYERS = 32, 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM, bias=index % 2 == 0) for index in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@dataclass(frozen=True)
class Product:
    """A matrix as an addition, and the layer's own weight, so that a wrong one would show."""

    matrix: Tensor
    factor: float = 0.5

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.matrix, self.matrix[0]

    def add(self, y: Tensor, x: Tensor, weight: Tensor, tensors: Sequence[Tensor]) -> None:
        matrix, row = tensors
        y.add_(x @ (matrix + weight).t() * row, alpha=self.factor)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


X = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(3))
EACH = (DIM * DIM + DIM) * 4  # bytes of an addition


def additions(seed: int = 0) -> dict[str, list[Product]]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{index}": [Product(torch.randn(DIM, DIM, generator=generator)) for _ in range(index % 3)]
            for index in range(LAYERS)}


def expected(net: Net, added: dict[str, list[Product]]) -> Tensor:
    """The same by one matrix for each layer."""
    merged = copy.deepcopy(net)
    for name, products in added.items():
        linear = merged.get_submodule(name)
        linear.weight = nn.Parameter(linear.weight + sum(
            product.factor * product.matrix[0][:, None] * (product.matrix + linear.weight) for product in products))
    return merged(X)


CONFIGS = {"balanced": (F32, F32, F32), "low": (F32, F32, F32), "fp8": (FP8, FP8, F32), "fp8 kept": (FP8, FP8, FP8),
           "disk": (None, None, F32), "disk, kept": (None, F32, F32)}


def managed(net: Net, states: tuple, limit: int | None, tmp_path, module_map=None) -> Net:
    """A managed copy on the CPU, with the given storage dtypes of the three states."""
    path = tmp_path / "weights.safetensors"
    save_file(net.state_dict(), path)
    disk_map = DiskMap([str(path)]) if states[0] is None else None
    return enable_vram_management(copy.deepcopy(net), module_map or {nn.Linear: AutoWrappedLinear},
                                  cpu_fields(*states, F32), ResidencyBudget(limit), disk_map)


@pytest.mark.parametrize("limit", [0, 6 * EACH, None])
@pytest.mark.parametrize("states", CONFIGS.values(), ids=CONFIGS)
def test_same_bits_wherever_the_weights_are(net, tmp_path, states, limit):
    if FP8 in states:
        for linear in net.layers:
            for parameter in linear.parameters():
                parameter.copy_(parameter.to(FP8).float())
    added, reference = additions(), copy.deepcopy(net)
    LinearLayers(reference).put(added)
    wanted = reference(X)
    assert (wanted - expected(net, added)).norm() <= 1e-5 * wanted.norm()
    model = managed(net, states, limit, tmp_path)
    keys = list(model.state_dict())
    LinearLayers(model).put(added)
    assert list(model.state_dict()) == keys
    for _ in range(2):
        onload_model(model)
        assert torch.equal(model(X), wanted)
        offload_model(model)
    residency = Residency([model])
    with residency.loop(Loop(steps=2, sides=2)):
        assert all(torch.equal(result, wanted) for _ in range(2) for result in residency.run([lambda: model(X)] * 2))
    LinearLayers(model).put({name: [] for name in added})
    onload_model(model)
    assert torch.equal(model(X), net(X))
    assert {type(layer).forward for layer in iter_managed(model)} == {AutoWrappedLinear.forward}


def test_a_layer_without_additions_is_what_it_was(net):
    LinearLayers(net).put({"layers.1": additions()["layers.1"]})
    assert [type(layer) is nn.Linear for layer in net.layers] == [True, False, True, True, True, True]
    assert isinstance(net.layers[1], nn.Linear) and type(net.layers[1]).__name__ == "Linear"


def test_never_narrower_than_the_computation(net, tmp_path):
    model = managed(net, CONFIGS["fp8 kept"], None, tmp_path)
    LinearLayers(model).put(additions())
    assert model.layers[2].weight.dtype == FP8
    assert {buffer.dtype for buffer in model.layers[2].buffers()} == {F32}


def test_a_block_takes_the_additions_of_its_layers_along(net, tmp_path):
    added, reference = additions(), copy.deepcopy(net)
    LinearLayers(reference).put(added)
    for module_map, states in (({Net: AutoWrappedModule}, (F32, F32, F32)),
                               ({nn.ModuleList: AutoWrappedModule}, (FP8, FP8, F32)),
                               ({Net: AutoWrappedModule}, (None, F32, F32))):
        model = managed(net, states, None, tmp_path, module_map)
        LinearLayers(model).put(added)
        LinearLayers(model).put({"layers.1": []})
        LinearLayers(model).put({"layers.1": added["layers.1"]})
        layer, = iter_managed(model)
        assert layer.management.carried_bytes == 6 * EACH
        if module_map == {Net: AutoWrappedModule}:
            onload_model(model)
            assert torch.equal(model(X), reference(X))
            offload_model(model)


def test_additions_count_against_the_limit(net, tmp_path):
    model = managed(net, CONFIGS["low"], None, tmp_path)
    layer = model.layers[2].management
    before = layer.costs
    LinearLayers(model).put(additions())
    assert layer.carried_bytes == 2 * EACH
    assert [after - earlier for after, earlier in zip(layer.costs, before)] == [0, 0, 2 * EACH]
    LinearLayers(model).put({"layers.2": []})
    assert layer.costs == before


def test_a_plan_counts_additions_and_the_stream_brings_them(net, caplog):
    caplog.set_level("INFO", logger="diffsynth_backend")
    planned, moved = zip(*(plan_and_moved(copy.deepcopy(net), added) for added in ({}, additions())))
    assert moved[1] - moved[0] == 6 * EACH
    assert planned[1] - planned[0] >= 6 * EACH  # each tensor begins at a multiple of the ring's alignment
    assert ["adapters" in message for message in caplog.messages if "cross per step" in message] == [False, True]


def plan_and_moved(net: Net, added: dict[str, list[Product]]) -> tuple[int, int]:
    """Bytes that a step should move, and those that it moved, with weights that wait in RAM."""
    model = enable_vram_management(net, {nn.Linear: AutoWrappedLinear}, cpu_fields(BF16, BF16, F32, F32),
                                   ResidencyBudget(0))
    LinearLayers(model).put(added)
    bus = FakeAccelerator(1e9)
    residency = Residency([model], bus)
    with residency.loop(Loop(steps=1)):
        residency.run([lambda: model(X)])
        return residency.plan.bytes_per_step, sum(bus.uploads)


@pytest.mark.parametrize("limit, fits", [(None, True), (10 * DIM * DIM * 4 + 6 * EACH, True),
                                         (7 * DIM * DIM * 4, False)])
def test_weights_that_rest_on_the_device_are_joined_there(net, monkeypatch, limit, fits):
    monkeypatch.setattr(Placements, "counts", lambda self, state: True)  # as if the CPU were an accelerator
    budget = ResidencyBudget(limit)
    model = enable_vram_management(net, {nn.Linear: AutoWrappedLinear}, cpu_fields(F32, F32, F32, F32), budget)
    used = budget.used_bytes
    assert used > 0
    if not fits:
        with pytest.raises(ValueError, match="no room for the adapters of layers"):
            LinearLayers(model).put(additions())
        return
    LinearLayers(model).put(additions())
    assert budget.used_bytes == used + 6 * EACH
    LinearLayers(model).put({name: [] for name in additions()})
    assert budget.used_bytes == used
