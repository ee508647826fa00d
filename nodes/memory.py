"""One of our models as ComfyUI's memory manager wants to see it, so that its models and ours can share a card.

Notable: a model whose layers move by themselves brings and removes its weights around each use, so all that the manager
has to know is how much room it will need. A model that stays on the card as a whole can be sent away and comes back
at its next use. The manager keeps weak references only: the adapter is held by its model and refers to it weakly.
"""
from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from ..diffsynth_backend.core.vram import iter_managed, offload_model

ATTRIBUTE = "_comfyui_memory_adapter"
CPU = torch.device("cpu")


def adapter_of(model: nn.Module, device: torch.device, dtype: torch.dtype, limit: int | None) -> ModelAdapter:
    """The adapter of a model, made at the first call. `limit` (bytes) is what its weights may take of the device."""
    adapter = model.__dict__.get(ATTRIBUTE)
    if adapter is None:
        adapter = model.__dict__[ATTRIBUTE] = ModelAdapter(model, device, dtype, limit)
    return adapter


class ModelAdapter:
    """Has the methods of ComfyUI's ModelPatcher that its memory manager calls; sizes in bytes."""

    parent = None
    offload_device = CPU

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, limit: int | None) -> None:
        self._model = weakref.ref(model)
        self.load_device, self._dtype = device, dtype
        self.managed = any(True for _ in iter_managed(model))
        size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
        self._size = size if limit is None else min(size, limit)
        self.in_use = False

    @property
    def model(self) -> nn.Module | None:
        return self._model()

    def model_size(self) -> int:
        return self._size

    def loaded_size(self) -> int:
        """What the model has on the device now."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters()
                   if parameter.device == self.load_device)

    def model_dtype(self) -> torch.dtype:
        return self._dtype

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else CPU

    def is_dynamic(self) -> bool:
        return False

    def is_clone(self, other: Any) -> bool:
        return other is self

    def model_patches_models(self) -> list:
        return []

    def model_patches_to(self, device_or_dtype: Any) -> None:
        """There are no patches."""

    def lowvram_patch_counter(self) -> int:
        return 0

    def partially_load(self, device: torch.device, extra_memory: float, force_patch_weights: bool = False) -> int:
        """Bring back a model that was sent away as a whole; layers that move by themselves come when they compute."""
        before = self.loaded_size()
        if not self.managed:
            self._move(self.load_device)
        return self.loaded_size() - before

    def partially_unload(self, device: torch.device, memory_to_free: float) -> int:
        """Leave the device, whatever part was asked for; returns what that freed, 0 while the model is at work."""
        before = self.loaded_size()
        if self.in_use:
            return 0
        if self.managed:
            offload_model(self.model)
        else:
            self._move(CPU)
        return before - self.loaded_size()

    def detach(self, unpatch_all: bool = True) -> None:
        """The manager forgets the model. It also says so, with False, when it loads the same model once more."""
        if unpatch_all:
            self.partially_unload(CPU, self.loaded_size())

    def _move(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # the weights outlive the node, which runs in that mode
            self.model.to(device)
