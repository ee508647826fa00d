"""A user's own rows for the registry, from a JSON file: data that can name what is there, and nothing to be imported.

    {"models": [{"model_hash": "<32 hex digits>", "model_name": "qwen_image_dit",
                 "model_class": "models.qwen_image_dit.QwenImageDiT",
                 "state_dict_converter": "utils.…", "extra_kwargs": {"num_layers": 30}}]}

Classes and converters are those of the rows that exist already, `extra_kwargs` are names of the class's parameters and
plain values. So a file from a stranger can cause a wrong model at worst. Programs that need more append to
`MODEL_CONFIGS`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .containment import read_small
from .model_files import ModelFileError

REGISTRY_VARIABLE = "DIFFSYNTH_MODEL_REGISTRY"  # the environment variable that names the file
MAX_BYTES = 1_000_000
MAX_ROWS = 1000
MAX_INTEGER = 1 << 20
MAX_DEPTH = 512  # of what is counted in layers: each is built to compare names
_FIELDS = {"model_hash", "model_name", "model_class", "state_dict_converter", "extra_kwargs"}
_HASH = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_COUNTS_LAYERS = re.compile(r"layers|depth|blocks", re.IGNORECASE)
_EXAMPLE = "see the example in core/loader/registry_file.py"


class RegistryFileError(ModelFileError):
    """A registry file says something that it may not say, or that makes no sense."""


def read_registry_file(path: str, known: Sequence[Mapping[str, Any]],
                       resolve: Callable[[str], Any]) -> list[dict[str, Any]]:
    """The rows of a file, checked. `known` are the rows whose classes and converters may be named, `resolve` gives the
    class that a row names. Raises RegistryFileError, and PathRefused for what is no file of data.
    """
    try:
        content = read_small(path, MAX_BYTES)
    except OSError as error:
        raise RegistryFileError(f"{path} cannot be read ({error}); check the path, or unset {REGISTRY_VARIABLE}"
                                ) from error
    if content is None:
        raise RegistryFileError(f"{path} has more than {MAX_BYTES} bytes: no registry; {_EXAMPLE}")
    try:
        rows = json.loads(content)["models"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RegistryFileError(f'{path}: a JSON object with the list "models" expected ({error!r:.200}); {_EXAMPLE}'
                                ) from error
    if not isinstance(rows, list) or len(rows) > MAX_ROWS:
        raise RegistryFileError(f'{path}: "models" must be a list of at most {MAX_ROWS} rows; {_EXAMPLE}')
    for number, row in enumerate(rows, 1):
        problem = _problem_of(row, known, resolve)
        if problem:
            raise RegistryFileError(f"{path}, row {number}: {problem}; {_EXAMPLE}")
    return rows


def _problem_of(row: Any, known: Sequence[Mapping[str, Any]], resolve: Callable[[str], Any]) -> str | None:
    """What is wrong with a row, None if it is right."""
    if not isinstance(row, dict) or not {"model_hash", "model_name", "model_class"} <= row.keys() <= _FIELDS:
        return f"an object with model_hash, model_name, model_class and optionally {sorted(_OPTIONAL)} expected"
    if not isinstance(row["model_hash"], str) or not _HASH.fullmatch(row["model_hash"]):
        return f"model_hash is {row['model_hash']!r:.80}; 32 hex digits, as `inspect FILE` prints them, expected"
    if not isinstance(row["model_name"], str) or not _NAME.fullmatch(row["model_name"]):
        return f"model_name is {row['model_name']!r:.80}; letters, digits, '_', '-' and '.' expected"
    for field in ("model_class", "state_dict_converter"):
        allowed = sorted({other[field] for other in known if isinstance(other.get(field), str)})
        if row.get(field) is not None and row[field] not in allowed:
            return f"{field} is {row[field]!r:.80}; one of {', '.join(allowed)} expected"
    if row["model_class"] is None:
        return "model_class is missing"
    return _problem_of_arguments(row.get("extra_kwargs") or {}, resolve(row["model_class"]))


_OPTIONAL = _FIELDS - {"model_hash", "model_name", "model_class"}


def _problem_of_arguments(arguments: Any, model_class: type) -> str | None:
    accepted = inspect.signature(model_class).parameters
    if not isinstance(arguments, dict):
        return f"extra_kwargs is {arguments!r:.80}; an object expected"
    for name, value in arguments.items():
        if name not in accepted:
            return f"extra_kwargs has {name!r:.80}; {model_class.__name__} takes {', '.join(accepted)}"
        limit = MAX_DEPTH if _COUNTS_LAYERS.search(name) else MAX_INTEGER
        if not _is_plain(value, limit):
            return f"extra_kwargs has {name}={value!r:.80}; numbers up to {limit}, true, false or lists expected"
    return None


def _is_plain(value: Any, limit: int) -> bool:
    if isinstance(value, list):
        return len(value) <= MAX_DEPTH and all(not isinstance(item, list) and _is_plain(item, limit) for item in value)
    return value is None or isinstance(value, bool) or (isinstance(value, int | float) and -limit <= value <= limit)
