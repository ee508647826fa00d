"""Tensors that are not read yet: what a state dict converter gets when the weights stay on disk.

A converter is an ordinary function from state dict to state dict. Run on real tensors it would read the whole model;
run on `TensorReference`s it only leaves a recipe for each result: which stored tensors, and which slices,
concatenations, reshapes and multiples of them. `evaluate` follows a recipe later, reading just its leaves.

A reference is a meta tensor (shape and dtype are real, `isinstance(x, torch.Tensor)` holds) whose operations pass
through `__torch_function__`. Only those of one table can be recorded; anything else raises while the model is loaded,
not in the middle of a run. Recipes are plain picklable data, references live no longer than the converter runs.
"""

from __future__ import annotations

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
    """The recipe's tensor; `read` is called once for each stored tensor in it."""
    done: dict[int, Any] = {}

    def value(part: Recipe) -> Any:
        if id(part) not in done:
            done[id(part)] = read(part.info) if isinstance(part, Leaf) else replay(part)
        return done[id(part)]

    def replay(part: Operation) -> Any:
        arguments, keywords = _map_nested((part.arguments, part.keywords), (Leaf, Operation), value)
        return REPLAY[part.name](*arguments, **keywords)

    return value(recipe)


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
