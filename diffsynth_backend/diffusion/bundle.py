"""A pipeline's three input dicts as an immutable value, for programs that prepare inputs step by step.

Notable: a graph of nodes gives inputs in any order. A unit runs as soon as everything that it has to read exists;
until then it is pending, and `run_pending` runs what is left, in the pipeline's order, when the last inputs are known.
A later input for a unit that has run makes it pending again, so the order in which inputs arrive changes nothing.
"""
from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .base_pipeline import BasePipeline
from .pipeline_unit import Inputs, PipelineUnit

FrozenInputs = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, eq=False)
class InputBundle:
    """Shared, positive and negative inputs, and the names of the units that have not run on them yet.

    Nothing writes into a bundle; `given` and `run_ready` return new ones.
    """

    shared: FrozenInputs = ()
    positive: FrozenInputs = ()
    negative: FrozenInputs = ()
    pending: tuple[str, ...] = ()

    @classmethod
    def empty(cls, pipe: BasePipeline) -> InputBundle:
        """No inputs, and every unit of the pipeline pending."""
        return cls(pending=tuple(unit_name(unit) for unit in pipe.units))

    def dicts(self) -> tuple[Inputs, Inputs, Inputs]:
        """Copies of the three dicts."""
        return dict(self.shared), dict(self.positive), dict(self.negative)

    def names(self) -> set[str]:
        """Every key of any of the three dicts."""
        return {name for side in (self.shared, self.positive, self.negative) for name, _ in side}

    def given(self, pipe: BasePipeline, shared: Mapping[str, Any] | None = None,
              positive: Mapping[str, Any] | None = None, negative: Mapping[str, Any] | None = None) -> InputBundle:
        """This bundle with more inputs. Units that read one, or what such a unit writes, are pending (again)."""
        new = [dict(side or {}) for side in (shared, positive, negative)]
        sides = [tuple({**old, **added}.items()) for old, added in zip(self.dicts(), new)]
        changed = {name for side in new for name in side}
        pending = set(self.pending)
        for unit in pipe.units:
            if changed & unit.reads():
                pending.add(unit_name(unit))
                changed.update(unit.output_params)
        return InputBundle(*sides, pending=_in_order(pipe, pending))

    def unchecked(self, pipe: BasePipeline) -> InputBundle:
        """This bundle with every unit pending that only checks: what it has was checked with other models."""
        checks = {unit_name(unit) for unit in pipe.units if unit.reads() and not unit.output_params}
        return replace(self, pending=_in_order(pipe, checks | set(self.pending)))


def unit_name(unit: PipelineUnit) -> str:
    """How a bundle refers to a unit."""
    return type(unit).__name__


def run_ready(pipe: BasePipeline, bundle: InputBundle) -> InputBundle:
    """Run each pending unit whose inputs all exist, optional ones aside, and that no earlier pending unit may change.

    A unit that declares no inputs waits for `run_pending`, because what it reads is unknown, and one that awaits models
    for a pipeline that has them.
    """
    waiting: set[str] = set()  # what pending units will write
    for unit in _pending_units(pipe, bundle):
        reads = unit.reads()
        is_ready = reads and reads - set(unit.optional_params) <= bundle.names() and not reads & waiting
        if is_ready and all(getattr(pipe, name, None) is not None for name in unit.awaited_models):
            bundle = _run(pipe, bundle, unit)
        else:
            waiting.update(unit.output_params)
    return bundle


def run_settled(pipe: BasePipeline, bundle: InputBundle, to_come: Collection[str]) -> InputBundle:
    """Run each pending unit that depends on none of the inputs still `to_come`: all others are given, or never will be.

    What nobody gave arrives there as None. A unit that declares no inputs waits, because what it reads is unknown.
    """
    unsettled = set(to_come)
    for unit in _pending_units(pipe, bundle):
        reads = unit.reads()
        if reads and not reads & unsettled:
            bundle = _run(pipe, bundle, unit)
        else:
            unsettled.update(unit.output_params)
    return bundle


def run_pending(pipe: BasePipeline, bundle: InputBundle) -> tuple[Inputs, Inputs, Inputs]:
    """Run every pending unit; inputs that nobody gave arrive there as None. Returns the three dicts."""
    for unit in _pending_units(pipe, bundle):
        bundle = _run(pipe, bundle, unit)
    return bundle.dicts()


def _pending_units(pipe: BasePipeline, bundle: InputBundle) -> list[PipelineUnit]:
    return [unit for unit in pipe.units if unit_name(unit) in bundle.pending]


def _run(pipe: BasePipeline, bundle: InputBundle, unit: PipelineUnit) -> InputBundle:
    sides = pipe.unit_runner(unit, pipe, *bundle.dicts())
    left = tuple(name for name in bundle.pending if name != unit_name(unit))
    return replace(bundle, shared=tuple(sides[0].items()), positive=tuple(sides[1].items()),
                   negative=tuple(sides[2].items()), pending=left)


def _in_order(pipe: BasePipeline, names: set[str]) -> tuple[str, ...]:
    return tuple(name for name in map(unit_name, pipe.units) if name in names)
