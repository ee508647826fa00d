"""LoRA files from the disk.

Notable: a file that is in use somewhere is not read again, unless it was rewritten. Its tensors are views of the mapped
file; layers have copies.
"""
from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from ...core.loader.file import (
    SAFETENSORS_SUFFIX,
    ModelFiles,
    check_model_files,
    fingerprint,
    load_state_dict,
    read_tensor_infos,
)
from .formats import LoraError, LoraFile, parse_lora

MAX_BYTES = 32 << 30  # of tensors: more than the models that such files are for

_in_use: WeakValueDictionary[tuple, LoraFile] = WeakValueDictionary()


def read_lora(files: ModelFiles, safetensors_only: bool = False) -> LoraFile:
    """The adapters in one or several files, which make one LoRA together.

    Pickles are read as the loader reads them, unless only safetensors are wanted. Raises LoraError for contents that
    make no LoRA, ModelFileError for what the loader refuses.
    """
    paths = check_model_files(files)
    if safetensors_only and (others := [path for path in paths if not path.lower().endswith(SAFETENSORS_SUFFIX)]):
        raise LoraError(f"{others[0]}: a {SAFETENSORS_SUFFIX} file expected; pickles are not loaded here. Get the LoRA "
                        f"as {SAFETENSORS_SUFFIX}")
    key = tuple((path.absolute(), fingerprint(path.stat())) for path in map(Path, paths))
    found = _in_use.get(key)
    if found is None:
        found = _in_use[key] = _read(paths)
    return found


def _read(paths: list[str]) -> LoraFile:
    title = ", ".join(Path(path).name for path in paths)
    nbytes = sum(info.nbytes for info in read_tensor_infos(paths).values())
    if nbytes > MAX_BYTES:
        raise LoraError(f"{title} has {nbytes} bytes of tensors, at most {MAX_BYTES} allowed: is it a LoRA?")
    metadata = {name: value for path in paths for name, value in lora_metadata(path).items()}
    with torch.inference_mode(False), torch.no_grad():
        return parse_lora(load_state_dict(paths), title, metadata)


def lora_metadata(path: str) -> Mapping[str, str]:
    """What a safetensors file says about itself, nothing for other files. Raises ModelFileError."""
    path, = check_model_files(path)
    if not path.lower().endswith(SAFETENSORS_SUFFIX):
        return {}
    read_tensor_infos(path)  # checks the header
    return _cached_metadata(path, fingerprint(Path(path).stat()))


@lru_cache(maxsize=64)
def _cached_metadata(path: str, _fingerprint: tuple[int, ...]) -> Mapping[str, str]:
    from safetensors import safe_open  # imported late as it imports numpy's and torch's parts of the library

    with safe_open(Path(path), framework="pt") as file:
        return file.metadata() or {}
