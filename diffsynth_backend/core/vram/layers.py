"""VRAM management: layers that know where their weights rest and how they reach the computation.

A managed layer is in one of three states, each with a dtype and a device of its own ("disk" keeps nothing in memory):

  0 offload     its model is not in use
  1 onload      its model is in use: `onload_model` … `offload_model`
  2 preparing   promoted on its first call, while the budget admits it; it stays until its model is offloaded

Computation is a fourth placement but never a state: a layer whose weights are not in that form already computes with
copies that live for one call. They come from the state that the layer is in. (So where preparing has a narrower dtype
than onload, values depend on which layers the limit lets in.)

Notable:

* A layer is not replaced. Its class becomes a subclass with the wrapper in front, as in torch's `parametrize`, so state
  dict keys, attributes, `isinstance` and references held elsewhere stay what they were.
* Weights are read-only: the offload copy is kept, leaving the device means dropping the copy there, and nothing is ever
  copied back.
* Copies for one call are put into a stand-in (`slots.stand_in`), never into the layer. A failing forward leaves nothing
  to undo, and several threads may run one model at once; `onload_model` and `offload_model` are for moments when none
  does. An attribute that such a forward sets on `self` is gone after the call.
* `ManagedLayer.weights_for_computation` is the one place where a layer obtains its weights.
"""
from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import GIB, empty_cache
from ..lookup import find_object
from .management import CPU, Management, Weights
from .placement import OFFLOAD, ONLOAD, PREPARING, Placement, Placements, ResidencyBudget
from .slots import Slot, collect_slots, read_slot, stand_in, write_slot

logger = logging.getLogger(__name__)

# A key of a module map: a class, its dotted name, or names under which versions of a library know it.
ModuleKey = type | str | tuple[str, ...]


@contextmanager
def long_lived() -> Iterator[None]:
    """Tensors made inside outlive the call: no inference tensors (the host may call us in that mode), no graph."""
    with torch.inference_mode(False), torch.no_grad():
        yield


# ---- layers ---------------------------------------------------------------------------------------------------------

class ManagedLayer(nn.Module):
    """Base of the wrappers. `enable_vram_management` turns layers into these; they are not built by themselves."""

    recurse = True  # the wrapper takes the modules below the layer with it
    _managed: Management

    @property
    def management(self) -> Management:
        """What it knows of its weights: for those who plan where they are."""
        return self._managed

    @property
    def state(self) -> int:
        """0 offload, 1 onload, 2 preparing."""
        return self._managed.state

    def offload(self) -> None:
        """Return to the offload placement; the copy of any other state is dropped."""
        managed = self._managed
        with managed.lock, long_lived():
            if managed.state != OFFLOAD:
                managed.budget.release(managed.costs[managed.state])
                self._enter(OFFLOAD, managed.stored)

    def onload(self) -> None:
        """Go from offload to the onload placement. Raises RuntimeError if that would exceed the limit."""
        managed = self._managed
        with managed.lock, long_lived():
            if managed.state == OFFLOAD and not self._advance(ONLOAD):
                raise RuntimeError(f"vram_limit is {managed.budget.limit_bytes / GIB:.2f} GiB, of which "
                                   f"{managed.budget.used_bytes / GIB:.2f} GiB are in use: no room to onload "
                                   f"{managed.slots[0].name}. Offload other models first, raise vram_limit, or set "
                                   "onload_device to 'cpu'")

    def carry(self, paths: AbstractSet[str], slots: Sequence[Slot], tensors: Sequence[Tensor]) -> None:
        """Have further tensors move along with the layer's own: those of the submodules at `paths`, instead of what
        was carried for these.

        They count like its own. In the offload state only: raises RuntimeError in others, and ValueError where that
        state is on the computation device and the limit has no room.
        """
        managed = self._managed
        with managed.lock, long_lived():
            if managed.state != OFFLOAD:
                raise RuntimeError(f"{managed.name} is in use: offload its model before its adapters change")
            managed.carry(paths, slots, tensors)
            self._enter(OFFLOAD, managed.stored)

    def weights_for_computation(self) -> AbstractContextManager[Weights]:
        """The layer's tensors in the order of its slots, on the computation device and in its dtype, for a `with`.

        The tuple that the layer holds, if that is in this form; else what the stream brings, or copies.
        """
        managed = self._managed
        if managed.state == ONLOAD and managed.stays and managed.budget.limit_bytes != 0:
            self._try_to_prepare()
        if managed.ready:
            return nullcontext(managed.current)
        if managed.stream is not None and managed.state == ONLOAD and not torch.is_grad_enabled():
            lease = managed.stream.borrow(managed)
            if lease is not None:
                return lease
        return nullcontext(managed.fetch(managed.current, managed.placements.computation))

    def _try_to_prepare(self) -> None:
        managed = self._managed
        if not managed.placements.states[PREPARING].on_disk and managed.budget.admits(managed.reservations[PREPARING]):
            with managed.lock, long_lived():
                # another thread may have been faster
                if managed.state == ONLOAD and self._advance(PREPARING) and managed.stream is not None:
                    managed.stream.pass_by(managed)

    def _advance(self, state: int) -> bool:
        """Make the copy of the next state and enter it, if the budget admits that."""
        managed = self._managed
        reserved = managed.reservations[state]
        if reserved and not managed.budget.reserve(reserved):
            return False
        try:
            weights = managed.fetch(managed.current, managed.placements.states[state])
        except BaseException:  # an interrupt, too, must not leave bytes counted that nobody holds
            managed.budget.release(reserved)
            raise
        previous = managed.state
        self._enter(state, weights)
        managed.budget.release(managed.costs[previous] + reserved - managed.costs[state])
        return True

    def _enter(self, state: int, weights: Weights) -> None:
        managed = self._managed
        managed.ready = False  # until all is in place, other threads compute with copies for their call
        for slot, tensor in zip(managed.slots, weights):
            write_slot(self, slot, tensor, managed.placements.computation.dtype)
        managed.current, managed.state, managed._transfer = weights, state, None
        managed.ready = managed.placements.states[state] == managed.placements.computation


class AutoWrappedModule(ManagedLayer):
    """Manages any module, with all that is below it, as one layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.weights_for_computation() as weights:
            if weights is self._managed.current:
                return super().forward(*args, **kwargs)
            result = stand_in(self, self._unmanaged_class, self.recurse, self._managed.slots, weights
                              ).forward(*args, **kwargs)
            return _apart_from(weights, result)


class AutoWrappedNonRecurseModule(AutoWrappedModule):
    """Manages the parameters that a block owns itself; the modules below it are managed on their own."""

    recurse = False


class AutoWrappedLinear(ManagedLayer, nn.Linear):
    """Manages a linear layer: weight (out, in), bias (out,) or none."""

    def forward(self, x: Tensor) -> Tensor:
        if self._managed.ready:
            return F.linear(x, *self._managed.current)
        with self.weights_for_computation() as weights:
            return F.linear(x, *weights)


def _apart_from(weights: Weights, result: Any) -> Any:
    """The result of a layer, copied where it is a part of weights whose memory is about to be used for others."""
    if isinstance(result, Tensor):
        is_part = any(result.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() for weight in weights)
        return result.clone() if is_part and result.numel() else result
    if type(result) in (tuple, list):
        return type(result)(_apart_from(weights, part) for part in result)
    if isinstance(result, dict):  # of transformers' outputs, too, which are dicts whose class has to stay
        changed = {key: _apart_from(weights, value) for key, value in result.items()}
        for key, value in changed.items():
            if value is not result[key]:
                result[key] = value
    return result


# Modules of transformers read `dtype` and `device` off their first parameter and cast their inputs to them. Managed,
# that parameter may be in fp8 or on disk, and what callers mean is the computation.
_REPORTED = {"dtype": property(lambda module: module._computation.dtype),
             "device": property(lambda module: module._computation.device)}


@cache
def _managed_class(wrapper: type[ManagedLayer], cls: type[nn.Module]) -> type[ManagedLayer]:
    """`cls` with the wrapper in front."""
    return derived_class(cls, (wrapper, cls), {"_unmanaged_class": cls})


@cache
def _reporting_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with those of its properties replaced that `_REPORTED` has; `cls` itself if there are none."""
    reported = {name: own for name, own in _REPORTED.items() if isinstance(getattr(cls, name, None), property)}
    return derived_class(cls, (cls,), reported) if reported else cls


def derived_class(cls: type[nn.Module], bases: tuple[type, ...], attributes: dict[str, Any]) -> type[Any]:
    """A class that goes by the name of `cls`: some libraries look classes up by name."""
    return type(cls.__name__, bases, {"__module__": cls.__module__, "__qualname__": cls.__qualname__, **attributes})


# ---- models ---------------------------------------------------------------------------------------------------------

def iter_managed(model: nn.Module) -> Iterator[ManagedLayer]:
    """The managed layers of a model, none if it is not managed."""
    return (module for module in model.modules() if isinstance(module, ManagedLayer))


def onload_model(model: nn.Module) -> None:
    """Bring a model's layers to the onload state. A failure or interrupt on the way leaves the model offloaded.

    Raises RuntimeError when the limit forbids what the onload state keeps on the computation device.
    """
    try:
        for layer in iter_managed(model):
            layer.onload()
    except BaseException:
        offload_model(model)
        raise


def offload_model(model: nn.Module) -> None:
    """Return a model's layers to the offload state and the memory to the driver. Nothing happens if they are there."""
    in_use = [layer for layer in iter_managed(model) if layer.state != OFFLOAD]
    for stream in {layer._managed.stream for layer in in_use} - {None}:
        stream.close()
    for layer in in_use:
        layer.offload()
    if in_use:
        empty_cache(in_use[0]._managed.placements.computation.device)


def enable_vram_management(model: nn.Module, module_map: Mapping[ModuleKey, type[ManagedLayer]] | None,
                           vram_config: Mapping[str, Any], vram_limit: float | ResidencyBudget | None = None,
                           disk_map: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Manage the layers of `model` (in place, also returned), which start in the offload state.

    `module_map` says which wrapper takes which class of module; the most specific class wins. Without a map, or with
    one that names the model's own class, the whole model is one layer that is moved to the computation device when it
    is onloaded. Parameters of modules outside the map are kept on the computation device in the computation dtype.
    `vram_config` has the fields of `Placements.from_config`. `vram_limit` (GiB) bounds what stays on the computation
    device; models that share a limit share one `ResidencyBudget`. `disk_map` gives tensors by their names in the model,
    also those of states in memory; what it lacks is taken from the model.
    Raises ValueError for a configuration that cannot be honoured and for weights that nobody has, TypeError for a map
    that does not fit, ImportError for a class name that does not exist.
    """
    budget = vram_limit if isinstance(vram_limit, ResidencyBudget) else ResidencyBudget.from_gib(vram_limit)
    parts, placements = _divide(model, module_map, vram_config)
    _check_sources(model, parts, placements, disk_map)
    _check_floor(model, parts, placements, budget)
    with long_lived():
        for part in parts:
            _take_over(part, placements, budget, disk_map)
    model.vram_management_enabled = True
    return model


def outline_vram_management(model: nn.Module, module_map: Mapping[ModuleKey, type[ManagedLayer]] | None,
                            vram_config: Mapping[str, Any], budget: ResidencyBudget,
                            disk_map: Mapping[str, Tensor]) -> nn.Module:
    """Manage a model on meta (in place, also returned) to plan with: it has sizes and no weights, and cannot be used.

    A plan for it is the plan for what `enable_vram_management` makes of the same arguments, and costs no memory.
    `disk_map` is only asked what is stored. Raises as that does.
    """
    parts, placements = _divide(model, module_map, vram_config)
    _check_floor(model, parts, placements, budget)
    for part in parts:
        if part.wrapper is not None and part.slots:
            _manage(part, placements, budget, disk_map, (None,) * len(part.slots))
        elif placements.computation.device.type != "cpu":
            budget.charge(sum(slot.nbytes(placements.computation) for slot in part.slots))
    return model


def _divide(model: nn.Module, module_map: Mapping[ModuleKey, type[ManagedLayer]] | None,
            vram_config: Mapping[str, Any]) -> tuple[list[_Part], Placements]:
    """The model in parts, and where each state keeps them."""
    if any(True for _ in iter_managed(model)):
        raise ValueError(f"{type(model).__name__} is managed already: load it again for other settings")
    placements = Placements.from_config(vram_config)
    wrappers = resolve_module_map(module_map or {})
    if not wrappers or _wrapper_of(model, wrappers):
        logger.info("%s has no map of its layers: it is moved as one block", type(model).__name__)
        wrappers, placements = {type(model): AutoWrappedModule}, placements.as_one_block()
    return [_Part(module, wrapper, collect_slots(module, name, placements.computation.dtype, _recurses(wrapper)))
            for name, module, wrapper in _walk(model, wrappers)], placements


@dataclass(frozen=True)
class _Part:
    """Modules are divided into these: a layer with its wrapper, or a module outside the map (None)."""

    module: nn.Module
    wrapper: type[ManagedLayer] | None
    slots: tuple[Slot, ...]


def _recurses(wrapper: type[ManagedLayer] | None) -> bool:
    return wrapper is not None and wrapper.recurse


def _walk(model: nn.Module, wrappers: Mapping[type, type[ManagedLayer]]
          ) -> Iterator[tuple[str, nn.Module, type[ManagedLayer] | None]]:
    """Name, module and wrapper of everything that is not below a layer that takes its children with it."""
    pending, seen = [("", model)], set()
    while pending:
        name, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        wrapper = _wrapper_of(module, wrappers)
        yield name, module, wrapper
        if not _recurses(wrapper):
            pending += [(f"{name}.{child_name}" if name else child_name, child)
                        for child_name, child in module.named_children()]


def _wrapper_of(module: nn.Module, wrappers: Mapping[type, type[ManagedLayer]]) -> type[ManagedLayer] | None:
    return next((wrappers[cls] for cls in type(module).__mro__ if cls in wrappers), None)


def resolve_module_map(module_map: Mapping[ModuleKey, type[ManagedLayer]]) -> dict[type, type[ManagedLayer]]:
    """The map with classes as keys. A dotted name is imported; of a tuple of names, all that exist are meant.

    Raises ImportError if none of a key's names exists, TypeError for a value that is not a wrapper.
    """
    resolved = {}
    for key, wrapper in module_map.items():
        if not (isinstance(wrapper, type) and issubclass(wrapper, ManagedLayer)):
            raise TypeError(f"module map: {key!r} is mapped to {wrapper!r}; expected AutoWrappedLinear, "
                            "AutoWrappedModule or AutoWrappedNonRecurseModule")
        names = (key,) if isinstance(key, str | type) else key
        found = (find_object(name) if isinstance(name, str) else name for name in names)
        classes = [cls for cls in found if cls is not None]
        if not classes:
            raise ImportError(f"module map: no class {' or '.join(names)} in the installed version of "
                              f"{names[0].partition('.')[0]}; add the name that it has there to the map")
        resolved.update(dict.fromkeys(classes, wrapper))
    return resolved


def _check_sources(model: nn.Module, parts: Iterable[_Part], placements: Placements,
                   disk_map: Mapping[str, Tensor] | None) -> None:
    """Raises ValueError unless everything that will be read can be."""
    needed = [slot.name for part in parts for slot in part.slots
              if read_slot(part.module, slot).is_meta or _starts_on_disk(part, slot, placements)]
    missing = [name for name in needed if disk_map is None or name not in disk_map]
    if missing:
        raise ValueError(f"{type(model).__name__}: {len(missing)} of {len(needed)} tensors have no weights to start "
                         f"from, among them {', '.join(missing[:5])}: load the model first, or give a disk_map")


def _starts_on_disk(part: _Part, slot: Slot, placements: Placements) -> bool:
    return part.wrapper is not None and not slot.is_buffer and placements.states[OFFLOAD].on_disk


def _check_floor(model: nn.Module, parts: Iterable[_Part], placements: Placements, budget: ResidencyBudget) -> None:
    """Raises ValueError if the configuration keeps more on the accelerator than the limit allows."""
    slots = [slot for part in parts if part.wrapper for slot in part.slots]
    kept = [state for state in (OFFLOAD, ONLOAD) if placements.counts(state)]
    if kept == [OFFLOAD, ONLOAD] and placements.shares_offload_copy(ONLOAD):
        kept = [OFFLOAD]
    floor = sum(slot.nbytes(placements.states[state]) for state in kept for slot in slots)
    if budget.limit_bytes is not None and floor > budget.limit_bytes:
        raise ValueError(f"vram_limit is {budget.limit_bytes / GIB:.2f} GiB, but {type(model).__name__} in use keeps "
                         f"{floor / GIB:.2f} GiB on {placements.computation.device}: raise vram_limit, or let layers "
                         "move one by one (offload_device and onload_device 'cpu' or 'disk', and a map of its layers)")


def _take_over(part: _Part, placements: Placements, budget: ResidencyBudget,
               disk_map: Mapping[str, Tensor] | None) -> None:
    if part.wrapper is not None and part.slots:
        _wrap(part, placements, budget, disk_map)
    elif part.slots:
        _keep_resident(part, placements, budget, disk_map)
    if part.wrapper is None and _reporting_class(type(part.module)) is not type(part.module):
        part.module.__class__ = _reporting_class(type(part.module))
        part.module._computation = placements.computation


def _wrap(part: _Part, placements: Placements, budget: ResidencyBudget, disk_map: Mapping[str, Tensor] | None) -> None:
    """Turn the module into a managed layer, in the offload state."""
    offload = placements.states[OFFLOAD]
    rest = Placement(placements.computation.dtype, CPU) if offload.on_disk else offload
    stored = tuple(None if _starts_on_disk(part, slot, placements) else _initial(part.module, slot, rest, disk_map)
                   for slot in part.slots)
    _manage(part, placements, budget, disk_map, stored)
    part.module._enter(OFFLOAD, stored)


def _manage(part: _Part, placements: Placements, budget: ResidencyBudget, disk_map: Mapping[str, Tensor] | None,
            stored: Weights) -> None:
    module, cls, offload = part.module, type(part.module), placements.states[OFFLOAD]
    if issubclass(part.wrapper, AutoWrappedLinear) and not _is_plain_linear(cls, part.slots):
        raise TypeError(f"{part.slots[0].name}: {cls.__name__} computes something else than torch.nn.Linear; map it to "
                        "AutoWrappedModule")
    module._managed = Management(part.slots, placements, budget, disk_map if offload.on_disk else None, stored,
                                 nested=not part.wrapper.recurse)
    module.__class__ = _managed_class(part.wrapper, cls)
    if placements.counts(OFFLOAD):
        budget.charge(sum(slot.nbytes(offload) for slot in part.slots))


def _is_plain_linear(cls: type[nn.Module], slots: Iterable[Slot]) -> bool:
    return (issubclass(cls, nn.Linear) and cls.forward is nn.Linear.forward
            and [slot.attribute for slot in slots] in (["weight"], ["weight", "bias"]))


def _keep_resident(part: _Part, placements: Placements, budget: ResidencyBudget,
                   disk_map: Mapping[str, Tensor] | None) -> None:
    """Tensors outside every layer: whoever uses them does so directly, so they have to be ready at any time."""
    computation = placements.computation
    for slot in part.slots:
        write_slot(part.module, slot, _initial(part.module, slot, computation, disk_map), computation.dtype)
        if computation.device.type != "cpu":
            budget.charge(slot.nbytes(computation))


def _initial(module: nn.Module, slot: Slot, placement: Placement, disk_map: Mapping[str, Tensor] | None) -> Tensor:
    given = disk_map is not None and slot.name in disk_map
    tensor = slot.place(disk_map[slot.name] if given else read_slot(module, slot).detach(), placement)
    return tensor.clone() if tensor.is_inference() else tensor  # the model may have been built in inference mode
