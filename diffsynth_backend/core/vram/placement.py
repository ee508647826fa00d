"""Placements (dtype and device) of the states of VRAM management, and the budget that bounds what stays resident.

Notable: both are decided from the configuration and from sizes alone. The driver is never asked: what it reports
includes other programs and the allocator's cache, and asking costs time in every layer.
"""
from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..device import GIB, parse_device

OFFLOAD, ONLOAD, PREPARING = 0, 1, 2
STATE_NAMES = ("offload", "onload", "preparing", "computation")
DISK = "disk"


@dataclass(frozen=True)
class Placement:
    """Where weights are and in which dtype. A device of None is the disk: memory holds a shape and nothing else."""

    dtype: torch.dtype | None
    device: torch.device | None

    @property
    def on_disk(self) -> bool:
        return self.device is None


ON_DISK = Placement(None, None)


@dataclass(frozen=True)
class Placements:
    """The placement of each state, indexed by the state's number, and the computation's."""

    states: tuple[Placement, Placement, Placement]
    computation: Placement

    @classmethod
    def from_config(cls, vram_config: Mapping[str, Any]) -> Placements:
        """From the eight fields `{offload,onload,preparing,computation}_{dtype,device}`.

        Unset fields: a dtype is the computation's; a device is "disk" when that state's dtype is "disk", else the
        computation's, and so is a device's missing index. Raises ValueError for unknown fields, a missing computation
        and combinations without meaning, TypeError for a dtype that is none.
        """
        unknown = set(vram_config) - {f"{name}_{part}" for name in STATE_NAMES for part in ("dtype", "device")}
        if unknown:
            raise ValueError(f"vram_config: unknown field(s) {sorted(unknown)}; expected <state>_dtype and "
                             f"<state>_device for the states {', '.join(STATE_NAMES)}")
        dtype, device = vram_config.get("computation_dtype"), vram_config.get("computation_device")
        if not isinstance(dtype, torch.dtype) or device in (None, DISK):
            raise ValueError("vram_config: computation_dtype must be a torch dtype and computation_device a device, "
                             f"got {dtype!r} and {device!r}")
        computation = Placement(dtype, parse_device(device))
        states = tuple(_placement(vram_config, name, computation) for name in STATE_NAMES[:3])
        for earlier, later, name in zip(states, states[1:], STATE_NAMES[1:]):
            if later.on_disk and not earlier.on_disk:
                raise ValueError(f"vram_config: {name} is 'disk' although the state before it holds the weights in "
                                 f"memory: give {name} a dtype and a device")
        return cls(states, computation)

    def as_one_block(self) -> Placements:
        """For a model that moves as a whole: while in use, all of it is where it computes."""
        return Placements((self.states[OFFLOAD], self.computation, self.computation), self.computation)

    def counts(self, state: int) -> bool:
        """Whether a layer in that state takes memory that a limit is about.

        Only the computation device is limited. On the CPU, where weights rest anyway, only promotion counts, so that a
        limit has the effect that it has on an accelerator.
        """
        placement = self.states[state]
        return placement.device == self.computation.device and (state == PREPARING or placement.device.type != "cpu")

    def shares_offload_copy(self, state: int) -> bool:
        """Whether a layer gets to that state without moving or casting anything."""
        return all(placement == self.states[OFFLOAD] for placement in self.states[:state + 1])


def is_managed_config(vram_config: Mapping[str, Any] | None) -> bool:
    """Management is on when both fields of the offload state are set; otherwise weights go straight to the device."""
    return bool(vram_config and vram_config.get("offload_dtype") and vram_config.get("offload_device"))


def _placement(vram_config: Mapping[str, Any], name: str, computation: Placement) -> Placement:
    dtype, device = vram_config.get(f"{name}_dtype"), vram_config.get(f"{name}_device")
    if device is None:
        device = DISK if dtype == DISK else computation.device
    if device == DISK and dtype in (None, DISK):
        return ON_DISK
    if DISK in (dtype, device):
        raise ValueError(f"vram_config: {name}_dtype={dtype!r} with {name}_device={device!r}: weights on disk have the "
                         "file's dtype, so set both to 'disk' or neither")
    if not isinstance(dtype, torch.dtype | None):
        raise TypeError(f"vram_config: {name}_dtype must be a torch dtype or 'disk', got {dtype!r}")
    device = parse_device(device)
    if device.index is None and device.type == computation.device.type:
        device = computation.device  # "cuda" beside "cuda:1" is that one
    return Placement(dtype or computation.dtype, device)


class ResidencyBudget:
    """Bytes of managed weights on the computation device, and how many there may be.

    One budget is shared by the layers of all models that the same limit is for. It counts what management holds there,
    not copies for a single call. A limit of None is no limit; 0: nothing is promoted. A model that is dropped while
    others keep the budget should be offloaded first: only then its promoted layers are counted out.
    `ram_limit_bytes` is the host's memory in which layers that are read from disk may wait while their model is in use.
    """

    def __init__(self, limit_bytes: int | None = None, ram_limit_bytes: int = 0) -> None:
        self.limit_bytes = limit_bytes
        self.ram_limit_bytes = ram_limit_bytes
        self.used_bytes = 0
        self._lock = threading.Lock()

    @classmethod
    def from_gib(cls, vram_limit: float | None, ram_limit: float | None = None) -> ResidencyBudget:
        """Limits in GiB, each None or at least 0; a `ram_limit` of None is 0. Raises ValueError for other values."""
        if vram_limit is not None and not vram_limit >= 0:
            raise ValueError(f"vram_limit must be at least 0 GiB, or None for no limit, got {vram_limit!r}")
        if ram_limit is not None and not 0 <= ram_limit < math.inf:
            raise ValueError(f"ram_limit must be a number of GiB, at least 0, or None, got {ram_limit!r}")
        return cls(None if vram_limit is None else int(vram_limit * GIB), int((ram_limit or 0) * GIB))

    def admits(self, nbytes: int) -> bool:
        """Whether `nbytes` more would fit now."""
        return self.limit_bytes is None or self.used_bytes + nbytes <= self.limit_bytes

    def reserve(self, nbytes: int) -> bool:
        """Count `nbytes` more if they fit; False, and nothing counted, if they do not."""
        with self._lock:
            if not self.admits(nbytes):
                return False
            self.used_bytes += nbytes
            return True

    def charge(self, nbytes: int) -> None:
        """Count bytes that have no other place to be, whatever the limit: less is left for the others."""
        with self._lock:
            self.used_bytes += nbytes

    def release(self, nbytes: int) -> None:
        with self._lock:
            self.used_bytes -= nbytes
