"""VRAM management: building models without weights, weights on disk, and layers that move by themselves."""
from __future__ import annotations

from .disk_map import DiskMap
from .initialization import skip_model_initialization
from .layers import (
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    enable_vram_management,
    iter_managed,
    offload_model,
    onload_model,
)
from .placement import ResidencyBudget
from .residency import Loop, Residency

__all__ = ["AutoWrappedLinear", "AutoWrappedModule", "AutoWrappedNonRecurseModule", "DiskMap", "Loop", "Residency",
           "ResidencyBudget", "enable_vram_management", "iter_managed", "offload_model", "onload_model",
           "skip_model_initialization"]
