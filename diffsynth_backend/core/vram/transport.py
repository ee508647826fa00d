"""How the weights of one visit get from a file or from RAM to the device.

Notable: where the device's memory is the host's, a file is read straight into it; elsewhere what is not pinned goes
through pinned memory in chunks, so that its upload need not wait for all of it.
"""
from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .bus import CHUNK_BYTES, Arena, Bus, Staging
from .host_memory import HostMemory
from .ring import aligned
from .visits import Entry, Part

if TYPE_CHECKING:
    from .disk_map import DiskMap
    from .management import Management


class Transport:
    """Brings weights to the device of a bus. Each thread that does so has staging buffers of its own."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._of_thread = threading.local()
        self._host: HostMemory | None = None

    def open(self, waiting: Sequence[Management]) -> None:
        """Have room in RAM for the layers that are to wait there."""
        nbytes = sum(layer.streamed_bytes(self._bus) for layer in waiting)
        self._host = HostMemory(self._bus, nbytes, len(waiting)) if waiting else None

    def close(self) -> None:
        """Nothing is under way any more, and what waits in RAM is about to go."""
        if self._host is not None:
            self._bus.finish(self._bus.uploaded())
            self._host.close()
            self._host = None

    def bring(self, entry: Entry, ring: Arena) -> None:
        """Give the entry its weights, in its region of `ring` or, without one, in memory of their own.

        Raises what reading them raises.
        """
        arena, offset = ring, 0
        if entry.region is None:
            arena = Arena(self._bus.allocate(entry.nbytes))
        else:
            offset = entry.region.start
            for event in entry.region.after:
                self._bus.upload_after(event)
        weights = []
        for part in self._parts_of(entry):
            weights.append(self._move(part, arena, offset, entry.layer.source) if part.nbytes else part.tensor)
            offset += aligned(part.nbytes)
        entry.weights, entry.arrived = tuple(weights), self._bus.uploaded()

    def _parts_of(self, entry: Entry) -> tuple[Part, ...]:
        """What has to be moved, after it was read into RAM if it is to wait there from now on."""
        layer = entry.layer
        with layer.lock if layer.waits else nullcontext():  # another reader may be at its next visit
            entry.read_bytes = layer.transfer(self._bus).read_bytes
            if layer.waits and entry.read_bytes:
                layer.hold(self._bus, self._host)
        return layer.transfer(self._bus).parts

    def _move(self, part: Part, arena: Arena, offset: int, source: DiskMap | None) -> Tensor:
        target = arena.tensor(offset, part.dtype, part.shape, part.strides)
        if not self._bus.direct:
            self._upload(part, target, source)
        elif part.as_stored:
            source.read_stored(part.name, arena.bytes[offset:offset + part.nbytes])
        elif part.tensor is None:
            source.load_into(part.name, target)
        else:
            target.copy_(part.tensor)
        return target

    def _upload(self, part: Part, target: Tensor, source: DiskMap | None) -> None:
        if part.tensor is not None and self._bus.is_locked(part.tensor):
            self._bus.upload(target, part.tensor)
        else:
            self._upload_staged(part, target.reshape(-1).view(torch.uint8), source, self._staging())

    def _staging(self) -> Staging:
        if not hasattr(self._of_thread, "staging"):
            self._of_thread.staging = self._bus.staging()
        return self._of_thread.staging

    def _upload_staged(self, part: Part, target: Tensor, source: DiskMap | None, staging: Staging) -> None:
        """Chunk by chunk; all are bytes."""
        held = None if part.tensor is None else part.tensor.contiguous().reshape(-1).view(torch.uint8)
        if held is None and not source.is_stored(part.name):  # or each chunk would put the whole tensor together again
            held = source.read_into(part.name, torch.empty(part.nbytes, dtype=torch.uint8))
        for start in range(0, target.numel(), CHUNK_BYTES):
            piece = target[start:start + CHUNK_BYTES]
            buffer = staging.take(piece.numel())
            if held is None:
                source.read_part(part.name, start, buffer)
            else:
                buffer.copy_(held[start:start + CHUNK_BYTES])
            self._bus.upload(piece, buffer)
            staging.put_back()
