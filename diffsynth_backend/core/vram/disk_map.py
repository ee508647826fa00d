"""DiskMap: a state dict whose tensors stay in the files until they are asked for.

Built from the files' headers, so it costs milliseconds and no memory whatever the model's size. A tensor is read with
positioned reads, straight into its final memory, or in chunks through a small warm buffer when it has to be cast or
moved on the way: memory use is the tensor asked for plus that buffer, and nothing of the file stays mapped. The
exception are pickles of the old format and tensors that a pickle stores transposed: those are read through torch.

Maps are safe to use from several threads. A copied or unpickled map shares no handle with its origin.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..loader.file import (
    CorruptFile,
    ModelFileError,
    ModelFiles,
    TensorInfo,
    check_model_files,
    fingerprint,
    is_pickle,
    load_pickle,
    place,
    read_layout,
    tensor_leaves,
    warn_about_pickle,
)
from ..platform import PositionedFile
from .tensor_reference import Leaf, Operation, Recipe, TensorReference, evaluate, evaluate_into, leaves

CHUNK_BYTES = 8 << 20  # small enough to stay in the processor's cache between the read and the cast
Converter = Callable[[dict[str, Any]], dict[str, Any]]
_thread = threading.local()


class DiskMap(Mapping[str, torch.Tensor], AbstractContextManager["DiskMap"]):
    """Read-only mapping from name to tensor; `map[name]` reads it to `device`, floating point cast to `torch_dtype`.

    `state_dict_converter` has the signature of any converter, dict to dict, and runs once, on `TensorReference`s:
    names it leaves out are absent here, and reading a result reads only the stored tensors in it.
    `infos` are the tensors as stored in the files, by their names there, converted or not.

    Raises ModelFileError as `read_tensor_infos`, and UnrecordableOperation if the converter computes with values.
    """

    def __init__(
        self,
        path: ModelFiles,
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype | None = None,
        state_dict_converter: Converter | None = None,
    ):
        self.paths = [str(Path(file).absolute()) for file in check_model_files(path)]
        self.device = torch.device(device)
        self.torch_dtype = torch_dtype
        self._fingerprints = {file: fingerprint(Path(file).stat()) for file in self.paths}
        layout = read_layout(self.paths)
        self.infos: dict[str, TensorInfo] = dict(tensor_leaves(layout))
        self._recipes = _convert(layout, state_dict_converter)
        self._reset_handles()
        for pickle in filter(is_pickle, self.paths):
            warn_about_pickle(pickle)

    def __getitem__(self, name: str) -> torch.Tensor:
        recipe = self._recipes[name]
        with torch.inference_mode(False):
            if isinstance(recipe, Leaf):
                return self._read(recipe.info, self.device, self.torch_dtype)
            return place(_compact(evaluate(recipe, self._read_stored)), self.device, self.torch_dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)

    def __contains__(self, name: object) -> bool:
        return name in self._recipes

    def __repr__(self) -> str:
        return f"DiskMap({len(self)} tensors in {len(self.paths)} files, {self.device}, {self.torch_dtype})"

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._recipes[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype as stored (after the converter, before `torch_dtype`), without reading the tensor."""
        return self._recipes[name].dtype

    def nbytes(self, name: str) -> int:
        """The bytes of the tensor in `dtype(name)`: the size of the buffer that `read_into` takes."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def is_stored(self, name: str) -> bool:
        """Whether the tensor's bytes lie in the file as they are; if not, all of it is put together to read a part."""
        recipe = self._recipes[name]
        return isinstance(recipe, Leaf) and recipe.info.offset is not None

    def sources(self, name: str) -> list[TensorInfo]:
        """The stored tensors that are read for `name`: one, unless the converter combines several."""
        return list(leaves(self._recipes[name]))

    @torch.inference_mode(False)
    def read_into(self, name: str, out: torch.Tensor) -> torch.Tensor:
        """Read the tensor as stored, `dtype(name)`, into `out` and return it: nothing is allocated for a plain tensor.

        `out` is a contiguous CPU tensor, either of `shape(name)` and `dtype(name)` or of uint8 with `nbytes(name)`
        elements. Raises ValueError if it is not.
        """
        self._check_buffer(name, out)
        recipe = self._recipes[name]
        if self.is_stored(name):
            self._fill(recipe.info, 0, _as_bytes(out))
        else:
            evaluate_into(recipe, self._read_stored, _as_bytes(out).view(self.dtype(name)).view(self.shape(name)))
        return out

    def read_stored(self, name: str, out: memoryview) -> None:
        """Fill `out`, of `nbytes(name)` bytes, with a tensor that `is_stored`: the quickest way, for streaming."""
        self._fill_bytes(self._recipes[name].info, 0, out)

    def load_into(self, name: str, out: torch.Tensor) -> torch.Tensor:
        """Read the tensor into `out`, contiguous and of `shape(name)`, and cast it to out's dtype and device."""
        recipe = self._recipes[name]
        is_plain = self.is_stored(name)
        if is_plain and out.dtype == recipe.info.dtype and out.device.type == "cpu":
            self._fill(recipe.info, 0, _as_bytes(out))  # without a detour: this runs for each streamed layer
            return out
        with torch.inference_mode(False):
            if is_plain:
                self._fill_through_chunks(recipe.info, out)
                return out
            return evaluate_into(recipe, self._read_stored, out)

    @torch.inference_mode(False)
    def read_part(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` (uint8, CPU) with the bytes of the tensor, as stored, from byte `start` on.

        For tensors that are not `is_stored`, all is read to get a part.
        """
        recipe = self._recipes[name]
        if self.is_stored(name):
            self._fill(recipe.info, start, out)
        else:
            whole = _as_bytes(evaluate(recipe, self._read_stored).contiguous())
            out.copy_(whole[start : start + out.numel()])

    def close(self) -> None:
        """Give the files back; reading raises ModelFileError afterwards. Reads under way in other threads complete."""
        with self._lock:
            self._closed = True
            self._handles = {}

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> DiskMap:
        return copy.copy(self)  # shares the index, which never changes

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_handles", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset_handles(closed=state["_closed"])

    def _reset_handles(self, closed: bool = False) -> None:
        self._handles: dict[tuple[str, bool], Any] = {}
        self._lock = threading.Lock()
        self._closed = closed

    def _handle(self, path: str, through_torch: bool = False) -> Any:
        """The opened file: a PositionedFile, or where torch has to read it, its tensors by full name."""
        with self._lock:
            if self._closed:
                raise ModelFileError(f"this DiskMap of {path} is closed; create a new one to read from it")
            key = (path, through_torch)
            if key not in self._handles:
                self._handles[key] = self._open(path, through_torch)
            return self._handles[key]

    def _open(self, path: str, through_torch: bool) -> Any:
        file = PositionedFile(path)
        if fingerprint(file.status()) != self._fingerprints[path]:
            raise CorruptFile(f"{path} was changed after its header was read; load the model again")
        if not through_torch:
            return file
        with torch.inference_mode(False):
            return dict(tensor_leaves(load_pickle(path)))

    def _read_stored(self, info: TensorInfo) -> torch.Tensor:
        return self._read(info, torch.device("cpu"), None)

    def _read(self, info: TensorInfo, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        casts = dtype is not None and info.dtype.is_floating_point
        if info.offset is None:
            return self._read_through_torch(info, device, dtype if casts else info.dtype)
        result = torch.empty(info.shape, dtype=dtype if casts else info.dtype, device=device)
        if result.dtype == info.dtype and device.type == "cpu":
            self._fill(info, 0, _as_bytes(result))
        else:
            self._fill_through_chunks(info, result)
        return result

    def _read_through_torch(self, info: TensorInfo, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        stored = self._handle(info.file, through_torch=True)[info.name]
        if stored.layout is not torch.strided or stored.is_quantized or stored.is_meta:
            raise ModelFileError(
                f"{info.file}: tensor {info.name!r} is sparse, quantized or without data, and cannot stay on disk; "
                "load this model without disk offload"
            )
        return torch.empty(info.shape, dtype=dtype, device=device).copy_(stored.to(device))

    def _fill_through_chunks(self, info: TensorInfo, result: torch.Tensor) -> None:
        """Cast on the target device, so that the stored, mostly smaller, type crosses the bus."""
        flat, step = result.reshape(-1), CHUNK_BYTES // info.dtype.itemsize
        for start in range(0, flat.numel(), step):
            target = flat[start : start + step]
            chunk = _chunk_buffer()[: target.numel() * info.dtype.itemsize]
            self._fill(info, start * info.dtype.itemsize, chunk)
            stored = chunk.view(info.dtype)
            target.copy_(stored if stored.dtype == result.dtype else stored.to(result.device))

    def _fill(self, info: TensorInfo, start: int, buffer: torch.Tensor) -> None:
        """Fill a uint8 CPU tensor with the stored bytes from byte `start` of the tensor on."""
        self._fill_bytes(info, start, memoryview(buffer.numpy()))

    def _fill_bytes(self, info: TensorInfo, start: int, buffer: memoryview) -> None:
        count = self._handle(info.file).read_into(buffer, info.offset + start) if buffer else 0
        if count != len(buffer):
            raise CorruptFile(
                f"{info.file}: tensor {info.name!r} needs {len(buffer)} bytes from byte {info.offset + start}, "
                f"{count} are there: the file was cut after its header was read; download it again"
            )

    def _check_buffer(self, name: str, out: torch.Tensor) -> None:
        expected = {(self.shape(name), self.dtype(name)), ((self.nbytes(name),), torch.uint8)}
        if (tuple(out.shape), out.dtype) not in expected or out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError(
                f"{name!r} is read into a contiguous CPU tensor of shape {self.shape(name)} and "
                f"{self.dtype(name)}, or of {self.nbytes(name)} torch.uint8; got {tuple(out.shape)}, {out.dtype} "
                f"on {out.device}{'' if out.is_contiguous() else ', not contiguous'}"
            )


def _convert(layout: dict[str, Any], converter: Converter | None) -> dict[str, Recipe]:
    with torch.inference_mode(False):
        converted = _references(layout) if converter is None else converter(_references(layout))
    return {name: _recipe(name, value) for name, value in converted.items()}


def _references(layout: dict[str, Any]) -> dict[str, Any]:
    """A fresh copy of the layout, since converters may change what they are given."""
    kinds = {dict: _references, TensorInfo: TensorReference.of}
    return {key: kinds[type(value)](value) if type(value) in kinds else value for key, value in layout.items()}


def _recipe(name: str, value: Any) -> Recipe:
    if isinstance(value, TensorReference):
        return value.recipe
    if isinstance(value, torch.Tensor) and not value.is_meta:  # a constant that the converter added
        return Operation("Tensor.clone", (value,), {}, tuple(value.shape), value.dtype)
    raise ModelFileError(
        f"{name!r} is a {type(value).__name__} and not a stored tensor; a state dict converter has to pick the tensors"
    )


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor that does not keep a larger one, of which it is a part, in memory."""
    fits = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if fits and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as a uint8 view."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def _chunk_buffer() -> torch.Tensor:
    """This thread's CHUNK_BYTES of memory, touched before: filling fresh pages costs more than reading."""
    if not hasattr(_thread, "buffer"):
        _thread.buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    return _thread.buffer
