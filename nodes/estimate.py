"""What the page shows while VRAM Config is edited: the plan for the models that its Model Loader names.

Notable: it is asked over HTTP by whoever has the page open, so it takes ids and numbers only, each checked against what
the widgets offer, opens nothing that a Model Config could not, and names no path in its answer. One at a time.
The answer is figures, and the names of problems: the page has the words, in its language.
"""
from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..diffsynth_backend.core.loader.config import VRAM_FIELDS
from ..diffsynth_backend.core.loader.containment import PathRefused
from ..diffsynth_backend.core.loader.file import MissingFile, ModelFileError
from ..diffsynth_backend.core.vram.presets import VRAM_CHOICES
from ..diffsynth_backend.pipelines.estimate import Estimate, estimate
from ..diffsynth_backend.pipelines.families import FAMILIES
from ..diffsynth_backend.pipelines.handle import (
    AUTOMATIC,
    DYNAMIC_PRESETS,
    ModelSource,
    NothingMoves,
    NothingRead,
    VramChoice,
)
from ..diffsynth_backend.pipelines.presets import MODEL_PRESETS
from .loading import DTYPES, FROM_PRESET, field_choices, overrides, settle, source_of, sources_of

MOST_FILES = 16
MOST_GIB = 1024.0
SIDES = (16, 16384)
NO_LIMIT = "none"

_one_at_a_time = threading.Lock()


class NoModel(ValueError):
    """Nothing is connected that could be estimated."""


def answer(query: Mapping[str, str]) -> dict[str, Any]:
    """`estimate`, the figures of an Estimate, or in their place `problem`: one of missing, unreadable, no_model,
    nothing_moves (with the `presets` that move), nothing_read, and other (with a sentence as `detail`).

    The query: `model`, a preset, or `family` and `file0`, `file1` … as Model Configs offer them (with a preset these
    are the files besides); `preset`, `limit` (GiB, automatic or none), `ram` (GiB or none), the eight fields, `dtype`,
    `width`, `height`.
    """
    try:
        with _one_at_a_time:
            return {"estimate": asdict(_estimate(query))}
    except MissingFile:
        return {"problem": "missing"}
    except (ModelFileError, PathRefused):
        return {"problem": "unreadable"}
    except NoModel:
        return {"problem": "no_model"}
    except NothingMoves:
        return {"problem": "nothing_moves", "presets": ", ".join(DYNAMIC_PRESETS)}
    except NothingRead:
        return {"problem": "nothing_read"}
    except ValueError as error:
        return {"problem": "other", "detail": str(error)}


def _estimate(query: Mapping[str, str]) -> Estimate:
    family, sources, size = _models(query)
    fields = {name: _one_of(query, name, field_choices(name), FROM_PRESET) for name in VRAM_FIELDS}
    choice = VramChoice(_one_of(query, "preset", VRAM_CHOICES), _limit(query), overrides(fields),
                        _ram_limit(query))
    handle, decision = settle(family, sources, None, _one_of(query, "dtype", DTYPES, DTYPES[0]), choice)
    width, height = (_number(query, name, *SIDES, default) for name, default in zip(("width", "height"), size))
    return estimate(handle, (int(width), int(height)), decision)


def _models(query: Mapping[str, str]) -> tuple[str, tuple[ModelSource, ...], tuple[int, int]]:
    """Family, files, and the size of picture that they are for."""
    entries = [query[name] for name in sorted(query) if name.startswith("file")]
    if len(entries) > MOST_FILES:
        raise ValueError(f"{len(entries)} files; at most {MOST_FILES} expected")
    files = tuple(map(source_of, entries))
    if "model" not in query:
        if not files:
            raise NoModel
        family = _one_of(query, "family", FAMILIES)
        return family, files, FAMILIES[family].typical_size
    name = _one_of(query, "model", MODEL_PRESETS)
    preset = MODEL_PRESETS[name]
    return preset.family, (*sources_of(name), *files), (preset.width, preset.height)


def _one_of(query: Mapping[str, str], name: str, choices: Any, default: str | None = None) -> str:
    value = query.get(name, default)
    if value not in choices:
        raise ValueError(f"{name} is {value!r:.100}; known: {', '.join(choices)}")
    return value


def _limit(query: Mapping[str, str]) -> float | str | None:
    value = query.get("limit", AUTOMATIC)
    if value == NO_LIMIT:
        return None
    return AUTOMATIC if value == AUTOMATIC else _number(query, "limit", 0.0, MOST_GIB)


def _ram_limit(query: Mapping[str, str]) -> float | None:
    return None if query.get("ram", NO_LIMIT) == NO_LIMIT else _number(query, "ram", 0.0, MOST_GIB)


def _number(query: Mapping[str, str], name: str, least: float, most: float, default: float | None = None) -> float:
    value = query.get(name, default)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not least <= number <= most:
        raise ValueError(f"{name} is {value!r:.100}; a number from {least:g} to {most:g} expected")
    return number
