"""Units: the steps that prepare a pipeline's inputs, and the runner that moves values between the three dicts.

Notable: a unit declares what it reads and writes, so a graph of nodes can run each one as soon as its inputs exist.
The runner copies the dicts it is given; bundles that a graph keeps are never written into.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base_pipeline import BasePipeline

Inputs = dict[str, Any]


def _names(value: Iterable[str] | None, what: str) -> tuple[str, ...]:
    if isinstance(value, str):
        raise TypeError(f"{what} must be a tuple of names, got the string {value!r}: a comma is missing")
    return tuple(value or ())


class PipelineUnit:
    """One step of preparation, in one of three modes.

    direct         `process(pipe, **inputs)` reads shared inputs and returns a dict of shared outputs
    seperate_cfg   the same once per side; `input_params_posi` / `_nega` map an argument to that side's key
    take_over      `process(pipe, inputs_shared, inputs_posi, inputs_nega)` returns all three

    An input that nobody gave arrives as None. `onload_model_names` are the models that `process` uses.
    `optional_params` are those of its inputs that a graph need not wait for before it runs the unit. `awaited_models`
    are those without which a graph leaves the unit to a pipeline that has them. A unit that names inputs and no outputs
    checks: with other models it checks again.
    """

    def __init__(self, seperate_cfg: bool = False, take_over: bool = False,
                 input_params: Iterable[str] | None = None, output_params: Iterable[str] | None = None,
                 input_params_posi: Mapping[str, str] | None = None, input_params_nega: Mapping[str, str] | None = None,
                 onload_model_names: Iterable[str] | None = None,
                 optional_params: Iterable[str] | None = None, awaited_models: Iterable[str] | None = None) -> None:
        if seperate_cfg and take_over:
            raise ValueError("a unit is either seperate_cfg or take_over, not both")
        self.seperate_cfg, self.take_over = seperate_cfg, take_over
        self.input_params = _names(input_params, "input_params")
        self.output_params = _names(output_params, "output_params")
        self.input_params_posi = dict(input_params_posi or {})
        self.input_params_nega = dict(input_params_nega or {})
        self.onload_model_names = _names(onload_model_names, "onload_model_names")
        self.optional_params = _names(optional_params, "optional_params")
        self.awaited_models = _names(awaited_models, "awaited_models")
        if unknown := set(self.optional_params) - self.reads():
            raise ValueError(f"{type(self).__name__}: optional_params {', '.join(sorted(unknown))} are not among its "
                             "inputs")

    def process(self, pipe: BasePipeline, *args: Any, **kwargs: Any) -> Any:
        """Do the work; each unit overrides it."""
        raise NotImplementedError(f"{type(self).__name__} does not implement process()")

    def reads(self) -> set[str]:
        """Every key, of any of the three dicts, that the unit declares to read."""
        return {*self.input_params, *self.input_params_posi.values(), *self.input_params_nega.values()}


class PipelineUnitRunner:
    """Runs one unit on the three dicts and returns three new ones."""

    def __call__(self, unit: PipelineUnit, pipe: BasePipeline, inputs_shared: Inputs, inputs_posi: Inputs,
                 inputs_nega: Inputs) -> tuple[Inputs, Inputs, Inputs]:
        shared, posi, nega = dict(inputs_shared), dict(inputs_posi), dict(inputs_nega)
        if unit.take_over:
            return unit.process(pipe, inputs_shared=shared, inputs_posi=posi, inputs_nega=nega)
        common = {name: shared.get(name) for name in unit.input_params}
        if not unit.seperate_cfg:
            shared.update(self._outputs(unit, unit.process(pipe, **common)))
            return shared, posi, nega
        positive = self._side(unit, pipe, common, posi, unit.input_params_posi)
        posi.update(positive)
        # Without guidance the negative side is never used, so it costs nothing.
        same = shared.get("cfg_scale") == 1
        nega.update(positive if same else self._side(unit, pipe, common, nega, unit.input_params_nega))
        return shared, posi, nega

    def _side(self, unit: PipelineUnit, pipe: BasePipeline, common: Inputs, side: Inputs,
              keys: Mapping[str, str]) -> Inputs:
        own = {argument: side.get(key) for argument, key in keys.items()}
        return self._outputs(unit, unit.process(pipe, **common, **own))

    @staticmethod
    def _outputs(unit: PipelineUnit, outputs: Inputs | None) -> Inputs:
        outputs = outputs or {}
        if unit.output_params and (extra := outputs.keys() - set(unit.output_params)):
            raise ValueError(f"{type(unit).__name__} returned {', '.join(sorted(extra))}, which its output_params "
                             f"{unit.output_params} do not declare")
        return outputs
