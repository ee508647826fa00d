"""The LoRAs of a pipeline: which layers have which adapters now, and the way from there to other ones.

Notable:

* A stack is put into effect as a whole, and only layers where something differs are touched. Adapters never accumulate,
  and what was taken away leaves no trace: hot ones are dropped, and for fused ones the layer gets its own weight back.
* Each layer has its adapters in the order of their digests, so the order in which they were loaded has no effect.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.vram.adapters import LinearLayers
from ...core.vram.layers import iter_managed, long_lived
from .adapter import Adapter
from .formats import LoraError
from .matching import Match, Target

Effect = tuple[str, float, bool]  # digest, strength, fused: what decides about a layer's output


@dataclass(frozen=True, eq=False)
class Lora:
    """A file's adapters on their layers, at a strength. `fused`: added to the weights instead of to the outputs.

    Raises ValueError for a strength that is not finite.
    """

    match: Match
    strength: float
    fused: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"the strength of {self.match.file.title} must be a finite number, got {self.strength!r}")

    @property
    def effect(self) -> Effect:
        return self.match.file.digest, self.strength, self.fused


@dataclass(frozen=True)
class _Applied:
    """An adapter of one layer."""

    effect: Effect
    adapter: Adapter

    @property
    def strength(self) -> float:
        return self.effect[1]

    @property
    def fused(self) -> bool:
        return self.effect[2]


@dataclass
class _Layer:
    """A layer as it is now: its adapters' effects, and its own weight while another one stands in for it."""

    linear: nn.Linear
    effects: tuple[Effect, ...] = ()
    original: nn.Parameter | None = None


class LoraStack:
    """What is in effect. Not for several threads at once: its pipeline's user has the pipeline to himself."""

    def __init__(self) -> None:
        self.loras: tuple[Lora, ...] = ()
        self._layers: dict[int, dict[str, _Layer]] = {}  # by model (id) and name, those that have adapters
        self._models: dict[int, nn.Module] = {}

    def put(self, loras: Sequence[Lora]) -> None:
        """Have these in effect and no others; strengths of 0 have no effect.

        Raises RuntimeError for a model in use, LoraError for weights that nothing can be fused into, ValueError if a
        limit has no room. What was in effect before then is again.
        """
        for lora in loras:
            if lora.fused:
                _check_fusible(lora)
        try:
            self._apply(loras)
        except BaseException:  # an interrupt, too, must not leave half of a LoRA
            self._apply(self.loras)
            raise
        self.loras = tuple(loras)

    def _apply(self, loras: Sequence[Lora]) -> None:
        wanted = _by_layer(lora for lora in loras if lora.strength != 0)
        models = self._models | {id(target.model): target.model for lora in loras for target in lora.match.targets}
        self._models = models
        with long_lived():
            for key, model in models.items():
                self._put_on(model, self._layers.setdefault(key, {}), wanted.get(key, {}))
        self._layers = {key: layers for key, layers in self._layers.items() if layers}
        self._models = {key: models[key] for key in self._layers}

    def _put_on(self, model: nn.Module, layers: dict[str, _Layer], wanted: Mapping[str, list[_Applied]]) -> None:
        linears = LinearLayers(model)
        changed = {name: wanted.get(name, []) for name in {**layers, **wanted}
                   if _effects(wanted.get(name, [])) != (layers[name].effects if name in layers else ())}
        if not changed:
            return
        for name in changed:
            layers.setdefault(name, _Layer(linears[name])).effects = (("unknown", 0.0, False),)  # until all is done
        linears.put(dict.fromkeys(changed, ()))
        for name, applied in changed.items():
            _fuse(layers[name], [one for one in applied if one.fused])
        linears.put({name: [one.adapter.addition(one.strength, lambda name=name: linears.weight(name))
                            for one in applied if not one.fused] for name, applied in changed.items()})
        for name, applied in changed.items():
            layers[name].effects = _effects(applied)
            if not applied:
                del layers[name]


def _by_layer(loras: Iterable[Lora]) -> dict[int, dict[str, list[_Applied]]]:
    """Adapters by model (id) and name of the layer, in the order of their effects."""
    found: dict[int, dict[str, list[_Applied]]] = {}
    for lora in sorted(loras, key=lambda lora: lora.effect):
        for target in lora.match.targets:
            layers = found.setdefault(id(target.model), {})
            layers.setdefault(target.layer, []).append(_Applied(lora.effect, target.adapter))
    return found


def _effects(applied: Sequence[_Applied]) -> tuple[Effect, ...]:
    return tuple(one.effect for one in applied)


# ---- fusing ---------------------------------------------------------------------------------------------------------

def _check_fusible(lora: Lora) -> None:
    for model in {id(target.model): target.model for target in lora.match.targets}.values():
        if any(True for _ in iter_managed(model)):
            raise LoraError(f"{lora.match.file.title} cannot be fused into {type(model).__name__}, whose weights are "
                            "managed: they are kept as they were loaded, maybe on disk or in fp8. Use hotload=True")
    narrow = next((target for target in lora.match.targets if _weight(target).dtype.itemsize == 1), None)
    if narrow is not None:
        raise LoraError(f"{lora.match.file.title} cannot be fused into {narrow.layer}: {_weight(narrow).dtype} is too "
                        "coarse for its changes. Load the model in bfloat16, or use hotload=True")


def _weight(target: Target) -> Tensor:
    return target.model.get_submodule(target.layer).weight


def _fuse(layer: _Layer, applied: Sequence[_Applied]) -> None:
    """Give the layer its own weight back, and then what the adapters make of it."""
    linear = layer.linear
    if layer.original is not None:
        linear.weight, layer.original = _moved(layer.original, linear.weight.device), None
    if not applied:
        return
    own = linear.weight
    weight = own.detach().float()
    for one in applied:
        weight = weight + one.adapter.changed(own.detach(), one.strength)
    layer.original = _moved(own, torch.device("cpu"))
    linear.weight = nn.Parameter(weight.to(own.dtype), requires_grad=own.requires_grad)


def _moved(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """The parameter itself where it is there already."""
    if parameter.device == device:
        return parameter
    return nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
