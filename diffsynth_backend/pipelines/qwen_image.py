"""Qwen-Image: text to image and image to image.

Notable: latents inside the pipeline are normalised; `encode_image` and `decode_latents` are the border to raw ones.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..core import ModelConfig
from ..core.loader.file import ModelFileError
from ..diffusion import BasePipeline, FlowMatchScheduler, PipelineUnit, Step
from ..diffusion.base_pipeline import check_cfg_scale
from ..diffusion.pipeline_unit import Inputs
from ..models.general_modules import check_tiles
from ..models.qwen_image_dit import QwenImageDiT
from ..models.qwen_image_text_encoder import QwenImageTextEncoder
from ..models.qwen_image_vae import QwenImageVAE, denormalize_latents, normalize_latents
from .latents import image_latents
from .qwen_image_prompts import TextPrompts, check_prompt

IMAGE_CHANNELS, LATENT_CHANNELS = 3, 16
TYPICAL_PROMPT = 256  # tokens, for estimates
PIXELS_PER_TOKEN = 16  # the VAE's 8 times the denoiser's 2×2 patches


class QwenImagePipeline(BasePipeline):
    """Text encoder, denoiser and autoencoder of the Qwen-Image family.

    Load it with `from_pretrained`, then call it. Any of the models may be absent as long as nothing needs it.
    """

    vae_factor = 8  # pixels per latent

    def __init__(self, device: str | torch.device | None = None, torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype)
        self.scheduler = FlowMatchScheduler("Qwen-Image")
        self.prompts: TextPrompts | None = None
        self.text_encoder: QwenImageTextEncoder | None = None
        self.dit: QwenImageDiT | None = None
        self.vae: QwenImageVAE | None = None
        self.in_iteration_models = ("dit",)
        self.units = [QwenImageUnit_ShapeChecker(), QwenImageUnit_NoiseInitializer(),
                      QwenImageUnit_InputImageEmbedder(), QwenImageUnit_InitialLatents(),
                      QwenImageUnit_PromptEmbedder()]
        self.model_fn = model_fn_qwen_image

    @staticmethod
    def from_pretrained(torch_dtype: torch.dtype = torch.bfloat16, device: str | torch.device | None = None,
                        model_configs: Iterable[ModelConfig] = (), tokenizer_config: ModelConfig | None = None,
                        vram_limit: float | None = None) -> QwenImagePipeline:
        """Load the models and, if there is a text encoder, its tokenizer.

        `tokenizer_config` is the folder with the tokenizer's files, `Qwen/Qwen-Image`'s unless another is given.
        `vram_limit` is in GiB for all models together. Raises what the loader raises: see `ModelPool`.
        """
        pipe = QwenImagePipeline(device=device, torch_dtype=torch_dtype)
        pool = pipe.download_and_load_models(model_configs, vram_limit)
        pipe.text_encoder = pool.fetch_model("qwen_image_text_encoder")
        pipe.dit = pool.fetch_model("qwen_image_dit")
        pipe.vae = pool.fetch_model("qwen_image_vae")
        if pipe.text_encoder is not None:
            config = tokenizer_config or ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="tokenizer/")
            config.download_if_necessary()
            pipe.prompts = TextPrompts.load(config.path)
        pipe.check_belong_together()
        pipe.vram_management_enabled = pipe.check_vram_management_state()
        return pipe

    def check_belong_together(self) -> None:
        """Raises ModelFileError unless text encoder, tokenizer and denoiser fit one another."""
        if self.text_encoder is None:
            return
        sizes = self.text_encoder.config.text_config
        if len(self.prompts.tokenizer) > sizes.vocab_size:
            raise ModelFileError(f"the tokenizer has {len(self.prompts.tokenizer)} tokens and the text encoder "
                                 f"{sizes.vocab_size}: they are of different models, take both from one")
        if self.dit is not None:
            self.check_prompt_width(sizes.hidden_size)

    def check_prompt_width(self, width: int) -> None:
        """Raises ModelFileError unless the denoiser takes prompt embeddings of that width."""
        if width != self.dit.txt_in.in_features:
            raise ModelFileError(f"the text encoder makes embeddings of {width} numbers and the denoiser takes "
                                 f"{self.dit.txt_in.in_features}: they are of different models, take both from one")

    # ---- between pictures and normalised latents --------------------------------------------------------------------
    def encode_image(self, image: Tensor, tiled: bool = False, tile_size: int = 128, tile_stride: int = 64,
                     progress_bar_cmd: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """Image (B, 3, H, W) in −1…1 → normalised latents (B, 16, H/8, W/8). Tile sizes in latent pixels."""
        _check_shape("the image", image, IMAGE_CHANNELS, self.vae_factor)
        self.load_models_to_device(["vae"])
        raw = self.vae.encode(image, device=self.device, tiled=tiled, tile_size=tile_size, tile_stride=tile_stride,
                              progress_bar_cmd=progress_bar_cmd)
        return normalize_latents(raw)

    def decode_latents(self, latents: Tensor, tiled: bool = False, tile_size: int = 128, tile_stride: int = 64,
                       progress_bar_cmd: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """Normalised latents (B, 16, h, w) → image (B, 3, 8·h, 8·w), about −1…1, not clipped."""
        _check_shape("the latent", latents, LATENT_CHANNELS)
        self.load_models_to_device(["vae"])
        return self.vae.decode(denormalize_latents(latents), device=self.device, tiled=tiled, tile_size=tile_size,
                               tile_stride=tile_stride, progress_bar_cmd=progress_bar_cmd)

    def import_latents(self, latents: Tensor) -> Tensor:
        """Raw latents as other programs have them, (B, 16, h, w) or (B, 16, 1, h, w) → normalised (B, 16, h, w).

        Raises ValueError for other shapes; see `image_latents`.
        """
        latents = image_latents(latents, LATENT_CHANNELS, PIXELS_PER_TOKEN // self.vae_factor, self.vae_factor)
        return normalize_latents(latents.to(self.device, torch.float32))

    def export_latents(self, latents: Tensor) -> Tensor:
        """The inverse: normalised (B, 16, h, w) → raw (B, 16, 1, h, w), float32 on the CPU."""
        return denormalize_latents(latents.to("cpu", torch.float32))[:, :, None]

    # ---- sampling -------------------------------------------------------------------------------------------------
    def set_schedule(self, height: int, width: int, num_inference_steps: int, denoising_strength: float = 1.0,
                     exponential_shift_mu: float | None = None) -> None:
        """The family's schedule for a picture of this size; more pixels spend more steps at high noise."""
        tokens = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)
        self.scheduler.set_timesteps(num_inference_steps, denoising_strength, dynamic_shift_len=tokens,
                                     exponential_shift_mu=exponential_shift_mu)

    def activation_bytes(self, latents: Tensor, inputs: Inputs) -> int:
        _check_shape("the latent", latents, LATENT_CHANNELS, self.dit.patch_size)
        batch, _, height, width = latents.shape
        return self.dit.activation_bytes(batch, height, width, TYPICAL_PROMPT, latents.dtype)

    def rescale_guided(self, guided: Tensor, positive: Tensor) -> Tensor:
        """Give every token (2×2 patch, all channels) of `guided` the length that it has in `positive`."""
        height, width = guided.shape[-2:]
        tokens, wanted = self.dit.patchify(guided), self.dit.patchify(positive)
        factor = wanted.norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True)
        return self.dit.unpatchify(tokens * factor, height, width)

    @torch.no_grad()
    def __call__(self, prompt: str, negative_prompt: str = "", cfg_scale: float = 4.0,
                 input_image: Image.Image | None = None, denoising_strength: float = 1.0, height: int = 1328,
                 width: int = 1328, seed: int | None = None, rand_device: str = "cpu", num_inference_steps: int = 30,
                 exponential_shift_mu: float | None = None, cfg_norm: bool = False, tiled: bool = False,
                 tile_size: int = 128, tile_stride: int = 64, progress_bar_cmd: Callable[[Iterable], Iterable] = tqdm,
                 step_callback: Callable[[Step], None] | None = None) -> Image.Image:
        """Draw a picture.

        prompt, negative_prompt   texts; the empty text is one too. The negative one has no effect at cfg_scale 1
        cfg_scale                 nega + cfg_scale·(posi − nega); 1 runs the positive side alone
        input_image, denoising_strength   start from this picture (of height × width), noised to this strength in (0, 1]
        height, width             pixels, rounded up to multiples of 16
        seed, rand_device         None draws another picture each time
        exponential_shift_mu      replaces the schedule's size-dependent shift
        cfg_norm                  norm-preserving guidance, as diffusers does it for this family
        tiled, tile_size, tile_stride   run the autoencoder tile by tile (latent pixels)
        progress_bar_cmd          wraps the list of timesteps
        step_callback             gets a `Step` after each step; raising in it stops the run

        Raises ValueError or TypeError for values out of range, before any model runs.
        """
        self.check_loaded(["text_encoder", "dit", "vae"])
        check_prompt(prompt)
        check_prompt(negative_prompt)
        check_cfg_scale(cfg_scale)
        if tiled:
            check_tiles(tile_size, tile_stride)
        height, width = self.check_resize_height_width(height, width)
        if input_image is None and denoising_strength != 1:
            raise ValueError(f"denoising_strength {denoising_strength} needs an input_image to start from")
        self.set_schedule(height, width, num_inference_steps, denoising_strength, exponential_shift_mu)
        try:
            shared, posi, nega = self.run_units(
                {"cfg_scale": cfg_scale, "input_image": input_image, "height": height, "width": width, "seed": seed,
                 "rand_device": rand_device, "tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride},
                {"prompt": prompt}, {"negative_prompt": negative_prompt})
            shared = self.denoise(shared, posi, nega, cfg_scale=cfg_scale, cfg_norm=cfg_norm,
                                  progress_bar_cmd=progress_bar_cmd, step_callback=step_callback)
            image = self.decode_latents(shared["latents"], tiled=tiled, tile_size=tile_size, tile_stride=tile_stride)
        finally:
            self.load_models_to_device([])
        return self.vae_output_to_image(image)


# ---- units ----------------------------------------------------------------------------------------------------------

class QwenImageUnit_ShapeChecker(PipelineUnit):
    """Height and width in the multiples that the models can draw."""

    def __init__(self) -> None:
        super().__init__(input_params=("height", "width"), output_params=("height", "width"))

    def process(self, pipe: QwenImagePipeline, height: int, width: int) -> dict:
        height, width = pipe.check_resize_height_width(height, width)
        return {"height": height, "width": width}


class QwenImageUnit_NoiseInitializer(PipelineUnit):
    """Starting noise (batch_size, 16, H/8, W/8), from one generator for the whole batch.

    `batch_index` picks pictures out of a larger batch: each gets the noise that it has there.
    """

    def __init__(self) -> None:
        super().__init__(input_params=("height", "width", "seed", "rand_device", "batch_size", "batch_index"),
                         output_params=("noise",))

    def process(self, pipe: QwenImagePipeline, height: int, width: int, seed: int | None, rand_device: str | None,
                batch_size: int | None = None, batch_index: Sequence[int] | None = None) -> dict:
        count = batch_size or 1 if batch_index is None else max(batch_index) + 1
        shape = (count, LATENT_CHANNELS, height // pipe.vae_factor, width // pipe.vae_factor)
        noise = pipe.generate_noise(shape, seed=seed, rand_device=rand_device or "cpu",
                                    rand_torch_dtype=pipe.torch_dtype)
        return {"noise": noise if batch_index is None else noise[list(batch_index)]}


class QwenImageUnit_InputImageEmbedder(PipelineUnit):
    """Image to image: the picture as normalised latents."""

    def __init__(self) -> None:
        super().__init__(input_params=("input_image", "height", "width", "tiled", "tile_size", "tile_stride"),
                         output_params=("input_latents",), onload_model_names=("vae",))

    def process(self, pipe: QwenImagePipeline, input_image: Image.Image | None, height: int, width: int,
                tiled: bool | None, tile_size: int | None, tile_stride: int | None) -> dict:
        if input_image is None:
            return {}
        if not isinstance(input_image, Image.Image):
            raise TypeError(f"input_image must be a PIL image, got {type(input_image).__name__}")
        if input_image.size != (width, height):
            raise ValueError(f"input_image is {input_image.width}×{input_image.height} but the picture to draw is "
                             f"{width}×{height} (width × height): resize one of them")
        image = pipe.preprocess_image(input_image)
        tiles = {"tile_size": tile_size, "tile_stride": tile_stride} if tiled else {}
        return {"input_latents": pipe.encode_image(image, bool(tiled), **tiles)}


class QwenImageUnit_InitialLatents(PipelineUnit):
    """Where the loop starts: noise, mixed with the input's latents as far as the schedule's first sigma says."""

    def __init__(self) -> None:
        super().__init__(input_params=("noise", "input_latents"), output_params=("latents",))

    def process(self, pipe: QwenImagePipeline, noise: Tensor, input_latents: Tensor | None) -> dict:
        if input_latents is None:
            return {"latents": noise}
        return {"latents": pipe.scheduler.add_noise(input_latents, noise, pipe.scheduler.timesteps[0])}


class QwenImageUnit_PromptEmbedder(PipelineUnit):
    """Prompts as the text encoder's hidden states, once per side."""

    def __init__(self) -> None:
        super().__init__(seperate_cfg=True, input_params_posi={"prompt": "prompt"},
                         input_params_nega={"prompt": "negative_prompt"},
                         output_params=("prompt_emb", "prompt_emb_mask"), onload_model_names=("text_encoder",))

    def process(self, pipe: QwenImagePipeline, prompt: str) -> dict:
        pipe.load_models_to_device(self.onload_model_names)
        embedding, mask = pipe.prompts.embed(pipe.text_encoder, [prompt], pipe.device)
        return {"prompt_emb": embedding.to(pipe.torch_dtype), "prompt_emb_mask": mask}


# ---- model_fn -------------------------------------------------------------------------------------------------------

def model_fn_qwen_image(dit: QwenImageDiT, latents: Tensor, timestep: Tensor, prompt_emb: Tensor,
                        prompt_emb_mask: Tensor | None = None) -> Tensor:
    """Predicted velocity (B, 16, h, w) for latents (B, 16, h, w), h and w even; one prompt serves the whole batch."""
    _check_shape("the latent", latents, LATENT_CHANNELS, dit.patch_size)
    batch = latents.shape[0]
    if prompt_emb.shape[0] == 1 and batch > 1:
        prompt_emb = prompt_emb.expand(batch, -1, -1)
        prompt_emb_mask = None if prompt_emb_mask is None else prompt_emb_mask.expand(batch, -1)
    return dit(latents, timestep.expand(batch), prompt_emb, prompt_emb_mask)


def _check_shape(what: str, tensor: Tensor, channels: int, multiple: int = 1) -> None:
    """Raises ValueError unless `tensor` is (B, channels, H, W) with H and W multiples of `multiple`, and not empty."""
    fits = tensor.ndim == 4 and tensor.shape[1] == channels and not any(side % multiple for side in tensor.shape[2:])
    if not fits or tensor.numel() == 0:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}; expected (batch, {channels}, height, width) with "
                         f"sides above 0 that are multiples of {multiple}")
