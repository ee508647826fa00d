"""Lists of model files: folders and shard sets are expanded, grouped and checked before anything is read.

A wrong file list would otherwise surface as "unknown model" or in the middle of a run. The errors of all of the loader
are defined here.

Notable: what is done for each file stays with text and `os.path`: recognising a known model takes a millisecond and a
half, of which a `Path` for each of nine files would be the tenth part.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

from .containment import PathRefused, check_file_name, check_is_file, list_folder, read_small

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pth", ".ckpt")
MODEL_SUFFIXES = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)
INDEX_SUFFIX = SAFETENSORS_SUFFIX + ".index.json"
SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<index>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)", re.ASCII)
MAX_SHARDS = 1000  # more than any published model has
MAX_FILES = 10_000
MAX_INDEX_BYTES = 5_000_000  # one line for each tensor

ModelFiles = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class ModelFileError(ValueError):
    """A model file, or a list of them, cannot be used. The message says which, why, and what to do."""


class MissingFile(ModelFileError, FileNotFoundError):
    """A model file is not there."""


class MissingShards(MissingFile):
    """Some files of a set `name-0000i-of-0000n` are not there or were not given."""


class CorruptFile(ModelFileError):
    """A file's content contradicts its format, mostly after an interrupted download."""


class DuplicateKeys(ModelFileError):
    """Two files hold a tensor of the same name, so they are not parts of one model."""


class PickleRefused(ModelFileError):
    """A pickle where only safetensors, or pickles that the registry knows, are let in."""


def refuse(path: str, problem: str, cause: Exception | None = None) -> NoReturn:
    """Raises CorruptFile with the advice that helps: to download the file again."""
    message = f"{path}: {problem}. The file is damaged or incomplete: delete it and download it again"
    raise CorruptFile(message) from cause


def is_pickle(path: str) -> bool:
    """Whether the file's suffix is that of a pickle."""
    return path.lower().endswith(PICKLE_SUFFIXES)


def check_model_files(file_path: ModelFiles) -> list[str]:
    """The files as a list of paths, as `status_of_files` gives and checks them."""
    return list(status_of_files(file_path))


def status_of_files(file_path: ModelFiles) -> dict[str, os.stat_result]:
    """The files' paths in their order, each with its status; folders are replaced by their safetensors files.

    All are checked before, so that each can be opened. Raises ModelFileError: empty list, unknown suffix, zero-byte
    file, a file given twice; MissingFile; MissingShards; PathRefused for devices, pipes and the like.
    """
    given = [file_path] if not isinstance(file_path, Iterable) or isinstance(file_path, str) else list(file_path)
    if not given or file_path is None or "" in given:
        raise ModelFileError("no model file given: the path or list of paths is empty; pass a file or a folder")
    files = [file for entry in given for file in _expand_folder(_as_path(entry))]
    if len(files) > MAX_FILES:
        raise ModelFileError(f"{len(files)} files given, at most {MAX_FILES} allowed; pass the files of one model")
    found = {path: status for path, status in files if status}
    check_shards(found)
    for path, status in files:
        _check_file(path, status)
    if len(found) != len(files):
        twice = next(path for path, count in Counter(path for path, _ in files).items() if count > 1)
        raise ModelFileError(f"{twice} is given more than once; list every file once")
    return found


def _as_path(entry: object) -> str:
    path = os.fspath(entry) if isinstance(entry, (str, os.PathLike)) else None
    if not isinstance(path, str):
        raise ModelFileError(f"{entry!r:.80} is no path; pass the path of a file or folder as text")
    return path


def group_files(paths: Iterable[str]) -> list[list[str]]:
    """The paths in groups that may each be a model: the files of one shard set together, every other file alone."""
    return [list(group) for group in _matched(paths).values()]


def _matched(paths: Iterable[str]) -> dict[tuple[str, ...], dict[str, re.Match[str] | None]]:
    """The groups by what their files have in common: folder, prefix, count and suffix of shards, or the path."""
    groups: dict[tuple[str, ...], dict[str, re.Match[str] | None]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        match = SHARD_NAME.fullmatch(name)
        key = (folder, *match.group("prefix", "count", "suffix")) if match else (path,)
        groups.setdefault(key, {})[path] = match
    return groups


def check_shards(paths: Iterable[str]) -> None:
    """Raises MissingShards if `paths` holds some but not all files of a set `name-0000i-of-0000n.suffix`."""
    _check_shards(tuple(paths))


@lru_cache(maxsize=16)
def _check_shards(paths: tuple[str, ...]) -> None:
    """Remembers the lists that it has found to be complete, which only their names tell."""
    for (folder, *shared), group in _matched(paths).items():
        if shared:
            _check_set(folder, {int(match["index"][-20:]): match for match in group.values()})


def _check_set(folder: str, present: dict[int, re.Match[str]]) -> None:
    prefix, digits, suffix = next(iter(present.values())).group("prefix", "count", "suffix")
    count = int(digits[-20:])
    if not 1 <= count <= MAX_SHARDS or len(digits) > 20:
        raise ModelFileError(f"{Path(folder, prefix)}: a set of {digits:.20} shards by its files' names, 1 to "
                             f"{MAX_SHARDS} allowed; give the files the names that their authors gave them")
    first = 0 if 0 in present else 1  # a few exporters count from zero
    missing = [index for index in range(first, count + first) if index not in present]
    if missing:
        width = len(next(iter(present.values()))["index"])
        names = [f"{prefix}-{index:0{width}}-of-{digits}{suffix}" for index in missing[:8]]
        _refuse_shards(folder, prefix, count, len(missing), names)


def _refuse_shards(folder: str, prefix: str, count: int, missing: int, names: list[str]) -> NoReturn:
    on_disk = [name for name in names if Path(folder, name).exists()]
    listed = ", ".join(names) + (f" and {missing - len(names)} more" if missing > len(names) else "")
    advice = f"pass the whole set: {', '.join(on_disk)} lie in that folder" if on_disk else "download them"
    raise MissingShards(
        f"{Path(folder, prefix)}: {count} of {count} shards expected, {missing} missing: {listed}; {advice}"
    )


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):  # ValueError: NUL, half a character
        return None


def _check_file(path: str, status: os.stat_result | None) -> None:
    if status is None:
        raise MissingFile(f"{path} does not exist; check the path or download the model")
    if not path.lower().endswith(MODEL_SUFFIXES):
        raise ModelFileError(f"{path}: unknown suffix {Path(path).suffix!r}; model files end in "
                             f"{', '.join(MODEL_SUFFIXES)}: choose one of those")
    if check_is_file(path, status).st_size == 0:
        raise CorruptFile(f"{path} is empty (0 bytes): its download failed; delete it and download it again")


# ---- folders --------------------------------------------------------------------------------------------------------


def _expand_folder(path: str) -> list[tuple[str, os.stat_result | None]]:
    """The file with its status, None if it is not there. Of a folder, its safetensors files; if one index file
    describes them, those that it lists."""
    status = _status(path)
    if status is None or not stat.S_ISDIR(status.st_mode):
        return [(path, status)]
    visible = list_folder(path)
    names = [name for name in visible if name.endswith(SAFETENSORS_SUFFIX)]
    indexes = [name for name in visible if name.endswith(INDEX_SUFFIX)]
    if len(indexes) == 1:
        names = _read_index(str(Path(path, indexes[0])))
    if not names:
        raise MissingFile(f"{path} is a folder without {SAFETENSORS_SUFFIX} files; pass the model's files themselves")
    return [(file, _status(file)) for file in (str(Path(path, name)) for name in names)]


def _read_index(path: str) -> list[str]:
    content = read_small(path, MAX_INDEX_BYTES)
    if content is None:
        raise CorruptFile(f"{path} is no index of shards: more than {MAX_INDEX_BYTES} bytes; download it again")
    try:
        names = list(dict.fromkeys(json.loads(content)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFile(f"{path} is not an index of shards ({error!r:.200}); download it again") from error
    if len(names) > MAX_SHARDS:
        raise CorruptFile(f"{path} lists {len(names)} files, at most {MAX_SHARDS} expected; download it again")
    return sorted(_check_listed(path, name) for name in names)


def _check_listed(index: str, name: str) -> str:
    """A name in an index if it is that of a safetensors file in the same folder."""
    try:
        check_file_name(name)
    except PathRefused as error:
        raise PathRefused(f"{index} lists {name!r:.80}; {SAFETENSORS_SUFFIX} files of the same folder expected; "
                          "download it again") from error
    if not name.endswith(SAFETENSORS_SUFFIX):
        raise CorruptFile(f"{index} lists {name!r:.80}; {SAFETENSORS_SUFFIX} files of the same folder expected; "
                          "download it again")
    return name
