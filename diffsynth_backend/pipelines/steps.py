"""The steps of a run one by one, as a graph takes them: encode prompts, denoise, decode, encode.

Notable: every function takes a handle and borrows the weights from their owner for the time of the call, and leaves no
model onloaded whatever ends it. Values go in and out as other programs have them: raw latents (float32, on the CPU),
pictures (B, H, W, 3) in 0…1.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..diffusion import BasePipeline, Step
from ..diffusion.base_pipeline import ModelNotLoaded
from ..diffusion.bundle import InputBundle, run_pending, run_ready
from .families import family
from .handle import PipelineHandle
from .owner import WeightsOwner, owner

Progress = Callable[[Iterable], Iterable]
MAX_BATCH = 4096


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Prompts as a pipeline's inputs, with the handle of the pipeline that encoded them."""

    handle: PipelineHandle
    bundle: InputBundle


@dataclass(frozen=True)
class Steps:
    """A schedule of the family's kind: `count` steps, from `strength` in (0, 1] of the noise down to none."""

    count: int
    strength: float = 1.0

    adds_noise = True

    def apply(self, pipe: BasePipeline, height: int, width: int) -> None:
        pipe.set_schedule(height, width, self.count, self.strength)


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
def _borrowed(handle: PipelineHandle, weights: WeightsOwner, *models: str) -> Iterator[BasePipeline]:
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
            wanted = ", ".join(family(handle.family).model_of(name) for name in error.names)
            raise ValueError(f"this needs the pipeline's {', '.join(error.names)}, and none was loaded (only "
                             f"{handle.titles()}): add a Model Config with the file of a {wanted} to the Model Loader"
                             ) from error
        finally:
            pipe.load_models_to_device([])
            pipe.announce = None


def encode_prompts(handle: PipelineHandle, positive: str, negative: str,
                   weights: WeightsOwner = owner) -> Conditioning:
    """Both prompts encoded; what depends on more than them is left to `sample`."""
    with _borrowed(handle, weights, "text_encoder") as pipe:
        bundle = InputBundle.empty(pipe).given(pipe, positive={"prompt": positive},
                                               negative={"negative_prompt": negative})
        return Conditioning(handle, run_ready(pipe, bundle))


def sample(handle: PipelineHandle, conditioning: Conditioning, latents: Tensor, schedule: Steps | Sigmas,
           seed: int, cfg_scale: float, cfg_norm: bool = False, batch_index: Sequence[int] | None = None,
           step_callback: Callable[[Step], None] | None = None, weights: WeightsOwner = owner,
           report: Callable[[str], None] | None = None) -> Tensor:
    """Denoise raw latents (B, 16, h, w) or (B, 16, 1, h, w) into (B, 16, 1, h, w).

    One generator, on the CPU, draws the noise of the whole batch from `seed`; `batch_index` says which of a larger
    batch's noise each picture gets. `step_callback` sees each step; raising in it ends the loop. `report` gets a line
    about what was moved, if weights were streamed.
    Raises ValueError for a conditioning, latents or a schedule that do not fit the pipeline.
    """
    check_same_encoder(conditioning.handle, handle)
    _check_batch(len(latents), batch_index)
    with _borrowed(handle, weights, "dit") as pipe:
        start = pipe.import_latents(latents)
        height, width = (side * pipe.vae_factor for side in start.shape[-2:])
        schedule.apply(pipe, height, width)
        bundle = conditioning.bundle.given(pipe, shared={
            "cfg_scale": cfg_scale, "height": height, "width": width, "seed": seed, "rand_device": "cpu",
            "batch_size": len(start), "batch_index": batch_index, "input_latents": start})
        shared, posi, nega = run_pending(pipe, bundle)
        pipe.check_prompt_width(posi["prompt_emb"].shape[-1])
        if not schedule.adds_noise:
            clean = torch.zeros_like(shared["noise"])
            shared["latents"] = pipe.scheduler.add_noise(start, clean, pipe.scheduler.timesteps[0])
        shared = pipe.denoise(shared, posi, nega, cfg_scale=cfg_scale, cfg_norm=cfg_norm, step_callback=step_callback)
        if report is not None and pipe.last_loop.traffic.moved_bytes:
            report(pipe.last_loop.traffic.describe())
        # Noise that is left is kept as ComfyUI's samplers do for flow models: the picture's share at full weight.
        return pipe.export_latents(shared["latents"].float() / (1 - pipe.scheduler.final_sigma))


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


def decode_latents(handle: PipelineHandle, latents: Tensor, tiled: bool = False, tile_size: int = 128,
                   tile_stride: int = 64, progress: Progress = iter, weights: WeightsOwner = owner) -> Tensor:
    """Raw latents → pictures (B, H, W, 3) in 0…1, one after the other. Tile sizes in latent pixels."""
    with _borrowed(handle, weights, "vae") as pipe:
        options = {"tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride}
        batch = pipe.import_latents(latents).to(pipe.torch_dtype).split(1)
        pictures = []
        for latent in batch if tiled else progress(batch):
            pixels = pipe.decode_latents(latent, **options, **({"progress_bar_cmd": progress} if tiled else {}))
            pictures.append((pixels.float().clamp(-1, 1).add(1) / 2).movedim(1, -1).cpu())
        return torch.cat(pictures)


def encode_pictures(handle: PipelineHandle, pictures: Tensor, tiled: bool = False, tile_size: int = 128,
                    tile_stride: int = 64, progress: Progress = iter, weights: WeightsOwner = owner) -> Tensor:
    """Pictures (B, H, W, 3) in 0…1 → raw latents (B, 16, 1, h, w), one after the other. Tile sizes in latent pixels."""
    with _borrowed(handle, weights, "vae") as pipe:
        _check_pictures(pictures, pipe.height_division_factor, pipe.width_division_factor)
        options = {"tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride}
        batch = (pictures.movedim(-1, 1) * 2 - 1).to(pipe.device, pipe.torch_dtype).split(1)
        latents = []
        for picture in batch if tiled else progress(batch):
            encoded = pipe.encode_image(picture, **options, **({"progress_bar_cmd": progress} if tiled else {}))
            latents.append(pipe.export_latents(encoded))
        return torch.cat(latents)


def _check_pictures(pictures: Tensor, height_multiple: int, width_multiple: int) -> None:
    if pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise ValueError(f"the image has shape {'×'.join(map(str, pictures.shape))}; batch×height×width×3 expected: "
                         "remove an alpha channel with Split Image with Alpha")
    height, width = pictures.shape[1:3]
    if height % height_multiple or width % width_multiple:
        raise ValueError(f"the image is {width}×{height} pixels (width × height); multiples of {width_multiple} and "
                         f"{height_multiple} expected: scale it with Upscale Image, or crop it")
