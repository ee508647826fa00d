"""ModelPool: model files in, models out. What a file contains is found by the hash of its keys and shapes.

Notable: files that others packed again are recognised by what is left without their additions (`repackaged`), a list
may hold the files of several models, and a user's registry file may add rows. A layout that no row knows is compared
with those that are known, and the error names the nearest one and what differs. Candidates are built without weights,
so the comparison costs a second and no memory.
"""
from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..configs.model_configs import MODEL_CONFIGS, display_path, find_configs, resolve
from ..configs.vram_management_module_maps import module_map_of
from ..core import environment
from ..core.device import parse_device
from ..core.loader.file import (
    DuplicateKeys,
    ModelFileError,
    ModelFiles,
    PickleRefused,
    check_model_files,
    group_files,
    hash_model_file,
    hash_state_dict,
    is_pickle,
    read_layout,
)
from ..core.loader.model import (
    LayoutDifference,
    StateDictConverter,
    build_on_meta,
    compare_layout,
    layout_of,
    load_model,
)
from ..core.loader.registry_file import REGISTRY_VARIABLE, read_registry_file
from ..core.loader.repackaged import Only, Unpack, part, prefixes_of, without_companions
from ..core.logs import ensure_plain_output
from ..core.vram.disk_map import DiskMap
from ..core.vram.placement import ResidencyBudget, is_managed_config

logger = logging.getLogger(__name__)

# Of an unknown layout: it is near a known one if fewer than this share of the keys differ …
NEAR = 0.5
EXAMPLES = 3  # … and so many of each kind are shown.
LORA_NAME = re.compile(r"lora_(A|B|up|down)\b|\.hada_w|\.lokr_w")
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
        self._budgets: dict[tuple[torch.device, float | None, float | None], ResidencyBudget] = {}

    @staticmethod
    def default_vram_config() -> dict[str, Any]:
        """No management: all weights on the CPU in bfloat16."""
        return {"computation_dtype": torch.bfloat16, "computation_device": "cpu"}

    def auto_load_model(self, path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None,
                        vram_config: Mapping[str, Any] | None = None, vram_limit: float | ResidencyBudget | None = None,
                        clear_parameters: bool = False, state_dict: Mapping[str, Any] | None = None,
                        model_name: str | None = None, wanted: Collection[str] | None = None,
                        ram_limit: float | None = None) -> None:
        """Load every model that the registry finds in a file, a list (shards, or several models' files), or a folder.

        `vram_config`: the eight `<state>_dtype`, `<state>_device` fields. Layers are managed only if both fields of
        "offload" are set; otherwise the weights go straight to the computation device and dtype (CPU and bfloat16 if
        unset). Models with the same computation device and `vram_limit` (GiB, or a budget) share that limit.
        `vram_limit` is about managed layers: a model that is not managed is on its device as a whole. `ram_limit`:
        GiB of RAM in which layers that are read from disk may wait while their model is in use; a budget has its own.
        `clear_parameters`: only the structure is wanted, its parameters stay on meta and no weight is read.
        `state_dict` takes the place of the files' content; `path` then only says where it came from.
        `model_name`: take the files for this model of the registry, whatever their hash; see `detect_models`.
        `wanted`: load only models of these names, since several families may know one layout.
        Raises ModelFileError for files that cannot be used, for an unknown layout and if no model is wanted, and what
        `load_model` raises.
        """
        paths = _as_list(path)
        logger.info("Loading models from: %s", json.dumps(paths, indent=4))
        settings = {**self.default_vram_config(), **{k: v for k, v in (vram_config or {}).items() if v is not None}}
        models = []
        for found in _wanted(detect_models(paths, state_dict, model_name), wanted):
            if clear_parameters:
                model = build_on_meta(resolve(found.row["model_class"]), found.row.get("extra_kwargs")).eval()
            else:
                model = self._load(found, settings, self._budget(settings, vram_limit, ram_limit), state_dict)
            models.append(LoadedModel(found.name, model, found.paths or tuple(paths), settings, vram_limit))
            logger.info("Loaded model: %s", json.dumps(_summary(found.row), indent=4))
        self.loaded += models  # all of them or none

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

    def _load(self, found: DetectedModel, settings: Mapping[str, Any], budget: ResidencyBudget,
              state_dict: Mapping[str, Any] | None) -> nn.Module:
        model_class = resolve(found.row["model_class"])
        managed = is_managed_config(settings)
        management = {"module_map": module_map_of(model_class), "vram_config": settings,
                      "vram_limit": budget} if managed else {}
        return load_model(model_class, found.paths if state_dict is None else None, found.row.get("extra_kwargs"),
                          torch_dtype=settings["computation_dtype"], device=settings["computation_device"],
                          state_dict_converter=found.converter, state_dict=state_dict, **management)

    def _budget(self, settings: Mapping[str, Any], vram_limit: float | ResidencyBudget | None,
                ram_limit: float | None) -> ResidencyBudget:
        if isinstance(vram_limit, ResidencyBudget):
            return vram_limit
        key = (parse_device(settings["computation_device"]), vram_limit, ram_limit)
        return self._budgets.setdefault(key, ResidencyBudget.from_gib(vram_limit, ram_limit))


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
        raise IndexError(f"{model_name}: index {position} asked for, {len(matches)} loaded: {_listing(matches)}; ask "
                         "for one of these")
    return matches[position].model


def _listing(matches: Sequence[LoadedModel]) -> str:
    return "; ".join(f"{position}: {', '.join(entry.paths) or 'a state dict'}"
                     for position, entry in enumerate(matches))


# ---- detection ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class DetectedModel:
    """A model found in files: its row of the registry, its files, and how their state dict becomes the model's."""

    row: Mapping[str, Any]
    paths: tuple[str, ...]
    converter: StateDictConverter | None
    remark: str = ""  # how the files differ from the published ones

    @property
    def name(self) -> str:
        return self.row["model_name"]


def detect_models(files: ModelFiles, state_dict: Mapping[str, Any] | None = None,
                  model_name: str | None = None) -> list[DetectedModel]:
    """Every model of the registry in files (or in a state dict, which takes their place); only headers are read.

    `model_name`: take the files for the row of that name that fits best, whatever their hash. What the model does not
    have is then left out, with a warning; what it lacks is an error when it is loaded.
    Raises ModelFileError for files that cannot be used, for a name that is in no row, and for an unknown layout, with
    the nearest known one and the difference.
    """
    paths = _as_list(files) if state_dict is not None else check_model_files(files)
    if model_name is not None:
        use_registry_file()
        return [_take_for(model_name, paths, state_dict)]
    found = find_models(paths, state_dict)
    if not found:
        raise ModelFileError(_unknown_layout(paths, state_dict))
    return found


def _wanted(found: list[DetectedModel], names: Collection[str] | None) -> list[DetectedModel]:
    """Those of these names, all if None. Raises ModelFileError for files that have none of them."""
    wanted = [model for model in found if names is None or model.name in names]
    for model in found:
        if not any(other.paths == model.paths for other in wanted):
            raise ModelFileError(f"{', '.join(model.paths) or 'the state dict'} is a {model.name}, which this pipeline "
                                 f"does not use (it uses {', '.join(sorted(names))}): leave it out")
    return wanted


def find_models(files: ModelFiles, state_dict: Mapping[str, Any] | None = None) -> list[DetectedModel]:
    """`detect_models` by what is in the files; of one model that nobody knows, the result is empty."""
    use_registry_file()
    paths = _as_list(files) if state_dict is not None else check_model_files(files)
    try:
        found = _in_layout(paths, state_dict)
    except DuplicateKeys:
        if len(group_files(paths)) == 1:
            raise
        found = []
    if not found and state_dict is None and len(groups := group_files(paths)) > 1:
        return [model for group in groups for model in detect_models(group)]
    return found


def check_workflow_files(files: ModelFiles, pickles_allowed: bool = False,
                         switch: str = "allow pickles in the settings") -> list[str]:
    """The files that a workflow names, as `check_model_files`, after refusing pickles that nobody knows.

    A pickle is let in if the user's own setting allows all (`pickles_allowed`), or if its layout is in the registry:
    some models are published so. Raises PickleRefused, which says how to convert it and how to `switch` them on, and
    ModelFileError for files that cannot be used.
    """
    paths = check_model_files(files)
    use_registry_file()
    for group in group_files(paths):
        if is_pickle(group[0]) and not pickles_allowed and not find_configs(hash_model_file(group)):
            raise PickleRefused(f"{group[0]} is a pickle of no model that the registry knows, which workflows may not "
                                "load: it may hold more than weights. Convert it (python -m diffsynth_backend convert "
                                f"IN OUT.safetensors), or, if you know where it comes from, {switch}")
    return paths


def use_registry_file(path: str | None = None) -> None:
    """Append the rows of a user's registry file to MODEL_CONFIGS: those of `path`, or else of the file that the
    environment names, if it does. Raises RegistryFileError."""
    path = path or environment.text(REGISTRY_VARIABLE, "")
    if path:
        rows = read_registry_file(path, MODEL_CONFIGS, resolve)
        MODEL_CONFIGS.extend(row for row in rows if row not in MODEL_CONFIGS)


def _in_layout(paths: list[str], state_dict: Mapping[str, Any] | None) -> list[DetectedModel]:
    if rows := find_configs(_hash(paths, state_dict)):
        return [DetectedModel(row, tuple(paths), resolve(row.get("state_dict_converter"))) for row in rows]
    layout = read_layout(paths) if state_dict is None else state_dict
    found, unknown = [], []
    for prefix in prefixes_of(layout):
        plain = without_companions(part(layout, prefix))
        rows = find_configs(hash_state_dict(plain))
        remark = f"repackaged under {prefix!r}" if prefix else "repackaged with scales or markers"
        found += [DetectedModel(row, tuple(paths), Unpack(prefix, resolve(row.get("state_dict_converter"))), remark)
                  for row in rows]
        unknown += [] if rows else list(plain)
    if found and unknown:
        logger.warning("%s: %d tensors belong to no known model and are not used, %.100r first",
                       ", ".join(paths) or "the state dict", len(unknown), unknown[0])
    return found


def _hash(paths: list[str], state_dict: Mapping[str, Any] | None) -> str:
    return hash_model_file(paths) if state_dict is None else hash_state_dict(dict(state_dict))


def _take_for(model_name: str, paths: list[str], state_dict: Mapping[str, Any] | None) -> DetectedModel:
    names = list(dict.fromkeys(row["model_name"] for row in MODEL_CONFIGS))
    if model_name not in names:
        raise ModelFileError(f"no model of the registry is called {model_name!r}; choose one of "
                             f"{', '.join(names)}")
    compared = list(_compare_with_known(paths, state_dict, model_name))
    if not compared:
        raise ModelFileError(f"{', '.join(paths) or 'the state dict'} cannot be taken for {model_name}: it has none of "
                             "its tensors; choose another name or file")
    best = min(compared, key=lambda comparison: len(comparison.difference))
    if best.difference.unexpected:
        logger.warning("%s is taken for %s without what that model does not have: %s", ", ".join(paths), model_name,
                       LayoutDifference((), best.difference.unexpected, ()).describe())
    converter = Only(best.names, Unpack(best.prefix, resolve(best.row.get("state_dict_converter"))))
    return DetectedModel(best.row, tuple(paths), converter, f"taken for {model_name} by name")


# ---- unknown layouts ------------------------------------------------------------------------------------------------

def _unknown_layout(paths: list[str], state_dict: Mapping[str, Any] | None) -> str:
    """The message for weights whose hash is in no row."""
    problem = (f"unknown layout {_hash(paths, state_dict)}: {', '.join(paths) or 'the state dict'} is in no row of the "
               "model registry")
    layout = read_layout(paths) if state_dict is None else state_dict
    if any(isinstance(name, str) and LORA_NAME.search(name) for name in layout):
        return f"{problem}; it looks like a LoRA: give it to load_lora or to a LoRA node, beside the model it is for"
    nearest = nearest_known(paths, state_dict)
    if nearest is None:
        known = ", ".join(dict.fromkeys(row["model_name"] for row in MODEL_CONFIGS))
        return f"{problem}, and like none of the models there ({known}). To add a model, append a row to MODEL_CONFIGS"
    return (f"{problem}; nearest: {nearest}. Check that all files of one model are given, in its authors' layout; if "
            "the difference is meant, give the model's name (model_name)")


def nearest_known(paths: list[str], state_dict: Mapping[str, Any] | None = None) -> str | None:
    """The known model that weights are most like, and how they differ; None if they are like none."""
    near = [comparison for comparison in _compare_with_known(paths, state_dict) if comparison.is_near]
    if not near:
        return None
    nearest = min(near, key=lambda comparison: len(comparison.difference))
    return (f"{nearest.row['model_name']}, {len(nearest.difference)} of its {len(nearest.names)} keys differ: "
            f"{nearest.difference.describe(EXAMPLES)}")


@dataclass(frozen=True)
class _Comparison:
    """How weights, or those of them under a prefix, differ from the model of a row, which has `names`."""

    row: Mapping[str, Any]
    prefix: str
    names: frozenset[str]
    difference: LayoutDifference

    @property
    def is_near(self) -> bool:
        """Most keys agree, or they are a part of the model's."""
        foreign, size = len(self.difference.unexpected) + len(self.difference.wrong), len(self.names)
        return len(self.difference) < NEAR * size or (not foreign and len(self.difference.missing) < size)


def _compare_with_known(paths: list[str], state_dict: Mapping[str, Any] | None,
                        model_name: str | None = None) -> Iterator[_Comparison]:
    """With every row, or those of a name, and for each prefix that occurs."""
    layout = read_layout(paths) if state_dict is None else state_dict
    for row in MODEL_CONFIGS:
        if model_name in (None, row["model_name"]):
            for prefix in prefixes_of(layout):
                yield from _compare(row, prefix, paths, state_dict)


def _compare(row: Mapping[str, Any], prefix: str, paths: list[str],
             state_dict: Mapping[str, Any] | None) -> Iterator[_Comparison]:
    def converter(stored: dict[str, Any]) -> dict[str, Any]:
        return (resolve(row.get("state_dict_converter")) or dict)(without_companions(part(stored, prefix)))

    try:
        weights = DiskMap(paths, state_dict_converter=converter) if state_dict is None else converter(dict(state_dict))
        expected = _known_layout(row)
    except CANNOT_COMPARE as error:
        logger.debug("Not compared with %s: %r", row["model_name"], error)
    else:
        yield _Comparison(row, prefix, frozenset(expected), compare_layout(expected, weights))


def _known_layout(row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors, on meta, of the model of a row; kept, since a list of files may be compared many times."""
    key = (row["model_class"], repr(row.get("extra_kwargs")))
    if key not in _known_layouts:
        _known_layouts[key] = layout_of(build_on_meta(resolve(row["model_class"]), row.get("extra_kwargs")))
    return _known_layouts[key]


_known_layouts: dict[tuple[Any, str], dict[str, torch.Tensor]] = {}
