"""The header of a safetensors file: which tensors there are, and where each lies.

Nothing that the file says is believed before it is checked: lengths against the file's real size, offsets against
shapes and against each other, so that the tensors fill the file without holes and overlaps; and the text itself before
it is parsed, since Python needs twenty times the memory of a text that is all brackets. The format allows headers of
100 MB, of which we take MAX_HEADER_BYTES: enough for 40,000 tensors, where large models have 5,000.

Sound headers are checked as a whole, a column at a time, which takes a tenth of what checking tensor by tensor does.
Only what fails there is looked at tensor by tensor, which gives the verdict and says what is wrong.

Notable: nearly all headers come from the safetensors library, which spells them one way: no blanks, the same keys in
the same order, the tensors in the order of their data. Such a text is cut at its quotes into columns instead of being
parsed, which is twice as fast; what is spelled otherwise in any respect goes to the parser.
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch

from .containment import open_regular
from .model_files import ModelFileError, refuse

MAX_HEADER_BYTES = 5_000_000
MAX_DIMENSIONS = 64
MAX_SIZE = 2**63 - 1  # sizes are signed 64-bit integers in torch
_INTEGERS = {int}  # bool is another type
_MIN_ENTRY_BYTES = 49  # of the shortest tensor, with an empty name
_TEXT = re.compile(rb'"[^"]*"')
_METADATA = '{"__metadata__":'
MAX_QUICK_METADATA = 100_000  # characters; longer ones, and such with lists, are left to the parser
# One tensor is `"name":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},`. Once the words between name and shape
# are replaced by MARK and the dtype, its quotes cut it into name, kind (dtype and shape), "data_offsets" and offsets.
_DTYPE, _SHAPE, _MARK = '":{"dtype":"', '","shape":[', "\0"
_PIECES = 4
_LISTS_PER_OBJECT = 4  # two, and some that the format may get in future
DTYPE_NAMES = {
    "BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E8M0": "float8_e8m0fnu",
    "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
DTYPES = {key: getattr(torch, name) for key, name in DTYPE_NAMES.items() if hasattr(torch, name)}


@dataclass(frozen=True, slots=True)
class TensorInfo:
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


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says, checked; the columns are parallel. `begins` and `ends` are absolute positions."""

    path: str
    names: list[str]
    dtypes: Sequence[torch.dtype]
    shapes: Sequence[tuple[int, ...]]
    begins: list[int]
    ends: list[int]

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor by its name."""
        columns = zip(self.names, self.dtypes, self.shapes, self.begins, self.ends, strict=True)
        return {name: TensorInfo(name, dtype, shape, self.path, begin, end - begin)
                for name, dtype, shape, begin, end in columns}


def read_header(path: str) -> Header:
    """The tensors of a file. Raises CorruptFile, and ModelFileError for a dtype that torch lacks."""
    raw, data_start, size = _read_text(path)
    if (header := _as_written(path, raw, data_start, size)) is not None:
        return header
    entries = _parse(path, raw)
    header = _as_columns(path, entries, data_start)
    if header is None or not _is_sound(header, data_start, size):
        header = _check_each(path, entries, data_start, size)
    return header


# ---- spelled as the library does ------------------------------------------------------------------------------------


def _as_written(path: str, raw: bytes, data_start: int, size: int) -> Header | None:
    """The header, checked, if it is sound and spelled as the safetensors library does; else None: ask the parser."""
    try:
        cut = _mark_kinds(_without_metadata(raw.decode())).split('"', len(raw) // _MIN_ENTRY_BYTES * _PIECES + _PIECES)
        names, kinds, words, offsets = (cut[at::_PIECES] for at in range(1, _PIECES + 1))
        if cut[0] or not words or len(cut) != _PIECES * len(words) + 1 or words.count("data_offsets") != len(words):
            return None
        known = {kind: _kind(kind) for kind in {*kinds}}
    except (ValueError, KeyError, RecursionError):  # of JSON; an unknown dtype
        return None
    dtypes, shapes, nbytes = zip(*map(known.__getitem__, kinds), strict=True)
    edges = list(accumulate(nbytes, initial=data_start))
    if not _are_names(names) or edges[-1] != size or '"'.join(offsets) != _spelled(accumulate(nbytes, initial=0)):
        return None
    return Header(path, names, dtypes, shapes, edges[:-1], edges[1:])


def _without_metadata(text: str) -> str:
    """What follows the opening bracket, or the metadata if they come first, up to the blanks that fill the text up.

    Raises ValueError for escapes, and for metadata that are not plain.
    """
    if "\\" in text or not text.startswith('{"'):
        raise ValueError
    if not text.startswith(_METADATA):
        return text[1:].rstrip(" ")
    end = text.index("}") + 1  # one in a text leaves half an object, which is none
    metadata = text[len(_METADATA):end]
    if len(metadata) > MAX_QUICK_METADATA or "[" in metadata or text[end:end + 1] != ",":
        raise ValueError
    json.loads(metadata, object_pairs_hook=_without_duplicates)
    return text[end + 1:].rstrip(" ")


def _mark_kinds(text: str) -> str:
    """The text with `"` MARK, dtype, blank in place of what stands between names and shapes."""
    if _MARK in text:
        raise ValueError
    while (at := text.find(_DTYPE)) >= 0:  # once for each dtype
        begin = at + len(_DTYPE)
        dtype = text[begin:text.index('"', begin)]
        if dtype not in DTYPES or not text.startswith(_SHAPE, begin + len(dtype)):
            raise ValueError
        text = text.replace(f"{_DTYPE}{dtype}{_SHAPE}", f'"{_MARK}{dtype} ')
    return text


def _kind(kind: str) -> tuple[torch.dtype, tuple[int, ...], int]:
    """Dtype, shape and bytes of what MARK stands before, as `BF16 2,3],`. Raises ValueError for anything else, also
    for a 0, which is rare and needs a closer look."""
    dtype, _, lengths = kind[len(_MARK):-2].partition(" ")
    shape = tuple(map(int, lengths.split(","))) if lengths else ()
    spelled = f"{_MARK}{dtype} {','.join(map(str, shape))}],"
    if kind != spelled or len(shape) > MAX_DIMENSIONS or min(shape, default=1) < 1:
        raise ValueError
    return DTYPES[dtype], shape, math.prod(shape) * DTYPES[dtype].itemsize


def _are_names(names: list[str]) -> bool:
    """Whether they are all different, and none has what JSON wants escaped."""
    return "".join(names).isprintable() and len({*names, "__metadata__"}) == len(names) + 1


def _spelled(edges: Iterable[int]) -> str:
    """The offsets of tensors that lie between these edges, with a quote for each name."""
    words = list(map(str, edges))
    parts = [","] * (4 * len(words) - 4)
    parts[::4], parts[2::4], parts[3::4] = words[:-1], words[1:], [']},":['] * (len(words) - 1)
    return f":[{''.join(parts[:-1])}]}}}}"


# ---- spelled in any way ---------------------------------------------------------------------------------------------


def _as_columns(path: str, entries: dict[str, Any], data_start: int) -> Header | None:
    """The header, unchecked; None if something is not there."""
    try:
        dtypes = [DTYPES[entry["dtype"]] for entry in entries.values()]
        shapes = [tuple(entry["shape"]) for entry in entries.values()]
        offsets = [entry["data_offsets"] for entry in entries.values()]
        if {*map(len, offsets)} - {2} or {*map(type, chain(*offsets))} - _INTEGERS:
            return None
    except (KeyError, TypeError):
        return None
    begins, ends = ([data_start + pair[side] for pair in offsets] for side in (0, 1))
    return Header(path, list(entries), dtypes, shapes, begins, ends)


def _is_sound(header: Header, data_start: int, size: int) -> bool:
    """Whether all is as it must be; False also where only a closer look can tell."""
    lengths = list(chain(*header.shapes))
    if {*map(type, lengths)} - _INTEGERS or max(map(len, header.shapes), default=0) > MAX_DIMENSIONS:
        return False
    if min(lengths, default=1) < 1 or max(lengths, default=1) > MAX_SIZE:  # a 0 is rare, and needs a closer look
        return False
    nbytes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(header.shapes, header.dtypes, strict=True)]
    places = sorted(zip(header.begins, header.ends, strict=True))
    edges = [data_start, *(end for _, end in places)]
    return (list(map(operator.sub, header.ends, header.begins)) == nbytes and edges[-1] == size
            and [begin for begin, _ in places] == edges[:-1])


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
    return Header(path, list(entries), [info.dtype for info in infos], [info.shape for info in infos],
                  [info.offset for info in infos], [info.offset + info.nbytes for info in infos])


def _read_text(path: str) -> tuple[bytes, int, int]:
    """The header's text, the position of the first data byte, and the file's size."""
    with open_regular(path) as file:
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
