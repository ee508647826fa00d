"""Devices by name: parsing, memory figures and cache release for every kind of accelerator that torch drives.

Notable: nothing here runs at import, so importing the package neither initialises CUDA nor needs an accelerator; and
every function takes "cpu" as well, because the whole engine also runs (and is tested) on the CPU.
"""
from __future__ import annotations

from types import ModuleType

import torch

GIB = 1024**3

# torch's namespaces of accelerators, in the order in which `available_device` tries them. ROCm calls itself "cuda".
ACCELERATORS = ("cuda", "xpu", "npu", "mps")


def parse_device(device: str | int | torch.device) -> torch.device:
    """`torch.device` of a device, its name or an accelerator's index.

    Raises ValueError for a name that torch does not know. Whether the device is present is seen at its first use.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"unknown device {device!r} for this build of torch ({torch.__version__}): expected a name "
                         "such as 'cuda', 'cuda:1', 'mps' or 'cpu'") from error


def get_device_type(device: str | int | torch.device) -> str:
    """The kind of a device without its index, such as "cuda" for "cuda:1"."""
    return parse_device(device).type


def empty_cache(device: str | int | torch.device) -> None:
    """Hand the allocator's cached, unused blocks back to the driver. The CPU's allocator keeps none."""
    device_type = get_device_type(device)
    if device_type != "cpu":
        _namespace(device_type).empty_cache()


def memory_info(device: str | int | torch.device) -> tuple[float, float]:
    """Free and total memory of a device in GiB, for all programs together. It asks the driver: not for hot loops."""
    device = parse_device(device)
    free, total = _MEMORY_QUERIES.get(device.type, _driver_memory)(device)
    return free / GIB, total / GIB


def available_device() -> torch.device:
    """The first kind of accelerator that is present and usable, else the CPU."""
    return next((torch.device(name) for name in ACCELERATORS if _device_count(name)), torch.device("cpu"))


def check_available(device: str | int | torch.device) -> torch.device:
    """`torch.device` of a device that this machine has.

    Raises ValueError for a name that torch does not know, and for an accelerator that is absent or has no such index.
    """
    device = parse_device(device)
    count = _device_count(device.type) if device.type in ACCELERATORS else None
    if count is not None and (device.index or 0) >= count:
        raise ValueError(f"device '{device}' is not there: torch {torch.__version__} sees {count} devices of the kind "
                         f"{device.type!r}; choose another, such as '{available_device()}', or install the build of "
                         "torch and the driver for it")
    return device


def _device_count(device_type: str) -> int:
    namespace = getattr(torch, device_type, None)
    return 0 if namespace is None else namespace.device_count()


def _namespace(device_type: str) -> ModuleType:
    namespace = getattr(torch, device_type, None)
    if namespace is None:
        raise ValueError(f"this build of torch ({torch.__version__}) has no support for {device_type!r}: install the "
                         "build for that device, or choose another device")
    return namespace


def _driver_memory(device: torch.device) -> tuple[int, int]:
    return _namespace(device.type).mem_get_info(device)


def _host_memory(device: torch.device) -> tuple[int, int]:
    import psutil  # only this figure needs it

    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _metal_memory(device: torch.device) -> tuple[int, int]:
    total = torch.mps.recommended_max_memory()
    return total - torch.mps.driver_allocated_memory(), total


_MEMORY_QUERIES = {"cpu": _host_memory, "mps": _metal_memory}
