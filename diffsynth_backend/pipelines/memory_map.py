"""Where the weights of all loaded pipelines are at this moment, in figures: what the page draws as bars.

Notable: only shapes and counters are read. No device is touched and nothing is moved or waited for but the owner's own
lock, so it may be called between the steps of a loop. Call it in the thread that runs the pipelines, or while none
runs: layers change their tensors as they compute.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from torch import Tensor, nn

from ..core.device import GIB
from ..core.loader.watch import LoadStep
from ..core.vram.adapters import BUFFER
from ..core.vram.layers import iter_managed
from ..core.vram.management import Management
from ..core.vram.planner import Plan
from ..core.vram.traffic import Traffic
from ..diffusion import BasePipeline
from .families import family
from .handle import PipelineHandle
from .owner import WeightsOwner, owner
from .report import dtype_name

ADAPTER_BUFFER = BUFFER.partition("{")[0]


@dataclass(frozen=True)
class ModelMemory:
    """Bytes of a model's weights, by where they are. Copies that wait in RAM count there even while others compute;
    `adapter_bytes` (of LoRAs) are among them. `ring_bytes`: of the device, for layers that pass through."""

    name: str
    kind: str
    device_bytes: int
    ram_bytes: int
    disk_bytes: int
    adapter_bytes: int
    ring_bytes: int


@dataclass(frozen=True)
class LoopPlan:
    """What a loop has planned or would plan: bytes that stay, wait in RAM, cross in a step or once before the first,
    and the time of a step (seconds) that is expected."""

    resident_bytes: int
    host_bytes: int
    ring_bytes: int
    activation_bytes: int
    bytes_per_step: int
    read_bytes_per_step: int
    once_bytes: int
    step_seconds: float


@dataclass(frozen=True)
class LoopTraffic:
    """What that loop has moved so far: bytes, bytes a second while readers were at work, seconds of waiting."""

    passes: int
    moved_bytes: int
    read_bytes: int
    bandwidth: float
    stall_seconds: float
    peak_device_bytes: int


@dataclass(frozen=True)
class PipelineMemory:
    """A loaded pipeline. `limit_bytes` (None: no limit) is what its weights, ring and computation may take of
    `device`; `counted_bytes` what is counted against it now."""

    title: str
    family: str
    device: str
    dtype: str
    limit_bytes: int | None
    counted_bytes: int
    models: tuple[ModelMemory, ...]
    plan: LoopPlan | None
    traffic: LoopTraffic | None


def memory_map(weights: WeightsOwner = owner) -> tuple[PipelineMemory, ...]:
    """Every loaded pipeline, the one used last first."""
    loaded = reversed(weights.pipelines())
    return tuple(_pipeline_memory(handle, pipe) for handle, pipe in loaded)


def _pipeline_memory(handle: PipelineHandle, pipe: BasePipeline) -> PipelineMemory:
    models = pipe.named_models()
    budgets = {id(layer.budget): layer.budget for _, model in models for layer in _layers(model)}
    loop = pipe.last_loop
    limit = handle.vram.vram_limit
    return PipelineMemory(
        handle.titles(), family(handle.family).title, handle.device, dtype_name(handle.torch_dtype),
        None if limit is None else int(limit * GIB), sum(budget.used_bytes for budget in budgets.values()),
        tuple(_model_memory(name, model) for name, model in models),
        None if loop is None or loop.plan is None else loop_plan(loop.plan),
        None if loop is None or not loop.traffic.passes else _traffic(loop.traffic))


def _layers(model: nn.Module) -> list[Management]:
    return [layer.management for layer in iter_managed(model)]


def _model_memory(name: str, model: nn.Module) -> ModelMemory:
    held = list(chain(model.parameters(), model.buffers()))
    in_ram = _nbytes(tensor for tensor in held if tensor.device.type == "cpu")
    on_device = _nbytes(tensor for tensor in held if tensor.device.type not in ("cpu", "meta"))
    adapters = _nbytes(buffer for path, buffer in model.named_buffers()
                       if path.rpartition(".")[2].startswith(ADAPTER_BUFFER))
    layers = _layers(model)
    copies, on_disk = sum(map(_waiting_bytes, layers)), sum(map(_disk_bytes, layers))
    streams = {id(layer.stream): layer.stream for layer in layers if layer.stream is not None}
    ring = sum(stream.ring_bytes for stream in streams.values())
    return ModelMemory(name, type(model).__name__, on_device, in_ram + copies, on_disk, adapters, ring)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _waiting_bytes(layer: Management) -> int:
    """Of copies in RAM behind others that are in use."""
    return _nbytes(stored for stored, current in zip(layer.stored, layer.current)
                   if stored is not None and stored is not current and stored.device.type == "cpu")


def _disk_bytes(layer: Management) -> int:
    return sum(layer.source.nbytes(slot.name) for slot, tensor in zip(layer.slots, layer.current) if tensor is None)


def loop_plan(plan: Plan) -> LoopPlan:
    """The figures of a plan."""
    return LoopPlan(plan.resident_bytes, plan.host_bytes, plan.ring_bytes, plan.activation_bytes, plan.bytes_per_step,
                    plan.read_bytes_per_step, plan.once_bytes, plan.step_seconds)


def _traffic(traffic: Traffic) -> LoopTraffic:
    return LoopTraffic(traffic.passes, traffic.moved_bytes, traffic.read_bytes, traffic.bandwidth,
                       traffic.stall_seconds, traffic.peak_device_bytes)


@dataclass(frozen=True)
class Loading:
    """How far the loading of a pipeline is: its `number`th source of `count`, that source's `shard`th file of `shards`,
    bytes of it that are read, and bytes taken of a device's room (None: there is no device to fill)."""

    title: str
    number: int
    count: int
    shard: int
    shards: int
    done_bytes: int
    total_bytes: int
    device_bytes: int
    room_bytes: int | None


def loading(handle: PipelineHandle, step: LoadStep, device_bytes: int = 0, room_bytes: int | None = None) -> Loading:
    """Where a step of the loading of a pipeline is."""
    file = Path(step.file).resolve()
    number, source = next((i, source) for i, source in enumerate(handle.sources, 1)
                          if file in (Path(other).resolve() for other in source.files))
    return Loading(source.title, number, len(handle.sources), step.shard, step.shards, step.done_bytes,
                   step.total_bytes, device_bytes, room_bytes)
