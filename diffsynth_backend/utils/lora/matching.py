"""Which layers of which models a LoRA file is for.

Notable: nothing is guessed from a spelling. Every layer of a model has its name with dots, its names in other published
layouts, and all of them with underscores for dots; a file's name is looked up among these. A name that several layers
would have is nobody's.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...core.vram.adapters import LinearLayers
from .adapter import Adapter
from .formats import LayerName, LoraError, LoraFile

SHOWN = 5  # unmatched keys in a message

# A state dict under a model's own names → the same under those of another layout.
Layout = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Target:
    """A layer that an adapter is for."""

    model: nn.Module
    layer: str
    adapter: Adapter


@dataclass(frozen=True, eq=False)
class Match:
    """A file's adapters on their layers, how many layers of each model these are, and the keys that fit nowhere."""

    file: LoraFile
    targets: tuple[Target, ...]
    layers: Mapping[str, int]
    unmatched: tuple[str, ...]

    @property
    def matched_count(self) -> int:
        """Keys that are used."""
        return self.file.key_count - len(self.unmatched)

    def describe(self) -> str:
        """One line for people."""
        where = ", ".join(f"{count} layers of {name}" for name, count in self.layers.items())
        line = f"{self.file.title}: {self.matched_count} of {self.file.key_count} keys used, on {where}"
        return line if not self.unmatched else f"{line}; {len(self.unmatched)} not used: {_listed(self.unmatched)}"


def match_lora(file: LoraFile, models: Sequence[tuple[str, nn.Module]],
               layouts: Mapping[str, Layout] | None = None) -> Match:
    """The layers of the models (each with its name in the pipeline) that the file's adapters are for.

    `layouts`: by the name of a model, the other layout that it is published in.
    A prefix that names a model counts where there are several to choose from. A name that several models have belongs
    to the one that has the most of the file's names, of equals to the first.
    Raises LoraError if nothing fits, if a shape does not, if two adapters are for one layer, and if several models of
    one name (ControlNets) have a claim.
    """
    candidates = [_Candidate(name, model, (layouts or {}).get(name), any_prefix=len(models) == 1)
                  for name, model in models]
    pending, targets, layers = dict(file.adapters), [], Counter()
    while found := _largest(candidates, pending, file):
        candidate, claims = found
        for spelled, layer in claims.items():
            targets.append(candidate.target(file, layer, pending.pop(spelled)))
        layers[candidate.name] += len(claims)
        candidates.remove(candidate)
    unmatched = tuple(sorted([*file.unused, *(key for adapter in pending.values() for key in adapter.keys)]))
    if not targets:
        names = ", ".join(f"{name} ({type(model).__name__})" for name, model in models) or "no model"
        raise LoraError(f"{file.title}: none of its {file.key_count} keys fits a layer of {names}; it is for another "
                        f"model. The first keys are {_listed(unmatched)}")
    return Match(file, tuple(targets), dict(layers), unmatched)


class _Candidate:
    """A model that adapters may be for."""

    def __init__(self, name: str, model: nn.Module, layout: Layout | None, any_prefix: bool) -> None:
        self.name, self.model, self.linears, self._any_prefix = name, model, LinearLayers(model), any_prefix
        spelled = [(spelling, layer) for layer in self.linears for spelling in _spellings(layer, layout)]
        count = Counter(spelling for spelling, _ in spelled)
        self._layers = {spelling: layer for spelling, layer in spelled if count[spelling] == 1}
        self._taken: dict[str, Adapter] = {}

    def claims(self, pending: Mapping[LayerName, Adapter]) -> dict[LayerName, str]:
        """The file's names that it has, with its own names."""
        return {spelled: self._layers[spelled.name] for spelled in pending
                if (self._any_prefix or spelled.model in (None, self.name)) and spelled.name in self._layers}

    def target(self, file: LoraFile, layer: str, adapter: Adapter) -> Target:
        if layer in self._taken:
            raise LoraError(f"{file.title}: {self._taken[layer].keys[0]!r} and {adapter.keys[0]!r} are both for the "
                            f"layer {layer} of {self.name}: save the adapters one by one")
        expected = tuple(self.linears[layer].weight.shape)
        if adapter.change.shape != expected:
            raise LoraError(f"{file.title}: {adapter.keys[0]!r} belongs to a change of "
                            f"{'×'.join(map(str, adapter.change.shape))}, and the layer {layer} of {self.name} has "
                            f"{'×'.join(map(str, expected))}: it is for a model of another size")
        self._taken[layer] = adapter
        return Target(self.model, layer, adapter)


def _spellings(layer: str, layout: Layout | None) -> set[str]:
    names = {layer}
    if layout is not None:
        names |= {name.removesuffix(".weight") for name in layout({f"{layer}.weight": None})}
    return names | {name.replace(".", "_") for name in names}


def _largest(candidates: Sequence[_Candidate], pending: Mapping[LayerName, Adapter],
             file: LoraFile) -> tuple[_Candidate, dict[LayerName, str]] | None:
    """The model with the most claims, None if there are none."""
    claims = [(candidate, candidate.claims(pending)) for candidate in candidates]
    best = max(claims, key=lambda claim: len(claim[1]), default=None)
    if best is None or not best[1]:
        return None
    equals = [candidate for candidate, found in claims if candidate.name == best[0].name and found == best[1]]
    if len(equals) > 1:
        raise LoraError(f"{file.title} fits {len(equals)} models called {best[0].name} alike: give it to one of them "
                        "with load_lora")
    return best


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more
