"""ModelPool: model files in, models out. What a file contains is found by the hash of its keys and shapes.

Notable: a layout that no row of the registry knows is compared with those that are known, and the error names the
nearest one and what differs. Candidates are built without weights, so the comparison costs a second and no memory.
"""
from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..configs.model_configs import MODEL_CONFIGS, display_path, find_configs, resolve
from ..configs.vram_management_module_maps import module_map_of
from ..core.device import parse_device
from ..core.loader.file import ModelFileError, hash_model_file, hash_state_dict
from ..core.loader.model import LayoutDifference, build_on_meta, compare_layout, load_model
from ..core.logs import ensure_plain_output
from ..core.vram.disk_map import DiskMap
from ..core.vram.placement import ResidencyBudget, is_managed_config

logger = logging.getLogger(__name__)

# Of an unknown layout: it is near a known one if fewer than this share of the keys differ …
NEAR = 0.5
EXAMPLES = 3  # … and so many of each kind are shown.
# A row cannot be compared if its library is not installed, or its converter looks for what other files do not have.
CANNOT_COMPARE = (ImportError, LookupError, AttributeError, TypeError, ValueError, RuntimeError)


@dataclass(frozen=True)
class LoadedModel:
    """A model in the pool, with where it came from and how it was loaded."""

    name: str
    model: nn.Module
    paths: tuple[str, ...]
    vram_config: Mapping[str, Any]
    vram_limit: float | ResidencyBudget | None


class ModelPool:
    """Loads model files, recognised by hash, and hands the models out by name."""

    def __init__(self) -> None:
        ensure_plain_output()
        self.loaded: list[LoadedModel] = []
        self._budgets: dict[tuple[torch.device, float | None], ResidencyBudget] = {}

    @staticmethod
    def default_vram_config() -> dict[str, Any]:
        """No management: all weights on the CPU in bfloat16."""
        return {"computation_dtype": torch.bfloat16, "computation_device": "cpu"}

    def auto_load_model(self, path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None,
                        vram_config: Mapping[str, Any] | None = None, vram_limit: float | ResidencyBudget | None = None,
                        clear_parameters: bool = False, state_dict: Mapping[str, Any] | None = None) -> None:
        """Load every model that the registry finds in a file, a list of shards, or a folder.

        `vram_config`: the eight `<state>_dtype`, `<state>_device` fields. Layers are managed only if both fields of
        "offload" are set; otherwise the weights go straight to the computation device and dtype (CPU and bfloat16 if
        unset). Models with the same computation device and `vram_limit` (GiB, or a budget) share that limit.
        `vram_limit` is about managed layers: a model that is not managed is on its device as a whole.
        `clear_parameters`: only the structure is wanted, its parameters stay on meta and no weight is read.
        `state_dict` takes the place of the files' content; `path` then only says where it came from.
        Raises ModelFileError for files that cannot be used and for an unknown layout, and what `load_model` raises.
        """
        paths = _as_list(path)
        logger.info("Loading models from: %s", json.dumps(paths, indent=4))
        settings = {**self.default_vram_config(), **{k: v for k, v in (vram_config or {}).items() if v is not None}}
        model_hash = hash_model_file(paths) if state_dict is None else hash_state_dict(dict(state_dict))
        rows = find_configs(model_hash)
        if not rows:
            raise ModelFileError(_unknown_layout(model_hash, paths, state_dict))
        for row in rows:
            if clear_parameters:
                model = build_on_meta(resolve(row["model_class"]), row.get("extra_kwargs")).eval()
            else:
                model = self._load(row, paths, settings, vram_limit, state_dict)
            self.loaded.append(LoadedModel(row["model_name"], model, tuple(paths), settings, vram_limit))
            logger.info("Loaded model: %s", json.dumps(_summary(row), indent=4))

    def fetch_model(self, model_name: str, index: int | Sequence[int] | str | None = None
                    ) -> nn.Module | list[nn.Module] | None:
        """The model of that name, None if there is none (many models are optional).

        Of several, `index` says which, in the order of loading: a number, a list of numbers (gives a list), or "all"
        (gives a list, also of none or one). Raises ValueError when it does not say, IndexError when there are fewer.
        """
        matches = [entry for entry in self.loaded if entry.name == model_name]
        if index == "all":
            return [entry.model for entry in matches]
        if not matches:
            logger.debug("No %s among the loaded models", model_name)
            return None
        if index is None and len(matches) > 1:
            raise ValueError(f"{len(matches)} models are called {model_name}: {_listing(matches)}. "
                             "Say which by index, or load only one of them")
        if isinstance(index, list | tuple | range):
            return [_pick(matches, model_name, position) for position in index]
        return _pick(matches, model_name, index or 0)

    def _load(self, row: Mapping[str, Any], paths: list[str], settings: Mapping[str, Any],
              vram_limit: float | ResidencyBudget | None, state_dict: Mapping[str, Any] | None) -> nn.Module:
        model_class = resolve(row["model_class"])
        managed = is_managed_config(settings)
        management = {"module_map": module_map_of(model_class), "vram_config": settings,
                      "vram_limit": self._budget(settings, vram_limit)} if managed else {}
        return load_model(model_class, paths if state_dict is None else None, row.get("extra_kwargs"),
                          torch_dtype=settings["computation_dtype"], device=settings["computation_device"],
                          state_dict_converter=resolve(row.get("state_dict_converter")), state_dict=state_dict,
                          **management)

    def _budget(self, settings: Mapping[str, Any], vram_limit: float | ResidencyBudget | None) -> ResidencyBudget:
        if isinstance(vram_limit, ResidencyBudget):
            return vram_limit
        key = (parse_device(settings["computation_device"]), vram_limit)
        return self._budgets.setdefault(key, ResidencyBudget.from_gib(vram_limit))


def _as_list(path: Any) -> list[str]:
    if path is None:
        return []
    return [os.fspath(path)] if isinstance(path, str | os.PathLike) else [os.fspath(entry) for entry in path]


def _summary(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_name": row["model_name"], "model_class": display_path(resolve(row["model_class"])),
            "extra_kwargs": row.get("extra_kwargs")}


def _pick(matches: Sequence[LoadedModel], model_name: str, position: int) -> nn.Module:
    if not isinstance(position, int):
        raise TypeError(f"{model_name}: index {position!r}; expected a number, a list of numbers, or 'all'")
    if not 0 <= position < len(matches):
        raise IndexError(f"{model_name}: index {position} asked for, {len(matches)} loaded: {_listing(matches)}")
    return matches[position].model


def _listing(matches: Sequence[LoadedModel]) -> str:
    return "; ".join(f"{position}: {', '.join(entry.paths) or 'a state dict'}"
                     for position, entry in enumerate(matches))


# ---- unknown layouts ------------------------------------------------------------------------------------------------

def _unknown_layout(model_hash: str, paths: list[str], state_dict: Mapping[str, Any] | None) -> str:
    """The message for weights whose hash is in no row."""
    problem = f"unknown layout {model_hash}: {', '.join(paths) or 'the state dict'} is in no row of the model registry"
    compared = list(_compare_with_known(paths, state_dict))
    near = [comparison for comparison in compared if comparison.is_near]
    if not near:
        known = ", ".join(dict.fromkeys(row["model_name"] for row in MODEL_CONFIGS))
        return f"{problem}, and like none of the models there ({known}). To add a model, append a row to MODEL_CONFIGS"
    nearest = min(near, key=lambda comparison: len(comparison.difference))
    return (f"{problem}; nearest: {nearest.model_name}, {len(nearest.difference)} of its {nearest.size} keys differ: "
            f"{nearest.difference.describe(EXAMPLES)}. Check that all files of one model are given, in its authors' "
            "layout")


@dataclass(frozen=True)
class _Comparison:
    """How weights differ from a known model, of `size` keys."""

    model_name: str
    size: int
    difference: LayoutDifference

    @property
    def is_near(self) -> bool:
        """Most keys agree, or they are a part of the model's."""
        foreign = len(self.difference.unexpected) + len(self.difference.wrong)
        return len(self.difference) < NEAR * self.size or (not foreign and len(self.difference.missing) < self.size)


def _compare_with_known(paths: list[str], state_dict: Mapping[str, Any] | None) -> Iterator[_Comparison]:
    for row in MODEL_CONFIGS:
        try:
            converter = resolve(row.get("state_dict_converter")) or dict
            weights = DiskMap(paths, state_dict_converter=converter) if state_dict is None else converter(state_dict)
            model = build_on_meta(resolve(row["model_class"]), row.get("extra_kwargs"))
        except CANNOT_COMPARE as error:
            logger.debug("Not compared with %s: %r", row["model_name"], error)
        else:
            yield _Comparison(row["model_name"], len(model.state_dict()), compare_layout(model, weights))
