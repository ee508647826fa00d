"""Pickles (.bin .pth .ckpt): read as by `weights_only=True`, which runs no code, and within bounds.

Notable: the description of the tensors in torch's zip format is read without their data (`pickle_layout`). What is left
to torch.load is checked before: archives that would grow when unpacked; tar files, in which older versions of torch
(2.5, CVE-2025-32434) run code even so; and descriptions, which are programs (`description`). Dictionaries in them may
refer to each other, so that a few bytes stand for billions of entries. Those are counted.
"""

from __future__ import annotations

import logging
import math
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .containment import open_regular
from .description import read_description
from .model_files import CorruptFile, ModelFileError, refuse
from .pickle_layout import (
    DESCRIPTION,
    MAX_DESCRIPTION_BYTES,
    ZIP_MAGIC,
    DamagedArchive,
    Unmappable,
    ZipPickle,
    check_archive,
    is_mappable,
)
from .pickle_names import NoDescription, StoredTensor
from .safetensors_header import TensorInfo

logger = logging.getLogger(__name__)

WRAPPER_KEYS = ("state_dict", "module", "model_state")
MAX_ENTRIES = 100_000  # of all dictionaries together
MAX_NESTING = 32
TAR_BLOCK = 512
OLD_FORMAT_PICKLES = 5  # magic number, version, machine, state dict, order of the storages


def load_pickle(path: str, map_location: str = "cpu") -> dict[str, Any]:
    """The state dict in a .bin/.pth/.ckpt file, one wrapper level removed; mapped if its records can be.

    Only the old format is read to a `map_location` of "meta"; zips always give CPU tensors.
    Raises ModelFileError for what is damaged, holds other things than tensors, or would take more memory than it says.
    """
    start = _start_of(path)
    if not start.startswith(ZIP_MAGIC) and _is_tar(start):
        raise ModelFileError(f"{path} is a tar archive, in which some versions of torch run code; get the model as "
                             ".safetensors")
    try:
        content = _load_zip(path) if start.startswith(ZIP_MAGIC) else _load_old(path, map_location)
    except DamagedArchive as error:
        refuse(path, str(error), error)
    except Exception as error:  # unpickling damaged bytes can raise any exception
        raise _no_tensors(path, error) from error
    return unwrap(path, content)


def _load_zip(path: str) -> Any:
    """From a file that cannot be mapped torch maps other bytes than the tensors'; and it crashes if it has to swap the
    bytes of a meta tensor, which an ill-meant zip can arrange behind the back of any check."""
    mappable = is_mappable(path)
    check_archive(path)
    # Private, and what torch.load itself asks for these bytes: another reader may find other ones in an ill-meant zip.
    read_description(torch._C.PyTorchFileReader(path).get_record(DESCRIPTION))
    return torch.load(path, map_location="cpu", mmap=mappable, weights_only=True)


def _load_old(path: str, map_location: str) -> Any:
    with open_regular(path) as file:
        code, end = file.read(MAX_DESCRIPTION_BYTES), 0
        for _ in range(OLD_FORMAT_PICKLES):
            end = read_description(code, end).end
        file.seek(0)
        return torch.load(file, map_location=map_location, weights_only=True)


def _no_tensors(path: str, error: Exception) -> CorruptFile:
    reason = str(error).splitlines()[0] if str(error) else repr(error)
    return CorruptFile(f"{path} cannot be read as tensors only ({reason:.300}): it is damaged or holds other Python "
                       "objects; download it again, or get the model as .safetensors")


def _start_of(path: str) -> bytes:
    with open_regular(path) as file:
        return file.read(TAR_BLOCK)


def _is_tar(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def unwrap(path: str, content: Any) -> dict[str, Any]:
    """A pickle's state dict without the one wrapper that trainers put around it."""
    if not isinstance(content, dict):
        kind = "Tensor" if isinstance(content, StoredTensor) else type(content).__name__
        raise ModelFileError(f"{path} holds a {kind}; a state dict (name -> tensor) expected; get the model as "
                             ".safetensors")
    inner = next(iter(content.values())) if len(content) == 1 and next(iter(content)) in WRAPPER_KEYS else None
    return inner if isinstance(inner, dict) else content


def warn_about_pickle(path: str) -> None:
    """Log why a pickle should be converted, and how."""
    logger.warning("%s is a pickle: slower to load and less safe than .safetensors; convert it if you can: "
                   "python -m diffsynth_backend convert IN OUT.safetensors", path)


def pickle_layout(path: str, places: bool = True) -> dict[str, Any]:
    """The state dict with a TensorInfo for each tensor; nesting and other values are as stored. No data is read,
    except from the old format. Without `places` no tensor's offset is looked for: the file's own index is enough."""
    try:
        stored = _stored_pickle(path, places)
        if stored is None:
            return _Places(path, lambda tensor: None).of(load_pickle(path, "meta"))
        return _Places(path, stored.offset).of(unwrap(path, stored.content))
    except DamagedArchive as error:
        refuse(path, str(error), error)
    except NoDescription as error:
        raise _no_tensors(path, error) from error


def _stored_pickle(path: str, places: bool) -> ZipPickle | None:
    try:
        return ZipPickle(path, places)
    except Unmappable as reason:
        logger.info("%s is read through torch.load: %s", path, reason)
        return None


@dataclass
class _Places:
    """Turns a state dict of tensors into one of TensorInfos, within bounds."""

    path: str
    offset: Callable[[Any], int | None]
    entries: int = 0
    names: set[str] = field(default_factory=set)

    def of(self, content: dict[str, Any], prefix: str = "", depth: int = 0) -> dict[str, Any]:
        if depth > MAX_NESTING:
            refuse(self.path, f"its dictionaries are nested without end, or deeper than {MAX_NESTING} levels")
        self.entries += len(content)
        if self.entries > MAX_ENTRIES:
            refuse(self.path, f"its dictionaries have more than {MAX_ENTRIES} entries")
        layout: dict[str, Any] = {}
        for key, value in content.items():
            name = f"{prefix}{key!s:.1000}"
            if isinstance(value, dict):
                layout[key] = self.of(value, f"{name}|", depth + 1)
            else:
                layout[key] = self._place(name, value) if isinstance(value, (torch.Tensor, StoredTensor)) else value
        return layout

    def _place(self, name: str, tensor: torch.Tensor | StoredTensor) -> TensorInfo:
        if isinstance(tensor, torch.Tensor) and tensor.is_nested:
            raise ModelFileError(f"{self.path}: {name!r} is a nested tensor, without one shape; save its parts instead")
        if name in self.names:
            refuse(self.path, f"two tensors have the name {name!r:.200}")
        self.names.add(name)
        shape = tuple(tensor.shape)
        nbytes = math.prod(shape) * tensor.dtype.itemsize
        return TensorInfo(name, tensor.dtype, shape, self.path, self.offset(tensor), nbytes)
