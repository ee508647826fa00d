"""The eight VRAM fields on the CPU, as tests write them: a storage dtype for each state."""
from __future__ import annotations

from typing import Any

import torch


def cpu_fields(offload: torch.dtype | None, onload: torch.dtype | None, preparing: torch.dtype | None,
               computation: torch.dtype) -> dict[str, Any]:
    """Every state on the CPU in its dtype; None is the disk."""
    dtypes = {"offload": offload, "onload": onload, "preparing": preparing, "computation": computation}
    return {f"{name}_dtype": dtype or "disk" for name, dtype in dtypes.items()} | {
        f"{name}_device": "cpu" if dtype else "disk" for name, dtype in dtypes.items()}
