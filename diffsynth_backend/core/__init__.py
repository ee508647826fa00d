"""Model files, VRAM management and devices: what every family of models is built on. It imports nothing above it."""
from __future__ import annotations

from .loader.config import ModelConfig
from .loader.file import hash_model_file, load_state_dict
from .loader.model import load_model
from .vram import (
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    DiskMap,
    enable_vram_management,
    skip_model_initialization,
)

__all__ = ["AutoWrappedLinear", "AutoWrappedModule", "AutoWrappedNonRecurseModule", "DiskMap", "ModelConfig",
           "enable_vram_management", "hash_model_file", "load_model", "load_state_dict", "skip_model_initialization"]
