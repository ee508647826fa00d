"""Model files: which tensors they hold, the hash that identifies an architecture, and loading them.

Everything is checked before a byte of weights is read: files exist, shard sets are complete, headers agree with the
file's real size. A wrong file list would otherwise surface as "unknown model" or in the middle of a run.
safetensors are loaded as views of the mapped file, so loading without a change of dtype or device copies nothing.
Pickles (.bin .pth .ckpt) are read as by `weights_only=True`; those in torch's zip format have an index of their tensors
like safetensors (see `pickle_layout`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import torch

from .pickle_layout import ZIP_MAGIC, DamagedArchive, Unmappable, ZipPickle, is_mappable

logger = logging.getLogger(__name__)

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pth", ".ckpt")
WRAPPER_KEYS = ("state_dict", "module", "model_state")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
MAX_SIZE = 2**63 - 1  # sizes are signed 64-bit integers in torch
_INTEGERS = {int}  # bool is another type
SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<index>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)", re.ASCII)
DTYPE_NAMES = {
    "BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E8M0": "float8_e8m0fnu",
    "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
DTYPES = {key: getattr(torch, name) for key, name in DTYPE_NAMES.items() if hasattr(torch, name)}

ModelFiles = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class ModelFileError(ValueError):
    """A model file, or a list of them, cannot be used. The message says which, why, and what to do."""


class MissingFile(ModelFileError, FileNotFoundError):
    """A model file is not there."""


class MissingShards(MissingFile):
    """Some files of a set `name-0000i-of-0000n` are not there or were not given."""


class CorruptFile(ModelFileError):
    """A file's content contradicts its format, mostly after an interrupted download."""


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


# ---------------------------------------------------------------------------------------------- the list of files


def check_model_files(file_path: ModelFiles) -> list[str]:
    """The files as a list of paths, folders replaced by their safetensors files, after checking that all can be read.

    Raises ModelFileError: empty list, unknown suffix, zero-byte file, a file given twice; MissingFile; MissingShards.
    """
    given = [file_path] if isinstance(file_path, (str, os.PathLike)) else list(file_path or ())
    if not given or "" in given:
        raise ModelFileError("no model file given: the path or list of paths is empty; pass a file or a folder")
    paths = [path for entry in given for path in _expand_folder(os.fspath(entry))]
    check_shards([path for path in paths if os.path.exists(path)])
    for path in paths:
        _check_file(path)
    for path in paths:
        if paths.count(path) > 1:
            raise ModelFileError(f"{path} is given more than once; list every file once")
    return paths


def check_shards(paths: Iterable[str]) -> None:
    """Raises MissingShards if `paths` holds some but not all files of a set `name-0000i-of-0000n.suffix`."""
    sets: dict[tuple[str, ...], dict[int, re.Match[str]]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if match := SHARD_NAME.fullmatch(name):
            sets.setdefault((folder, *match.group("prefix", "count", "suffix")), {})[int(match["index"])] = match
    for (folder, prefix, count, suffix), present in sets.items():
        first = 0 if 0 in present else 1  # a few exporters count from zero
        missing = [index for index in range(first, int(count) + first) if index not in present]
        if missing:
            width = len(next(iter(present.values()))["index"])
            names = [f"{prefix}-{index:0{width}}-of-{count}{suffix}" for index in missing[:8]]
            _refuse_shards(folder, prefix, int(count), len(missing), names)


def _refuse_shards(folder: str, prefix: str, count: int, missing: int, names: list[str]) -> NoReturn:
    on_disk = [name for name in names if os.path.exists(os.path.join(folder, name))]
    listed = ", ".join(names) + (f" and {missing - len(names)} more" if missing > len(names) else "")
    advice = f"pass the whole set: {', '.join(on_disk)} lie in that folder" if on_disk else "download them"
    raise MissingShards(
        f"{os.path.join(folder, prefix)}: {count} of {count} shards expected, {missing} missing: {listed}; {advice}"
    )


def _check_file(path: str) -> None:
    if not os.path.exists(path):
        raise MissingFile(f"{path} does not exist; check the path or download the model")
    suffix = os.path.splitext(path)[1].lower()
    if suffix != SAFETENSORS_SUFFIX and suffix not in PICKLE_SUFFIXES:
        known = ", ".join((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES))
        raise ModelFileError(f"{path}: unknown suffix {suffix!r}; model files end in {known}")
    if os.path.getsize(path) == 0:
        raise CorruptFile(f"{path} is empty (0 bytes): its download failed; delete it and download it again")


def _expand_folder(path: str) -> list[str]:
    """A folder's safetensors files; if one index file describes them, those that it lists."""
    if not os.path.isdir(path):
        return [path]
    visible = sorted(name for name in os.listdir(path) if not name.startswith("."))
    names = [name for name in visible if name.endswith(SAFETENSORS_SUFFIX)]
    indexes = [name for name in visible if name.endswith(SAFETENSORS_SUFFIX + ".index.json")]
    if len(indexes) == 1:
        names = _read_index(os.path.join(path, indexes[0]))
    if not names:
        raise MissingFile(f"{path} is a folder without {SAFETENSORS_SUFFIX} files; pass the model's files themselves")
    return [os.path.join(path, name) for name in names]


def _read_index(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFile(f"{path} is not an index of shards ({error!r}); download it again") from error
    for name in names:
        if os.path.basename(name) != name or "\\" in name or not name.endswith(SAFETENSORS_SUFFIX):
            raise CorruptFile(f"{path} lists {name!r}; {SAFETENSORS_SUFFIX} files of the same folder expected")
    return names


# ---------------------------------------------------------------------------------------------- what files contain


def read_tensor_infos(file_path: ModelFiles) -> dict[str, TensorInfo]:
    """Name, dtype, shape and place of every tensor in one or several model files, without reading their data.

    Raises ModelFileError as `check_model_files`; CorruptFile; and if two files hold the same key, or none a tensor.
    """
    return dict(tensor_leaves(read_layout(check_model_files(file_path))))


def read_layout(paths: Iterable[str]) -> dict[str, Any]:
    """The files' state dict with a TensorInfo for each tensor; nesting and other values are as stored."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for path in paths:
        layout = _cached_layout(path, fingerprint(os.stat(path)))
        if common := [key for key in layout if key in merged]:
            raise ModelFileError(
                f"{len(common)} keys are in two files: {common[0]!r} is in {origin[common[0]]} and in {path}; "
                "these are different models or two versions of one: pass the files of one model"
            )
        merged.update(layout)
        origin.update(dict.fromkeys(layout, path))
    if next(tensor_leaves(merged), None) is None:
        raise ModelFileError(f"no tensor in {', '.join(origin.values()) or 'the files given'}; is it a model file?")
    return merged


def tensor_leaves(layout: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and value of everything with a shape, nested dictionaries included."""
    for key, value in layout.items():
        if isinstance(value, dict):
            yield from tensor_leaves(value, f"{prefix}{key}|")
        elif hasattr(value, "shape"):
            yield f"{prefix}{key}", value


def fingerprint(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is rewritten or replaced."""
    return status.st_size, status.st_mtime_ns, status.st_ino


@lru_cache(maxsize=64)
def _cached_layout(path: str, _fingerprint: tuple[int, ...]) -> dict[str, Any]:
    if is_pickle(path):
        return _pickle_layout(path)
    return _safetensors_layout(path)


def _safetensors_layout(path: str) -> dict[str, TensorInfo]:
    size = os.path.getsize(path)
    header, data_start = _read_header(path, size)
    infos = {name: _tensor_info(path, name, entry, data_start) for name, entry in header.items()}
    end = data_start
    for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            problem = "overlaps the tensor before it" if info.offset < end else "leaves a hole before it"
            _refuse(path, f"tensor {info.name!r} starts at byte {info.offset}, expected {end}: it {problem}")
        end += info.nbytes
    if end != size:
        _refuse(path, f"its header describes {end} bytes, the file has {size}")
    return infos


def _read_header(path: str, size: int) -> tuple[dict[str, Any], int]:
    """The JSON header and the position of the first data byte."""
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            _refuse(path, f"8 bytes of header length expected, the file has {size}")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES:
            _refuse(path, f"its header claims {length} bytes, {MAX_HEADER_BYTES} allowed; is it a safetensors file?")
        if 8 + length > size:
            _refuse(path, f"a header of {8 + length} bytes expected, the file has {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is not valid JSON ({error})", error)
    if not isinstance(header, dict):
        _refuse(path, f"its header is a JSON {type(header).__name__}, an object expected")
    header.pop("__metadata__", None)
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return result


def _tensor_info(path: str, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        sizes = (*shape, begin, end)
    except (KeyError, TypeError, ValueError) as error:
        _refuse(path, f"tensor {name!r} lacks dtype, shape or data_offsets: {entry}", error)
    if {*map(type, sizes)} != _INTEGERS or min(sizes) < 0 or max(sizes) > MAX_SIZE:
        _refuse(path, f"tensor {name!r} has shape {shape} and data_offsets {[begin, end]}; sizes from 0 expected")
    if dtype is None:
        raise ModelFileError(
            f"{path}: tensor {name!r} has dtype {entry['dtype']!r}, unknown to torch {torch.__version__}; "
            f"known: {', '.join(DTYPES)}"
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        _refuse(path, f"tensor {name!r}: {dtype} {shape} needs {nbytes} bytes, its data_offsets are {[begin, end]}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, nbytes)


def _refuse(path: str, problem: str, cause: Exception | None = None) -> NoReturn:
    message = f"{path}: {problem}. The file is damaged or incomplete: delete it and download it again"
    raise CorruptFile(message) from cause


# ---------------------------------------------------------------------------------------------- pickles


def is_pickle(path: str) -> bool:
    """Whether the file's suffix is that of a pickle."""
    return path.lower().endswith(PICKLE_SUFFIXES)


def load_pickle(path: str, map_location: str = "cpu") -> dict[str, Any]:
    """The state dict in a .bin/.pth/.ckpt file, one wrapper level removed; mapped if its records can be.

    Only the old format is read to a `map_location` of "meta"; zips always give CPU tensors.
    """
    with open(path, "rb") as file:
        is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
    # From a file that cannot be mapped torch maps other bytes than the tensors'; and it crashes if it has to swap the
    # bytes of a meta tensor, which an ill-meant zip can arrange behind the back of any check.
    mappable = is_zip and is_mappable(path)
    location = "cpu" if is_zip else map_location
    try:
        content = torch.load(path, map_location=location, mmap=mappable, weights_only=True)
    except Exception as error:  # unpickling damaged bytes can raise any exception
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise CorruptFile(
            f"{path} cannot be read as tensors only ({reason}): it is damaged or holds other Python objects; "
            "download it again, or get the model as .safetensors"
        ) from error
    return _unwrap(path, content)


def _unwrap(path: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ModelFileError(f"{path} holds a {type(content).__name__}; a state dict (name -> tensor) expected")
    inner = next(iter(content.values())) if len(content) == 1 and next(iter(content)) in WRAPPER_KEYS else None
    return inner if isinstance(inner, dict) else content


def warn_about_pickle(path: str) -> None:
    """Log why a pickle should be converted."""
    logger.warning("%s is a pickle: slower to load and less safe than .safetensors; convert it if you can", path)


def _pickle_layout(path: str) -> dict[str, Any]:
    stored = _stored_pickle(path)
    try:
        if stored is None:
            return _tensor_places(path, load_pickle(path, "meta"), lambda tensor: None)
        return _tensor_places(path, _unwrap(path, stored.content), stored.offset)
    except DamagedArchive as error:
        _refuse(path, str(error), error)
    except RecursionError as error:
        _refuse(path, "its dictionaries are nested without end", error)


def _stored_pickle(path: str) -> ZipPickle | None:
    try:
        return ZipPickle(path)
    except Unmappable as reason:
        logger.info("%s is read through torch.load: %s", path, reason)
        return None


def _tensor_places(
    path: str, content: dict[str, Any], offset: Callable[[torch.Tensor], int | None], prefix: str = ""
) -> dict[str, Any]:
    layout: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            value = _tensor_places(path, value, offset, f"{name}|")
        elif isinstance(value, torch.Tensor):
            if value.is_nested:
                raise ModelFileError(f"{path}: {name!r} is a nested tensor, without one shape; save its parts instead")
            nbytes = value.numel() * value.element_size()
            value = TensorInfo(name, value.dtype, tuple(value.shape), path, offset(value), nbytes)
        layout[key] = value
    return layout


# ---------------------------------------------------------------------------------------------- hash


def hash_model_file(file_path: ModelFiles) -> str:
    """The 32 hex digits that identify an architecture: an MD5 over keys and shapes, blind to dtype, values and order.

    Several files hash like their merged state dict. Reads headers only. Raises ModelFileError (see read_tensor_infos).
    """
    paths = check_model_files(file_path)
    return _cached_hash(tuple((path, fingerprint(os.stat(path))) for path in paths))


def hash_state_dict(state_dict: dict[str, Any]) -> str:
    """`hash_model_file` of a file with this content: a dict of tensors (also on meta), possibly nested."""
    return hashlib.md5(_describe(state_dict).encode(), usedforsecurity=False).hexdigest()


@lru_cache(maxsize=64)
def _cached_hash(files: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
    return hash_state_dict(read_layout(path for path, _ in files))


def _describe(layout: dict[str, Any]) -> str:
    parts: list[str] = []
    for key, value in layout.items():
        if isinstance(key, str) and isinstance(value, dict):
            parts.append(f"{key}|{_describe(value)}")
        elif isinstance(key, str) and hasattr(value, "shape"):
            parts += (f"{key}:{'_'.join(map(str, value.shape))}", key)
    return ",".join(sorted(parts))


# ---------------------------------------------------------------------------------------------- loading


@torch.inference_mode(False)  # ComfyUI calls inside inference mode, whose tensors could never be written again
def load_state_dict(
    file_path: ModelFiles, torch_dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """The merged state dict of one or several model files on `device`, floating point tensors cast to `torch_dtype`.

    On the CPU without a cast the tensors are private views of the mapped files: no memory is taken before they are
    read, and writing to them does not change the files. Raises ModelFileError (see read_tensor_infos).
    """
    paths = check_model_files(file_path)
    infos = dict(tensor_leaves(read_layout(paths)))
    state_dict: dict[str, Any] = {}
    for path in paths:
        if is_pickle(path):
            warn_about_pickle(path)
            content = load_pickle(path)
            state_dict.update(_map_tensors(content, lambda tensor: place(tensor.detach(), device, torch_dtype)))
        else:
            views = _mapped_views(path, (info for info in infos.values() if info.file == path))
            state_dict.update((name, place(view, device, torch_dtype)) for name, view in views)
    return state_dict


def place(tensor: torch.Tensor, device: str | torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """`tensor` on `device`, cast there if it is floating point: indices and packed weights keep their dtype."""
    moved = tensor.to(device)
    return moved.to(dtype) if dtype is not None and moved.is_floating_point() else moved


def _mapped_views(path: str, infos: Iterable[TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of the file, mapped copy-on-write; the mapping lives as long as one of them.

    Not through safetensors' reader, which touches each tensor: where the system reads far ahead that is the whole file.
    """
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (ValueError, OSError) as error:  # the header is sound, so it is the system that refuses the mapping
        raise ModelFileError(
            f"{path}: cannot map {os.path.getsize(path)} bytes into memory ({error}); "
            "use disk offload for this model, or give the system more swap"
        ) from error
    for info in infos:
        yield info.name, _view(content, info)


def _view(content: mmap.mmap, info: TensorInfo) -> torch.Tensor:
    if info.nbytes == 0:  # torch takes no view of nothing
        return torch.empty(info.shape, dtype=info.dtype)
    count = math.prod(info.shape)
    return torch.frombuffer(content, dtype=info.dtype, count=count, offset=info.offset).view(info.shape)


def _map_tensors(content: dict[str, Any], function: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    mapped: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            value = _map_tensors(value, function)
        mapped[key] = function(value) if isinstance(value, torch.Tensor) else value
    return mapped
