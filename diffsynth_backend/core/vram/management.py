"""What a managed layer knows of its weights: where each state keeps them, what that costs, how they get there.

Notable: costs and sizes follow from shapes, placements and file headers, so a plan can be made before a weight is read.
"""
from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence, Set as AbstractSet
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..device import GIB
from .bus import Bus
from .disk_map import DiskMap
from .host_memory import HostMemory
from .placement import OFFLOAD, ONLOAD, PREPARING, Placement, Placements, ResidencyBudget
from .ring import aligned
from .slots import Slot
from .streaming import WeightStream
from .visits import Part, Transfer

CPU = torch.device("cpu")

# The tensors of a layer's slots; None stands for a parameter that is on disk.
Weights = tuple[Tensor | None, ...]


@dataclass(eq=False)  # a layer is itself, not its tensors
class Management:
    """What a managed layer knows. It does not refer to the layer: a cycle would delay the freeing of whole models."""

    slots: tuple[Slot, ...]
    placements: Placements
    budget: ResidencyBudget
    source: Mapping[str, Tensor] | None  # by name, for what is on disk
    stored: Weights  # the offload copy
    nested: bool = False  # the modules below it are managed on their own, and compute while it does
    stays: bool = True  # whether it may be promoted: a plan says so layer by layer, without one the budget alone does
    waits: bool = False  # whether what it has on disk is kept in RAM once it was read, as long as its model is in use
    stream: WeightStream | None = None  # brings its weights while its model is in use and it does not stay
    current: Weights = ()  # what the layer holds now
    state: int = OFFLOAD
    ready: bool = False  # `current` is what a computation needs
    lock: threading.Lock = field(default_factory=threading.Lock)
    _transfer: Transfer | None = None
    _own: int = 0  # slots of the layer itself; those behind them are carried for adapters

    def __post_init__(self) -> None:
        self._own = len(self.slots)
        self._weigh()

    def _weigh(self) -> None:
        # Bytes on the computation device: what each state adds to the offload copy there, and what has to be free on
        # the way from onload to preparing, when both copies exist for a moment unless they are the same one.
        onload, preparing = self._cost(ONLOAD), self._cost(PREPARING)
        is_same_copy = self.placements.states[ONLOAD] == self.placements.states[PREPARING]
        self.costs = (0, onload, preparing)
        self.reservations = (0, onload, preparing - onload if is_same_copy else preparing)

    def _cost(self, state: int) -> int:
        placements = self.placements
        shared = placements.counts(OFFLOAD) and placements.shares_offload_copy(state)
        if shared or not placements.counts(state):
            return 0
        return sum(slot.nbytes(placements.states[state]) for slot in self.slots)

    def carry(self, paths: AbstractSet[str], slots: Sequence[Slot], tensors: Sequence[Tensor]) -> None:
        """Have tensors move along after the layer's own; those carried before for `paths` go. See `ManagedLayer.carry`.
        """
        carried = [(slot, tensor) for slot, tensor in zip(self.slots[self._own:], self.stored[self._own:])
                   if slot.path not in paths] + list(zip(slots, tensors, strict=True))
        more = sum(tensor.nbytes for _, tensor in carried) - self.carried_bytes
        if self.placements.counts(OFFLOAD) and more < 0:
            self.budget.release(-more)
        elif self.placements.counts(OFFLOAD) and not self.budget.reserve(more):
            raise ValueError(f"vram_limit is {(self.budget.limit_bytes or 0) / GIB:.2f} GiB, of which "
                             f"{self.budget.used_bytes / GIB:.2f} GiB are in use: no room for the adapters of "
                             f"{self.name}. Raise vram_limit, or set offload_device to 'cpu'")
        self.slots = self.slots[:self._own] + tuple(slot for slot, _ in carried)
        self.stored = self.stored[:self._own] + tuple(tensor for _, tensor in carried)
        self._weigh()

    @property
    def carried_bytes(self) -> int:
        """Of the tensors of adapters that move with its own."""
        return sum(tensor.nbytes for tensor in self.stored[self._own:])

    @property
    def name(self) -> str:
        """Of its first tensor, in the whole model."""
        return self.slots[0].name

    @property
    def can_stay(self) -> bool:
        """Whether it has a preparing state in memory to be promoted to."""
        return not self.placements.states[PREPARING].on_disk

    @property
    def resident_bytes(self) -> int:
        """What it adds to the limited memory by staying there."""
        return self.costs[PREPARING] - self.costs[ONLOAD]

    @property
    def streams_from_disk(self) -> bool:
        """Whether it has nothing but its files while its model is in use."""
        return self.placements.states[ONLOAD].on_disk

    @property
    def is_ready_when_onloaded(self) -> bool:
        """Whether its weights are then in the form that the computation needs."""
        return self.placements.states[ONLOAD] == self.placements.computation

    @property
    def can_stream(self) -> bool:
        """Whether a stream can bring its weights to the computation: from memory, or from files read in parts."""
        return isinstance(self.source, DiskMap | None)

    def streamed_bytes(self, bus: Bus) -> int:
        """Bytes that a visit moves to the device while the model is in use, 0 if the weights are there then.

        Known before anything is onloaded, from shapes, placements and headers.
        """
        onload = self.placements.states[ONLOAD]
        return sum(aligned(self._bytes_on_the_way(slot, onload, bus)) for slot in self.slots)

    def _bytes_on_the_way(self, slot: Slot, onload: Placement, bus: Bus) -> int:
        if onload.on_disk and not slot.is_buffer:
            return self._form(slot, self.source.dtype(slot.name), None, bus)[1]
        stored = slot.fixed_dtype or onload.dtype or self.placements.computation.dtype
        return self._form(slot, stored, onload.device or CPU, bus)[1]

    def _form(self, slot: Slot, stored: torch.dtype, device: torch.device | None, bus: Bus) -> tuple[torch.dtype, int]:
        """In which dtype a tensor gets to the computation, and the bytes on the way; `device` is None on disk."""
        dtype = slot.fixed_dtype or self.placements.computation.dtype if bus.direct else stored
        is_there = device is not None and bus.is_at(device) and stored == dtype
        return dtype, 0 if is_there else slot.shape.numel() * dtype.itemsize

    def transfer(self, bus: Bus) -> Transfer:
        """How the weights that the layer holds now get to the computation: as stored, or in its dtype if the way there
        is direct."""
        if self._transfer is None:
            parts = (self._part(slot, tensor, bus) for slot, tensor in zip(self.slots, self.current))
            self._transfer = Transfer(tuple(parts))
        return self._transfer

    def _part(self, slot: Slot, tensor: Tensor | None, bus: Bus) -> Part:
        if tensor is not None:
            return Part(slot.name, tensor, *self._form(slot, tensor.dtype, tensor.device, bus), slot.shape)
        dtype, nbytes = self._form(slot, self.source.dtype(slot.name), None, bus)
        as_stored = dtype == self.source.dtype(slot.name) and self.source.is_stored(slot.name)
        return Part(slot.name, None, dtype, nbytes, slot.shape, self.source.nbytes(slot.name), as_stored)

    def hold(self, bus: Bus, memory: HostMemory) -> None:
        """Read what is on disk into `memory`, in the form in which it gets to the computation, until the state changes.
        """
        parts = self.transfer(bus).parts
        held, offset = [], memory.take(sum(aligned(part.nbytes) for part in parts if part.tensor is None))
        for part in parts:
            if part.tensor is None:
                target = memory.arena.tensor(offset, part.dtype, part.shape, part.strides)
                held.append(self.source.load_into(part.name, target))
                offset += aligned(part.nbytes)
            else:
                held.append(part.tensor)
        self.current = tuple(held)
        self._transfer = None

    def fetch(self, weights: Weights, placement: Placement) -> Weights:
        """The weights at a placement, read from disk where they are there."""
        if placement.on_disk:
            return weights
        return tuple(slot.place(self.source[slot.name] if tensor is None else tensor, placement)
                     for slot, tensor in zip(self.slots, weights))
