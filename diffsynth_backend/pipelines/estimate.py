"""What a pipeline would take, before anything is loaded: the plan that its loader would print, from headers alone.

Notable: models are built on meta and outlined as layers, and then the pipeline's own `preview` plans, so the numbers
cannot differ from those after loading. That costs a second for a large model, and hardly any memory.
"""
from __future__ import annotations

from torch import nn

from ..configs.model_configs import resolve
from ..configs.vram_management_module_maps import module_map_of
from ..core.loader.model import build_on_meta
from ..core.vram.disk_map import DiskMap
from ..core.vram.layers import outline_vram_management
from ..core.vram.placement import DISK, ResidencyBudget
from ..diffusion import BasePipeline
from ..models.model_loader import DetectedModel, detect_models
from .families import family, pipeline_class
from .handle import Decision, PipelineHandle, VramSettings, weight_bytes_of, words
from .report import dtype_name, placement_words, plan_or_why_not, ram_words


def estimate(handle: PipelineHandle, size: tuple[int, int], decision: Decision | None = None) -> list[str]:
    """Lines for people: weights and where they would be, the limit, and what stays and moves for a picture of `size`
    (width, height in pixels).

    The handle needs no tokenizer. Raises ModelFileError for files that are missing or of no known model, ValueError for
    settings that contradict each other.
    """
    stored = handle.vram.offload_dtype if handle.vram.managed else handle.torch_dtype
    dtype = handle.torch_dtype if stored == DISK else stored
    nbytes = sum(weight_bytes_of(source.files, dtype) for source in handle.sources)
    lines = [f"{words(nbytes)} of weights in {dtype_name(dtype)}, {placement_words(handle.vram, handle.device)}"]
    if decision is not None:
        lines.append(decision.describe())
    if handle.vram.vram_limit is not None:
        lines.append(f"limit: {handle.vram.vram_limit:g} GiB of {handle.device}")
    if handle.vram.ram_limit is not None:
        lines.append(ram_words(handle.vram.ram_limit))
    if handle.vram.managed:
        lines += plan_or_why_not(outline_pipeline(handle), *size)
    return lines


def outline_pipeline(handle: PipelineHandle) -> BasePipeline:
    """The pipeline with models that have sizes and no weights, to plan with. Raises as `estimate`."""
    kind = family(handle.family)
    pipe = pipeline_class(handle.family)(device=handle.device, torch_dtype=handle.torch_dtype)
    budget = ResidencyBudget.from_gib(handle.vram.vram_limit, handle.vram.ram_limit)
    models: dict[str, list[nn.Module]] = {}
    for source in handle.sources:
        for found in detect_models(source.files):
            if found.name in kind.attributes:
                models.setdefault(found.name, []).append(_outline(found, handle.vram, budget))
    for name, outlined in models.items():
        if name in kind.several:  # they take part in the loop
            setattr(pipe, kind.attributes[name], nn.ModuleList(outlined))
            pipe.in_iteration_models = (*pipe.in_iteration_models, kind.attributes[name])
            continue
        for attribute, model in zip(kind.attributes_of(name), outlined):
            setattr(pipe, attribute, model)
    return pipe


def _outline(found: DetectedModel, vram: VramSettings, budget: ResidencyBudget) -> nn.Module:
    model_class = resolve(found.row["model_class"])
    model = build_on_meta(model_class, found.row.get("extra_kwargs")).requires_grad_(False)
    stored = DiskMap(found.paths, state_dict_converter=found.converter)
    return outline_vram_management(model, module_map_of(model_class), vram.fields(), budget, stored)
