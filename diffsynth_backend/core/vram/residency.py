"""Models that are in use together: which of their layers stay on the device, and the stream that serves the others.

Notable: who stays is planned once, before the first layer runs, from sizes and the limit, and holds until the models
are offloaded. Models that are not managed, or whose layers are where they compute anyway, cost nothing here.
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..device import GIB
from .bus import Bus, bus_to
from .layers import iter_managed, offload_model
from .lockstep import LockStep
from .management import Management
from .placement import OFFLOAD, ResidencyBudget
from .planner import LayerSize, Machine, Plan, plan_residency
from .streaming import WeightStream
from .timestep_table import Schedule, TimestepTable, has_timestep_call
from .traffic import Traffic

logger = logging.getLogger(__name__)

# Bytes a second, until a run has measured them, which takes so many bytes.
HOST_BANDWIDTH = 10e9
DISK_BANDWIDTH = 2e9
ENOUGH_TO_MEASURE = 256 << 20
RING_DEPTHS = (3, 2, 1)  # of the largest layer: what smooths the transfer best, and what is done with less room
SIDES_AT_ONCE = 64  # of a table: threads


@dataclass(frozen=True)
class Loop:
    """What is known of a loop before it begins.

    `steps` forward passes of each of `sides`, `activation_bytes` of the device for one side's computation.
    `schedule`: the timesteps, for what depends on them alone. `most_resident`: bytes that may stay, None: the limit's.
    """

    steps: int
    sides: int = 1
    activation_bytes: int = 0
    schedule: Schedule | None = None
    most_resident: int | None = None


class Residency:
    """Brings models to their device together, plans what stays there, and streams the rest.

    The models of a pipeline share one budget and one device. Where models do not, their layers move by themselves, as
    without a plan. `traffic` counts since the last `onload`.
    """

    def __init__(self, models: Sequence[nn.Module], bus: Bus | None = None) -> None:
        self.models = tuple(models)
        self.plan: Plan | None = None
        self.traffic = Traffic()
        self._layers = [layer for model in self.models for layer in iter_managed(model)]
        self._layer_names = {layer.management: f"{number} {layer.management.name}"  # which no other layer has
                             for number, model in enumerate(self.models) for layer in iter_managed(model)}
        self._budget, device = self._common()
        self._stream = None if self._budget is None else WeightStream(bus or bus_to(device))
        self._visits: dict[str, tuple[Management, ...]] = {}  # in a pass of "loop" or "table"
        self._charged = 0  # to the budget, for ring and tables
        self._loop: Loop | None = None
        self._measured: dict[bool, float] = {}  # bytes a second, from disk and from memory
        self._what = "loop"
        self._running = ExitStack()  # a loop's lock step and tables
        self._lock_step: LockStep | None = None
        self._tables: list[TimestepTable] = []

    def _common(self) -> tuple[ResidencyBudget | None, torch.device | None]:
        """Budget and device, if all layers have the same."""
        found = {(id(managed.budget), managed.placements.computation.device): managed.budget
                 for managed in self._managed()}
        if len(found) != 1:
            return None, None
        (_, device), budget = next(iter(found.items()))
        return budget, device

    def _managed(self) -> list[Management]:
        return [layer.management for layer in self._layers]

    def serves(self, models: Sequence[nn.Module]) -> bool:
        """Whether it is made for exactly these models."""
        return len(models) == len(self.models) and all(a is b for a, b in zip(models, self.models))

    # ---- on and off -------------------------------------------------------------------------------------------------
    def onload(self, loop: Loop | None = None) -> None:
        """Bring all layers to the onload state and decide who stays on the device; nothing if they are there.

        Nothing is left onloaded when this raises: ValueError for a limit below what the computation needs,
        RuntimeError for states that the limit forbids, and what reading the weights raises.
        """
        if loop is None and all(layer.state != OFFLOAD for layer in self._layers):
            return
        self.offload()
        self._loop, self.traffic = loop, Traffic()
        try:
            for layer in self._layers:
                layer.onload()
            if self._stream is not None:
                self._stream.traffic = self.traffic
                self._prepare(loop or Loop(steps=0))
        except BaseException:
            self.offload()
            raise

    def offload(self) -> None:
        """Return all layers to the offload state; ring, readers and tables go."""
        self._running.close()
        self._lock_step, self._tables = None, []
        if self._stream is not None:
            self._close_stream()
        for model in self.models:
            offload_model(model)
        for managed in self._managed():
            managed.stays, managed.waits, managed.stream = True, False, None

    def preview(self, loop: Loop) -> Plan | None:
        """The plan that the loop would get now, without touching a weight; None where nothing moves.

        What depends on the timestep alone counts as if it were computed in each step.
        """
        if self._stream is None:
            return None
        moving = self._moving()
        return self._make_plan(moving, loop) if moving else None

    def _moving(self) -> list[Management]:
        """The layers whose weights are not where they compute when their model is in use, in the order of visits."""
        return self._in_order([managed for managed in self._managed()
                               if managed.can_stream and not managed.is_ready_when_onloaded])

    def _prepare(self, loop: Loop) -> None:
        moving = self._moving()
        if not moving:
            return
        self.plan = self._make_plan(moving, loop)
        if self.plan.ring_bytes and loop.schedule is not None:
            skipped = self._tabulate(loop, moving)
            self.plan = self._make_plan([managed for managed in moving if id(managed) not in skipped], loop)
        self._serve(moving, self.plan.resident, self.plan.ring_bytes, self._passes(loop), self.plan.host)
        if self.plan.ring_bytes and self._walks_together(loop):
            self._lock_step = self._running.enter_context(LockStep(self._stream, loop.sides))
        self._note_device_bytes()
        logger.info("%s: %s%s", self._names(), self.plan.describe(), self._describe_adapters())

    def _describe_adapters(self) -> str:
        carried = sum(managed.carried_bytes for managed in self._managed())
        return f"; {carried / GIB:.2f} GiB of these weights are adapters'" if carried else ""

    def _in_order(self, moving: Sequence[Management]) -> list[Management]:
        """By the first visit, as far as it is known; layers that were not visited last time come last."""
        visits = self._visits.get("loop", ())
        places = {id(managed): place for place, managed in reversed(list(enumerate(visits)))}
        return sorted(moving, key=lambda managed: places.get(id(managed), len(places)))

    def _serve(self, moving: Sequence[Management], resident: frozenset[str], ring_bytes: int, passes: int,
               host: frozenset[str] = frozenset(), what: str = "loop") -> None:
        """Let the layers named `resident` stay and stream the others, those named `host` from RAM."""
        self._what = what
        for managed in moving:
            managed.stays, managed.stream = self._layer_names[managed] in resident, self._stream
            managed.waits = self._layer_names[managed] in host and managed.streams_from_disk
        if ring_bytes:
            self._charge(ring_bytes)
            known = [managed for managed in self._visits.get(what, ()) if not managed.stays]
            self._stream.open(ring_bytes, passes, known, {managed: self._layer_names[managed] for managed in moving})
            self.traffic.note_device_bytes(self._budget.used_bytes)

    def _close_stream(self) -> None:
        if self._stream.ring_bytes:
            self._visits[self._what] = self._stream.visits
        self._stream.close()
        self._budget.release(self._charged)
        self._charged = 0

    def _charge(self, nbytes: int) -> None:
        self._budget.charge(nbytes)
        self._charged += nbytes

    # ---- the plan ---------------------------------------------------------------------------------------------------
    def _make_plan(self, moving: Sequence[Management], loop: Loop) -> Plan:
        sizes = [LayerSize(self._layer_names[managed], managed.resident_bytes, managed.streamed_bytes(self._stream.bus),
                           in_host_memory=not managed.streams_from_disk) for managed in moving]
        activations = loop.activation_bytes * loop.sides
        room = self._room() if all(managed.can_stay for managed in moving) else 0
        machine = Machine(room, self._budget.ram_limit_bytes, self._measured.get(False, HOST_BANDWIDTH),
                          self._measured.get(True, DISK_BANDWIDTH))
        ring_bytes = self._ring_bytes(moving, machine, activations)
        if loop.most_resident is not None:
            most = loop.most_resident + ring_bytes + activations
            machine = replace(machine, limit_bytes=min(most, machine.limit_bytes or most))
        return plan_residency(sizes, machine, activations, ring_bytes=ring_bytes)

    def _room(self) -> int | None:
        """Bytes of the device that the plan may give away; 0: nothing stays, whatever the computation needs."""
        limit = self._budget.limit_bytes
        return max(1, limit - self._budget.used_bytes) if limit else limit

    def _ring_bytes(self, moving: Sequence[Management], machine: Machine, activations: int) -> int:
        largest = max(managed.streamed_bytes(self._stream.bus) for managed in moving)
        fitting = (depth * largest for depth in RING_DEPTHS
                   if not machine.limit_bytes or depth * largest + activations <= machine.limit_bytes)
        return next(fitting, largest)

    def _passes(self, loop: Loop) -> int:
        return loop.steps if self._walks_together(loop) else loop.steps * loop.sides

    def _walks_together(self, loop: Loop) -> bool:
        return loop.sides > 1 and not torch.is_grad_enabled()

    def _note_device_bytes(self) -> None:
        self.traffic.note_device_bytes(self._budget.used_bytes + self.plan.resident_bytes)

    # ---- loops ------------------------------------------------------------------------------------------------------
    @contextmanager
    def loop(self, loop: Loop) -> Iterator[Residency]:
        """The models onloaded for a loop; within the block, `run` makes the passes of a step. Offloads at the end."""
        self.onload(loop)
        try:
            yield self
        finally:
            self.offload()
            if self.traffic.moved_bytes:
                logger.info("%s: %s", self._names(), self.traffic.describe())
            if self.traffic.moved_bytes > ENOUGH_TO_MEASURE and self._stream.bus.direct:  # others only queue copies
                self._measured[self.traffic.read_bytes > 0] = self.traffic.bandwidth

    def run(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of a step's forward passes: in lock step where weights are streamed, else one after the other."""
        if self._lock_step is not None and not torch.is_grad_enabled():
            return self._lock_step.run(functions)
        return [self._alone(function) for function in functions]

    def _alone(self, function: Callable[[], Any]) -> Any:
        if self._stream is None or not self._stream.ring_bytes:
            return function()
        with self._stream.one_pass():
            return function()

    def with_room(self, step: Callable[[], Any]) -> Any:
        """The result of `step`; when the device is out of memory, again and again with fewer layers kept there.

        Raises torch.OutOfMemoryError when nothing is left that could make room.
        """
        while True:
            try:
                return step()
            except torch.OutOfMemoryError:
                if not self._can_shrink():
                    raise
            self._shrink()  # outside of the handler: the error refers to the frames, and so to the tensors, of the step

    def _can_shrink(self) -> bool:
        return self.plan is not None and bool(self.plan.resident)

    def _shrink(self) -> None:
        """Keep half as much on the device from now on."""
        kept = self.plan.resident_bytes // 2
        logger.warning("Out of memory: keeping %.2f GiB of weights on the device instead of %.2f, and trying again. A "
                       "lower vram_limit avoids this", kept / GIB, self.plan.resident_bytes / GIB)
        self.onload(replace(self._loop, most_resident=kept))

    def _names(self) -> str:
        return ", ".join(type(model).__name__ for model in self.models)

    def now_at(self, timestep: torch.Tensor, value: float) -> None:
        """The loop's timestep, on the device, and its value."""
        for table in self._tables:
            table.now_at(timestep, value)

    def _tabulate(self, loop: Loop, moving: Sequence[Management]) -> set[int]:
        """Make and install the tables; returns the layers (ids) that only they needed."""
        self._tables = [TimestepTable(model) for model in self.models if has_timestep_call(model)]
        if not self._tables:
            return set()
        self._serve(moving, frozenset(), self.plan.ring_bytes, 0, what="table")
        device = self._stream.bus.device
        calls = [call for table in self._tables for call in table.calls(loop.schedule, device)]
        used: set[int] = set()
        with torch.inference_mode(False), torch.no_grad():
            for start in range(0, len(calls), SIDES_AT_ONCE):
                group = calls[start:start + SIDES_AT_ONCE]
                with LockStep(self._stream, len(group)) as together:
                    together.run(group)
                used |= {id(managed) for managed in self._stream.order}
        self._close_stream()
        self._charge(sum(table.nbytes for table in self._tables))
        for table in self._tables:
            self._running.enter_context(table.installed())
        return used
