"""Build a model without allocating or initialising its parameters.

How it works: torch calls a hook for every parameter that is assigned to a module. Ours answers, where the switch is on,
with an empty parameter on the "meta" device; the constructor's tensor is dropped at once. Everything that the
constructor then does to the parameter (`kaiming_uniform_` …) is shape arithmetic on meta and costs microseconds.

Why not `torch.device("meta")`: it redirects every factory, so buffers such as a rotary embedding's `inv_freq`, which no
file brings back, would be lost. Here only parameters are swapped; buffers and plain tensors are computed as always.

Why the constructor's own allocation costs nothing: layers make their parameters with `torch.empty`, which reserves
address space but touches no page, and it is released before the next layer is built. (A parameter made by
`torch.randn` is filled once; one such tensor at a time is the peak.)

The hook is installed once, with this module, and the switch is thread-local: a module that another thread builds
meanwhile keeps its weights. Off, it costs one attribute lookup per parameter.
"""
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import Parameter, is_lazy


class _Switch(threading.local):
    depth = 0  # of nested `with` blocks in this thread


_switch = _Switch()


def _register_on_meta(module: torch.nn.Module, name: str, parameter: Parameter) -> Parameter | None:
    """Registration hook. None leaves the parameter as it is: tied weights stay tied, lazy ones stay lazy."""
    if not _switch.depth or parameter is None or parameter.is_meta or is_lazy(parameter):
        return None
    return Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)


register_module_parameter_registration_hook(_register_on_meta)


@contextmanager
def skip_model_initialization() -> Iterator[None]:
    """Inside the block, modules that this thread builds have their parameters on "meta": shapes without storage.

    Fill them with `model.load_state_dict(state_dict, assign=True)`. Buffers are real. Blocks may be nested.
    """
    _switch.depth += 1
    try:
        yield
    finally:
        _switch.depth -= 1
