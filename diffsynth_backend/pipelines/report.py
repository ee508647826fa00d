"""What a loaded pipeline is, in words: which models were recognised, in which dtype, how large, where they live, and
what moves when they run.
"""
from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..core.vram.placement import DISK
from ..core.vram.planner import Plan
from ..diffusion import BasePipeline
from .families import family
from .handle import Decision, PipelineHandle, VramSettings, words


def describe(handle: PipelineHandle, pipe: BasePipeline, size: tuple[int, int] | None = None,
             decision: Decision | None = None) -> str:
    """A few lines of text for people; `size`: width and height (pixels) that are planned for, the family's if None."""
    kind = family(handle.family)
    lines = [f"{kind.title} · computes in {dtype_name(handle.torch_dtype)} on {handle.device}"]
    for model_name, attribute in kind.attributes.items():
        models = [named for named in pipe.named_models() if named[0] in kind.attributes_of(model_name)]
        if not models and model_name in kind.models:
            lines.append(f"{attribute}: not loaded")
        files = [source.files for source in handle.sources if model_name in source.model_names(handle.family)]
        lines += [f"{name}: {_describe_model(model, handle, pipe.files.get(name, paths))}"
                  for (name, model), paths in zip(models, files)]
    if handle.tokenizer is not None:
        lines.append(f"tokenizer: {Path(*Path(handle.tokenizer).parts[-2:])}")
    if decision is not None:
        lines.append(decision.describe())
    if handle.vram.vram_limit is not None:
        lines.append(f"limit: {handle.vram.vram_limit:g} GiB of {handle.device}, weights and the loop's computation")
    if handle.vram.ram_limit is not None:
        lines.append(ram_words(handle.vram.ram_limit))
    return "\n".join(lines + plan_or_why_not(pipe, *(size or kind.typical_size)))


def ram_words(ram_limit: float) -> str:
    """The limit (GiB) for layers of the disk, in words."""
    return f"RAM: {ram_limit:g} GiB for layers that would be read from disk in each step"


def plan_or_why_not(pipe: BasePipeline, width: int, height: int) -> list[str]:
    """`plan_lines`; where the limit is too low for this size, that. A smaller picture may still be drawn."""
    try:
        return plan_lines(pipe, width, height)
    except ValueError as error:
        return [f"{width}×{height} does not fit: {error}"]


def plan_lines(pipe: BasePipeline, width: int, height: int, cfg: bool = True) -> list[str]:
    """One line for each model whose weights move: what stays where, and what crosses in a step.

    For a picture of width × height pixels; `cfg`: with guidance. Raises ValueError for a limit that is too low for it.
    """
    return [_plan_line(name, plan, f"{width}×{height}") for name, plan in pipe.preview(height, width, cfg=cfg).items()]


def _plan_line(name: str, plan: Plan, size: str) -> str:
    if not plan.activation_bytes:
        return f"{name}: {plan.describe()}"
    return f"{name} at {size}: {plan.describe()}; about {words(plan.activation_bytes)} for the computation"


def _describe_model(model: nn.Module, handle: PipelineHandle, files: tuple[str, ...]) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    stored = handle.vram.offload_dtype if handle.vram.managed else handle.torch_dtype
    dtype = handle.torch_dtype if stored == DISK else stored
    size = words(count * dtype.itemsize)
    names = Path(files[0]).name + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    return f"{type(model).__name__}, {_count(count)} parameters, {size} {dtype_name(dtype)}, " \
           f"{placement_words(handle.vram, handle.device)} ({names})"


def placement_words(vram: VramSettings, device: str) -> str:
    """Where weights rest, and where they are while their model works."""
    if not vram.managed:
        return f"on {device}"
    rest = "on disk" if vram.offload_device == DISK else f"rests on {vram.offload_device}"
    work = vram.onload_device or device
    return rest if work == vram.offload_device else f"{rest}, works from {work}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _count(number: int) -> str:
    return f"{number / 10**9:.1f} billion" if number >= 10**9 else f"{number / 10**6:.1f} million"

