"""How weights get to the device that computes: copies ahead of use, ordered by events.

Notable: a stream of weights knows three steps only (host memory → device, "it has arrived", "it is no longer used").
On an accelerator each is an entry in a queue of the device, so the host runs ahead and nothing waits for it; on the CPU
the weights are read straight to where they are used, and a step that has returned is done.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..device import parse_device

CHUNK_BYTES = 16 << 20  # of pinned memory; large enough for the full speed of the bus
CHUNKS = 4  # in flight for each reader
PORTABLE = 1  # CUDA: locked for all devices, whichever is the current one of the thread that asks


class Bus:
    """A device whose copies are done when they return; events are None.

    `direct`: the device's memory is the host's, so weights are read and cast into it without a detour.
    `readers`: how many threads fetch weights at a time.
    """

    readers = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.direct = device.type == "cpu"

    def is_at(self, device: torch.device) -> bool:
        """Whether what is on `device` is where the computation needs it."""
        return device == self.device

    def allocate(self, nbytes: int) -> Tensor:
        """Device memory: uint8 (nbytes,)."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def staging(self) -> Staging:
        """A reader's own buffers on the way from a file to the device."""
        return Staging(self)

    def allocate_host(self, nbytes: int) -> Tensor:
        """Host memory that `upload` reads from: uint8 (nbytes,)."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def lock_pages(self, memory: Tensor) -> Callable[[], None] | None:
        """Keep host memory, which begins with a page, in place, so that uploads from it need no detour. Returns what
        ends that, or None if there is nothing to gain or the system refuses."""
        return None

    def is_locked(self, tensor: Tensor) -> bool:
        """Whether uploads from this host memory need no detour."""
        return tensor.is_pinned()

    def upload(self, target: Tensor, source: Tensor) -> None:
        """Copy `source` (host) to `target` (device), both of one dtype and shape, in the order of calls."""
        target.copy_(source)

    def uploaded(self) -> Any:
        """The event after the uploads so far."""
        return None

    def computed(self) -> Any:
        """The event after the computation so far."""
        return None

    def upload_after(self, event: Any) -> None:
        """Further uploads start after the event."""

    def compute_after(self, event: Any) -> None:
        """Further computation starts after the event."""

    def finish(self, event: Any) -> None:
        """Return when the event has passed."""


class AcceleratorBus(Bus):
    """An accelerator with streams and events of torch's usual interface (CUDA, ROCm, XPU, NPU)."""

    readers = 2

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._api = getattr(torch, device.type)
        self._copies = self._api.Stream(device=device)

    def allocate_host(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def lock_pages(self, memory: Tensor) -> Callable[[], None] | None:
        """Not torch's pinned memory, which takes the next power of two and keeps it when nobody uses it any more."""
        if self.device.type != "cuda":  # ROCm calls itself so, too; others have no such function
            return None
        runtime, address = self._api.cudart(), memory.data_ptr()
        if int(runtime.cudaHostRegister(address, memory.numel(), PORTABLE)) == 0:
            return partial(runtime.cudaHostUnregister, address)
        self._forget_last_error()
        return None

    def _forget_last_error(self) -> None:
        """CUDA would report it to whoever asks next, as if that had failed."""
        with suppress(RuntimeError):
            torch.zeros(1, device=self.device).add_(1)

    def upload(self, target: Tensor, source: Tensor) -> None:
        with self._api.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def uploaded(self) -> Any:
        return self._copies.record_event()

    def computed(self) -> Any:
        return self._api.current_stream(self.device).record_event()

    def upload_after(self, event: Any) -> None:
        self._copies.wait_event(event)

    def compute_after(self, event: Any) -> None:
        self._api.current_stream(self.device).wait_event(event)

    def finish(self, event: Any) -> None:
        event.synchronize()


class Arena:
    """Device memory that tensors of any dtype are laid into.

    `bytes` are its bytes where the host can write them, for those who fill it without a tensor; else None.
    """

    __slots__ = ("_typed", "bytes", "memory")

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.bytes = memoryview(memory.numpy()) if memory.device.type == "cpu" else None
        self._typed: dict[torch.dtype, Tensor] = {}

    def tensor(self, offset: int, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
        """The tensor that lies `offset` bytes (a multiple of its items) from the beginning."""
        if dtype not in self._typed:
            self._typed[dtype] = self.memory.view(dtype)
        return self._typed[dtype].as_strided(shape, strides, offset // dtype.itemsize)


class Staging:
    """A few host buffers in turn; each is free again when the upload from it has passed."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._buffers: deque[tuple[Tensor, Any]] = deque()
        self._memory = bus.allocate_host(CHUNKS * CHUNK_BYTES)
        self._buffers.extend((chunk, None) for chunk in self._memory.split(CHUNK_BYTES))

    def take(self, nbytes: int) -> Tensor:
        """The next buffer, of `nbytes` ≤ CHUNK_BYTES; `put_back` ends its use."""
        buffer, event = self._buffers[0]
        if event is not None:
            self._bus.finish(event)
        return buffer[:nbytes]

    def put_back(self) -> None:
        """The uploads so far were the last use of the buffer that was taken."""
        buffer, _ = self._buffers.popleft()
        self._buffers.append((buffer, self._bus.uploaded()))


def bus_to(device: str | torch.device) -> Bus:
    """The bus to a device; for one without streams (mps), copies are done on return."""
    device = parse_device(device)
    has_streams = device.type != "cpu" and hasattr(getattr(torch, device.type, None), "Stream")
    return AcceleratorBus(device) if has_streams else Bus(device)
