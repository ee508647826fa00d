"""What a model computes from the timestep alone, computed once for a whole schedule.

In a diffusion transformer that is the modulation: a third of Qwen-Image's weights, and the same few vectors whenever
the same timestep comes by. A model obtains them through one call of its own, which its class names in `timestep_call`.
For a known list of timesteps all those calls are made at the beginning, in lock step, so that their weights pass by
once; during the loop the call is looked up, and these weights are not streamed at all.

Notable: each entry is made by the very call that the loop would make, one timestep at a time at the loop's batch shape,
since a matrix product over several timesteps at once may round differently.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Schedule:
    """The timesteps of a loop as its model sees them: the value of each, and the rest of the call.

    `timesteps` 0-dim tensors, `batch` how many pictures, `dtype` of the latents.
    """

    timesteps: tuple[Tensor, ...]
    batch: int
    dtype: torch.dtype


class TimestepTable:
    """Stands in for a model's `timestep_call` while `installed`: looks results up, and computes what it lacks."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._name = model, type(model).timestep_call
        self._compute = getattr(model, self._name)
        self._results: dict[Key, Any] = {}
        self._current: tuple[Tensor, float] | None = None

    def calls(self, schedule: Schedule, device: torch.device) -> list[Callable[[], None]]:
        """Functions that fill the table, one for each timestep that it lacks."""
        distinct = {float(timestep): timestep for timestep in schedule.timesteps}
        batches = {value: timestep.to(device).reshape(1).expand(schedule.batch) for value, timestep in distinct.items()}
        return [self._filler((value,) * schedule.batch, batch, schedule.dtype) for value, batch in batches.items()]

    def _filler(self, values: tuple[float, ...], timestep: Tensor, dtype: torch.dtype) -> Callable[[], None]:
        def fill() -> None:
            self._results[values, dtype] = self._compute(timestep, dtype)
        return fill

    @property
    def nbytes(self) -> int:
        """What the table takes of the device."""
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(self._results.values()))

    def now_at(self, timestep: Tensor, value: float) -> None:
        """The loop is at this timestep: a tensor on the device whose value need not be asked for, which would wait."""
        self._current = (timestep, value)

    def __call__(self, timestep: Tensor, dtype: torch.dtype) -> Any:
        """As the model's own call: timestep (B,), dtype of the latents."""
        result = self._results.get((self._values(timestep), dtype))
        return self._compute(timestep, dtype) if result is None else result

    def _values(self, timestep: Tensor) -> tuple[float, ...]:
        """Of the tensor's elements. An accelerator is not asked for them if this is the loop's tensor, expanded."""
        if self._current is not None and timestep.device.type != "cpu":
            known, value = self._current
            is_one_value = timestep.numel() == 1 or not any(timestep.stride())
            if is_one_value and timestep.data_ptr() == known.data_ptr():
                return (value,) * timestep.numel()
        return tuple(timestep.tolist())

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block the model's call is this table."""
        setattr(self._model, self._name, self)
        try:
            yield
        finally:
            delattr(self._model, self._name)


def has_timestep_call(model: nn.Module) -> bool:
    """Whether the model says which of its calls depends on the timestep alone."""
    return getattr(type(model), "timestep_call", None) is not None


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        yield from _tensors(value.values())
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for part in value:
            yield from _tensors(part)
