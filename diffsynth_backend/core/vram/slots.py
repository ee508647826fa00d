"""A layer's tensors one by one: which there are, what dtype each is kept in, and how they are put into a module.

Notable: buffers are never freed or narrowed. They move with their layer; persistent ones (they come from the file) have
the computation dtype, the others keep the precision in which the constructor computed them (a rotary embedding's
frequencies are useless in bfloat16). Integers and complex numbers are moved and never cast.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..loader.file import place
from .placement import Placement


@dataclass(frozen=True)
class Slot:
    """A parameter or buffer: `attribute` of the submodule at `path` of its layer, called `name` in the whole model."""

    path: str
    attribute: str
    name: str
    is_buffer: bool
    shape: torch.Size
    fixed_dtype: torch.dtype | None  # None: stored as the placement says

    @property
    def table(self) -> str:
        """The module's dict that holds it."""
        return "_buffers" if self.is_buffer else "_parameters"

    def place(self, tensor: Tensor, placement: Placement) -> Tensor:
        """The tensor at the placement, itself if it is there already."""
        return place(tensor, placement.device, self.fixed_dtype or placement.dtype)

    def nbytes(self, placement: Placement) -> int:
        return 0 if placement.on_disk else self.shape.numel() * (self.fixed_dtype or placement.dtype).itemsize


def collect_slots(module: nn.Module, name: str, computation_dtype: torch.dtype, recurse: bool) -> tuple[Slot, ...]:
    """The tensors of a layer called `name` in its model, with or without those of the modules below it."""
    owners = module.named_modules() if recurse else [("", module)]
    return tuple(slot for path, owner in owners for slot in _own_slots(owner, path, name, computation_dtype))


def _own_slots(module: nn.Module, path: str, layer_name: str, computation_dtype: torch.dtype) -> list[Slot]:
    slots = []
    for is_buffer, table in ((False, module._parameters), (True, module._buffers)):
        for attribute, tensor in table.items():
            if tensor is not None:
                name = ".".join(part for part in (layer_name, path, attribute) if part)
                fixed = _fixed_dtype(module, attribute, tensor, computation_dtype)
                slots.append(Slot(path, attribute, name, is_buffer, tensor.shape, fixed))
    return slots


def _fixed_dtype(module: nn.Module, attribute: str, tensor: Tensor,
                 computation_dtype: torch.dtype) -> torch.dtype | None:
    if not tensor.is_floating_point() or attribute in module._non_persistent_buffers_set:
        return tensor.dtype
    return computation_dtype if attribute in module._buffers else None


def read_slot(module: nn.Module, slot: Slot) -> Tensor:
    """What the layer `module` holds there."""
    return getattr(module.get_submodule(slot.path), slot.table)[slot.attribute]


def write_slot(module: nn.Module, slot: Slot, tensor: Tensor | None, computation_dtype: torch.dtype) -> None:
    """Put a tensor there. None (it is on disk) leaves a meta tensor, of the dtype that a computation would see."""
    if tensor is None:
        tensor = torch.empty(slot.shape, dtype=slot.fixed_dtype or computation_dtype, device="meta")
    if not slot.is_buffer:
        tensor = nn.Parameter(tensor, requires_grad=False)
    getattr(module.get_submodule(slot.path), slot.table)[slot.attribute] = tensor


def stand_in(module: nn.Module, cls: type[nn.Module], recurse: bool, slots: Sequence[Slot],
             tensors: Sequence[Tensor]) -> nn.Module:
    """A clone of `module`, of class `cls`, that holds `tensors` in `slots` and shares everything else with it.

    With `recurse` the modules below are cloned, too; otherwise the clone refers to the same children. It costs a few
    dict copies and no tensor, so it can be made for every call, and the module itself need not be changed and restored.
    """
    clones = {"": _shallow_clone(module, cls)}
    if recurse:
        _clone_children(module, "", clones)
    for slot, tensor in zip(slots, tensors, strict=True):
        getattr(clones[slot.path], slot.table)[slot.attribute] = tensor
    return clones[""]


def _shallow_clone(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    clone = cls.__new__(cls)
    clone.__dict__.update(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        clone.__dict__[table] = module.__dict__[table].copy()
    return clone


def _clone_children(module: nn.Module, path: str, clones: dict[str, nn.Module]) -> None:
    for name, child in module._modules.items():
        if child is not None:
            child_path = f"{path}.{name}" if path else name
            clones[child_path] = clones[path]._modules[name] = _shallow_clone(child, type(child))
            _clone_children(child, child_path, clones)
