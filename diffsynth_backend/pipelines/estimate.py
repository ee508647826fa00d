"""What a pipeline would take, before anything is loaded: the plan that its loader would print, from headers alone.

Notable: models are built on meta and outlined as layers, and then the pipeline's own `preview` plans, so the numbers
cannot differ from those after loading. That costs a second for a large model, and hardly any memory.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from ..configs.model_configs import resolve
from ..configs.vram_management_module_maps import module_map_of
from ..core.loader.model import build_on_meta
from ..core.vram.disk_map import DiskMap
from ..core.vram.layers import outline_vram_management
from ..core.vram.placement import DISK, ResidencyBudget
from ..core.vram.planner import LimitTooLow
from ..diffusion import BasePipeline
from ..models.model_loader import DetectedModel, detect_models
from .families import family, pipeline_class
from .handle import Decision, PipelineHandle, VramSettings, weight_bytes_of
from .memory_map import LoopPlan, loop_plan
from .report import dtype_name


@dataclass(frozen=True)
class Estimate:
    """Figures for people. Weights rest on `rests_on` and work from `works_from`, each "disk" or a device. `plans`: by
    the names of the models whose weights move, for a picture of width × height pixels. Where the limit is too low there
    are none, and `floor_gib` is the least that would do."""

    weight_bytes: int
    dtype: str
    device: str
    rests_on: str
    works_from: str
    limit_gib: float | None
    ram_limit_gib: float | None
    decision: Decision | None
    width: int
    height: int
    plans: Mapping[str, LoopPlan] = field(default_factory=dict)
    floor_gib: float | None = None


def estimate(handle: PipelineHandle, size: tuple[int, int], decision: Decision | None = None) -> Estimate:
    """Weights and where they would be, the limit, and what stays and moves for a picture of `size` (width, height in
    pixels). The handle needs no tokenizer.

    Raises ModelFileError for files that are missing or of no known model, ValueError for settings that contradict each
    other.
    """
    vram, (width, height) = handle.vram, size
    stored = vram.offload_dtype if vram.managed else handle.torch_dtype
    dtype = handle.torch_dtype if stored == DISK else stored
    rests_on = str(vram.offload_device) if vram.managed else handle.device
    works_from = str(vram.onload_device or handle.device) if vram.managed else handle.device
    plans, floor_gib = _plans(handle, size) if vram.managed else ({}, None)
    return Estimate(sum(weight_bytes_of(source.files, dtype) for source in handle.sources), dtype_name(dtype),
                    handle.device, rests_on, works_from, vram.vram_limit, vram.ram_limit, decision, width, height,
                    plans, floor_gib)


def _plans(handle: PipelineHandle, size: tuple[int, int]) -> tuple[dict[str, LoopPlan], float | None]:
    """The plan of each model whose weights move, or the limit that it would take."""
    width, height = size
    try:
        plans = outline_pipeline(handle).preview(height, width)
    except LimitTooLow as error:
        return {}, error.floor_gib
    return {names: loop_plan(plan) for names, plan in plans.items()}, None


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
