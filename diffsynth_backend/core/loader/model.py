"""Build a model of a given class and fill it from files, straight to a device or under VRAM management.

Notable: the files are checked against the model before any weight is read, also when weights stay on disk, so a wrong
file is one clear error here and never a surprise in the middle of a run. Converters see the tensors as they are stored;
the cast to the wanted dtype comes after them, whichever way the weights take.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..device import parse_device
from ..vram.disk_map import DiskMap
from ..vram.initialization import skip_model_initialization
from ..vram.layers import ManagedLayer, ModuleKey, enable_vram_management
from ..vram.placement import OFFLOAD, Placement, Placements, ResidencyBudget, is_managed_config
from ..vram.slots import collect_slots, read_slot, write_slot
from .file import ModelFileError, ModelFiles, load_state_dict
from .watch import watched

LISTED = 5  # names of each kind in an error

StateDictConverter = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class LayoutDifference:
    """What keeps a state dict from fitting a model: names, those of `wrong` with what was expected and found."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.wrong)

    def describe(self, listed: int = LISTED) -> str:
        """The kinds that occur, each with its number and its first `listed` names."""
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of wrong shape or type": self.wrong}
        return "; ".join(f"{len(names)} {kind}: {', '.join(map(_shown, names[:listed]))}"
                         f"{', …' if len(names) > listed else ''}" for kind, names in kinds.items() if names)


def _shown(name: str) -> str:
    """A name of a stranger's file, fit for one line of a terminal."""
    return f"{name if name.isprintable() else repr(name):.200}"


def layout_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state dict (which may be on meta) by name."""
    return {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def compare_layout(expected: Mapping[str, Tensor], weights: Mapping[str, Any]) -> LayoutDifference:
    """Compare a model's layout with tensors, or a DiskMap, by name, shape and kind of dtype."""
    wrong = [f"{name} (expected {_outline(tensor.shape, tensor.dtype)}, found {_outline(*_layout_of(weights, name))})"
             for name, tensor in expected.items() if name in weights and not _fits(tensor, *_layout_of(weights, name))]
    return LayoutDifference(tuple(name for name in expected if name not in weights),
                            tuple(name for name in weights if name not in expected), tuple(wrong))


def _layout_of(weights: Mapping[str, Any], name: str) -> tuple[tuple[int, ...] | None, torch.dtype | None]:
    if isinstance(weights, DiskMap):
        return tuple(weights.shape(name)), weights.dtype(name)
    value = weights[name]
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (None, None)


def _fits(tensor: Tensor, shape: tuple[int, ...] | None, dtype: torch.dtype | None) -> bool:
    return tuple(tensor.shape) == shape and tensor.is_floating_point() == dtype.is_floating_point


def _outline(shape: tuple[int, ...] | None, dtype: torch.dtype | None) -> str:
    return "no tensor" if shape is None else f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def build_on_meta(model_class: Callable[..., nn.Module], config: Mapping[str, Any] | None = None) -> nn.Module:
    """A model with real buffers and parameters that have a shape and no storage."""
    with torch.inference_mode(False), skip_model_initialization():
        return model_class(**(config or {}))


def load_model(model_class: Callable[..., nn.Module], path: ModelFiles | None, config: Mapping[str, Any] | None = None,
               torch_dtype: torch.dtype | None = torch.bfloat16, device: str | torch.device = "cpu",
               state_dict_converter: StateDictConverter | None = None, use_disk_map: bool = False,
               module_map: Mapping[ModuleKey, type[ManagedLayer]] | None = None,
               vram_config: Mapping[str, Any] | None = None, vram_limit: float | ResidencyBudget | None = None,
               state_dict: Mapping[str, Any] | None = None) -> nn.Module:
    """A model in inference mode (`eval`, no gradients), filled from one or several files.

    `config` are the class's arguments. `state_dict_converter` turns the files' state dict into the model's.
    Without management the weights are on `device` in `torch_dtype` (None: the files' own). With a `vram_config` whose
    offload dtype and device are set, layers are managed as `module_map` says (see `enable_vram_management`), start in
    the offload state, and `vram_limit` (GiB) bounds what stays on the computation device; `torch_dtype` and `device`
    then have no part in it. `use_disk_map` reads tensor by tensor instead of mapping the files; weights that stay on
    disk are always read so. `state_dict` takes the place of the files' content.
    Raises ModelFileError if files and model do not fit, ValueError for settings that contradict each other, and what
    `enable_vram_management` raises.
    """
    managed = is_managed_config(vram_config)
    _check_settings(managed, module_map, vram_config, vram_limit)
    with torch.inference_mode(False):
        model = build_on_meta(model_class, config)
        on_disk = managed and Placements.from_config(vram_config).states[OFFLOAD].on_disk
        weights = _open_weights(path, state_dict, state_dict_converter, use_disk_map, on_disk)
        _check_fit(model, weights, path)
        weights = watched(weights, path, state_dict_converter, on_disk)
        if managed:
            enable_vram_management(model, module_map, vram_config, vram_limit, weights)
        else:
            _fill(model, weights, Placement(torch_dtype, parse_device(device)))
    return model.eval().requires_grad_(False)


def _check_settings(managed: bool, module_map: Mapping | None, vram_config: Mapping | None,
                    vram_limit: float | ResidencyBudget | None) -> None:
    if module_map is not None and vram_config is None:
        raise ValueError("module_map is given without vram_config, which says where the layers' weights are kept: "
                         "give both or none")
    if vram_limit is not None and not managed:
        raise ValueError("vram_limit is given, but nothing is managed: set offload_dtype and offload_device in "
                         "vram_config")


def _open_weights(path: ModelFiles | None, state_dict: Mapping[str, Any] | None, converter: StateDictConverter | None,
                  use_disk_map: bool, on_disk: bool) -> Mapping[str, Any]:
    """Name -> tensor as the model names them, nothing read or cast yet if it comes from files."""
    if state_dict is None and (use_disk_map or on_disk):
        return DiskMap(path, state_dict_converter=converter)
    if on_disk or (use_disk_map and state_dict is not None):
        raise ValueError("weights given as a state dict cannot be kept on or read from disk: give an offload_dtype and "
                         "an offload_device, or the path of the files instead")
    weights = load_state_dict(path) if state_dict is None else dict(state_dict)
    return converter(weights) if converter else weights


def _check_fit(model: nn.Module, weights: Mapping[str, Any], path: ModelFiles | None) -> None:
    difference = compare_layout(layout_of(model), weights)
    if difference:
        raise ModelFileError(f"{_named(path)} does not fit {type(model).__name__}: {difference.describe()}. Check that "
                             "all files of one model are given, and that its configuration and converter are right")
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in weights]
    if lost:
        raise ModelFileError(f"{type(model).__name__} computes buffers from parameters in its constructor, when those "
                             f"have no values: {', '.join(lost[:LISTED])}. Compute them from constants, or in forward")


def _named(path: ModelFiles | None) -> str:
    if path is None:
        return "the state dict"
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    return str(paths[0]) + (f" (with {len(paths) - 1} more files)" if len(paths) > 1 else "")


def _fill(model: nn.Module, weights: Mapping[str, Any], placement: Placement) -> None:
    """Put the weights into the model; buffers that no file brings keep their value and dtype and are moved."""
    for slot in collect_slots(model, "", placement.dtype, recurse=True):
        tensor = weights[slot.name] if slot.name in weights else read_slot(model, slot)
        write_slot(model, slot, slot.place(tensor, placement), placement.dtype)
