"""What the names in a pickle of tensors stand for, and what a description says of a tensor.

A pickle names functions and classes. Of those that tensors need, a few functions here take the place, which import and
make nothing; some are left to torch, and no other is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.serialization import get_safe_globals

MAX_DIMENSIONS = 64  # torch's limit
MAX_BYTES = 2**63 - 1  # sizes are signed 64-bit integers in torch


class NoDescription(ValueError):
    """These bytes do not describe tensors, or not in bounds; the message says why."""


class Storage(NamedTuple):
    """A run of bytes in the file by its key, and the dtype of its elements."""

    dtype: torch.dtype
    key: str


class StoredTensor(NamedTuple):
    """A view of a storage: a tensor of `dtype` and `shape` from element `first` on; its last element is `reach` - 1
    elements behind that, and `as_stored` tells whether it lies there as it does in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    key: str
    first: int
    reach: int
    as_stored: bool


class StorageType(NamedTuple):
    """A class of storages, by the dtype of their elements."""

    dtype: torch.dtype


class Other:
    """Something that only torch can make."""


OTHER = Other()


def _rebuild_old_tensor(storage: Storage, first: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> StoredTensor:
    return _view(storage, None, first, shape, stride, None)


def _rebuild_tensor(storage: Storage, first: int, shape: tuple[int, ...], stride: tuple[int, ...],
                    _requires_grad: Any, _hooks: Any, metadata: Any = None) -> StoredTensor:
    return _view(storage, None, first, shape, stride, metadata)


def _rebuild_tensor_of_dtype(storage: Storage, first: int, shape: tuple[int, ...], stride: tuple[int, ...],
                             _requires_grad: Any, _hooks: Any, dtype: torch.dtype, metadata: Any = None
                             ) -> StoredTensor:
    return _view(storage, dtype, first, shape, stride, metadata)


def _view(storage: Storage, dtype: torch.dtype | None, first: int, shape: tuple[int, ...], stride: tuple[int, ...],
          metadata: Any) -> StoredTensor:
    """Of the storage's dtype, if none is given. `metadata` tells of a conjugation or negation still to be done."""
    if type(storage) is not Storage or type(shape) is not tuple or type(stride) is not tuple:
        raise NoDescription("a tensor without storage, shape or stride")
    dtype = storage.dtype if dtype is None else dtype
    if type(dtype) is not torch.dtype:
        raise NoDescription(f"a {type(dtype).__name__} where a dtype is expected")
    sizes = (first, *shape, *stride)
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS or {*map(type, sizes)} != {int} or min(sizes) < 0:
        raise NoDescription("a tensor's sizes are not numbers from 0, or too many")
    if math.prod(filter(None, shape)) * dtype.itemsize > MAX_BYTES:
        raise NoDescription(f"a tensor of shape {shape!r:.80} has more elements than can be counted")
    contiguous, expected, reach = True, 1, 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        contiguous &= step == expected or length == 1
        expected *= length
        reach += (length - 1) * step
    if expected == 0:
        contiguous, reach = True, 0
    return StoredTensor(dtype, shape, storage.key, first, reach, contiguous and not metadata)


def _rebuild_parameter(tensor: StoredTensor, _requires_grad: Any, _hooks: Any) -> StoredTensor:
    if type(tensor) is not StoredTensor:
        raise NoDescription("a parameter without tensor")
    return tensor


def _empty_dictionary() -> dict[Any, Any]:
    return {}


_TYPED = {"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
          "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
          "Bool": torch.bool, "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64}
_STORAGES = {f"torch {kind}Storage": StorageType(dtype) for kind, dtype in _TYPED.items()} | {
    f"{module} UntypedStorage": StorageType(torch.uint8) for module in ("torch", "torch.storage")}
_MAKERS: dict[str, Callable[..., Any]] = {
    "torch._utils _rebuild_tensor": _rebuild_old_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v3": _rebuild_tensor_of_dtype,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "collections OrderedDict": _empty_dictionary,
}
_DTYPES = {f"torch {name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_KNOWN: dict[str, Any] = {**_MAKERS, **_STORAGES, **_DTYPES}
# Left to torch. Not here: what torch allows for the sake of numpy, and types that allocate what they are asked for.
_LEFT_TO_TORCH = frozenset((
    *(f"torch._utils _rebuild_{kind}" for kind in (
        "sparse_tensor", "qtensor", "nested_tensor", "meta_tensor_no_storage", "parameter_with_state",
        "wrapper_subclass")),
    "torch._tensor _rebuild_from_type_v2", "torch.serialization _get_layout", "torch.nn.parameter Parameter",
    "torch Size", "torch device", "torch per_tensor_affine", "torch per_channel_affine",
    "torch per_channel_affine_float_qparams", "torch QInt8Storage", "torch QUInt8Storage", "torch QInt32Storage",
    "torch QUInt4x2Storage", "torch QUInt2x4Storage", "collections Counter", "builtins set", "__builtin__ set",
    "builtins complex", "__builtin__ complex",
))  # fmt: skip


def _allowed_by_user() -> set[str]:
    """What torch was told to let in, as names."""
    allowed = (entry if isinstance(entry, tuple) else (entry, f"{entry.__module__}.{entry.__qualname__}")
               for entry in get_safe_globals())
    return {name for _, name in allowed}


def meaning_of(module: str, name: str) -> Any:
    """A function of this file, a StorageType or a dtype; OTHER for what is left to torch. Raises NoDescription."""
    known = _KNOWN.get(f"{module} {name}")
    if known is not None:
        return known
    if f"{module} {name}" in _LEFT_TO_TORCH or f"{module}.{name}" in _allowed_by_user():
        return OTHER
    raise NoDescription(f"it names {module!r:.100} {name!r:.100}, which is no part of a tensor")
