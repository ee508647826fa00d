"""What a stream of weights keeps a record of: visits of layers, in the order of a pass, and who has made them.

Notable: plain data without locks; the stream guards it. A layer that is visited twice in a pass has two entries.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .ring import Region, aligned

if TYPE_CHECKING:
    from .management import Management, Weights


@dataclass(frozen=True)
class Part:
    """One of a layer's tensors on its way: `tensor` is None on disk, `nbytes` 0 if it is used where it is.

    `read_bytes` of a file are read for it. `as_stored`: what lies in the file are the bytes that arrive.
    """

    name: str
    tensor: Tensor | None
    dtype: torch.dtype
    nbytes: int
    shape: torch.Size
    read_bytes: int = 0
    as_stored: bool = False

    @cached_property
    def strides(self) -> tuple[int, ...]:
        return tuple(accumulate(reversed(self.shape[1:]), mul, initial=1))[::-1][:len(self.shape)]


@dataclass(frozen=True)
class Transfer:
    """All of a layer's tensors on their way, and the bytes of the ring that they take."""

    parts: tuple[Part, ...]

    @cached_property
    def nbytes(self) -> int:
        return sum(aligned(part.nbytes) for part in self.parts)

    @cached_property
    def read_bytes(self) -> int:
        return sum(part.read_bytes for part in self.parts)


@dataclass(eq=False)
class Entry:
    """One visit of the log: a layer's weights on their way through the ring."""

    layer: Management
    nbytes: int
    read_bytes: int = 0  # of files, for this visit
    region: Region | None = None
    weights: Weights = ()
    arrived: Any = None  # the event after which the computation may use them
    ready: bool = False
    dropped: bool = False  # foreseen and not wanted after all
    leases: int = 0
    error: BaseException | None = None


@dataclass(eq=False)
class Side:
    """One walk over the layers. `at` is the place in the log of what it will use next."""

    at: int = 0
    finished: bool = False


@dataclass
class Log:
    """The visits of the current pass, and behind them those that are foreseen.

    Indices: `freed` ≤ `lead` ≤ len(entries) and `allotted` ≤ len(entries). Before `freed` all sides have been and the
    ring has the memory back; before `lead` some side has been; before `allotted` entries have been given to a reader.
    """

    entries: list[Entry] = field(default_factory=list)
    freed: int = 0
    lead: int = 0
    allotted: int = 0
    held_bytes: int = 0  # of entries in freed…lead

    def start_again(self) -> None:
        """Forget what lies before `lead`: a new pass begins there."""
        del self.entries[:self.lead]
        self.allotted -= self.lead
        self.freed = self.lead = self.held_bytes = 0
