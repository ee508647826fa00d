"""The header of a safetensors file: which tensors there are, and where each lies.

Nothing that the file says is believed before it is checked: lengths against the file's real size, offsets against
shapes and against each other, so that the tensors fill the file without holes and overlaps; and the text itself before
it is parsed, since Python needs twenty times the memory of a text that is all brackets. The format allows headers of
100 MB, of which we take MAX_HEADER_BYTES: enough for 40,000 tensors, where large models have 5,000.

Notable: nearly all headers come from the safetensors library, which spells them one way: no blanks, the same keys in
the same order, the tensors in the order of their data. One expression cuts such a text into columns, and since shapes
repeat and offsets follow from them, what is left to check is a comparison of texts: that takes a third of what parsing
does. What is spelled otherwise in any respect goes to the parser, and is checked tensor by tensor.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch

from .containment import open_regular
from .model_files import ModelFileError, refuse

MAX_HEADER_BYTES = 5_000_000
MAX_DIMENSIONS = 64
MAX_SIZE = 2**63 - 1  # sizes are signed 64-bit integers in torch
_INTEGERS = {int}  # bool is another type
_MIN_ENTRY_BYTES = 49  # of the shortest tensor, with an empty name
_TEXT = re.compile(rb'"[^"]*"')
# How the library begins: with the metadata that nearly all files have, or none.
_START = re.compile(r'\{(?:"__metadata__":\{"[^"]*":"[^"]*"\},)?(?=")')
# One tensor as the library writes it. The limits, beyond what any model has, keep a search from running on and on.
_ENTRY = re.compile(r'"([^"]*)":\{"dtype":"([^]]{0,64})\],"data_offsets":\[([^]]{0,40})\]\},')
_NBYTES = attrgetter("nbytes")
_LISTS_PER_OBJECT = 4  # two, and some that the format may get in future
DTYPE_NAMES = {
    "BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E8M0": "float8_e8m0fnu",
    "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
DTYPES = {key: getattr(torch, name) for key, name in DTYPE_NAMES.items() if hasattr(torch, name)}


class TensorInfo(NamedTuple):
    """Where one tensor lies: `nbytes` bytes from absolute position `offset` in `file`.

    An offset of None means that only torch.load can read the tensor: it is in a pickle of the old format, or stored
    transposed or otherwise not as it is in memory. Nested dictionaries of a pickle give names like "outer|inner".
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int | None
    nbytes: int


class Kind(NamedTuple):
    """What many tensors of a model have in common. `suffix` follows their names in the text that is hashed."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    suffix: str


def kind_of(dtype: torch.dtype, shape: tuple[int, ...]) -> Kind:
    """The kind of tensors of this dtype and shape."""
    return Kind(dtype, shape, math.prod(shape) * dtype.itemsize, shape_suffix(shape))


def shape_suffix(shape: Iterable[int]) -> str:
    """What follows the name of a tensor of this shape in the text that is hashed."""
    return f":{'_'.join(map(str, shape))}"


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says, checked; the columns are parallel. `begins` count from `data_start`, the first data byte."""

    path: str
    data_start: int
    names: list[str]
    kinds: list[Kind]
    begins: list[int]

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor by its name."""
        return {name: TensorInfo(name, kind.dtype, kind.shape, self.path, self.data_start + begin, kind.nbytes)
                for name, kind, begin in zip(self.names, self.kinds, self.begins, strict=True)}


def read_header(path: str) -> Header:
    """The tensors of a file. Raises CorruptFile, and ModelFileError for a dtype that torch lacks."""
    raw, data_start, size = _read_text(path)
    return _as_written(path, raw, data_start, size) or _check_each(path, _parse(path, raw), data_start, size)


# ---- spelled as the library does ------------------------------------------------------------------------------------


def _as_written(path: str, raw: bytes, data_start: int, size: int) -> Header | None:
    """The header, checked, if it is sound and spelled as the safetensors library does; else None: ask the parser."""
    try:
        cut = _ENTRY.split(_entries(raw))
        between, names, kinds, offsets = (cut[at::4] for at in range(4))
        known = {kind: _kind(kind) for kind in {*kinds}}
    except (ValueError, KeyError):
        return None
    kinds = list(map(known.__getitem__, kinds))
    edges = list(accumulate(map(_NBYTES, kinds), initial=0))
    if (not names or any(between) or "]".join([*offsets, ""]) != _spelled(edges) or data_start + edges[-1] != size
            or len({*names, "__metadata__"}) != len(names) + 1):
        return None
    return Header(path, data_start, names, kinds, edges[:-1])


def _entries(raw: bytes) -> str:
    """The text of all tensors, with a comma behind each. Raises ValueError for escapes, control characters, and
    metadata other than one pair of texts before the tensors."""
    if b"\\" in raw or np.minimum.reduce(np.frombuffer(raw, np.uint8)) < ord(" "):
        raise ValueError
    text = raw.decode().rstrip(" ")
    start = _START.match(text)
    if start is None or text[-1] != "}":
        raise ValueError
    return f"{text[start.end():-1]},"


@lru_cache(maxsize=1024)
def _kind(text: str) -> Kind:
    """The kind that is spelled `BF16","shape":[2,3`. Raises ValueError or KeyError for anything else, also for a 0,
    which is rare and needs a closer look."""
    dtype, _, lengths = text.partition('","shape":[')
    shape = tuple(map(int, lengths.split(","))) if lengths else ()
    spelled = f'{dtype}","shape":[{",".join(map(str, shape))}'
    if text != spelled or len(shape) > MAX_DIMENSIONS or min(shape, default=1) < 1:
        raise ValueError
    return kind_of(DTYPES[dtype], shape)


def _spelled(edges: list[int]) -> str:
    """The offsets of tensors that lie between these edges as the text has them, with a bracket behind each pair."""
    twice = [0] * (2 * len(edges))
    twice[::2], twice[1::2] = edges, edges
    return "%d,%d]" * (len(edges) - 1) % tuple(twice[1:-1])


# ---- spelled in any way ---------------------------------------------------------------------------------------------


def _check_each(path: str, entries: dict[str, Any], data_start: int, size: int) -> Header:
    infos = [_tensor_info(path, name, entry, data_start) for name, entry in entries.items()]
    end = data_start
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            problem = "overlaps the tensor before it" if info.offset < end else "leaves a hole before it"
            refuse(path, f"tensor {info.name!r:.200} starts at byte {info.offset}, expected {end}: it {problem}")
        end += info.nbytes
    if end != size:
        refuse(path, f"its header describes {end} bytes, the file has {size}")
    return Header(path, data_start, list(entries), [kind_of(info.dtype, info.shape) for info in infos],
                  [info.offset - data_start for info in infos])


def _read_text(path: str) -> tuple[bytes, int, int]:
    """The header's text, the position of the first data byte, and the file's size."""
    with open_regular(path, buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            refuse(path, f"8 bytes of header length expected, the file has {size}")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES:
            refuse(path, f"its header claims {length} bytes, {MAX_HEADER_BYTES} allowed; is it a safetensors file?")
        if 8 + length > size:
            refuse(path, f"a header of {8 + length} bytes expected, the file has {size}")
        raw = file.read(length)
        while len(raw) < length and (more := file.read(length - len(raw))):  # some file systems give it piece by piece
            raw += more
    if len(raw) != length:
        refuse(path, f"a header of {length} bytes expected, {len(raw)} could be read")
    return raw, 8 + length, size


def _parse(path: str, raw: bytes) -> dict[str, Any]:
    _check_structure(path, raw)
    try:
        header = json.loads(raw)
        if isinstance(header, dict) and _count_keys(header) != raw.count(b":"):  # keys were lost, or texts have colons
            header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        refuse(path, f"its header is not valid JSON ({error!s:.200})", error)
    if not isinstance(header, dict):
        refuse(path, f"its header is a JSON {type(header).__name__}, an object expected")
    header.pop("__metadata__", None)
    return header


def _count_keys(header: dict[str, Any]) -> int:
    """Of a header and of what is right below it."""
    return len(header) + sum(len(entry) for entry in header.values() if isinstance(entry, dict))


def _check_structure(path: str, raw: bytes) -> None:
    """Refuse what has more texts, or more brackets outside of them, than tensors of that many bytes can have."""
    if _too_much(raw):
        without_escapes = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
        bare = b"" if _too_many_quotes(without_escapes) else _TEXT.sub(b"", without_escapes)
        if not bare or _too_much(bare.ljust(len(raw))):
            counts = ", ".join(f"{raw.count(sign)} {sign.decode()}" for sign in (b"{", b"[", b'"'))
            refuse(path, f"its header is not valid JSON of tensors: {counts} in {len(raw)} bytes")


def _too_much(text: bytes) -> bool:
    objects = text.count(b"{")
    return (objects > len(text) // _MIN_ENTRY_BYTES + 2 or text.count(b"[") > _LISTS_PER_OBJECT * objects
            or _too_many_quotes(text))


def _too_many_quotes(text: bytes) -> bool:
    return text.count(b'"') > len(text) // 3 + 8  # tensors have 10 in 49 bytes


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (key, _), = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"duplicate key {key!r:.200}")
    return result


def _tensor_info(path: str, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        sizes = (*shape, begin, end)
    except (KeyError, TypeError, ValueError) as error:
        refuse(path, f"tensor {name!r:.200} lacks dtype, shape or data_offsets: {entry!r:.200}", error)
    if len(sizes) - 2 > MAX_DIMENSIONS:
        refuse(path, f"tensor {name!r:.200} has {len(sizes) - 2} dimensions, at most {MAX_DIMENSIONS} allowed")
    if {*map(type, sizes)} != _INTEGERS or min(sizes) < 0 or max(sizes) > MAX_SIZE:
        described = f"shape {shape} and data_offsets {[begin, end]}"
        refuse(path, f"tensor {name!r:.200} has {described:.200}; sizes from 0 expected")
    if dtype is None:
        raise ModelFileError(
            f"{path}: tensor {name!r:.200} has dtype {entry['dtype']!r:.80}, unknown to torch {torch.__version__}; "
            f"known: {', '.join(DTYPES)}. Get the model in one of these, or a newer torch"
        )
    if math.prod(filter(None, shape)) * dtype.itemsize > MAX_SIZE:  # what torch computes of a shape with a 0 in it
        refuse(path, f"tensor {name!r:.200} has shape {shape}, more elements than can be counted")
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        refuse(path, f"tensor {name!r:.200}: {dtype} {shape} needs {nbytes} bytes, its data_offsets are {[begin, end]}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, nbytes)
