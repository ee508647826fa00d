"""A small network, streamed from disk or RAM in several ways, and what reads of it are counted by."""
from __future__ import annotations

import copy
import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth_backend.core.vram import (
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    DiskMap,
    Loop,
    Residency,
    enable_vram_management,
    iter_managed,
)
from tests.helpers.vram_fields import cpu_fields

GIB = 2**30
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


class Table(nn.Module):
    """Returns its own parameter: what a call gives must outlive the ring."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, dim))

    def forward(self) -> tuple[Tensor, dict]:
        return self.weight, {"half": self.weight[:, ::2]}


class Block(nn.Module):
    """Bare parameters that its children compute inside of."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(dim))
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """`route` says which blocks run, and in which order."""

    def __init__(self, dim: int = 16, blocks: int = 5) -> None:
        super().__init__()
        self.table = Table(dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(blocks))
        self.route = list(range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        shift, parts = self.table()
        for index in self.route:
            x = self.blocks[index](x)
        return x + shift + parts["half"].repeat(1, 2)


MAP = {nn.Linear: AutoWrappedLinear, nn.LayerNorm: AutoWrappedModule, Table: AutoWrappedModule,
       Block: AutoWrappedNonRecurseModule}
INPUTS = [torch.linspace(-1, 1, 3 * 16).view(3, 16), torch.linspace(2, -2, 7 * 16).view(7, 16)]


def states(offload, onload, preparing, computation=torch.float32) -> dict:
    """VRAM fields of storage dtypes on the CPU; None is the disk."""
    return cpu_fields(offload, onload, preparing, computation)


CONFIGS = {
    "disk": states(None, None, torch.float32),
    "disk, same dtype": states(None, None, BF16, BF16),
    "disk for ever": states(None, None, None),
    "ram": states(BF16, BF16, torch.float32),
    "fp8 in ram": states(FP8, FP8, FP8),
    "disk, then fp8": states(None, FP8, FP8),
}


def manage(model: nn.Module, disk_map: DiskMap | None, config: dict, limit: int | None, module_map=MAP) -> nn.Module:
    """A managed copy; `limit` in bytes."""
    source = disk_map if "disk" in config.values() else None
    return enable_vram_management(copy.deepcopy(model), module_map, config,
                                  None if limit is None else limit / GIB, source)


def unmanaged(model: nn.Module, config: dict) -> nn.Module:
    """The model as stored, then cast, and computed without management."""
    storage = config["onload_dtype"] if config["onload_dtype"] != "disk" else BF16
    return copy.deepcopy(model).to(storage).to(config["computation_dtype"])


def run_all(residency: Residency, model: nn.Module, loop: Loop) -> list[list[Tensor]]:
    """The results of each step of a loop, for as many of INPUTS as there are sides."""
    inputs = [x.to(next(iter_managed(model)).management.placements.computation.dtype) for x in INPUTS[:loop.sides]]
    with torch.no_grad(), residency.loop(loop):
        return [residency.run([partial(model, x) for x in inputs]) for _ in range(loop.steps)]


def assert_same_bits(got: list[list[Tensor]], expected: list[Tensor]) -> None:
    for step, results in enumerate(got):
        for side, (result, wanted) in enumerate(zip(results, expected, strict=True)):
            assert torch.equal(result, wanted), f"step {step}, side {side}"


class CountingMap(DiskMap):
    """Knows how often each tensor was read, and by whom."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.reads: list[str] = []
        self.readers: list[threading.Thread] = []

    def note(self, name: str) -> None:
        self.readers.append(threading.current_thread())
        self.reads.append(name)

    def load_into(self, name: str, out: Tensor) -> Tensor:
        self.note(name)
        return super().load_into(name, out)

    def read_into(self, name: str, out: Tensor) -> Tensor:
        self.note(name)
        return super().read_into(name, out)

    def read_stored(self, name: str, out: memoryview) -> None:
        self.note(name)
        super().read_stored(name, out)
