"""Qwen-Image and its relatives: pictures from text, from pictures, edited, inpainted, controlled, by entity, in layers.

Notable: latents inside the pipeline are normalised; `encode_image` and `decode_latents` are the border to raw ones. The
layers of a picture are an axis of its latents, (B, 16, layers + 1, h, w); without layers there is no such axis. Each
capability has a file with its units; all of them end up in one `model_fn`.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..core import ModelConfig
from ..core.loader.file import ModelFileError
from ..diffusion import BasePipeline, FlowMatchScheduler, PipelineUnit, Step
from ..diffusion.base_pipeline import check_cfg_scale
from ..diffusion.pipeline_unit import Inputs
from ..models.dinov3_image_encoder import DINOv3ImageEncoder
from ..models.general_modules import check_tiles
from ..models.model_loader import ModelPool
from ..models.qwen_image_dit import KeysValues, QwenImageDiT
from ..models.qwen_image_image2lora import QwenImageImage2LoRAModel
from ..models.qwen_image_text_encoder import QwenImageTextEncoder
from ..models.qwen_image_vae import QwenImageVAE, denormalize_latents, normalize_latents
from ..models.siglip2_image_encoder import Siglip2ImageEncoder
from ..utils.pictures import Picture
from ..utils.state_dict_converters.qwen_image_text_encoder import published_text_encoder_keys
from .families import family
from .latents import image_latents, pictures_of
from .prompts import check_prompt
from .qwen_image_control import ControlNetInput, QwenImageUnit_BlockwiseControlNet, QwenImageUnit_ControlChecker
from .qwen_image_editing import (
    QwenImageUnit_ContextImageEmbedder,
    QwenImageUnit_EditImageEmbedder,
    QwenImageUnit_LayerInputImageEmbedder,
    QwenImageUnit_PromptEmbedder,
)
from .qwen_image_entities import (
    QwenImageUnit_EntityChecker,
    QwenImageUnit_EntityControl,
    QwenImageUnit_EntityRegions,
)
from .qwen_image_image_to_lora import QwenImageUnit_Image2LoRADecode, QwenImageUnit_Image2LoRAEncode
from .qwen_image_inpaint import (
    QwenImageUnit_Inpaint,
    QwenImageUnit_InputImageEmbedder,
    blended,
    check_same_batch,
)
from .qwen_image_model import (
    LATENT_CHANNELS,
    activation_bytes,
    check_latents,
    check_shape,
    conditions_of,
    model_fn_qwen_image,
)
from .qwen_image_prompts import TextPrompts, check_processor

TYPICAL_PROMPT = 256  # tokens, for estimates
PIXELS_PER_TOKEN = 16  # the VAE's 8 times the denoiser's 2×2 patches
MAX_LAYERS = 64
IMAGE_ENCODERS = ("siglip2_image_encoder", "dinov3_image_encoder")
IMAGE_TO_LORA = ("image2lora_style", "image2lora_coarse", "image2lora_fine")

__all__ = ["ControlNetInput", "ModelConfig", "QwenImagePipeline", "QwenImageUnit_Image2LoRADecode",
           "QwenImageUnit_Image2LoRAEncode", "model_fn_qwen_image"]


class QwenImagePipeline(BasePipeline):
    """Text encoder, denoiser and autoencoder of the Qwen-Image family, and what its relatives have besides.

    Load it with `from_pretrained`, then call it. Any of the models may be absent as long as nothing needs it.
    """

    vae_factor = 8  # pixels per latent
    scheduler_template = "Qwen-Image"
    scheduler_templates = ("Qwen-Image", "Qwen-Image-Lightning")
    model_names = frozenset(family("qwen-image").attributes)
    lora_layouts = {"text_encoder": published_text_encoder_keys}
    shift_option = "exponential_shift_mu"
    prompt_input = "prompt_emb"
    decodes_in_parts = False

    def __init__(self, device: str | torch.device | None = None, torch_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(device=device, torch_dtype=torch_dtype)
        self.scheduler = FlowMatchScheduler(self.scheduler_template)
        self.prompts: TextPrompts | None = None
        self.text_encoder: QwenImageTextEncoder | None = None
        self.dit: QwenImageDiT | None = None
        self.vae: QwenImageVAE | None = None
        self.blockwise_controlnet: nn.ModuleList | None = None
        self.siglip2_image_encoder: Siglip2ImageEncoder | None = None
        self.dinov3_image_encoder: DINOv3ImageEncoder | None = None
        self.image2lora_style: QwenImageImage2LoRAModel | None = None
        self.image2lora_coarse: QwenImageImage2LoRAModel | None = None
        self.image2lora_fine: QwenImageImage2LoRAModel | None = None
        self.in_iteration_models = ("dit",)
        self.units = [QwenImageUnit_OptionChecker(), QwenImageUnit_EntityChecker(), QwenImageUnit_ControlChecker(),
                      QwenImageUnit_ShapeChecker(), QwenImageUnit_NoiseInitializer(),
                      QwenImageUnit_InputImageEmbedder(), QwenImageUnit_InitialLatents(), QwenImageUnit_Inpaint(),
                      QwenImageUnit_EditImageEmbedder(), QwenImageUnit_LayerInputImageEmbedder(),
                      QwenImageUnit_ContextImageEmbedder(), QwenImageUnit_BlockwiseControlNet(),
                      QwenImageUnit_PromptEmbedder(), QwenImageUnit_EntityControl(), QwenImageUnit_EntityRegions()]
        self.model_fn = model_fn_qwen_image

    @staticmethod
    def from_pretrained(torch_dtype: torch.dtype = torch.bfloat16, device: str | torch.device | None = None,
                        model_configs: Iterable[ModelConfig] = (), tokenizer_config: ModelConfig | None = None,
                        processor_config: ModelConfig | None = None, vram_limit: float | None = None,
                        ram_limit: float | None = None) -> QwenImagePipeline:
        """Load the models and, if there is a text encoder, its tokenizer.

        `tokenizer_config` is the folder with the tokenizer's files, `Qwen/Qwen-Image`'s unless another is given.
        `processor_config`, the folder `processor/` of an edit model, has them too; how it prepares pictures is checked
        to be what is done here. `vram_limit` and `ram_limit` are in GiB for all models together, see
        `download_and_load_models`.
        Raises what the loader raises (see `ModelPool`), and ModelFileError for models that do not belong together.
        """
        pipe = QwenImagePipeline(device=device, torch_dtype=torch_dtype)
        pipe._take_models(pipe.download_and_load_models(model_configs, vram_limit, ram_limit))
        if processor_config is not None:
            processor_config.download_if_necessary()
            check_processor(processor_config.path)
        if pipe.text_encoder is not None:
            config = tokenizer_config or processor_config or ModelConfig(model_id="Qwen/Qwen-Image",
                                                                         origin_file_pattern="tokenizer/")
            config.download_if_necessary()
            pipe.prompts = TextPrompts.load(config.path)
        pipe.check_belong_together()
        pipe.vram_management_enabled = pipe.check_vram_management_state()
        return pipe

    def _take_models(self, pool: ModelPool) -> None:
        for name in ("text_encoder", "dit", "vae", *IMAGE_TO_LORA):
            setattr(self, name, pool.fetch_model(f"qwen_image_{name}"))
        for name in IMAGE_ENCODERS:
            setattr(self, name, pool.fetch_model(name))
        controlnets = pool.fetch_model("qwen_image_blockwise_controlnet", "all")
        if controlnets:
            self.blockwise_controlnet = nn.ModuleList(controlnets)
            self.in_iteration_models = ("dit", "blockwise_controlnet")

    def check_belong_together(self) -> None:
        """Raises ModelFileError unless text encoder, tokenizer, denoiser and autoencoder fit one another."""
        if self.dit is not None and self.vae is not None:
            self._check_layers_agree()
        if self.text_encoder is None:
            return
        sizes = self.text_encoder.config.text_config
        if len(self.prompts.tokenizer) > sizes.vocab_size:
            raise ModelFileError(f"the tokenizer has {len(self.prompts.tokenizer)} tokens and the text encoder "
                                 f"{sizes.vocab_size}: they are of different models, take both from one")
        if self.dit is not None:
            self.check_prompt_width(sizes.hidden_size)

    def _check_layers_agree(self) -> None:
        draws, decodes = self.dit.use_layer3d_rope, self.vae.image_channels == 4
        if draws != decodes:
            raise ModelFileError(f"the denoiser {'draws' if draws else 'does not draw'} layers and the autoencoder has "
                                 f"{self.vae.image_channels} image channels, {'with' if decodes else 'without'} "
                                 "transparency: take both from Qwen/Qwen-Image-Layered, or neither")

    def check_prompt_width(self, width: int) -> None:
        """Raises ModelFileError unless the denoiser takes prompt embeddings of that width."""
        if width != self.dit.txt_in.in_features:
            raise ModelFileError(f"the text encoder makes embeddings of {width} numbers and the denoiser takes "
                                 f"{self.dit.txt_in.in_features}: they are of different models, take both from one")

    @property
    def layered(self) -> bool:
        """Whether pictures are drawn as layers with transparency, as Qwen-Image-Layered does."""
        return self.dit.use_layer3d_rope if self.dit is not None else self.vae.image_channels == 4

    # ---- between pictures and normalised latents --------------------------------------------------------------------
    @property
    def image_channels(self) -> int:
        """Of the pictures that are encoded and decoded: 4 with transparency, else 3."""
        return self.vae.image_channels

    def split_pictures(self, pixels: Tensor) -> Sequence[Tensor]:
        """Pictures (B, C, H, W) as what `encode_image` takes at once."""
        return pixels.to(self.device).split(1)

    def split_latents(self, latents: Tensor) -> list[Tensor]:
        """Latents of several pictures as what `decode_latents` takes at once: the layers of each in turn."""
        return [latent for picture in latents.split(1) for latent in pictures_of(picture)]

    def encode_image(self, image: Tensor, tiled: bool = False, tile_size: int = 128, tile_stride: int = 64,
                     progress_bar_cmd: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """Image (B, 3 or 4, H, W) in −1…1 → normalised latents (B, 16, H/8, W/8). Tile sizes in latent pixels.

        The layered model's pictures have four channels, the others three.
        """
        self.check_loaded(["vae"])
        check_shape("the image", image, self.vae.image_channels, self.vae_factor)
        self.load_models_to_device(["vae"])
        raw = self.vae.encode(image, device=self.device, tiled=tiled, tile_size=tile_size, tile_stride=tile_stride,
                              progress_bar_cmd=progress_bar_cmd)
        return normalize_latents(raw)

    def decode_latents(self, latents: Tensor, tiled: bool = False, tile_size: int = 128, tile_stride: int = 64,
                       progress_bar_cmd: Callable[[Iterable], Iterable] = iter) -> Tensor:
        """Normalised latents (B, 16, h, w) → image (B, 3 or 4, 8·h, 8·w), about −1…1, not clipped."""
        check_shape("the latent", latents, LATENT_CHANNELS)
        self.load_models_to_device(["vae"])
        return self.vae.decode(denormalize_latents(latents), device=self.device, tiled=tiled, tile_size=tile_size,
                               tile_stride=tile_stride, progress_bar_cmd=progress_bar_cmd)

    def import_latents(self, latents: Tensor) -> Tensor:
        """Raw latents as other programs have them → normalised, float32: (B, 16, h, w), layered (B, 16, layers, h, w).

        Both take (B, 16, h, w) and (B, 16, 1, h, w), layered models also more. Raises ValueError for other shapes; see
        `image_latents`.
        """
        latents = image_latents(latents, LATENT_CHANNELS, PIXELS_PER_TOKEN // self.vae_factor, self.vae_factor,
                                layered=self.layered).to(self.device, torch.float32)
        return torch.stack([normalize_latents(layer) for layer in latents.unbind(2)], dim=2) if self.layered \
            else normalize_latents(latents)

    def export_latents(self, latents: Tensor) -> Tensor:
        """The inverse: normalised → raw (B, 16, 1, h, w), layered (B, 16, layers, h, w), float32 on the CPU."""
        pictures = pictures_of(latents.to("cpu", torch.float32))
        return torch.stack([denormalize_latents(picture) for picture in pictures], dim=2)

    def size_inputs(self, latents: Tensor) -> Inputs:
        """The inputs that imported latents say: their size, and how many layers they have."""
        height, width = (side * self.vae_factor for side in latents.shape[-2:])
        return {"height": height, "width": width, "layer_num": latents.shape[2] - 1 if self.layered else None}

    def typical_latents(self, height: int, width: int, batch: int) -> Tensor:
        return torch.empty(batch, LATENT_CHANNELS, height // self.vae_factor, width // self.vae_factor,
                           dtype=self.torch_dtype, device="meta")

    # ---- sampling -------------------------------------------------------------------------------------------------
    def set_schedule(self, height: int, width: int, num_inference_steps: int, denoising_strength: float = 1.0,
                     exponential_shift_mu: float | None = None) -> None:
        """The scheduler's steps for a picture of this size; more pixels spend more steps at high noise."""
        tokens = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN)
        self.scheduler.set_timesteps(num_inference_steps, denoising_strength, dynamic_shift_len=tokens,
                                     exponential_shift_mu=exponential_shift_mu)

    def loop_models(self, inputs_shared: Inputs) -> tuple[str, ...]:
        return self.in_iteration_models if inputs_shared.get("blockwise_controlnet_conditioning") else ("dit",)

    def model_timesteps(self, shared: Inputs) -> tuple[Tensor, ...]:
        steps = super().model_timesteps(shared)
        return (*steps, torch.zeros(())) if shared.get("zero_cond_t") else steps

    def activation_bytes(self, latents: Tensor, inputs: Inputs) -> int:
        check_latents(latents, inputs.get("layer_num"), self.dit.patch_size)
        prompts = [inputs["prompt_emb"], *(inputs.get("entity_prompt_emb") or ())] if "prompt_emb" in inputs else []
        prompt_tokens = max(TYPICAL_PROMPT, sum(prompt.shape[1] for prompt in prompts))
        conditions = conditions_of(*map(inputs.get, ("context_latents", "edit_latents", "layer_input_latents")))
        return activation_bytes(self.dit, latents, prompt_tokens, conditions)

    def cfg_guided_model_fn(self, cfg_scale: float, inputs_shared: Inputs, inputs_posi: Inputs, inputs_nega: Inputs,
                            cfg_norm: bool = False, progress_id: int = 0, **inputs: object) -> Tensor:
        """As everywhere; where a mask keeps the input, what leads there."""
        predicted = super().cfg_guided_model_fn(cfg_scale, inputs_shared, inputs_posi, inputs_nega, cfg_norm=cfg_norm,
                                                progress_id=progress_id, **inputs)
        mask = inputs_shared.get("inpaint_mask")
        if mask is None:
            return predicted
        return blended(predicted, inputs_shared["latents"], inputs_shared["input_latents"], mask,
                       float(self.scheduler.sigmas[progress_id]))

    def rescale_guided(self, guided: Tensor, positive: Tensor) -> Tensor:
        """Give every token (2×2 patch, all channels) of `guided` the length that it has in `positive`."""
        height, width = guided.shape[-2:]
        pictures = []
        for picture, wanted in zip(pictures_of(guided), pictures_of(positive)):
            tokens, lengths = self.dit.patchify(picture), self.dit.patchify(wanted).norm(dim=-1, keepdim=True)
            pictures.append(self.dit.unpatchify(tokens * (lengths / tokens.norm(dim=-1, keepdim=True)), height, width))
        return pictures[0] if guided.ndim == 4 else torch.stack(pictures, dim=2)

    @torch.no_grad()
    def __call__(self, prompt: str, negative_prompt: str = "", cfg_scale: float = 4.0,
                 input_image: Picture | Sequence[Picture] | None = None, denoising_strength: float = 1.0,
                 inpaint_mask: Picture | None = None, inpaint_blur_size: int | None = None,
                 inpaint_blur_sigma: float | None = None, height: int = 1328, width: int = 1328,
                 seed: int | None = None, rand_device: str = "cpu", num_inference_steps: int = 30,
                 exponential_shift_mu: float | None = None,
                 blockwise_controlnet_inputs: Sequence[ControlNetInput] | None = None,
                 eligen_entity_prompts: Sequence[str] | None = None,
                 eligen_entity_masks: Sequence[Picture] | None = None, eligen_enable_on_negative: bool = False,
                 edit_image: Picture | Sequence[Picture] | None = None, edit_image_auto_resize: bool = True,
                 edit_rope_interpolation: bool = False, zero_cond_t: bool = False,
                 kv_cache: Mapping[str, KeysValues] | None = None,
                 negative_kv_cache: Mapping[str, KeysValues] | None = None, layer_input_image: Picture | None = None,
                 layer_num: int | None = None, context_image: Picture | None = None, cfg_norm: bool = False,
                 tiled: bool = False, tile_size: int = 128, tile_stride: int = 64,
                 progress_bar_cmd: Callable[[Iterable], Iterable] = tqdm,
                 step_callback: Callable[[Step], None] | None = None) -> Image.Image | list[Image.Image]:
        """Draw a picture; with a list of input images that many, with layers the whole picture and each layer.

        prompt, negative_prompt   texts; the empty text is one too. The negative one has no effect at cfg_scale 1
        cfg_scale                 nega + cfg_scale·(posi − nega); 1 runs the positive side alone
        input_image, denoising_strength   start from this picture (of height × width), noised to this strength in (0, 1]
        inpaint_mask, …_blur_size, …_blur_sigma   redraw the input image where this is white; the blur is in latents
        height, width             pixels, rounded up to multiples of 16
        seed, rand_device         None draws another picture each time
        exponential_shift_mu      replaces the schedule's size-dependent shift
        blockwise_controlnet_inputs   pictures that control, see `ControlNetInput`
        eligen_entity_prompts, …_masks, …_enable_on_negative   prompts for regions, of one mask each (white is inside)
        edit_image                what to edit: a picture (Qwen-Image-Edit) or a list of them (2509 and later)
        edit_image_auto_resize    bring edit images to about 1024² pixels; else their sides must be multiples of 16
        edit_rope_interpolation   a small edit image lies over the whole picture (Qwen-Image-Edit-Lowres-Fix)
        zero_cond_t               as Qwen-Image-Edit-2511 was trained: edit images are told timestep 0
        kv_cache, negative_kv_cache   per side, keys and values that all tokens see, see `model_fn_qwen_image`
        layer_input_image, layer_num   the picture to take apart, and into how many layers (Qwen-Image-Layered)
        context_image             in-context control; its LoRA wants a prompt that begins with "Context_Control. "
        cfg_norm                  norm-preserving guidance, as diffusers does it for this family
        tiled, tile_size, tile_stride   run the autoencoder tile by tile (latent pixels)
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
            check_tiles(tile_size, tile_stride)
        height, width = self.check_resize_height_width(height, width)
        if input_image is None and denoising_strength != 1:
            raise ValueError(f"denoising_strength {denoising_strength} needs an input_image to start from")
        self.set_schedule(height, width, num_inference_steps, denoising_strength, exponential_shift_mu)
        shared = {"cfg_scale": cfg_scale, "input_image": input_image, "inpaint_mask": inpaint_mask,
                  "inpaint_blur_size": inpaint_blur_size, "inpaint_blur_sigma": inpaint_blur_sigma, "height": height,
                  "width": width, "seed": seed, "rand_device": rand_device,
                  "batch_size": len(input_image) if isinstance(input_image, list | tuple) else 1,
                  "blockwise_controlnet_inputs": blockwise_controlnet_inputs,
                  "eligen_entity_prompts": eligen_entity_prompts, "eligen_entity_masks": eligen_entity_masks,
                  "eligen_enable_on_negative": eligen_enable_on_negative, "edit_image": edit_image,
                  "edit_image_auto_resize": edit_image_auto_resize, "edit_rope_interpolation": edit_rope_interpolation,
                  "zero_cond_t": zero_cond_t, "layer_input_image": layer_input_image, "layer_num": layer_num,
                  "context_image": context_image, "tiled": tiled, "tile_size": tile_size, "tile_stride": tile_stride}
        try:
            shared, posi, nega = self.run_units(shared, {"prompt": prompt, "kv_cache": kv_cache},
                                                {"negative_prompt": negative_prompt, "kv_cache": negative_kv_cache})
            shared = self.denoise(shared, posi, nega, cfg_scale=cfg_scale, cfg_norm=cfg_norm,
                                  progress_bar_cmd=progress_bar_cmd, step_callback=step_callback)
            images = [self.vae_output_to_image(self.decode_latents(latents, tiled, tile_size, tile_stride))
                      for pictures in pictures_of(shared["latents"]) for latents in pictures.split(1)]
        finally:
            self.load_models_to_device([])
        return images if layer_num is not None or isinstance(input_image, list | tuple) else images[0]


# ---- units ----------------------------------------------------------------------------------------------------------

class QwenImageUnit_OptionChecker(PipelineUnit):
    """Refuses options that would have no effect, and layers for models that have none, before anything is computed."""

    def __init__(self) -> None:
        super().__init__(input_params=("edit_image", "context_image", "layer_input_image", "layer_num", "zero_cond_t",
                                       "edit_rope_interpolation"))

    def process(self, pipe: QwenImagePipeline, edit_image: object, context_image: object, layer_input_image: object,
                layer_num: int | None, zero_cond_t: bool | None, edit_rope_interpolation: bool | None) -> dict:
        if zero_cond_t and edit_image is context_image is layer_input_image is None:
            raise ValueError("zero_cond_t is about pictures to draw by, and there is none: give edit_image, or leave "
                             "zero_cond_t off")
        if edit_rope_interpolation and edit_image is None:
            raise ValueError("edit_rope_interpolation is about edit images, and there is none: give edit_image, or "
                             "leave it off")
        if layer_num is None and (pipe.layered or layer_input_image is not None):
            raise ValueError("Qwen-Image-Layered draws layers: say how many with layer_num (0: the whole alone)")
        if layer_num is not None:
            _check_layer_num(pipe, layer_num)
        return {}


def _check_layer_num(pipe: QwenImagePipeline, layer_num: int) -> None:
    if not pipe.layered:
        raise ValueError(f"layer_num is {layer_num!r}, and the denoiser that is loaded draws no layers: load the "
                         "models of Qwen/Qwen-Image-Layered, or leave layer_num out")
    if not isinstance(layer_num, int) or not 0 <= layer_num <= MAX_LAYERS:
        raise ValueError(f"layer_num must be a whole number in 0…{MAX_LAYERS}, got {layer_num!r}")


class QwenImageUnit_ShapeChecker(PipelineUnit):
    """Height and width in the multiples that the models can draw."""

    def __init__(self) -> None:
        super().__init__(input_params=("height", "width"), output_params=("height", "width"))

    def process(self, pipe: QwenImagePipeline, height: int, width: int) -> dict:
        height, width = pipe.check_resize_height_width(height, width)
        return {"height": height, "width": width}


class QwenImageUnit_NoiseInitializer(PipelineUnit):
    """Starting noise (batch_size, 16, H/8, W/8), with layers (batch_size, 16, layer_num + 1, H/8, W/8).

    One generator draws for the whole batch. `batch_index` picks pictures out of a larger batch: each gets the noise
    that it has there.
    """

    def __init__(self) -> None:
        super().__init__(input_params=("height", "width", "seed", "rand_device", "batch_size", "batch_index",
                                       "layer_num"), output_params=("noise",))

    def process(self, pipe: QwenImagePipeline, height: int, width: int, seed: int | None, rand_device: str | None,
                batch_size: int | None, batch_index: Sequence[int] | None, layer_num: int | None) -> dict:
        count = batch_size or 1 if batch_index is None else max(batch_index) + 1
        shape = (count * (1 if layer_num is None else layer_num + 1), LATENT_CHANNELS, height // pipe.vae_factor,
                 width // pipe.vae_factor)
        noise = pipe.generate_noise(shape, seed=seed, rand_device=rand_device or "cpu",
                                    rand_torch_dtype=pipe.torch_dtype)
        if layer_num is not None:
            noise = noise.unflatten(0, (count, -1)).movedim(1, 2)  # drawn layer by layer, as published
        return {"noise": noise if batch_index is None else noise[list(batch_index)]}


class QwenImageUnit_InitialLatents(PipelineUnit):
    """Where the loop starts: noise, mixed with the input's latents as far as the schedule's first sigma says."""

    def __init__(self) -> None:
        super().__init__(input_params=("noise", "input_latents"), output_params=("latents",))

    def process(self, pipe: QwenImagePipeline, noise: Tensor, input_latents: Tensor | None) -> dict:
        if input_latents is None:
            return {"latents": noise}
        check_same_batch(noise, input_latents)
        return {"latents": pipe.scheduler.add_noise(input_latents, noise, pipe.scheduler.timesteps[0])}
