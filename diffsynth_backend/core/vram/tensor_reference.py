"""Tensors that are not read yet: what a state dict converter gets when the weights stay on disk.

A converter is an ordinary function from state dict to state dict. Run on real tensors it would read the whole model;
run on `TensorReference`s it only leaves a recipe for each result: which stored tensors, and which slices,
concatenations, reshapes and multiples of them. `evaluate` follows a recipe later, reading just its leaves; what is
computed, block by block.

A reference is a meta tensor (shape and dtype are real, `isinstance(x, torch.Tensor)` holds) whose operations pass
through `__torch_function__`. Only those of one table can be recorded; anything else raises while the model is loaded,
not in the middle of a run. Recipes are plain picklable data, references live no longer than the converter runs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..loader.file import ModelFileError, TensorInfo

# Data moves, casts and scaling, which is part of how 8-bit weights are stored; as methods and as functions of torch,
# where both exist. Nothing else that computes values: what a model computes belongs into its forward.
RECORDABLE = (
    "cat", "concat", "concatenate", "stack", "chunk", "split", "narrow", "unbind", "select",
    "reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze",
    "transpose", "swapaxes", "permute", "movedim", "t", "contiguous", "clone", "detach", "to", "mul", "__getitem__",
)  # fmt: skip
# Of these, what computes each value from the values at its place, so that rows can be computed alone.
ELEMENTWISE = ("Tensor.to", "Tensor.mul", "torch.mul")
BLOCK_ELEMENTS = 1 << 20  # 4 MB of float32: what is read, cast and multiplied stays in the processor's cache
ITEM = "item"  # of the tuple that chunk, split and unbind return
# Recipes hold names from this table, so that they can be pickled.
REPLAY: dict[str, Callable[..., Any]] = {
    f"{owner.__name__}.{name}": getattr(owner, name)
    for name in RECORDABLE
    for owner in (torch, torch.Tensor)
    if hasattr(owner, name)
} | {"Tensor.T": torch.Tensor.T.__get__, ITEM: operator.getitem}
_NAME_OF = {function: name for name, function in REPLAY.items()}
# Questions about shape and type, which a meta tensor answers by itself.
_ANSWERED = {
    *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "device", "layout", "is_meta")),
    *(getattr(torch.Tensor, name).__get__ for name in ("requires_grad", "nbytes", "itemsize")),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "nelement", "element_size", "stride")),
    *(getattr(torch.Tensor, name) for name in ("is_floating_point", "is_complex", "is_contiguous", "__len__")),
    *(torch.numel, torch.is_floating_point, torch.is_complex),
}


class UnrecordableOperation(ModelFileError):
    """A converter did something to a tensor that cannot be deferred until the tensor is read.

    Not a TypeError, which torch's operators take for "try the other operand" and replace by a message of their own.
    """


@dataclass(frozen=True, eq=False, slots=True)
class Leaf:
    """A tensor as stored in a file."""

    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.info.dtype


@dataclass(frozen=True, eq=False, slots=True)
class Operation:
    """The result of REPLAY[name] on other recipes. A `chunk` has no shape and dtype; each ITEM of it has."""

    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None


Recipe = Leaf | Operation


class TensorReference(torch.Tensor):
    """A meta tensor that knows the recipe of its values; `name` is that of the first stored tensor in it."""

    recipe: Recipe

    @staticmethod
    def of(info: TensorInfo) -> TensorReference:
        """The reference to a stored tensor."""
        return _reference(torch.empty(info.shape, dtype=info.dtype, device="meta"), Leaf(info))

    @property
    def name(self) -> str:
        return next(leaves(self.recipe)).name

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorReference:
        return self  # nothing can change it

    def __repr__(self) -> str:
        return f"TensorReference({self.name!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ANSWERED:
            return _on_meta(func, args, kwargs)
        name = _NAME_OF.get(func)
        if name is None or not _is_recordable(name, args, kwargs):
            raise _unrecordable(torch.overrides.resolve_name(func) or func.__name__, args)
        return _record(name, args, kwargs)


def leaves(recipe: Recipe) -> Iterator[TensorInfo]:
    """The stored tensors that a recipe reads, in the order of use; one may occur several times."""
    if isinstance(recipe, Leaf):
        yield recipe.info
        return
    found: list[Recipe] = []
    _map_nested((recipe.arguments, recipe.keywords), (Leaf, Operation), found.append)
    for part in found:
        yield from leaves(part)


def evaluate(recipe: Recipe, read: Callable[[TensorInfo], torch.Tensor]) -> torch.Tensor:
    """The recipe's tensor; `read` is called once for each stored tensor in it, or for parts of rows of it where values
    are computed: that is done a block of rows at a time, so that casts to float32 never have a whole layer in memory.
    """
    return _Evaluation(read).value(recipe)


def evaluate_into(recipe: Recipe, read: Callable[[TensorInfo], torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """`evaluate` to `out`, of the recipe's shape and any dtype and device. What is computed goes there by blocks."""
    _Evaluation(read).fill(recipe, out)
    return out


class _Evaluation:
    """Follows one recipe; what several parts of it use is evaluated once."""

    def __init__(self, read: Callable[[TensorInfo], torch.Tensor]):
        self._read = read
        self._done: dict[int, Any] = {}

    def value(self, part: Recipe) -> Any:
        """A tensor, or the tuple of a `chunk`."""
        if id(part) not in self._done:
            self._done[id(part)] = self._compute(part)
        return self._done[id(part)]

    def fill(self, part: Recipe, out: torch.Tensor) -> None:
        """Copy the value to `out`, by blocks of rows if it is computed."""
        if not _is_computed(part):
            out.copy_(self.value(part))
            return
        step = max(1, BLOCK_ELEMENTS // max(1, math.prod(part.shape[1:])))
        for start in range(0, part.shape[0], step):
            stop = min(start + step, part.shape[0])
            out[start:stop].copy_(self._rows(part, part.shape, start, stop))

    def _compute(self, part: Recipe) -> Any:
        if isinstance(part, Leaf):
            return self._read(part.info)
        if _is_computed(part):
            result = torch.empty(part.shape, dtype=part.dtype)
            self.fill(part, result)
            return result
        arguments, keywords = _map_nested((part.arguments, part.keywords), (Leaf, Operation), self.value)
        return REPLAY[part.name](*arguments, **keywords)

    def _rows(self, part: Recipe | torch.Tensor, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        """What of `part` is needed for these rows of a result of that shape: all of it, if it is broadcast to rows."""
        if len(part.shape) != len(shape) or part.shape[0] != shape[0]:
            return part if isinstance(part, torch.Tensor) else self.value(part)
        if isinstance(part, Operation) and _is_computed(part):
            arguments, keywords = _map_nested((part.arguments, part.keywords), (Leaf, Operation, torch.Tensor),
                                              lambda argument: self._rows(argument, shape, start, stop))
            return REPLAY[part.name](*arguments, **keywords)
        if isinstance(part, Leaf) and part.info.offset is not None:
            return self._read(_rows_of(part.info, start, stop))
        return (part if isinstance(part, torch.Tensor) else self.value(part))[start:stop]


def _is_computed(part: Recipe) -> bool:
    """Whether rows of the result come from the same rows, and there are any."""
    return isinstance(part, Operation) and part.name in ELEMENTWISE and len(part.shape) > 0


def _rows_of(info: TensorInfo, start: int, stop: int) -> TensorInfo:
    """Rows of a stored tensor, which lie side by side in the file."""
    row = math.prod(info.shape[1:]) * info.dtype.itemsize
    return info._replace(shape=(stop - start, *info.shape[1:]), offset=info.offset + start * row,
                         nbytes=(stop - start) * row)


def _reference(meta: torch.Tensor, recipe: Recipe) -> TensorReference:
    reference = meta.as_subclass(TensorReference)
    reference.recipe = recipe
    return reference


def _record(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    arguments, keywords = _map_nested((args, kwargs), TensorReference, lambda reference: reference.recipe)
    result = _on_meta(REPLAY[name], *_map_nested((args, kwargs), torch.Tensor, _without_data))
    if isinstance(result, torch.Tensor):
        return _reference(result, Operation(name, arguments, keywords, tuple(result.shape), result.dtype))
    whole = Operation(name, arguments, keywords)
    parts = (Operation(ITEM, (whole, i), {}, tuple(part.shape), part.dtype) for i, part in enumerate(result))
    return tuple(_reference(part, recipe) for part, recipe in zip(result, parts, strict=True))


def _on_meta(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    """A plain meta tensor: references lose their type, constants that the converter made lose their values."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor).to("meta")


def _is_recordable(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "Tensor.to":  # dtype only: where the values go is decided when they are read
        return all(isinstance(value, torch.dtype) for value in (*args[1:], *kwargs.values()))
    if name == "Tensor.__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return all(value is None or value is Ellipsis or isinstance(value, (int, slice)) for value in index)
    if name in ("Tensor.mul", "torch.mul"):  # of float8 only meta tensors have it, so it would fail while reading
        return "out" not in kwargs and not any(_is_float8(value) for value in (*args, *kwargs.values()))
    return "out" not in kwargs


def _is_float8(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point and value.dtype.itemsize == 1


def _unrecordable(operation: str, args: Any) -> UnrecordableOperation:
    names: list[str] = []
    _map_nested(args, TensorReference, lambda reference: names.append(reference.name))
    return UnrecordableOperation(
        f"the state dict converter applies {operation} to {', '.join(map(repr, names[:4]))}, which cannot be deferred "
        f"until the weights are read from disk; use only slices and {', '.join(RECORDABLE)} (to: dtype only; mul: "
        "float8 has to be cast before), or load this model without disk offload"
    )


def _map_nested(value: Any, kind: type | tuple[type, ...], function: Callable[[Any], Any]) -> Any:
    """`value` with `function` applied to everything of type `kind` in nested tuples, lists and dictionaries."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map_nested(item, kind, function) for item in value)
    if isinstance(value, Mapping):
        return {key: _map_nested(item, kind, function) for key, item in value.items()}
    return value
