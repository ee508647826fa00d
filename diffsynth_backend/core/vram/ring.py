"""A ring of bytes: memory for weights that are needed once, in order, and then make room for the next.

Notable: regions are reserved in order and mostly freed in order; one that is freed early waits for its elders. Nothing
is ever allocated or moved. On an accelerator a region is "free" for the host before the device is done with it, so each
freed region keeps the event after which it may be written, and `reserve` says which of them the new region lies on.
"""
from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

ALIGNMENT = 256  # bytes: what CUDA's allocator gives, and enough for any dtype


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(eq=False)
class Region:
    """Bytes start…end of the ring. `after` are the events that have to pass before it is written."""

    start: int
    end: int
    after: tuple[Any, ...] = ()
    free: bool = False
    unused: bool = False
    used_until: Any = None

    def overlaps(self, other: Region) -> bool:
        return self.start < other.end and other.start < self.end


class Ring:
    """Offsets into `capacity` bytes. Not safe for several threads by itself: its stream's lock guards it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._live: deque[Region] = deque()  # in the order of reservation
        self._past: list[Region] = []  # freed ones whose event may still be ahead
        self._head = 0  # the end of the last one
        self.free_bytes = capacity  # of all regions, wherever they lie

    def reserve(self, nbytes: int) -> Region | None:
        """The next `nbytes`, None while there is no room. Raises ValueError for more than the ring ever has."""
        size = aligned(nbytes)
        if size > self.capacity:
            raise ValueError(f"{size} bytes asked of a ring of {self.capacity}")
        start = self._find(size)
        if start is None:
            return None
        region = Region(start, start + size)
        region.after = tuple(past.used_until for past in self._past if past.overlaps(region))
        self._past = [past for past in self._past if not region.start <= past.start < past.end <= region.end]
        self._live.append(region)
        self.free_bytes -= size
        self._head = region.end
        return region

    def free(self, region: Region, used_until: Any = None) -> None:
        """Give a region back; the device uses it until the event `used_until` (None: it is done)."""
        region.free, region.used_until = True, used_until
        self.free_bytes += region.end - region.start
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        while self._live and self._live[0].free:
            oldest = self._live.popleft()
            if oldest.used_until is not None:
                self._past.append(oldest)

    def take_back(self, region: Region) -> None:
        """Free a region that nobody has used; the newest ones make room at once, whatever their elders do."""
        region.free = region.unused = True
        self.free_bytes += region.end - region.start
        while self._live and self._live[-1].unused:
            self._head = self._live.pop().start
        self._drop_oldest()

    def _find(self, size: int) -> int | None:
        if not self._live:  # goes on where the last region ended: that it was quick does not change the places
            return self._head if self._head + size <= self.capacity else 0
        tail, head = self._live[0].start, self._head
        if head > tail:  # live bytes are one stretch: behind it, else from the beginning
            if head + size <= self.capacity:
                return head
            return 0 if size <= tail else None
        return head if head + size <= tail else None
