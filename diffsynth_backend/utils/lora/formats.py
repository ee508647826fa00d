"""LoRA files → adapters: which spellings of keys exist, and what the tensors behind them make together.

A key is a prefix of the program that wrote it, the name of a layer (with dots, or with underscores in their place), and
what the tensor is. Prefixes and endings are the tables below; the names are compared with a model's in `matching`.
Sources: PEFT, diffusers, kohya's scripts, LyCORIS, ComfyUI and DiffSynth-Studio, as their published files have them.

Notable: files are untrusted. Reading one is string comparison and arithmetic on shapes; what contradicts itself (half
a pair, two tensors for one thing, shapes that do not multiply, numbers that are none) raises LoraError with the key and
the file. What is merely of no use here, such as changes of convolutions and biases, is listed as unused.
"""
from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...core.loader.file import ModelFileError
from .adapter import Adapter, Change, Hadamard, Kronecker, LowRank

MAX_KEYS = 200_000
MAX_KEY_LENGTH = 1000
LARGEST = 1e30  # alpha
ALPHA, MAGNITUDE, TUCKER = "alpha", "magnitude", "tucker"
LYCORIS_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b",
                   "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
# What a key ends with, a possible ".weight" aside, and what the tensor is then.
ENDINGS = {
    ".lora_A": "down", ".lora_down": "down", ".lora.down": "down", "_lora.down": "down",
    ".lora_linear_layer.down": "down",
    ".lora_B": "up", ".lora_up": "up", ".lora.up": "up", "_lora.up": "up", ".lora_linear_layer.up": "up",
    ".alpha": ALPHA, ".dora_scale": MAGNITUDE, ".lora_magnitude_vector": MAGNITUDE,
    ".lora_mid": TUCKER, ".hada_t1": TUCKER, ".hada_t2": TUCKER, ".lokr_t1": TUCKER, ".lokr_t2": TUCKER,
    **{f".{name}": name for name in LYCORIS_FACTORS},
}
# PEFT's endings may be followed by the name of the adapter: ".lora_A.default.weight".
NAMED = (".lora_A", ".lora_B", ".lora_magnitude_vector")
# What a key may begin with, any number of them one after the other, and the model that it names (as pipelines call it).
PREFIXES = {
    "base_model.model.": None, "module.": None, "pipe.": None, "lycoris_": None,
    "model.diffusion_model.": "dit", "diffusion_model.": "dit", "transformer.": "dit", "unet.": "dit", "dit.": "dit",
    "lora_unet_": "dit", "lora_transformer_": "dit",
    "text_encoder.": "text_encoder", "text_encoders.qwen25_7b.transformer.": "text_encoder",
    "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
    "blockwise_controlnet.": "blockwise_controlnet",
}
_LONGEST_FIRST = sorted(PREFIXES, key=len, reverse=True)
DIFFUSERS_METADATA = "lora_adapter_metadata"


class LoraError(ModelFileError):
    """A LoRA file cannot be used. The message says which, why, and what to do."""


@dataclass(frozen=True)
class LayerName:
    """What a file calls a layer: the model, if a prefix names it, and the rest as it is spelled."""

    model: str | None
    name: str


@dataclass(frozen=True, eq=False)
class LoraFile:
    """What a file changes. `title` is for messages; `unused` are keys of no known kind.

    `digest`: SHA-256 of the tensors, with what they are, their scales and the names of their layers.
    """

    title: str
    adapters: Mapping[LayerName, Adapter]
    unused: tuple[str, ...]
    digest: str

    @property
    def key_count(self) -> int:
        return len(self.unused) + sum(len(adapter.keys) for adapter in self.adapters.values())


def parse_lora(state_dict: Mapping[str, Any], title: str, metadata: Mapping[str, str] | None = None) -> LoraFile:
    """The adapters in a state dict, whose values are tensors (floating point, on any device) or, for alpha, numbers.

    `metadata` are a safetensors file's: diffusers keeps alpha there. Raises LoraError.
    """
    if len(state_dict) > MAX_KEYS:
        raise LoraError(f"{title} has {len(state_dict)} keys, at most {MAX_KEYS} allowed: is it a LoRA?")
    layers, unused = _by_layer(state_dict, title)
    recorded, adapters = _Recorded.read(metadata or {}), {}
    for layer, parts in layers.items():
        if _is_of_no_use(parts):
            unused += [part.key for part in parts.values()]
        else:
            adapters[layer] = _Layer(title, parts).adapter(recorded.alpha(layer))
    return LoraFile(title, adapters, tuple(sorted(unused)), _digest(layers, adapters))


def _is_of_no_use(parts: Mapping[str, _Part]) -> bool:
    """An alpha whose factors are of an unknown kind, or what changes a convolution."""
    factors = [part.value for kind, part in parts.items() if kind not in (ALPHA, MAGNITUDE)]
    return TUCKER in parts or set(parts) == {ALPHA} or any(isinstance(value, Tensor) and value.ndim > 2
                                                           for value in factors)


# ---- keys -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class _Part:
    key: str
    value: Any


def _by_layer(state_dict: Mapping[str, Any], title: str) -> tuple[dict[LayerName, dict[str, _Part]], list[str]]:
    layers: dict[LayerName, dict[str, _Part]] = {}
    unused = []
    for key, value in state_dict.items():
        found = split_key(key) if isinstance(key, str) and len(key) <= MAX_KEY_LENGTH else None
        if found is None:
            unused.append(str(key)[:MAX_KEY_LENGTH])
            continue
        layer, kind = found
        parts = layers.setdefault(layer, {})
        if kind in parts:
            raise LoraError(f"{title}: {parts[kind].key!r} and {key!r} are both the {kind} of one layer; the file "
                            "mixes several adapters: save them one by one")
        parts[kind] = _Part(key, value)
    return layers, unused


def split_key(key: str) -> tuple[LayerName, str] | None:
    """The layer of a key and what its tensor is, None if it is of no known kind."""
    stem = key.removesuffix(".weight")
    without_name, _, name = stem.rpartition(".")
    candidates = [(stem, ENDINGS)]
    if name != "bias":
        candidates.append((without_name, NAMED))
    for candidate, endings in candidates:
        ending = next((ending for ending in endings if candidate.endswith(ending)), None)
        if ending is not None and len(candidate) > len(ending):
            return _layer_name(candidate.removesuffix(ending)), ENDINGS[ending]
    return None


def _layer_name(spelled: str) -> LayerName:
    model = None
    while prefix := next((prefix for prefix in _LONGEST_FIRST if spelled.startswith(prefix)), None):
        spelled, model = spelled.removeprefix(prefix), PREFIXES[prefix] or model
    return LayerName(model, spelled)


# ---- metadata -------------------------------------------------------------------------------------------------------

Alpha = Callable[[int], Any]  # of a rank


@dataclass(frozen=True)
class _Recorded:
    """PEFT's configuration as diffusers keeps it in a file's metadata, with a prefix for each model."""

    values: Mapping[str, Any]

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> _Recorded:
        try:
            values = json.loads(metadata.get(DIFFUSERS_METADATA, "{}"))
        except (ValueError, RecursionError):  # a stranger's text, without which files are read as well
            values = {}
        return cls(values if isinstance(values, dict) else {})

    def alpha(self, layer: LayerName) -> Alpha | None:
        """What alpha is at a rank, None if nothing is recorded."""
        prefixes = {None: ("transformer.", ""), "dit": ("transformer.", "")}.get(layer.model, (f"{layer.model}.",))
        prefix = next((prefix for prefix in prefixes if f"{prefix}lora_alpha" in self.values), None)
        if prefix is None:
            return None
        alpha = self._of_layer(f"{prefix}alpha_pattern", layer.name, self.values[f"{prefix}lora_alpha"])
        takes_root = self.values.get(f"{prefix}use_rslora") is True
        return lambda rank: _number(alpha) * math.sqrt(rank) if takes_root else alpha

    def _of_layer(self, pattern: str, name: str, usual: Any) -> Any:
        """PEFT's exceptions by the end of a layer's name."""
        exceptions = self.values.get(pattern)
        for end, alpha in exceptions.items() if isinstance(exceptions, dict) else ():
            if f".{name}".endswith(f".{end}"):
                return alpha
        return usual


def _number(value: Any) -> float:
    """NaN for what is no number, or no finite one."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    return float(value) if isinstance(value, int | float) and abs(value) < LARGEST else math.nan


# ---- tensors --------------------------------------------------------------------------------------------------------

class _Layer:
    """The tensors of one layer on their way to an adapter."""

    def __init__(self, title: str, parts: Mapping[str, _Part]) -> None:
        self._title, self._parts = title, parts

    def adapter(self, recorded: Alpha | None) -> Adapter:
        change, rank = self._change()
        scale = 1.0 if rank is None else self._alpha(rank, recorded) / rank
        return Adapter(change, scale, self._magnitude(change.shape), tuple(part.key for part in self._parts.values()))

    def _change(self) -> tuple[Change, int | None]:
        """ΔW, and the rank that alpha is divided by."""
        kinds = {kind: [name for name in names if name in self._parts] for kind, names in _FACTORS.items()}
        present = [kind for kind, names in kinds.items() if names]
        if len(present) != 1:
            self._refuse(f"the factors of a {' and of a '.join(present)}" if present else "a magnitude and no factors",
                         "one kind of adapter for a layer expected")
        return {"LoRA": self._low_rank, "LoHa": self._hadamard, "LoKr": self._kronecker}[present[0]]()

    def _low_rank(self) -> tuple[Change, int]:
        down, up = self._matrix("down"), self._matrix("up")
        self._check_product("up", up, "down", down)
        return LowRank(down, up), down.shape[0]

    def _hadamard(self) -> tuple[Change, int]:
        first, second = self._pair("hada_w1"), self._pair("hada_w2")
        if (first[0].shape[0], first[1].shape[1]) != (second[0].shape[0], second[1].shape[1]):
            self._refuse(f"products of {_sizes(first)} and {_sizes(second)}", "two of one shape expected")
        return Hadamard(*first, *second), first[1].shape[0]

    def _kronecker(self) -> tuple[Change, int | None]:
        w1, w2 = self._whole_or_pair("lokr_w1"), self._whole_or_pair("lokr_w2")
        ranks = [factors[1].shape[0] for factors in (w1, w2) if len(factors) == 2]
        return Kronecker(w1, w2), ranks[-1] if ranks else None  # whole matrices are not scaled

    def _whole_or_pair(self, name: str) -> tuple[Tensor, ...]:
        if name not in self._parts:
            return self._pair(name)
        if f"{name}_a" in self._parts or f"{name}_b" in self._parts:
            self._refuse(f"{name} as a matrix and in factors", "one of them expected")
        return (self._matrix(name),)

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        a, b = self._matrix(f"{name}_a"), self._matrix(f"{name}_b")
        self._check_product(f"{name}_a", a, f"{name}_b", b)
        return a, b

    def _check_product(self, left: str, a: Tensor, right: str, b: Tensor) -> None:
        if a.shape[1] != b.shape[0]:
            self._refuse(f"{left} of {_size(a)} and {right} of {_size(b)}", "matrices that can be multiplied expected")

    def _matrix(self, kind: str) -> Tensor:
        if kind not in self._parts:
            self._refuse(f"no {kind}", "every factor of an adapter expected; the file is incomplete or damaged")
        tensor = self._tensor(kind)
        if tensor.ndim != 2 or 0 in tensor.shape:
            self._refuse(f"{kind} of {_size(tensor)}", "a matrix of at least 1×1 expected")
        return tensor

    def _tensor(self, kind: str) -> Tensor:
        tensor = self._parts[kind].value
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            self._refuse(f"{what} for {kind}", "a floating point tensor expected")
        wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # fp8 has neither arithmetic nor comparison
        if not bool(torch.isfinite(wide).all()):
            self._refuse(f"{kind} with values that are not finite", "numbers expected; the file is damaged")
        return wide

    def _alpha(self, rank: int, recorded: Alpha | None) -> float:
        """What the file's keys say, else what its metadata say, else the rank: a scale of 1."""
        if ALPHA in self._parts:
            value = self._parts[ALPHA].value
        else:
            value = rank if recorded is None else recorded(rank)
        alpha = _number(value)
        if not math.isfinite(alpha):
            self._refuse(f"alpha {value!r:.100}", "one finite number expected")
        return alpha

    def _magnitude(self, shape: tuple[int, int]) -> Tensor | None:
        if MAGNITUDE not in self._parts:
            return None
        tensor = self._tensor(MAGNITUDE)
        by_output, by_input = (shape[0], 1), (1, shape[1])
        if tensor.ndim == 1:
            tensor = tensor.reshape(by_output if len(tensor) == shape[0] else (1, -1))
        if tensor.shape not in (by_output, by_input):
            self._refuse(f"a magnitude of {_size(tensor)} for a change of {shape[0]}×{shape[1]}",
                         f"{shape[0]} or {shape[1]} numbers expected")
        return tensor

    def _refuse(self, found: str, expected: str) -> NoReturn:
        first = next(iter(self._parts.values())).key
        raise LoraError(f"{self._title}: the layer of {first!r} has {found}; {expected}")


_FACTORS = {"LoRA": ("down", "up"), "LoHa": LYCORIS_FACTORS[:4], "LoKr": LYCORIS_FACTORS[4:]}


def _size(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "one number"


def _sizes(tensors: Iterable[Tensor]) -> str:
    return " by ".join(_size(tensor) for tensor in tensors)


def _digest(layers: Mapping[LayerName, Mapping[str, _Part]], adapters: Mapping[LayerName, Adapter]) -> str:
    digest = hashlib.sha256()
    for layer in sorted(adapters, key=lambda layer: (layer.name, layer.model or "")):
        digest.update(f"{layer.name}|{adapters[layer].scale!r}|".encode())
        for kind, part in sorted(layers[layer].items()):
            if kind != ALPHA:
                digest.update(f"{kind}|{part.value.dtype}|{tuple(part.value.shape)}|".encode())
                digest.update(_bytes(part.value))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
