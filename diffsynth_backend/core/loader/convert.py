"""Write model files of any kind as one safetensors file, tensor by tensor: memory is that of the largest tensor.

Notable: the file appears under its name only when it is complete and has the hash of what it was made from.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..vram.disk_map import DiskMap
from .file import DTYPES, SAFETENSORS_SUFFIX, ModelFileError, ModelFiles, hash_model_file

logger = logging.getLogger(__name__)

SPARE_BYTES = 1 << 26  # of the disk, left free
_KEYS = {dtype: key for key, dtype in DTYPES.items()}

Progress = Callable[[int, int], None]


def convert_to_safetensors(files: ModelFiles, output: str | Path, progress: Progress | None = None) -> int:
    """Write the tensors of a model's files to `output`, with their names and dtypes; returns their number.

    `progress` gets the bytes written so far and in all. Raises ModelFileError if `output` exists or cannot take what
    the files hold, if the disk has too little space, and for files that cannot be used.
    """
    output = Path(output)
    _check_output(output)
    with DiskMap(files, state_dict_converter=_only_tensors) as tensors:
        header, order, total = _header(tensors)
        _check_space(output, total)
        partial = Path(f"{output}.{os.getpid()}.part{SAFETENSORS_SUFFIX}")
        try:
            _write(partial, header, order, tensors, total, progress)
            _check_equal(tensors.paths, partial)
            os.replace(partial, output)
        finally:
            partial.unlink(missing_ok=True)
        return len(order)


def _check_output(output: Path) -> None:
    if output.suffix.lower() != SAFETENSORS_SUFFIX:
        raise ModelFileError(f"{output}: a name that ends in {SAFETENSORS_SUFFIX} expected for the converted file; "
                             "choose another")
    if output.exists():
        raise ModelFileError(f"{output} exists already; choose another name, or delete it first")
    if not output.absolute().parent.is_dir():
        raise ModelFileError(f"{output}: there is no such folder; create it first")


def _only_tensors(stored: dict[str, Any]) -> dict[str, Any]:
    if nested := [name for name, value in stored.items() if isinstance(value, dict)]:
        raise ModelFileError(f"{len(nested)} entries are dictionaries of their own, such as {nested[0]!r:.200}, which "
                             "safetensors does not have; load the file as it is")
    others = [name for name, value in stored.items() if not isinstance(value, torch.Tensor)]
    if others:
        logger.warning("left out, since safetensors holds tensors only: %.200s", ", ".join(map(repr, others)))
    return {name: value for name, value in stored.items() if isinstance(value, torch.Tensor)}


def _header(tensors: DiskMap) -> tuple[bytes, list[str], int]:
    """The header, the names in the order of their data (wide dtypes first, so that all are aligned), and the bytes."""
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    order = sorted(tensors, key=lambda name: (-tensors.dtype(name).itemsize, name))
    for name in order:
        if tensors.dtype(name) not in _KEYS:
            raise ModelFileError(f"{name!r:.200} is {tensors.dtype(name)}, which safetensors does not have; load the "
                                 "file as it is")
        begin, end = end, end + tensors.nbytes(name)
        entries[name] = {"dtype": _KEYS[tensors.dtype(name)], "shape": list(tensors.shape(name)),
                         "data_offsets": [begin, end]}
    raw = json.dumps(entries).encode()
    return raw + b" " * (-len(raw) % 8), order, end


def _check_space(output: Path, needed: int) -> None:
    free = shutil.disk_usage(output.absolute().parent).free
    if needed + SPARE_BYTES > free:
        raise ModelFileError(f"{output}: {needed} bytes are to be written, and the disk has {free} free; make room or "
                             "choose another disk")


def _write(path: Path, header: bytes, order: list[str], tensors: DiskMap, total: int, progress: Progress | None
           ) -> None:
    done = 0
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name in order:
            data = tensors.read_into(name, torch.empty(tensors.nbytes(name), dtype=torch.uint8))
            file.write(memoryview(data.numpy()))
            done += data.numel()
            if progress:
                progress(done, total)


def _check_equal(files: list[str], output: Path) -> None:
    if (expected := hash_model_file(files)) != (found := hash_model_file(output)):
        raise ModelFileError(f"{output}: the converted file has the hash {found}, {expected} expected; the original "
                             "changed meanwhile, or the disk is broken: try again")
