"""The steps of a run one by one, as a graph takes them: encode prompts, denoise, decode, encode.

Notable: every function takes a handle and borrows the weights from their owner for the time of the call, and leaves no
model onloaded whatever ends it. Values go in and out as other programs have them: raw latents (float32, on the CPU),
pictures (B, H, W, 3) in 0…1.
"""
from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion import BasePipeline, FlowMatchScheduler, Step
from ..diffusion.base_pipeline import ModelNotLoaded
from ..diffusion.bundle import InputBundle, run_pending, run_ready, run_settled
from ..diffusion.pipeline_unit import Inputs
from ..utils.masks import latent_mask
from ..utils.pictures import resized, size_of
from .families import family
from .handle import LoraChoice, PipelineHandle
from .locate import parts_for
from .lora import LoraState, check, lora_state, schedule_hint
from .owner import WeightsOwner, owner

logger = logging.getLogger(__name__)

Progress = Callable[[Iterable], Iterable]
MAX_BATCH = 4096
# Inputs that differ from one run of a graph to the next; what depends on none of them is computed once.
OF_A_RUN = ("input_latents", "batch_size", "batch_index", "inpaint_mask", "cfg_scale", "seed", "rand_device")
KNOWN_NAMED = 4  # of the known models that a missing one could be


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Prompts as a pipeline's inputs, with the handle of the pipeline that encoded them."""

    handle: PipelineHandle
    bundle: InputBundle


@dataclass(frozen=True)
class Steps:
    """A schedule of the family's kind: `count` steps, from `strength` in (0, 1] of the noise down to none.

    `template` is another of the scheduler's (a distilled model's). A shift that replaces its own is `mu` for families
    whose shift is e^μ, and `shift` for the others.
    """

    count: int
    strength: float = 1.0
    template: str | None = None
    mu: float | None = None
    shift: float | None = None

    adds_noise = True

    def apply(self, pipe: BasePipeline, height: int, width: int) -> None:
        if self.template is not None and self.template not in pipe.scheduler_templates:
            raise ValueError(f"the schedule {self.template} is not for a {type(pipe).__name__}, which has "
                             f"{', '.join(pipe.scheduler_templates)}: choose one of its own")
        given = {"exponential_shift_mu": self.mu, "sigma_shift": self.shift}
        own = given.pop(pipe.shift_option)
        if any(value is not None for value in given.values()):
            raise ValueError(f"{type(pipe).__name__} takes its shift as {pipe.shift_option}, and {', '.join(given)} "
                             "was given: leave it out")
        pipe.scheduler = FlowMatchScheduler(self.template or pipe.scheduler_template)
        pipe.set_schedule(height, width, self.count, self.strength, **{pipe.shift_option: own})


@dataclass(frozen=True)
class Sigmas:
    """A given schedule: one value more than there are steps, falling; the last one is where the loop ends.

    Without `adds_noise` the latent is one that still has the noise of the first sigma, left by another sampler.
    """

    values: tuple[float, ...]
    adds_noise: bool = True

    def apply(self, pipe: BasePipeline, height: int, width: int) -> None:
        if len(self.values) < 2:
            raise ValueError(f"SIGMAS has {len(self.values)} values, which makes no step: at least 2 expected. "
                             "A scheduler with denoise 0 gives that")
        pipe.scheduler.set_sigmas(torch.tensor(self.values[:-1]), final_sigma=self.values[-1])


@contextmanager
def borrowed(handle: PipelineHandle, weights: WeightsOwner, *models: str) -> Iterator[BasePipeline]:
    """The pipeline, which has the named models, for a calculation that no gradients are wanted of.

    The program around us hears of each model before it is used.
    """
    with weights.use(handle) as pipe, torch.no_grad(), ExitStack() as at_work:
        known: list[nn.Module] = []

        def announce(models: list[nn.Module]) -> None:
            if models == known:
                return
            at_work.close()
            known[:] = models
            if models:
                at_work.enter_context(weights.memory.in_use(handle, models))

        pipe.announce = announce
        try:
            pipe.check_loaded(models)
            yield pipe
        except ModelNotLoaded as error:
            raise ValueError(_what_to_load(handle, error.names)) from error
        finally:
            pipe.load_models_to_device([])
            pipe.announce = None


def _what_to_load(handle: PipelineHandle, names: Sequence[str]) -> str:
    wanted = ", ".join(family(handle.family).model_of(name) for name in names)
    known = [part for name in names for part in parts_for(name, handle.family)[:KNOWN_NAMED]]
    return (f"this needs the pipeline's {', '.join(names)}, and none was loaded (only {handle.titles()}): add a Model "
            f"Config with the file of a {wanted} to the Model Loader, such as {', '.join(known)}")


def encode_prompts(handle: PipelineHandle, positive: str, negative: str, weights: WeightsOwner = owner,
                   conditioning: Conditioning | None = None) -> Conditioning:
    """Both prompts encoded, as part of a conditioning if there is one; what depends on more is left to `sample`."""
    with borrowed(handle, weights, "text_encoder") as pipe:
        bundle = _bundle(pipe, handle, conditioning).given(pipe, positive={"prompt": positive},
                                                           negative={"negative_prompt": negative})
        return Conditioning(handle, run_ready(pipe, bundle))


def give(handle: PipelineHandle, inputs: Inputs, weights: WeightsOwner = owner,
         conditioning: Conditioning | None = None) -> Conditioning:
    """A conditioning with more shared inputs of the pipeline; units that now have all they need run at once.

    Raises ValueError for an input that is there already: a second one would replace it.
    """
    with borrowed(handle, weights) as pipe:
        bundle = _bundle(pipe, handle, conditioning)
        if twice := sorted(inputs.keys() & bundle.names()):
            raise ValueError(f"the conditioning has {', '.join(twice)} already, and a pipeline takes that once: leave "
                             "one of the two nodes out")
        return Conditioning(handle, run_ready(pipe, bundle.given(pipe, shared=inputs)))


def with_alpha(picture: Tensor, mask: Tensor | None) -> Tensor:
    """A picture (H, W, 3 or 4) with transparency where a mask (h, w) of any size is 1, as ComfyUI has it: (H, W, 4).

    Without a mask the picture stays as it is. Raises ValueError for a mask beside a picture that has transparency.
    """
    if mask is None:
        return picture
    if picture.shape[-1] != 3:
        raise ValueError("the image has an alpha channel, and there is a mask for one: leave out one of the two")
    return torch.cat([picture, 1 - resized(mask, *size_of(picture))[..., None].to(picture)], dim=-1)


def _bundle(pipe: BasePipeline, handle: PipelineHandle, conditioning: Conditioning | None) -> InputBundle:
    if conditioning is None:
        return InputBundle.empty(pipe)
    check_same_encoder(conditioning.handle, handle)
    return conditioning.bundle


def sample(handle: PipelineHandle, conditioning: Conditioning, latents: Tensor, schedule: Steps | Sigmas,
           seed: int, cfg_scale: float, cfg_norm: bool = False, batch_index: Sequence[int] | None = None,
           noise_mask: Tensor | None = None, step_callback: Callable[[Step], None] | None = None,
           weights: WeightsOwner = owner, report: Callable[[str], None] | None = None) -> Tensor:
    """Denoise raw latents (B, 16, h, w) or (B, 16, 1, h, w) into (B, 16, 1, h, w); layers are kept, if there are any.

    One generator, on the CPU, draws the noise of the whole batch from `seed`; `batch_index` says which of a larger
    batch's noise each picture gets. `noise_mask` (B, H, W) or (B, 1, H, W), of any size, is 1 where the latents are to
    be redrawn. `step_callback` sees each step; raising in it ends the loop. `report` gets a line if the LoRAs and the
    schedule do not fit, and one about what was moved, if weights were streamed.
    Raises ValueError for a conditioning, latents or a schedule that do not fit the pipeline.
    """
    check_same_encoder(conditioning.handle, handle)
    _check_batch(len(latents), batch_index)
    with borrowed(handle, weights, "dit") as pipe:
        _hint(pipe, handle, schedule, cfg_scale, report)
        start = pipe.import_latents(latents)
        size = pipe.size_inputs(start)
        schedule.apply(pipe, size["height"], size["width"])
        of_this_run = {**_mask_inputs(pipe, handle, conditioning.bundle, latents, noise_mask, schedule),
                       "input_latents": start, "batch_size": len(start), "batch_index": batch_index,
                       "cfg_scale": cfg_scale, "seed": seed, "rand_device": "cpu"}
        bundle = _of_size(pipe, handle, conditioning, size)
        if "input_latents" in bundle.names():
            raise ValueError("the conditioning has a picture or a video to start from, and the latent is one, too: "
                             "leave it out of the conditioning, and encode it for the latent")
        shared, posi, nega = run_pending(pipe, bundle.given(pipe, shared=of_this_run))
        pipe.check_prompt_width(posi[pipe.prompt_input].shape[-1])
        if not schedule.adds_noise:
            clean = torch.zeros_like(shared["noise"])
            if clean.shape[1:] != start.shape[1:]:
                raise ValueError("reference pictures are drawn from noise beside the video, and the latent is one that "
                                 "another sampler began: add the noise here, or leave the references out")
            shared["latents"] = pipe.scheduler.add_noise(start, clean, pipe.scheduler.timesteps[0])
        shared = pipe.denoise(shared, posi, nega, cfg_scale=cfg_scale, cfg_norm=cfg_norm, step_callback=step_callback)
        for loop in pipe.last_loops if report is not None else ():
            if loop.traffic.moved_bytes:
                report(loop.traffic.describe())
        # Noise that is left is kept as ComfyUI's samplers do for flow models: the picture's share at full weight.
        return pipe.export_latents(shared["latents"].float() / (1 - pipe.scheduler.final_sigma))


@dataclass(frozen=True, eq=False)
class _Sized:
    """A conditioning's bundle with a size, and everything that follows from both; `of` says for which pipeline."""

    of: tuple[PipelineHandle, LoraState, Inputs]
    bundle: InputBundle


# By the bundle without a size, as long as a graph keeps that: guides are encoded once for all seeds.
_sized: weakref.WeakKeyDictionary[InputBundle, _Sized] = weakref.WeakKeyDictionary()


def _of_size(pipe: BasePipeline, handle: PipelineHandle, conditioning: Conditioning, size: Inputs) -> InputBundle:
    of = handle.weights, lora_state(handle.loras), size
    kept = _sized.pop(conditioning.bundle, None)
    if kept is None or kept.of != of:
        checked = conditioning.handle.models == handle.models
        bundle = conditioning.bundle if checked else conditioning.bundle.unchecked(pipe)
        del kept  # before the next one is made
        kept = _Sized(of, run_settled(pipe, bundle.given(pipe, shared=size), to_come=OF_A_RUN))
    _sized[conditioning.bundle] = kept
    return kept.bundle


def _hint(pipe: BasePipeline, handle: PipelineHandle, schedule: Steps | Sigmas, cfg_scale: float,
          report: Callable[[str], None] | None) -> None:
    """Warn of LoRAs made for another schedule. What a given list of sigmas was made for cannot be known."""
    if isinstance(schedule, Sigmas):
        return
    hint = schedule_hint(handle.loras, schedule.template or pipe.scheduler_template, schedule.count, cfg_scale)
    if hint is not None:
        logger.warning("%s", hint)
        if report is not None:
            report(hint)


def _mask_inputs(pipe: BasePipeline, handle: PipelineHandle, bundle: InputBundle, latents: Tensor,
                 noise_mask: Tensor | None, schedule: Steps | Sigmas) -> Inputs:
    """The mask of a latent as an input. Raises ValueError for a second one, where it would keep nothing of use, and if
    the pipeline takes none."""
    if noise_mask is not None and not any("inpaint_mask" in unit.reads() for unit in pipe.units):
        kind = family(handle.family)
        raise ValueError(f"the latent has a mask, which a {kind.title} pipeline does not take: "
                         f"{kind.instead_of_mask or 'remove it'}")
    in_bundle = "inpaint_mask" in bundle.names()
    if noise_mask is not None and in_bundle:
        raise ValueError("both the conditioning (Inpaint) and the latent (Set Latent Noise Mask) have a mask: use one")
    if (noise_mask is not None or in_bundle) and not latents.any():
        raise ValueError("there is a mask, and the latent is empty: what the mask leaves alone comes from the latent, "
                         "so connect the picture to change through a VAE Encode")
    if (noise_mask is not None or in_bundle) and not schedule.adds_noise:
        raise ValueError("there is a mask, and add_noise is off: what the mask leaves alone would come from a latent "
                         "that still has noise in it. Denoise a masked picture in one run")
    return {} if noise_mask is None else {"inpaint_mask": latent_mask(noise_mask, *reversed(latents.shape[-2:]))}


def check_same_encoder(encoded: PipelineHandle, used: PipelineHandle) -> None:
    """Raises ValueError for prompts encoded by another kind of pipeline, or by another text encoder."""
    if encoded.family != used.family:
        raise ValueError(f"the prompt was encoded for {family(encoded.family).title} and the pipeline is "
                         f"{family(used.family).title}: connect Prompt Encode to the pipeline that denoises")
    ours, theirs = used.text_encoder_files, encoded.text_encoder_files
    if ours and ours != theirs:
        raise ValueError(f"the prompt was encoded with {', '.join(theirs)} and the pipeline has the text encoder "
                         f"{', '.join(ours)}: connect Prompt Encode to the pipeline that denoises")


def _check_batch(size: int, batch_index: Sequence[int] | None) -> None:
    if batch_index is None:
        return
    if len(batch_index) != size or not all(0 <= index < MAX_BATCH for index in batch_index):
        raise ValueError(f"batch_index {list(batch_index)} does not fit a batch of {size}: "
                         f"one number in 0…{MAX_BATCH - 1} for each picture expected")


@dataclass(frozen=True)
class Tiles:
    """How the autoencoder works in parts: the side of a tile, and from one to the next, in pixels of the picture."""

    size: int = 1024
    stride: int = 768

    def options(self, pipe: BasePipeline) -> dict[str, Any]:
        """The pipeline's arguments, which are in latent pixels. Raises ValueError for less than one of these."""
        factor = pipe.vae_factor
        if min(self.size, self.stride) < factor:
            raise ValueError(f"tiles of {self.size} pixels, {self.stride} apart, are finer than the latent, where one "
                             f"stands for {factor}×{factor}: make the tiles larger, or let them overlap less")
        return {"tiled": True, "tile_size": self.size // factor, "tile_stride": self.stride // factor}


def decode_latents(handle: PipelineHandle, latents: Tensor, tiles: Tiles | None = None, progress: Progress = iter,
                   weights: WeightsOwner = owner) -> Tensor:
    """Raw latents → pictures (B, H, W, 3) in 0…1, one after the other, with `tiles` each in parts.

    Layered models give (B·layers, H, W, 4), with transparency: the layers of each picture in turn. Video models give
    (B·frames, H, W, 3), the frames of each video in turn; their progress counts parts of a video.
    """
    with borrowed(handle, weights, "vae") as pipe:
        options = {} if tiles is None else tiles.options(pipe)
        batch = pipe.split_latents(pipe.import_latents(latents).to(pipe.torch_dtype))
        in_parts = tiles is not None or pipe.decodes_in_parts
        pictures = []
        for latent in batch if in_parts else progress(batch):
            pixels = pipe.decode_latents(latent, **options, **({"progress_bar_cmd": progress} if in_parts else {}))
            decoded = (pixels.float().clamp(-1, 1).add(1) / 2).movedim(1, -1).cpu()  # (1, H, W, 3) or (1, F, H, W, 3)
            pictures.append(decoded.flatten(0, -4))
        return torch.cat(pictures)


def encode_pictures(handle: PipelineHandle, pictures: Tensor, tiles: Tiles | None = None, progress: Progress = iter,
                    weights: WeightsOwner = owner) -> Tensor:
    """Pictures (B, H, W, 3) in 0…1 → raw latents (B, 16, 1, h, w), one after the other, with `tiles` each in parts.

    Layered models take (B, H, W, 4) too: with transparency. For video models the pictures are the frames of one video:
    (1, C, frames, h, w).
    """
    with borrowed(handle, weights, "vae") as pipe:
        pictures = _with_channels(pictures, pipe.image_channels)
        _check_sides(pictures, pipe.height_division_factor, pipe.width_division_factor)
        options = {} if tiles is None else tiles.options(pipe)
        batch = pipe.split_pictures((pictures.movedim(-1, 1) * 2 - 1).to(pipe.torch_dtype))
        in_parts = tiles is not None or pipe.decodes_in_parts
        latents = []
        for picture in batch if in_parts else progress(batch):
            encoded = pipe.encode_image(picture, **options, **({"progress_bar_cmd": progress} if in_parts else {}))
            latents.append(pipe.export_latents(encoded))
        return torch.cat(latents)


def _with_channels(pictures: Tensor, channels: int) -> Tensor:
    """The pictures (B, H, W, channels), opaque where they say nothing of it. Raises ValueError for other shapes."""
    if pictures.ndim != 4 or pictures.shape[-1] not in (3, channels):
        raise ValueError(f"the image has shape {'×'.join(map(str, pictures.shape))}; batch×height×width×{channels} "
                         "expected: remove an alpha channel with Split Image with Alpha")
    return pictures if pictures.shape[-1] == channels else torch.cat([pictures, torch.ones_like(pictures[..., :1])], -1)


def _check_sides(pictures: Tensor, height_multiple: int, width_multiple: int) -> None:
    height, width = pictures.shape[1:3]
    if height % height_multiple or width % width_multiple:
        raise ValueError(f"the image is {width}×{height} pixels (width × height); multiples of {width_multiple} and "
                         f"{height_multiple} expected: scale it with Upscale Image, or crop it")


# ---- LoRAs ----------------------------------------------------------------------------------------------------------

def add_loras(handle: PipelineHandle, choices: Sequence[LoraChoice],
              weights: WeightsOwner = owner) -> tuple[PipelineHandle, list[str]]:
    """The handle with more LoRAs, and what each of them changes, in a line. Nothing is changed yet.

    Raises LoraError for a file that fits nothing, ModelFileError for one that cannot be read, ValueError for too many.
    """
    with borrowed(handle, weights) as pipe:
        lines = [check(pipe, choice) for choice in choices]
    added = handle
    for choice in choices:
        added = added.with_lora(choice)
    return _keeping(handle, added), lines


def _keeping(handle: PipelineHandle, derived: PipelineHandle) -> PipelineHandle:
    """`derived`; as long as it lives, `handle` does, and with it the weights that its owner has tied to it."""
    if derived is not handle:
        weakref.finalize(derived, lambda kept: None, handle).atexit = False
    return derived
