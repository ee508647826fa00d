"""What a run moved: the figures that a report, a log line or a benchmark is made of."""
from __future__ import annotations

from dataclasses import dataclass

from ..device import GIB


@dataclass
class Traffic:
    """Counters of one run. Bytes; seconds of the host's clock."""

    passes: int = 0
    read_bytes: int = 0  # of files, for streamed weights
    moved_bytes: int = 0  # of streamed weights, to the device
    busy_seconds: float = 0.0  # of readers at work, added up
    stall_seconds: float = 0.0  # the computation waited for weights
    peak_device_bytes: int = 0  # weights, ring and tables at their most

    @property
    def bandwidth(self) -> float:
        """Bytes a second that the readers moved while at work; 0 before anything was moved."""
        return self.moved_bytes / self.busy_seconds if self.busy_seconds else 0.0

    def note_device_bytes(self, nbytes: int) -> None:
        """Weights, ring and tables now take `nbytes` of the device."""
        self.peak_device_bytes = max(self.peak_device_bytes, nbytes)

    def describe(self) -> str:
        """One line for people."""
        return (f"{self.read_bytes / GIB:.2f} GiB read from disk, {self.moved_bytes / GIB:.2f} GiB streamed in "
                f"{self.passes} passes at {self.bandwidth / GIB:.2f} GiB/s, waited {self.stall_seconds:.2f} s, "
                f"at most {self.peak_device_bytes / GIB:.2f} GiB of weights on the device")
