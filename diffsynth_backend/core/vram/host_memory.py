"""Host memory for weights that wait there for their turn: one run of bytes, filled once in a loop.

Notable: on an accelerator each piece is locked into RAM as it is handed out, so that the time for locking is hidden
behind the computation. A piece that the system refuses to lock works all the same, by way of staging.
"""
from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable

import torch

from .bus import Arena, Bus

logger = logging.getLogger(__name__)

PAGE_BYTES = 4096  # memory is locked page by page, so no two pieces share one


class HostMemory:
    """Room for `pieces` pieces of `nbytes` bytes together. Safe for several threads.

    `close` ends the locks; pieces that are still in use then remain as ordinary memory. No copy from them may be under
    way.
    """

    def __init__(self, bus: Bus, nbytes: int, pieces: int) -> None:
        self._bus = bus
        pages = -(-nbytes // PAGE_BYTES) + pieces + 1
        memory = torch.empty(pages * PAGE_BYTES, dtype=torch.uint8)
        self.arena = Arena(memory)
        self._end = -memory.data_ptr() % PAGE_BYTES
        self._lock = threading.Lock()
        self._locks: list[Callable[[], None]] = []
        self._locks_pages = True
        # Also when nobody closes it: memory must not be given back to the system while it is locked.
        self.close = weakref.finalize(self, _end_all, self._locks, memory)

    def take(self, nbytes: int) -> int:
        """Where the next `nbytes` begin in `arena`, on pages of their own."""
        with self._lock:
            start, end = self._end, self._end + -(-nbytes // PAGE_BYTES) * PAGE_BYTES
            if end > self.arena.memory.numel():
                raise ValueError(f"{nbytes} bytes asked of {self.arena.memory.numel() - start} that are left")
            self._end = end
            if self._locks_pages and nbytes:
                self._lock_pages(self.arena.memory[start:end])
        return start

    def _lock_pages(self, piece: torch.Tensor) -> None:
        unlock = self._bus.lock_pages(piece)
        if unlock is not None:
            self._locks.append(unlock)
        elif not self._bus.direct:
            self._locks_pages = False
            logger.warning("The system does not lock more memory for copies to %s, so weights in RAM go there by a "
                           "detour; a lower ram_limit may help", self._bus.device)


def _end_all(locks: list[Callable[[], None]], _memory: torch.Tensor) -> None:
    while locks:
        locks.pop()()
