"""Who waits for models hears of each tensor that is read, and may stop the loading by raising.

Notable: the watcher is set for the time of a `with` block and found by `load_model` itself, so that every pipeline's
`from_pretrained` can be watched, also one that knows nothing of it. Without a watcher nothing is wrapped.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..vram.disk_map import Converter, DiskMap
from ..vram.tensor_reference import UnrecordableOperation
from .file import ModelFiles, check_model_files, read_tensor_infos


@dataclass(frozen=True)
class LoadStep:
    """A tensor of a model is about to be read, or, where its weights stay on disk, the model about to be mapped.

    `file` (number `shard` of `shards`, from 1) holds the tensor; `done_bytes` of the model's `total_bytes` are read, as
    they are in the files.
    """

    file: str
    shard: int
    shards: int
    done_bytes: int
    total_bytes: int


Watcher = Callable[[LoadStep], None]
_watcher: ContextVar[Watcher | None] = ContextVar("load watcher", default=None)


@contextmanager
def watch_loading(watcher: Watcher) -> Iterator[None]:
    """Within the block, `watcher` is called before each tensor that this thread's `load_model` reads.

    What it raises ends the loading, of which nothing remains.
    """
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def watched(weights: Mapping[str, Any], path: ModelFiles | None, converter: Converter | None, stay_on_disk: bool
            ) -> Mapping[str, Any]:
    """The weights of files, telling the watcher of each that is asked for; themselves if there is none.

    A map of weights that stay on disk goes on serving the model, so it remains what it is, and is told of once.
    """
    watcher = _watcher.get()
    if watcher is None or path is None:
        return weights
    reading = _Reading(weights, path, converter, watcher)
    if stay_on_disk:
        reading.tell(reading.files[0])
        return weights
    return reading


class _Reading(Mapping[str, Any]):
    """Weights by the model's names, and how many of them were asked for."""

    def __init__(self, weights: Mapping[str, Any], path: ModelFiles, converter: Converter | None,
                 watcher: Watcher) -> None:
        # As everywhere else: pathlib cannot take ".." out of a path without following links.
        self.files = [str(Path(file).absolute()) for file in check_model_files(path)]
        self._weights, self._watcher = weights, watcher
        self._origin = _origins(self.files, converter)
        self._total = sum(math.prod(info.shape) * info.dtype.itemsize for info in read_tensor_infos(path).values())
        self._done = 0

    def tell(self, file: str) -> None:
        shard = self.files.index(file) + 1
        self._watcher(LoadStep(file, shard, len(self.files), min(self._done, self._total), self._total))

    def __getitem__(self, name: str) -> torch.Tensor:
        self.tell(self._origin.get(name, self.files[0]))
        tensor = self._weights[name]
        self._done += tensor.nbytes
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _origins(files: list[str], converter: Converter | None) -> dict[str, str]:
    """By the model's name of each tensor of several files, the one that it is read from; empty if a converter does not
    let one see."""
    if len(files) == 1:
        return {}
    try:
        index = DiskMap(files, state_dict_converter=converter)
    except UnrecordableOperation:
        return {}
    return {name: index.sources(name)[0].file for name in index if index.sources(name)}
