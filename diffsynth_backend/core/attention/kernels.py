"""Attention of optional packages: what each is called, what it takes, and how it wants its tensors.

Notable: a package is imported when it is asked for and never before, so a broken one breaks nothing else. What a kernel
does not take (a mask, a dtype, a head_dim, a device outside its row) goes to torch's, by this rule alone: a kernel that
fails at what its row says it takes is an error.
"""
from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HALVES = frozenset({torch.float16, torch.bfloat16})


class AttentionUnavailable(RuntimeError):
    """The chosen implementation's package is missing, or does not work here."""


def torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """PyTorch's own, which takes everything and picks flash, memory-efficient or cuDNN kernels by itself."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@dataclass(frozen=True)
class Kernel:
    """`function` of `module`; `pip` is what to install.

    call       (the function, q, k, v) → result; all tensors (B, heads, S, head_dim)
    dtypes, head_dims, devices  what it takes; besides, no mask
    """

    module: str
    function: str
    pip: str
    call: Callable[[Callable[..., Any], Tensor, Tensor, Tensor], Tensor]
    dtypes: frozenset[torch.dtype]
    head_dims: range
    devices: frozenset[str] = frozenset({"cuda"})

    def takes(self, q: Tensor, mask: Tensor | None) -> bool:
        return (mask is None and q.dtype in self.dtypes and q.shape[-1] in self.head_dims
                and q.device.type in self.devices)

    def load(self) -> Callable[..., Any]:
        """The function. Raises AttentionUnavailable, whatever the package's import raises."""
        try:
            return getattr(importlib.import_module(self.module), self.function)
        except ModuleNotFoundError as error:
            raise AttentionUnavailable(
                f"{self.module} is not installed ({error}): `pip install {self.pip}`, or choose torch") from error
        except Exception as error:  # a wheel built for another torch or CUDA fails in many ways
            raise AttentionUnavailable(
                f"{self.module} is installed but does not work here ({type(error).__name__}: {error}): install a build "
                f"for torch {torch.__version__} (`pip install --force-reinstall {self.pip}`), or choose torch"
            ) from error

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        function = self.load()  # also if this call is not for it, so that a missing package is known at the first one
        return self.call(function, q, k, v) if self.takes(q, mask) else torch_attention(q, k, v, mask)


def _tokens_first(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """For functions of (B, S, heads, head_dim); early FlashAttention 3 returns the softmax's sums, too."""
    out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _heads_first(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return function(q, k, v, tensor_layout="HND", is_causal=False)


EIGHTS = range(8, 257, 8)

KERNELS = {
    "flash_attention_2": Kernel("flash_attn", "flash_attn_func", "flash-attn --no-build-isolation", _tokens_first,
                                HALVES, EIGHTS),
    "flash_attention_3": Kernel(
        "flash_attn_interface", "flash_attn_func",
        "--no-build-isolation 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'", _tokens_first,
        HALVES, EIGHTS),
    "sage_attention": Kernel("sageattention", "sageattn", "sageattention", _heads_first, HALVES, range(1, 129)),
    "xformers": Kernel("xformers.ops", "memory_efficient_attention", "xformers", _tokens_first,
                       HALVES | {torch.float32}, EIGHTS),
}
