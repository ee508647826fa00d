"""Wan video: from text, from a first and a last picture, from a video, controlled, edited (VACE), with one denoiser or
two that take turns (2.2-A14B).

Notable: latents inside the pipeline are normalised, (B, 16 or 48, T, h, w); `encode_image` and `decode_latents` are the
border to raw ones. Each capability has a file with its units; all of them end up in one `model_fn`.
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..core import ModelConfig
from ..core.loader.file import ModelFileError
from ..diffusion import BasePipeline, FlowMatchScheduler, Step
from ..diffusion.base_pipeline import Stage, check_cfg_scale
from ..diffusion.pipeline_unit import Inputs
from ..models.model_loader import ModelPool
from ..models.wan_video_camera_controller import ORIGIN, SPEED
from ..models.wan_video_dit import VaceWanModel, WanModel
from ..models.wan_video_image_encoder import WanImageEncoder
from ..models.wan_video_motion_controller import WanMotionControllerModel
from ..models.wan_video_text_encoder import WanTextEncoder
from ..models.wan_video_vae import WanVideoVAE, denormalize_latents, normalize_latents
from ..utils.lora.formats import LoraError, LoraFile
from ..utils.lora.matching import Match, match_lora
from ..utils.pictures import Picture, to_image
from ..utils.state_dict_converters.wan_video_dit import diffusers_keys
from ..utils.state_dict_converters.wan_video_text_encoder import diffusers_text_encoder_keys
from ..utils.videos import Video, video_pixels
from .families import family
from .latents import video_latents
from .prompts import check_prompt
from .wan_prompts import TextPrompts
from .wan_video_cache import WanVideoUnit_TeaCache
from .wan_video_control import (
    WanVideoUnit_FunCameraControl,
    WanVideoUnit_FunControl,
    WanVideoUnit_FunReference,
    WanVideoUnit_SpeedControl,
)
from .wan_video_experts import EXPERTS, in_order, noise_of
from .wan_video_images import (
    TILE_SIZE,
    TILE_STRIDE,
    WanVideoUnit_ConditionChannels,
    WanVideoUnit_ImageEmbedderCLIP,
    WanVideoUnit_ImageEmbedderFused,
    WanVideoUnit_ImageEmbedderVAE,
)
from .wan_video_inputs import (
    WanVideoUnit_InitialLatents,
    WanVideoUnit_InputVideoEmbedder,
    WanVideoUnit_NoiseInitializer,
    WanVideoUnit_OptionChecker,
    WanVideoUnit_PromptEmbedder,
    WanVideoUnit_ShapeChecker,
    check_tile_options,
)
from .wan_video_model import activation_bytes, as_one_batch, model_fn_wan_video
from .wan_video_vace import WanVideoUnit_VACE

logger = logging.getLogger(__name__)

FRAMES_PER_LATENT = 4
MAX_FRAMES = 4 * 1024 + 1
TYPICAL_FRAMES = 81
BOUNDARY = 0.875

__all__ = ["ModelConfig", "WanVideoPipeline", "model_fn_wan_video"]


class WanVideoPipeline(BasePipeline):
    """Text encoder, one or two denoisers and autoencoder of the Wan family, and what its relatives have besides.

    Load it with `from_pretrained`, then call it. Any of the models may be absent as long as nothing needs it. With two
    denoisers `dit` draws while there is much noise, `dit2` after `switch_DiT_boundary`; so do `vace` and `vace2`.
    """

    scheduler_template = "Wan"
    scheduler_templates = ("Wan",)
    model_names = frozenset(family("wan").attributes)
    lora_layouts = {**dict.fromkeys(("dit", "dit2", "vace", "vace2"), diffusers_keys),
                    "text_encoder": diffusers_text_encoder_keys}
    shift_option = "sigma_shift"
    prompt_input = "context"
    image_channels = 3
    decodes_in_parts = True  # of one video

    def __init__(self, device: str | torch.device | None = None, torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype)
        self.scheduler = FlowMatchScheduler(self.scheduler_template)
        self.prompts: TextPrompts | None = None
        self.text_encoder: WanTextEncoder | None = None
        self.image_encoder: WanImageEncoder | None = None
        self.dit: WanModel | None = None
        self.dit2: WanModel | None = None
        self.vae: WanVideoVAE | None = None
        self.vace: VaceWanModel | None = None
        self.vace2: VaceWanModel | None = None
        self.motion_controller: WanMotionControllerModel | None = None
        self.in_iteration_models = ("dit", "dit2", "vace", "vace2")
        self.units = [WanVideoUnit_OptionChecker(), WanVideoUnit_ShapeChecker(), WanVideoUnit_NoiseInitializer(),
                      WanVideoUnit_PromptEmbedder(), WanVideoUnit_ImageEmbedderCLIP(),
                      WanVideoUnit_InputVideoEmbedder(), WanVideoUnit_ImageEmbedderVAE(),
                      WanVideoUnit_ImageEmbedderFused(), WanVideoUnit_FunControl(), WanVideoUnit_FunReference(),
                      WanVideoUnit_VACE(), WanVideoUnit_ConditionChannels(), WanVideoUnit_InitialLatents(),
                      WanVideoUnit_FunCameraControl(), WanVideoUnit_SpeedControl(), WanVideoUnit_TeaCache()]
        self.model_fn = model_fn_wan_video

    @staticmethod
    def from_pretrained(torch_dtype: torch.dtype = torch.bfloat16, device: str | torch.device | None = None,
                        model_configs: Iterable[ModelConfig] = (), tokenizer_config: ModelConfig | None = None,
                        vram_limit: float | None = None, experts: Sequence[str] | None = None,
                        ram_limit: float | None = None) -> WanVideoPipeline:
        """Load the models and, if there is a text encoder, its tokenizer.

        `tokenizer_config` is the folder with tokenizer.json, `Wan-AI/Wan2.1-T2V-1.3B`'s unless another is given.
        `vram_limit` and `ram_limit` are in GiB for all models together, see `download_and_load_models`. `experts`,
        "high_noise" and "low_noise" in the order of `model_configs`, is for two denoisers whose files' names do not
        tell.
        Raises what the loader raises (see `ModelPool`), and ModelFileError for models that do not belong together.
        """
        pipe = WanVideoPipeline(device=device, torch_dtype=torch_dtype)
        pipe._take_models(pipe.download_and_load_models(model_configs, vram_limit, ram_limit), experts)
        if pipe.text_encoder is not None:
            config = tokenizer_config or ModelConfig(model_id="Wan-AI/Wan2.1-T2V-1.3B",
                                                     origin_file_pattern="google/umt5-xxl/")
            config.download_if_necessary()
            pipe.prompts = TextPrompts.load(config.path)
        pipe.check_belong_together()
        pipe.vram_management_enabled = pipe.check_vram_management_state()
        return pipe

    def _take_models(self, pool: ModelPool, experts: Sequence[str] | None) -> None:
        for name in ("text_encoder", "image_encoder", "vae", "motion_controller"):
            setattr(self, name, pool.fetch_model(f"wan_video_{name}"))
        for name in ("dit", "vace"):
            entries = [(entry, entry.paths) for entry in pool.loaded if entry.name == f"wan_video_{name}"]
            for attribute, entry in zip((name, f"{name}2"), in_order(f"wan_video_{name}", entries, experts)):
                setattr(self, attribute, entry.model)
                self.files[attribute] = entry.paths

    def check_belong_together(self) -> None:
        """Raises ModelFileError unless text encoder, denoisers and autoencoder fit one another.

        From then on sizes are rounded as these models need it.
        """
        self.height_division_factor = self.width_division_factor = 2 * self.vae_factor
        if self.dit is None:
            return
        if self.dit2 is not None and (self.dit2.dim, self.dit2.in_dim) != (self.dit.dim, self.dit.in_dim):
            raise ModelFileError("the denoisers for high and low noise have other sizes: take both from one model")
        if self.vae is not None and self.vae.z_dim != self.dit.out_dim:
            raise ModelFileError(f"the autoencoder has {self.vae.z_dim} latent channels and the denoiser draws "
                                 f"{self.dit.out_dim}: TI2V-5B takes Wan2.2_VAE, all others Wan2.1_VAE")
        if self.text_encoder is not None:
            self.check_prompt_width(self.text_encoder.token_embedding.embedding_dim)

    def check_prompt_width(self, width: int) -> None:
        """Raises ModelFileError unless the denoiser takes prompt embeddings of that width."""
        wanted = self.dit.text_embedding[0].in_features
        if width != wanted:
            raise ModelFileError(f"the text encoder makes embeddings of {width} numbers and the denoiser takes "
                                 f"{wanted}: they are of different models, take both from one")

    # ---- sizes ------------------------------------------------------------------------------------------------------
    @property
    def vae_factor(self) -> int:
        """Pixels per latent, in height and in width."""
        if self.vae is not None:
            return self.vae.spatial_factor
        return 8 if self.latent_channels == 16 else 16

    @property
    def latent_channels(self) -> int:
        """16, or TI2V-5B's 48."""
        if self.vae is not None:
            return self.vae.z_dim
        return 16 if self.dit is None else self.dit.out_dim

    def latent_frames(self, num_frames: int) -> int:
        """Of a video: the first frame is one, each further one stands for four."""
        return (num_frames - 1) // FRAMES_PER_LATENT + 1

    def check_num_frames(self, num_frames: int) -> int:
        """Rounded up to 4·n + 1; says so when that changes it. Raises ValueError for what is no number of frames."""
        if not isinstance(num_frames, int) or not 1 <= num_frames <= MAX_FRAMES:
            raise ValueError(f"num_frames must be a whole number in 1…{MAX_FRAMES}, got {num_frames!r}")
        rounded = -(-(num_frames - 1) // FRAMES_PER_LATENT) * FRAMES_PER_LATENT + 1
        if rounded != num_frames:
            logger.info("num_frames %d rounded up to %d (a multiple of %d, plus 1)", num_frames, rounded,
                        FRAMES_PER_LATENT)
        return rounded

    # ---- between videos and normalised latents ----------------------------------------------------------------------
    def preprocess_video(self, frames: Sequence[Picture], width: int, height: int) -> Tensor:
        """(1, 3, frames, height, width) in −1…1, of the pipeline's dtype, on the CPU."""
        return (video_pixels(frames, width, height) * 2 - 1).to(self.torch_dtype)

    def encode_image(self, image: Tensor, tiled: bool = False, tile_size: int | tuple[int, int] = TILE_SIZE,
                     tile_stride: int | tuple[int, int] = TILE_STRIDE,
                     progress_bar_cmd: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """Videos (B, 3, 4·n + 1, H, W) in −1…1 → normalised latents (B, 16 or 48, n + 1, h, w). Tiles in latent pixels.
        """
        self.check_loaded(["vae"])
        self.load_models_to_device(["vae"])
        raw = self.vae.encode(image.cpu(), device=self.device, tiled=tiled, tile_size=tile_size,
                              tile_stride=tile_stride, progress_bar_cmd=progress_bar_cmd)
        return normalize_latents(raw.to(self.device))

    def decode_latents(self, latents: Tensor, tiled: bool = False, tile_size: int | tuple[int, int] = TILE_SIZE,
                       tile_stride: int | tuple[int, int] = TILE_STRIDE,
                       progress_bar_cmd: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """Normalised latents (B, 16 or 48, n + 1, h, w) → videos (B, 3, 4·n + 1, H, W), about −1…1, not clipped, on the
        CPU, since a video may be larger than what the device has to spare."""
        self.check_loaded(["vae"])
        self.load_models_to_device(["vae"])
        return self.vae.decode(denormalize_latents(latents).cpu(), device=self.device, tiled=tiled, tile_size=tile_size,
                               tile_stride=tile_stride, progress_bar_cmd=progress_bar_cmd)

    def split_pictures(self, pixels: Tensor) -> list[Tensor]:
        """Pictures (F, 3, H, W), which are the frames of one video, as what `encode_image` takes at once."""
        return [pixels.movedim(0, 1)[None]]

    def split_latents(self, latents: Tensor) -> Sequence[Tensor]:
        """Latents of several videos as what `decode_latents` takes at once."""
        return latents.split(1)

    def import_latents(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, T, h, w), or (B, C, h, w) of one frame, as other programs have them → normalised, float32.

        Raises ValueError for other shapes; see `video_latents`.
        """
        latents = video_latents(latents, self.latent_channels, 2, self.vae_factor)
        return normalize_latents(latents.to(self.device, torch.float32))

    def export_latents(self, latents: Tensor) -> Tensor:
        """The inverse: normalised → raw (B, C, T, h, w), float32 on the CPU."""
        return denormalize_latents(latents.to("cpu", torch.float32))

    def size_inputs(self, latents: Tensor) -> Inputs:
        """The inputs that imported latents say: their size and frames."""
        height, width = (side * self.vae_factor for side in latents.shape[-2:])
        return {"height": height, "width": width, "num_frames": (latents.shape[2] - 1) * FRAMES_PER_LATENT + 1}

    def typical_latents(self, height: int, width: int, batch: int) -> Tensor:
        return torch.empty(batch, self.latent_channels, self.latent_frames(TYPICAL_FRAMES), height // self.vae_factor,
                           width // self.vae_factor, dtype=self.torch_dtype, device="meta")

    # ---- sampling ---------------------------------------------------------------------------------------------------
    def set_schedule(self, height: int, width: int, num_inference_steps: int, denoising_strength: float = 1.0,
                     sigma_shift: float | None = None) -> None:
        """The scheduler's steps; `sigma_shift` replaces 5. They do not depend on the size."""
        self.scheduler.set_timesteps(num_inference_steps, denoising_strength, shift=sigma_shift)

    def loop_stages(self, inputs_shared: Inputs) -> tuple[Stage, ...]:
        """The denoiser for high noise down to the boundary, then the one for low noise; one stage if there is one."""
        names = ("dit", "vace") if inputs_shared.get("vace_context") is not None else ("dit",)
        total = len(self.scheduler.timesteps)
        if self.dit2 is None:
            return (Stage(total, {name: name for name in names}),)
        boundary = inputs_shared.get("switch_DiT_boundary")
        border = (BOUNDARY if boundary is None else boundary) * 1000
        high = sum(float(timestep) >= border for timestep in self.scheduler.timesteps)
        stages = (Stage(high, {name: name for name in names}),
                  Stage(total - high, {name: f"{name}2" for name in names}))
        return tuple(stage for stage in stages if stage.steps)

    def models_together(self) -> tuple[tuple[str, ...], ...]:
        loaded = {name for name, _ in self.named_models()}
        return tuple(tuple(name for name in names if name in loaded) for names in (("dit", "vace"), ("dit2", "vace2")))

    def model_batch(self, shared: Inputs) -> int:
        return len(shared["latents"]) * (2 if shared.get("cfg_merge") and shared.get("cfg_scale") != 1 else 1)

    def activation_bytes(self, latents: Tensor, inputs: Inputs) -> int:
        if (size := inputs.get("sliding_window_size")) is not None:
            latents = latents[:, :, :size + (inputs.get("vace_references") or 0)]
        vace = self.vace if inputs.get("vace_context") is not None else None
        return activation_bytes(self.dit, latents, vace, inputs.get("reference_latents") is not None,
                                inputs.get("tea_cache") is not None)

    def predict_sides(self, inputs_shared: Inputs, sides: Sequence[Inputs], **inputs: object) -> list[Tensor]:
        """As everywhere, or with `cfg_merge` both sides as one batch. Clean first frames lead to themselves."""
        if inputs_shared.get("cfg_merge") and len(sides) == 2:
            merged = super().predict_sides(*as_one_batch(inputs_shared, sides), **inputs)[0].chunk(2)
        else:
            merged = super().predict_sides(inputs_shared, sides, **inputs)
        first = inputs_shared.get("first_frame_latents")
        if first is None:
            return list(merged)
        latents, count = inputs_shared["latents"], first.shape[2]
        sigma = float(self.scheduler.sigmas[inputs["progress_id"]])
        towards = ((latents[:, :, :count].float() - first.float()) / sigma).to(latents.dtype)
        return [torch.cat([towards, predicted[:, :, count:]], dim=2) for predicted in merged]

    def denoise(self, inputs_shared: Inputs, inputs_posi: Inputs, inputs_nega: Inputs, cfg_scale: float = 1.0,
                cfg_norm: bool = False, progress_bar_cmd: Callable[[Iterable], Iterable] = iter,
                step_callback: Callable[[Step], None] | None = None) -> Inputs:
        """As everywhere; VACE's references, which are frames before the video, are cut off what comes out."""
        references = inputs_shared.get("vace_references") or 0

        def without_references(step: Step) -> None:
            step_callback(replace(step, latents=step.latents[:, :, references:],
                                  denoised=step.denoised[:, :, references:]))

        callback = without_references if references and step_callback is not None else step_callback
        shared = super().denoise(inputs_shared, inputs_posi, inputs_nega, cfg_scale=cfg_scale, cfg_norm=cfg_norm,
                                 progress_bar_cmd=progress_bar_cmd, step_callback=callback)
        return {**shared, "latents": shared["latents"][:, :, references:]}

    def match_lora(self, file: LoraFile) -> Match:
        """As everywhere; with two denoisers a LoRA is for the one that its name says.

        Raises LoraError for a name that does not say it.
        """
        if self.dit2 is None:
            return super().match_lora(file)
        noise = noise_of(file.title)
        if noise is None:
            raise LoraError(f"{file.title} does not say in its name whether it is for high or low noise, and this "
                            "pipeline has a denoiser for each: rename it so that it has high_noise or low_noise in it, "
                            "or give it to one of them with load_lora(pipe.dit, …) or load_lora(pipe.dit2, …)")
        others = ("dit2", "vace2") if noise == EXPERTS[0] else ("dit", "vace")
        models = [(name, model) for name, model in self.named_models() if name not in others]
        return match_lora(file, models, self.lora_layouts)

    @torch.no_grad()
    def __call__(self, prompt: str = "", negative_prompt: str = "", input_image: Picture | None = None,
                 end_image: Picture | None = None, input_video: Video | None = None, denoising_strength: float = 1.0,
                 control_video: Video | None = None, reference_image: Picture | None = None,
                 camera_control_direction: str | None = None, camera_control_speed: float = SPEED,
                 camera_control_origin: Sequence[float] = ORIGIN, vace_video: Video | None = None,
                 vace_video_mask: Video | Picture | None = None,
                 vace_reference_image: Picture | Sequence[Picture] | None = None, vace_scale: float = 1.0,
                 seed: int | None = None, rand_device: str = "cpu", height: int = 480, width: int = 832,
                 num_frames: int = 81, cfg_scale: float = 5.0, cfg_merge: bool = False,
                 switch_DiT_boundary: float = BOUNDARY, num_inference_steps: int = 50, sigma_shift: float = 5.0,
                 motion_bucket_id: float | None = None, tiled: bool = True,
                 tile_size: int | tuple[int, int] = TILE_SIZE, tile_stride: int | tuple[int, int] = TILE_STRIDE,
                 sliding_window_size: int | None = None, sliding_window_stride: int | None = None,
                 tea_cache_l1_thresh: float | None = None, tea_cache_model_id: str = "",
                 progress_bar_cmd: Callable[[Iterable], Iterable] = tqdm,
                 step_callback: Callable[[Step], None] | None = None) -> list[Image.Image]:
        """Draw a video; returns its frames.

        prompt, negative_prompt   texts; the negative one has no effect at cfg_scale 1
        input_image, end_image    the first and the last frame, for models made for that; resized to the video's size
        input_video, denoising_strength   start from this video (of height × width), noised to this strength in (0, 1]
        control_video, reference_image    what Fun-Control models take
        camera_control_direction, …_speed, …_origin   what Fun-Control-Camera models take, see `camera_control`
        vace_video, …_mask, vace_reference_image, vace_scale   VACE: a video, where it changes (white; without a mask
                                  everywhere), pictures of what is to appear, and how much all that counts
        seed, rand_device         None draws another video each time
        height, width             pixels, rounded up to multiples of 16 (TI2V-5B: 32)
        num_frames                rounded up to 4·n + 1
        cfg_scale, cfg_merge      nega + cfg_scale·(posi − nega); 1 runs the positive side alone; both in one batch
        switch_DiT_boundary       with two denoisers: the noise (0…1) below which the second one draws
        sigma_shift               more spends more steps at high noise
        motion_bucket_id          how fast things move, 0…100, with a motion controller
        tiled, tile_size, tile_stride   run the autoencoder tile by tile (latent pixels; one number or vertical,
                                  horizontal)
        sliding_window_size, …_stride   latent frames: draw longer videos in windows that overlap
        tea_cache_l1_thresh, tea_cache_model_id   skip steps that change less than this, see `TeaCache`
        progress_bar_cmd          wraps the list of timesteps
        step_callback             gets a `Step` after each step; raising in it stops the run

        Raises ValueError or TypeError for values out of range, before any model runs, and for a value whose model is
        not loaded.
        """
        self.check_loaded(["text_encoder", "dit", "vae"])
        check_prompt(prompt)
        check_prompt(negative_prompt)
        check_cfg_scale(cfg_scale)
        if tiled:
            check_tile_options(tile_size, tile_stride)
        if input_video is None and denoising_strength != 1:
            raise ValueError(f"denoising_strength {denoising_strength} needs an input_video to start from")
        self.set_schedule(height, width, num_inference_steps, denoising_strength, sigma_shift)
        shared = {"input_image": input_image, "end_image": end_image, "input_video": input_video,
                  "control_video": control_video, "reference_image": reference_image,
                  "camera_control_direction": camera_control_direction, "camera_control_speed": camera_control_speed,
                  "camera_control_origin": camera_control_origin, "vace_video": vace_video,
                  "vace_video_mask": vace_video_mask, "vace_reference_image": vace_reference_image,
                  "vace_scale": vace_scale, "seed": seed, "rand_device": rand_device, "height": height, "width": width,
                  "num_frames": num_frames, "cfg_scale": cfg_scale, "cfg_merge": cfg_merge,
                  "switch_DiT_boundary": switch_DiT_boundary, "motion_bucket_id": motion_bucket_id, "tiled": tiled,
                  "tile_size": tile_size, "tile_stride": tile_stride, "sliding_window_size": sliding_window_size,
                  "sliding_window_stride": sliding_window_stride, "tea_cache_l1_thresh": tea_cache_l1_thresh,
                  "tea_cache_model_id": tea_cache_model_id}
        try:
            dicts = self.run_units(shared, {"prompt": prompt}, {"negative_prompt": negative_prompt})
            shared = self.denoise(*dicts, cfg_scale=cfg_scale, progress_bar_cmd=progress_bar_cmd,
                                  step_callback=step_callback)
            video = self.decode_latents(shared["latents"], tiled, tile_size, tile_stride)
        finally:
            self.load_models_to_device([])
        return [to_image(frame) for frame in video[0].unbind(1)]
