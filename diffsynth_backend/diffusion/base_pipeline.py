"""What all pipelines share: loading, onloading, noise, pictures, and the denoising loop.

Notable: the loop lives here once. It reports every step, can be stopped between and within steps by an exception from
a callback, and leaves no model onloaded whatever ends it. `model_fn` gets what its signature names; a value that it
would have to drop is an error, because a misspelt or unsupported input must not vanish.
"""
from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..core import ModelConfig, attention
from ..core.device import available_device, check_available, empty_cache
from ..core.vram import Loop, Residency, offload_model
from ..core.vram.placement import DISK, is_managed_config
from ..core.vram.planner import Plan
from ..core.vram.timestep_table import Schedule
from ..models.model_loader import ModelPool
from ..utils.lora.files import read_lora
from ..utils.lora.formats import LoraFile, parse_lora
from ..utils.lora.matching import Layout, Match, match_lora
from ..utils.lora.stack import Lora, LoraStack
from ..utils.pictures import Picture, pixels, to_image
from .flow_match import FlowMatchScheduler
from .pipeline_unit import Inputs, PipelineUnit, PipelineUnitRunner

__all__ = ["BasePipeline", "PipelineUnit", "PipelineUnitRunner", "Step"]

logger = logging.getLogger(__name__)

MAX_PIXELS = 16384 * 16384
SEEDS = range(-2**63, 2**64)  # what torch's generators take
# Values that steer the loop itself or describe the request: no model_fn needs to take them.
BOOKKEEPING = frozenset({"cfg_scale", "num_inference_steps", "denoising_strength", "seed", "rand_device", "height",
                         "width", "noise", "input_latents", "progress_id"})


@dataclass(frozen=True)
class Step:
    """What a step callback sees after each step."""

    index: int  # 0 … total − 1
    total: int
    latents: Tensor  # after the step
    denoised: Tensor  # the current estimate of the finished latents


@dataclass(frozen=True)
class Stage:
    """Consecutive steps of a loop that run the same models.

    `models`: by the name under which `model_fn` takes it, the attribute that holds each.
    """

    steps: int
    models: Mapping[str, str]


class ModelNotLoaded(ValueError):
    """Something given needs a model that the pipeline does not have; `names` are the attributes that would hold it."""

    def __init__(self, message: str, names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.names = names


class BasePipeline(nn.Module):
    """Base class of all pipelines; the documents' "building a pipeline" describes how to write one.

    `device` is where models compute, `torch_dtype` what they compute in and what intermediates have.
    """

    model_names: Collection[str] | None = None  # the registry's, of models that it has a place for; None: any
    lora_layouts: Mapping[str, Layout] = {}  # by attribute, a published layout whose names LoRAs have, too

    def __init__(self, device: str | torch.device | None = None, torch_dtype: torch.dtype = torch.bfloat16,
                 height_division_factor: int = 16, width_division_factor: int = 16) -> None:
        super().__init__()
        attention.chosen()  # a misspelt setting is an error now, not after the first models have run
        self.device = available_device() if device is None else check_available(device)
        self.torch_dtype = torch_dtype
        self.height_division_factor = height_division_factor
        self.width_division_factor = width_division_factor
        self.scheduler: FlowMatchScheduler | None = None
        self.in_iteration_models: tuple[str, ...] = ()
        self.units: list[PipelineUnit] = []
        self.unit_runner = PipelineUnitRunner()
        self.model_fn: Callable[..., Tensor] | None = None
        self.vram_management_enabled = False
        self.announce: Callable[[list[nn.Module]], None] | None = None  # told which models are about to be used
        self.last_loops: list[Residency] = []  # of the last `denoise`, by stage: `plan` and `traffic` say what moved
        self.files: dict[str, tuple[str, ...]] = {}  # of attributes that share the name of a model: where it is from
        self._lora_stack = LoraStack()
        self._residencies: dict[tuple[str, ...], Residency] = {}
        self._looping: Residency | None = None

    # ---- models ---------------------------------------------------------------------------------------------------
    def download_and_load_models(self, model_configs: Iterable[ModelConfig] = (),
                                 vram_limit: float | None = None, ram_limit: float | None = None) -> ModelPool:
        """Resolve and load every config; unset computation fields become this pipeline's dtype and device.

        `vram_limit` (GiB of the device) and `ram_limit` (GiB of RAM in which layers wait that are read from disk) are
        for all of the models together. Raises ValueError where no model has a use for them, and what `ModelConfig` and
        `ModelPool` raise.
        """
        pool, configs = ModelPool(), list(model_configs)
        if vram_limit is not None and not any(is_managed_config(config.vram_config()) for config in configs):
            raise ValueError(f"vram_limit is {vram_limit!r}, but no model is managed: set offload_dtype and "
                             "offload_device in a ModelConfig, or leave vram_limit out")
        if ram_limit is not None and not any(DISK in (config.onload_device, config.onload_dtype)
                                             for config in configs):
            raise ValueError(f"ram_limit is {ram_limit!r}, but no model reads its layers from disk while it is in use: "
                             "set offload_device and onload_device to 'disk' in a ModelConfig, or leave ram_limit out")
        for config in configs:
            config.download_if_necessary()
            vram_config = config.vram_config()
            vram_config["computation_dtype"] = vram_config["computation_dtype"] or self.torch_dtype
            vram_config["computation_device"] = vram_config["computation_device"] or self.device
            pool.auto_load_model(config.path, vram_config=vram_config, vram_limit=vram_limit, ram_limit=ram_limit,
                                 clear_parameters=config.clear_parameters, state_dict=config.state_dict,
                                 model_name=config.model_name, wanted=self.model_names)
        return pool

    def check_vram_management_state(self) -> bool:
        """Whether any of the models moves its layers by itself."""
        return any(getattr(model, "vram_management_enabled", False) for _, model in self.named_models())

    def named_models(self) -> list[tuple[str, nn.Module]]:
        """The loaded models; a list of models (several ControlNets) counts each under the list's name."""
        found = []
        for name, child in self.named_children():
            members = child if isinstance(child, nn.ModuleList) else [child]
            found += [(name, member) for member in members]
        return found

    def check_loaded(self, model_names: Iterable[str]) -> None:
        """Raises ModelNotLoaded, a ValueError, when a named model is not loaded."""
        if missing := sorted(name for name in set(_as_names(model_names)) if getattr(self, name, None) is None):
            raise ModelNotLoaded(f"{type(self).__name__} needs {', '.join(missing)}, which is not loaded: "
                                 "add its files to model_configs", tuple(missing))

    def load_models_to_device(self, model_names: Iterable[str] = ()) -> None:
        """Onload the named models and offload the others. Does nothing for models without VRAM management.

        Raises ModelNotLoaded when a named model is not loaded.
        """
        names = self._offload_others(model_names)
        empty_cache(self.device)
        self._residency(names).onload()

    def _offload_others(self, model_names: Iterable[str]) -> tuple[str, ...]:
        names = tuple(sorted(set(_as_names(model_names))))
        self.check_loaded(names)
        for together, residency in self._residencies.items():
            if together != names:
                residency.offload()
        for name, model in self.named_models():
            if name not in names:
                offload_model(model)
        if self.announce is not None:
            self.announce([model for name, model in self.named_models() if name in names])
        return names

    def _residency(self, names: tuple[str, ...]) -> Residency:
        """What keeps the named models together while they are in use; it remembers in which order layers are visited.
        """
        models = [model for name, model in self.named_models() if name in names]
        if names not in self._residencies or not self._residencies[names].serves(models):
            self._residencies[names] = Residency(models)
        return self._residencies[names]

    def preview(self, height: int, width: int, batch: int = 1, cfg: bool = True) -> dict[str, Plan]:
        """By name, the plan that each model would get now; only of models whose weights move. Touches no weight.

        The models of the loop share a plan, under all of their names: for `batch` pictures of height × width pixels,
        with two sides if `cfg`. Raises ValueError for a limit below what the computation needs.
        """
        loaded = [name for name, _ in self.named_models()]
        together = [tuple(sorted(set(names))) for names in self.models_together()]
        group_of = {name: names for names in together for name in names}
        loops = {group_of.get(name, (name,)): Loop(steps=1) for name in loaded}
        latents = self.typical_latents(height, width, batch)
        for names in together:
            if names and set(names) <= set(loaded):
                activations = 0 if latents is None else self.activation_bytes(latents, {})
                loops[names] = Loop(1, 2 if cfg else 1, activations)
        plans = {", ".join(names): self._residency(names).preview(loop) for names, loop in loops.items()}
        return {names: plan for names, plan in plans.items() if plan is not None}

    # ---- LoRA -----------------------------------------------------------------------------------------------------
    def load_lora(self, module: nn.Module, lora_config: ModelConfig | str | None = None, alpha: float = 1.0,
                  hotload: bool | None = None, state_dict: Mapping[str, Tensor] | None = None) -> Lora:
        """Add a LoRA (or LoHa, LoKr, with or without DoRA's magnitudes) to a model, beside those that it has.

        `lora_config` is a file or the configuration of one, `state_dict` its content instead; `alpha` is the strength.
        Hot (`hotload` True, and unless something else is said) it acts while the layers compute: with every VRAM
        setting and storage dtype, and it is gone without a trace when it is cleared. Fused (False) it is added to the
        weights, which saves a little time; the original weights are then kept in RAM, and the model must not be managed
        nor stored in fp8. Returns what `clear_lora` takes away again.
        Raises LoraError for a file that does not fit the model or contradicts itself, ModelFileError for one that
        cannot be read, RuntimeError while the loop runs.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"load_lora needs the model that the LoRA is for, such as pipe.dit, got {module!r}")
        if (lora_config is None) == (state_dict is None):
            raise ValueError("load_lora needs either a file (lora_config) or a state_dict")
        file = _lora_file(lora_config) if state_dict is None else parse_lora(state_dict, "the LoRA's state dict")
        name = next((name for name, model in self.named_models() if model is module), type(module).__name__)
        lora = Lora(match_lora(file, [(name, module)], self.lora_layouts), alpha, fused=hotload is False)
        logger.info("%s", lora.match.describe())
        self._put_loras([*self._lora_stack.loras, lora])
        return lora

    def clear_lora(self, *loras: Lora) -> None:
        """Take these LoRAs away, all if none is named: every layer computes again what it did without them.

        Raises ValueError for one that is not there, RuntimeError while the loop runs.
        """
        for lora in loras:
            if lora not in self._lora_stack.loras:
                raise ValueError(f"{lora.match.file.title} is not among this pipeline's LoRAs: it was cleared before")
        self._put_loras([lora for lora in self._lora_stack.loras if loras and lora not in loras])

    def set_loras(self, files: Iterable[tuple[LoraFile, float]]) -> None:
        """Have exactly these LoRAs, each at its strength, hot, on all models that they are for. Raises as `load_lora`.
        """
        self._put_loras([Lora(self.match_lora(file), strength) for file, strength in files])

    def match_lora(self, file: LoraFile) -> Match:
        """Which layers of the loaded models a LoRA is for. Raises LoraError if it fits none."""
        loop_first = sorted(self.named_models(), key=lambda named: named[0] not in self.in_iteration_models)
        return match_lora(file, loop_first, self.lora_layouts)

    def _put_loras(self, loras: list[Lora]) -> None:
        if self._looping is not None:
            raise RuntimeError("LoRAs cannot be changed while the loop runs: do it before or after")
        self.load_models_to_device([])
        self._lora_stack.put(loras)

    # ---- sizes, noise, pictures -----------------------------------------------------------------------------------
    def check_resize_height_width(self, height: int, width: int) -> tuple[int, int]:
        """Height and width rounded up to what the models can draw; says so when that changes them."""
        for name, value in (("height", height), ("width", width)):
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 1 or value != int(value):
                raise ValueError(f"{name} must be a positive whole number of pixels, got {value!r}")
        if height * width > MAX_PIXELS:
            raise ValueError(f"{height}×{width} is more than {MAX_PIXELS} pixels; ask for a smaller picture")
        rounded = (_round_up(int(height), self.height_division_factor),
                   _round_up(int(width), self.width_division_factor))
        if rounded != (height, width):
            logger.info("height × width %d×%d rounded up to %d×%d (multiples of %d and %d)", height, width, *rounded,
                        self.height_division_factor, self.width_division_factor)
        return rounded

    def generate_noise(self, shape: tuple[int, ...], seed: int | None = None, rand_device: str = "cpu",
                       rand_torch_dtype: torch.dtype = torch.float32, device: torch.device | None = None,
                       torch_dtype: torch.dtype | None = None) -> Tensor:
        """Gaussian noise; drawn on `rand_device` so that a seed means the same picture on every machine.

        Raises ValueError for a seed that is no whole number in −2⁶³…2⁶⁴ − 1, and for a device that is not there.
        """
        check_available(rand_device)
        generator = None if seed is None else torch.Generator(rand_device).manual_seed(check_seed(seed))
        noise = torch.randn(shape, generator=generator, device=rand_device, dtype=rand_torch_dtype)
        return noise.to(dtype=torch_dtype or self.torch_dtype, device=device or self.device)

    def preprocess_image(self, image: Picture, channels: int = 3) -> Tensor:
        """Picture → (1, channels, H, W) in −1…1, of the pipeline's dtype and device; see `pixels` for the channels."""
        return (pixels(image, channels) * 2 - 1).to(dtype=self.torch_dtype, device=self.device)

    def vae_output_to_image(self, vae_output: Tensor) -> Image.Image:
        """(1, 3 or 4, H, W) in −1…1 → picture, clipped and rounded to 8 bits."""
        return to_image(vae_output[0])

    # ---- units ----------------------------------------------------------------------------------------------------
    def run_units(self, inputs_shared: Inputs, inputs_posi: Inputs, inputs_nega: Inputs,
                  units: Iterable[PipelineUnit] | None = None) -> tuple[Inputs, Inputs, Inputs]:
        """Run the units in their order; returns new dicts."""
        for unit in self.units if units is None else units:
            inputs_shared, inputs_posi, inputs_nega = self.unit_runner(unit, self, inputs_shared, inputs_posi,
                                                                       inputs_nega)
        return inputs_shared, inputs_posi, inputs_nega

    # ---- the loop -------------------------------------------------------------------------------------------------
    def call_model_fn(self, **inputs: Any) -> Tensor:
        """`model_fn` with the inputs that its signature names; all of them when it takes `**kwargs`.

        Raises TypeError for a value (not None) that it does not take and that neither a unit nor the loop consumes.
        """
        parameters = _parameters(self.model_fn)
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return self.model_fn(**inputs)
        consumed = BOOKKEEPING.union(*(unit.reads() for unit in self.units))
        dropped = sorted(name for name, value in inputs.items()
                         if name not in parameters and name not in consumed and value is not None)
        if dropped:
            raise TypeError(f"{self.model_fn.__name__} does not take {', '.join(dropped)}: "
                            "the value would be ignored; add the parameter or do not give it")
        return self.model_fn(**{name: value for name, value in inputs.items() if name in parameters})

    def cfg_guided_model_fn(self, cfg_scale: float, inputs_shared: Inputs, inputs_posi: Inputs, inputs_nega: Inputs,
                            cfg_norm: bool = False, **inputs: Any) -> Tensor:
        """The prediction with classifier-free guidance: nega + s·(posi − nega); one pass only when s = 1.

        `cfg_norm` rescales the result, token by token, to the length of the positive prediction, as diffusers does.
        """
        sides = [inputs_posi] if cfg_scale == 1 else [inputs_posi, inputs_nega]
        positive, *others = self.predict_sides(inputs_shared, sides, **inputs)
        if not others:
            return positive
        negative, = others
        guided = negative + cfg_scale * (positive - negative)
        return self.rescale_guided(guided, positive) if cfg_norm else guided

    def predict_sides(self, inputs_shared: Inputs, sides: Sequence[Inputs], **inputs: Any) -> list[Tensor]:
        """The prediction for each side of a step."""
        return self._run_sides([partial(self.call_model_fn, **inputs_shared, **side, **inputs) for side in sides])

    def _run_sides(self, passes: list[Callable[[], Tensor]]) -> list[Tensor]:
        """The results of the forward passes of a step; they share each visit of a layer that is streamed."""
        return [run() for run in passes] if self._looping is None else self._looping.run(passes)

    def rescale_guided(self, guided: Tensor, positive: Tensor) -> Tensor:
        """Norm-preserving guidance; families whose published pipelines have it say over which elements."""
        raise ValueError(f"{type(self).__name__} has no cfg_norm; leave it off")

    def step(self, scheduler: FlowMatchScheduler, latents: Tensor, progress_id: int, noise_pred: Tensor,
             **_: Any) -> Tensor:
        """The latents after one scheduler step. Takes all shared inputs, so that a subclass can blend some in."""
        return scheduler.step(noise_pred, scheduler.timesteps[progress_id], latents, progress_id=progress_id)

    def denoise(self, inputs_shared: Inputs, inputs_posi: Inputs, inputs_nega: Inputs, cfg_scale: float = 1.0,
                cfg_norm: bool = False, progress_bar_cmd: Callable[[Iterable], Iterable] = iter,
                step_callback: Callable[[Step], None] | None = None) -> Inputs:
        """Run the loop over the scheduler's timesteps; returns the shared inputs with the finished `latents`.

        `step_callback` is called after each step. Whatever it or `progress_bar_cmd` raises ends the loop, and the
        models are offloaded before the exception goes on. When the device is out of memory, the step is done again from
        the same latents with fewer layers kept there; only with none left does that raise.
        """
        check_cfg_scale(cfg_scale)
        total = len(self.scheduler.timesteps)
        shared = {name: value for name, value in inputs_shared.items() if name != "num_inference_steps"}
        stages = self.loop_stages(shared)
        starts = dict(zip(accumulate((stage.steps for stage in stages), initial=0), stages))
        self.last_loops = []
        try:
            with ExitStack() as onloaded:
                for progress_id, timestep in enumerate(progress_bar_cmd(self.scheduler.timesteps)):
                    if progress_id in starts:
                        onloaded.close()
                        stage = starts[progress_id]
                        models = {name: getattr(self, attribute) for name, attribute in stage.models.items()}
                        self._looping = weights = onloaded.enter_context(
                            self._loop(stage, shared, inputs_posi, sides=1 if cfg_scale == 1 else 2))
                        self.last_loops.append(weights)
                    latents = shared["latents"]
                    at_device = timestep.unsqueeze(0).to(self.device)
                    weights.now_at(at_device, float(timestep))
                    noise_pred = weights.with_room(partial(
                        self.cfg_guided_model_fn, cfg_scale, shared, inputs_posi, inputs_nega, cfg_norm=cfg_norm,
                        **models, timestep=at_device, progress_id=progress_id, num_inference_steps=total))
                    shared["latents"] = self.step(self.scheduler, progress_id=progress_id, noise_pred=noise_pred,
                                                  **shared)
                    if step_callback is not None:
                        denoised = latents - float(self.scheduler.sigmas[progress_id]) * noise_pred
                        step_callback(Step(progress_id, total, shared["latents"], denoised))
        finally:
            self._looping = None
            self.load_models_to_device([])
        return shared

    @property
    def last_loop(self) -> Residency | None:
        """Of the last stage of the last `denoise`; None before the first."""
        return self.last_loops[-1] if self.last_loops else None

    def loop_stages(self, inputs_shared: Inputs) -> tuple[Stage, ...]:
        """The loop over these inputs: one stage with `loop_models`, unless a subclass has models that take turns. A
        stage's models are offloaded before the next one's are onloaded.
        """
        return (Stage(len(self.scheduler.timesteps), {name: name for name in self.loop_models(inputs_shared)}),)

    def loop_models(self, inputs_shared: Inputs) -> tuple[str, ...]:
        """The models that a loop over these inputs runs: all of the loop's, unless a subclass knows of idle ones."""
        return self.in_iteration_models

    def models_together(self) -> tuple[tuple[str, ...], ...]:
        """Which of the loop's models are in use at the same time: all, unless a subclass has some that take turns."""
        return (self.in_iteration_models,)

    def _loop(self, stage: Stage, shared: Inputs, side: Inputs, sides: int) -> AbstractContextManager[Residency]:
        """The models of a stage, with what is known of it; `side` are the inputs of one of its sides."""
        names = self._offload_others(stage.models.values())
        empty_cache(self.device)
        latents = shared["latents"]
        schedule = Schedule(self.model_timesteps(shared), self.model_batch(shared), latents.dtype)
        activations = self.activation_bytes(latents, {**shared, **side})
        return self._residency(names).loop(Loop(stage.steps, sides, activations, schedule))

    def model_batch(self, shared: Inputs) -> int:
        """How many pictures a call of the model in a loop over these inputs is about."""
        return len(shared["latents"])

    def typical_latents(self, height: int, width: int, batch: int) -> Tensor | None:
        """What a loop for `batch` results of so many pixels starts from, on meta, for estimates; None: unknown."""
        return None

    def model_timesteps(self, shared: Inputs) -> tuple[Tensor, ...]:
        """All timesteps (0-dim tensors) at which a loop over these inputs calls its models: the scheduler's, and those
        that a subclass knows of besides. One that is left out is computed in every step.
        """
        return tuple(self.scheduler.timesteps)

    def activation_bytes(self, latents: Tensor, inputs: Inputs) -> int:
        """Estimate of what one forward pass of the loop takes of the device besides weights; 0: unknown.

        `inputs`: of `model_fn`, empty where they are not known yet.
        """
        return 0


def check_seed(seed: int) -> int:
    """The seed. Raises ValueError unless it is a whole number that torch's generators take."""
    if not isinstance(seed, int) or seed not in SEEDS:
        raise ValueError(f"seed must be a whole number in {SEEDS.start}…{SEEDS.stop - 1}, got {seed!r}")
    return seed


def check_cfg_scale(cfg_scale: float) -> None:
    """Raises ValueError for a guidance scale that is not finite."""
    if not math.isfinite(cfg_scale):
        raise ValueError(f"cfg_scale must be a finite number, got {cfg_scale!r}")


@lru_cache(maxsize=16)
def _parameters(model_fn: Callable[..., Tensor]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model_fn).parameters


def _as_names(model_names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(model_names, str):
        raise TypeError(f"model names must be a list, got the string {model_names!r}")
    return tuple(model_names)


def _lora_file(lora_config: ModelConfig | str) -> LoraFile:
    if isinstance(lora_config, ModelConfig):
        lora_config.download_if_necessary()
        return read_lora(lora_config.path)
    return read_lora(lora_config)


def _round_up(value: int, factor: int) -> int:
    return -(-value // factor) * factor
