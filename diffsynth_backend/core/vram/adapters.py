"""Additions to linear layers: what an adapter such as a LoRA adds to a layer's output, at the moment it computes.

Notable:

* A layer with additions has a class in front of its own, as managed layers have; without them it is what it was, so it
  costs nothing.
* An addition's tensors are buffers of the layer that no state dict shows. Where the layer is managed they are part of
  its weights: they rest in RAM, stay on the device or pass through the stream with it, and count against the limit.
  They have the dtype of the computation wherever they are; a storage dtype like fp8 never touches them.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ManagedLayer, derived_class, long_lived
from .management import CPU
from .placement import OFFLOAD
from .slots import Slot

BUFFER = "addition_{}"


class Addition(Protocol):
    """Something that a layer's output is increased by. `tensors` (floating point) are what it computes with."""

    @property
    def tensors(self) -> Sequence[Tensor]: ...

    def add(self, y: Tensor, x: Tensor, weight: Tensor, tensors: Sequence[Tensor]) -> None:
        """Increase `y` (…, out), in place. `x` (…, in), the layer's `weight` (out, in), and its own `tensors` again, on
        their device and in their dtype."""


class _AdaptedLinear(nn.Linear):
    """In front of a linear layer's class while it has additions."""

    _additions: tuple[Addition, ...]
    _addition_buffers: tuple[str, ...]  # the names of their tensors, one after the other

    def forward(self, x: Tensor) -> Tensor:
        own = (self.weight,) if self.bias is None else (self.weight, self.bias)
        return self._computed(x, (*own, *(self._buffers[name] for name in self._addition_buffers)))

    def _computed(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """`weights`: weight, bias if there is one, and the tensors of all additions one after the other."""
        weight, bias = weights[0], None if self.bias is None else weights[1]
        y, start = F.linear(x, weight, bias), 1 if bias is None else 2
        for addition in self._additions:
            end = start + len(addition.tensors)
            addition.add(y, x, weight, weights[start:end])
            start = end
        return y


class _AdaptedManagedLinear(_AdaptedLinear):
    """The same for a managed layer, whose tensors come from where it gets its weights."""

    def forward(self, x: Tensor) -> Tensor:
        with self.weights_for_computation() as weights:
            return self._computed(x, weights)


@cache
def _adapted_class(cls: type[nn.Linear]) -> type[_AdaptedLinear]:
    front = _AdaptedManagedLinear if issubclass(cls, ManagedLayer) else _AdaptedLinear
    return derived_class(cls, (front, cls), {"_without_additions": cls})


# ---- models ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Place:
    """A linear layer, and the managed layer that has its weights (itself or one above), where it is at `path`."""

    linear: nn.Linear
    home: ManagedLayer | None
    path: str = ""


class LinearLayers(Mapping[str, nn.Linear]):
    """The linear layers of a model that can have additions, by name: all that compute as torch.nn.Linear does."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        self._places = {name: _place(name, module, modules) for name, module in modules.items()
                        if _computes_as_linear(module)}

    def __getitem__(self, name: str) -> nn.Linear:
        return self._places[name].linear

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def weight(self, name: str) -> Tensor:
        """The weight (out, in) as the layer computes with it, where it does: a copy if it rests elsewhere."""
        place = self._places[name]
        if place.home is None:
            return place.linear.weight.detach()
        managed = place.home.management
        index = next(i for i, slot in enumerate(managed.slots) if (slot.path, slot.attribute) == (place.path, "weight"))
        slot, tensor = managed.slots[index], managed.stored[index]
        stored = managed.source[slot.name] if tensor is None else tensor
        return slot.place(stored.detach(), managed.placements.computation)

    def put(self, additions: Mapping[str, Sequence[Addition]]) -> None:
        """Give each named layer these additions, in their order, instead of those that it has.

        Raises RuntimeError, and changes nothing, where a managed layer is in use; ValueError for additions that a limit
        has no room for.
        """
        with long_lived():
            by_home: dict[int, list[str]] = {}
            for name in additions:
                by_home.setdefault(id(self._places[name].home), []).append(name)
            _check_idle(self._places[name].home for name in additions)
            for names in by_home.values():
                self._put_together({name: tuple(additions[name]) for name in names})

    def _put_together(self, additions: Mapping[str, tuple[Addition, ...]]) -> None:
        """For layers of one home."""
        places = [self._places[name] for name in additions]
        prepared = [_tensors_at_rest(place, added) for place, added in zip(places, additions.values())]
        home = places[0].home
        if home is not None:
            slots = [slot for place, name, tensors in zip(places, additions, prepared)
                     for slot in _slots(place.path, name, tensors)]
            home.carry({place.path for place in places}, slots, [tensor for tensors in prepared for tensor in tensors])
        for place, added, tensors in zip(places, additions.values(), prepared):
            _install(place.linear, added, tensors)


def _place(name: str, linear: nn.Linear, modules: Mapping[str, nn.Module]) -> _Place:
    above, path = name, ""
    while True:
        home = modules.get(above)
        if isinstance(home, ManagedLayer) and (home.recurse or above == name):
            return _Place(linear, home, path)
        if not above:
            return _Place(linear, None)
        above, _, last = above.rpartition(".")
        path = f"{last}.{path}" if path else last


def _computes_as_linear(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    cls = getattr(type(module), "_without_additions", type(module))
    return getattr(cls, "_unmanaged_class", cls).forward is nn.Linear.forward


def _check_idle(homes: Iterator[ManagedLayer | None]) -> None:
    if any(home is not None and home.state != OFFLOAD for home in homes):
        raise RuntimeError("adapters cannot be changed while their model is in use: offload it first")


def _tensors_at_rest(place: _Place, additions: Sequence[Addition]) -> list[Tensor]:
    """Copies of the additions' tensors, where and as the layer's own tensors rest while it computes nothing."""
    if place.home is None:
        device, dtype = place.linear.weight.device, place.linear.weight.dtype
    else:
        placements = place.home.management.placements
        device, dtype = placements.states[OFFLOAD].device or CPU, placements.computation.dtype
    return [tensor.to(device, dtype, copy=True).contiguous() for addition in additions for tensor in addition.tensors]


def _slots(path: str, name: str, tensors: Sequence[Tensor]) -> list[Slot]:
    return [Slot(path, BUFFER.format(index), f"{name}.{BUFFER.format(index)}", True, tensor.shape, tensor.dtype)
            for index, tensor in enumerate(tensors)]


def _install(linear: nn.Linear, additions: tuple[Addition, ...], tensors: Sequence[Tensor]) -> None:
    for name in vars(linear).pop("_addition_buffers", ()):
        del linear._buffers[name]
        linear._non_persistent_buffers_set.discard(name)
    vars(linear).pop("_additions", None)
    plain = getattr(type(linear), "_without_additions", type(linear))
    linear.__class__ = _adapted_class(plain) if additions else plain
    if additions:
        linear._additions = additions
        linear._addition_buffers = tuple(BUFFER.format(index) for index in range(len(tensors)))
        for name, tensor in zip(linear._addition_buffers, tensors):
            linear.register_buffer(name, tensor, persistent=False)
