"""An accelerator that runs in virtual time: copies and computations are queued and take as long as we say.

Notable: like a GPU's, its two queues run by themselves and are ordered by events alone, which here are points in time.
The host is infinitely fast, so schedules are exact and nothing sleeps. Data moves at once; an event that the engine
forgets shows as a schedule that is faster than any machine could be.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from diffsynth_backend.core.vram.bus import Bus


class FakeAccelerator(Bus):
    """`bandwidth` in bytes per virtual second. Its memory is the host's, and yet weights have to be copied to it.

    `most_locks`: of pieces of host memory that its system allows at a time.
    """

    def __init__(self, bandwidth: float, most_locks: int = 1000) -> None:
        super().__init__(torch.device("cpu"))
        self.direct = False
        self.bandwidth = bandwidth
        self.copied = self.calculated = 0.0  # until when the two queues are busy
        self.uploads: list[int] = []  # bytes of each
        self.most_locks = most_locks
        self.locked: dict[int, int] = {}  # bytes by address

    def __deepcopy__(self, memo: dict) -> FakeAccelerator:
        return self  # a copied model is on the same machine

    def is_at(self, device: torch.device) -> bool:
        return False

    def lock_pages(self, memory: Tensor) -> Callable[[], None] | None:
        start, end = memory.data_ptr(), memory.data_ptr() + memory.numel()
        if start % 4096 or any(start < other + size and other < end for other, size in self.locked.items()):
            raise AssertionError("locked memory begins with a page, and is locked once")
        if len(self.locked) == self.most_locks:
            return None
        self.locked[start] = memory.numel()
        return partial(self.locked.pop, start)

    def is_locked(self, tensor: Tensor) -> bool:
        start = tensor.data_ptr()
        return any(begin <= start and start + tensor.nbytes <= begin + size for begin, size in self.locked.items())

    def upload(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)
        self.copied += source.nbytes / self.bandwidth
        self.uploads.append(source.nbytes)

    def uploaded(self) -> float:
        return self.copied

    def computed(self) -> float:
        return self.calculated

    def upload_after(self, event: float) -> None:
        self.copied = max(self.copied, event)

    def compute_after(self, event: float) -> None:
        self.calculated = max(self.calculated, event)

    def compute(self, seconds: float) -> None:
        self.calculated += seconds


class TimedLinear(nn.Module):
    """A linear layer (dim → dim) that keeps the accelerator busy for `seconds`."""

    def __init__(self, dim: int, seconds: float, accelerator: FakeAccelerator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, dim) / dim**0.5)
        self._seconds, self._accelerator = seconds, [accelerator]

    def forward(self, x: Tensor) -> Tensor:
        self._accelerator[0].compute(self._seconds)
        return x @ self.weight.to(x.dtype)


class TimedNet(nn.Module):
    """Timed layers one after the other, of the given sizes (dim, seconds)."""

    def __init__(self, layers: list[tuple[int, float]], accelerator: FakeAccelerator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TimedLinear(dim, seconds, accelerator) for dim, seconds in layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x[:, :layer.weight.shape[0]].repeat(1, 8)[:, :layer.weight.shape[0]]))
        return x
