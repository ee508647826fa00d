"""Model files: which tensors they hold, the hash that identifies an architecture, and loading them.

safetensors are loaded as views of the mapped file, so loading without a change of dtype or device copies nothing.
Pickles (.bin .pth .ckpt) are read as by `weights_only=True`; those in torch's zip format have an index of their tensors
like safetensors (see `pickle_layout`). Lists of files are checked in `model_files`, where the errors are defined, and
what the files say about themselves in `safetensors_header` and `pickles`.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from .containment import open_regular
from .model_files import (
    MODEL_SUFFIXES,
    PICKLE_SUFFIXES,
    SAFETENSORS_SUFFIX,
    SHARD_NAME,
    CorruptFile,
    DuplicateKeys,
    MissingFile,
    MissingShards,
    ModelFileError,
    ModelFiles,
    PickleRefused,
    check_model_files,
    check_shards,
    group_files,
    is_pickle,
    status_of_files,
)
from .pickles import load_pickle, pickle_layout, warn_about_pickle
from .safetensors_header import DTYPES, Header, Kind, TensorInfo, read_header, shape_suffix

# The loader's public names, whichever file of this folder defines them.
__all__ = ["DTYPES", "MODEL_SUFFIXES", "PICKLE_SUFFIXES", "SAFETENSORS_SUFFIX", "SHARD_NAME", "CorruptFile",
           "DuplicateKeys", "MissingFile", "MissingShards", "ModelFileError", "ModelFiles", "PickleRefused",
           "TensorInfo", "check_model_files", "check_shards", "fingerprint", "group_files", "hash_model_file",
           "hash_state_dict", "is_pickle", "load_pickle", "load_state_dict", "place", "read_layout",
           "read_tensor_infos", "tensor_leaves", "warn_about_pickle"]

_SUFFIX = operator.attrgetter("suffix")

# ---- what files contain ---------------------------------------------------------------------------------------------


def read_tensor_infos(file_path: ModelFiles) -> dict[str, TensorInfo]:
    """Name, dtype, shape and place of every tensor in one or several model files, without reading their data.

    Raises ModelFileError as `check_model_files`; CorruptFile; and if two files hold the same key, or none a tensor.
    """
    return dict(tensor_leaves(read_layout(check_model_files(file_path))))


def read_layout(paths: Iterable[str], places: bool = True) -> dict[str, Any]:
    """The files' state dict with a TensorInfo for each tensor; nesting and other values are as stored. Without `places`
    those of pickles have no offset."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for path in paths:
        layout = _cached_layout(path, fingerprint(Path(path).stat()), places)
        if common := [key for key in layout if key in merged]:
            raise DuplicateKeys(
                f"{len(common)} keys are in two files: {common[0]!r:.200} is in {origin[common[0]]} and in {path}; "
                "these are different models or two versions of one: pass the files of one model"
            )
        merged.update(layout)
        origin.update(dict.fromkeys(layout, path))
    if next(tensor_leaves(merged), None) is None:
        raise ModelFileError(f"no tensor in {', '.join(origin.values()) or 'the files given'}; is it a model file? "
                             "Pass the files that hold the weights")
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
def _cached_layout(path: str, _fingerprint: tuple[int, ...], places: bool) -> dict[str, Any]:
    return pickle_layout(path, places) if is_pickle(path) else _cached_header(path, _fingerprint).infos()


@lru_cache(maxsize=64)
def _cached_header(path: str, _fingerprint: tuple[int, ...]) -> Header:
    return read_header(path)


# ---- hash -----------------------------------------------------------------------------------------------------------


def hash_model_file(file_path: ModelFiles) -> str:
    """The 32 hex digits that identify an architecture: an MD5 over keys and shapes, blind to dtype, values and order.

    Several files hash like their merged state dict. Reads headers only. Raises ModelFileError (see read_tensor_infos).
    """
    return _cached_hash(tuple((path, fingerprint(status)) for path, status in status_of_files(file_path).items()))


def hash_state_dict(state_dict: dict[str, Any]) -> str:
    """`hash_model_file` of a file with this content: a dict of tensors (also on meta), possibly nested."""
    return _digest(_describe(state_dict))


@lru_cache(maxsize=64)
def _cached_hash(files: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
    if not any(is_pickle(path) for path, _ in files):
        headers = [_cached_header(*file) for file in files]
        names = list(chain.from_iterable(header.names for header in headers))
        if names and len({*names}) == len(names):
            return _digest(_parts(names, chain.from_iterable(header.kinds for header in headers)))
    return hash_state_dict(read_layout((path for path, _ in files), places=False))


def _parts(names: list[str], kinds: Iterable[Kind]) -> list[str]:
    """As `_describe` for plain tensors; nearly in order, which is soon sorted."""
    parts = [""] * (2 * len(names))
    parts[::2] = names
    parts[1::2] = map(operator.add, names, map(_SUFFIX, kinds))
    return parts


def _digest(parts: Iterable[str]) -> str:
    description = ",".join(sorted(parts)).encode(errors="surrogatepass")  # names are what strangers wrote
    return hashlib.md5(description, usedforsecurity=False).hexdigest()


def _describe(layout: dict[str, Any]) -> list[str]:
    parts: list[str] = []
    for key, value in layout.items():
        if isinstance(key, str) and isinstance(value, dict):
            parts.append(f"{key}|{','.join(sorted(_describe(value)))}")
        elif isinstance(key, str) and hasattr(value, "shape"):
            parts += (key + shape_suffix(value.shape), key)
    return parts


# ---- loading --------------------------------------------------------------------------------------------------------


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
        with open_regular(path) as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (ValueError, OSError) as error:  # the header is sound, so it is the system that refuses the mapping
        raise ModelFileError(
            f"{path}: cannot map {Path(path).stat().st_size} bytes into memory ({error}); "
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
