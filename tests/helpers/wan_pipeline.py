"""A tiny Wan twice, with equal random weights: our pipeline, and diffusers' own ones as the oracle."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
)
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from diffsynth_backend.models.wan_video_dit import CLIP_DIM, WanModel
from diffsynth_backend.models.wan_video_image_encoder import WanImageEncoder
from diffsynth_backend.models.wan_video_text_encoder import WanTextEncoder
from diffsynth_backend.models.wan_video_vae import STATISTICS, WanVideoVAE, WanVideoVAE38
from diffsynth_backend.pipelines.wan_prompts import TextPrompts, clip_pixels
from diffsynth_backend.pipelines.wan_video import WanVideoPipeline
from diffsynth_backend.utils.state_dict_converters.wan_video_image_encoder import WanImageEncoderFromDiffusers
from diffsynth_backend.utils.state_dict_converters.wan_video_text_encoder import WanTextEncoderFromDiffusers
from diffsynth_backend.utils.state_dict_converters.wan_video_vae import (
    WanVideoVAE38FromDiffusers,
    WanVideoVAEFromDiffusers,
)
from tests.helpers.wan_denoiser import make_pair, make_vace_pair

SPECIAL = ("<pad>", "</s>", "<unk>")
PIECES = ("▁", "▁a", "▁red", "▁circle", "▁blue", "▁square", *"abcdefghijklmnopqrstuvwxyz,.")
VOCAB = len(SPECIAL) + len(PIECES)
TEXT_ENCODER = {"vocab": VOCAB, "dim": 24, "dim_attn": 32, "dim_ffn": 40, "num_heads": 2, "num_layers": 2}
IMAGE_ENCODER = {"num_layers": 1, "hidden_dim": 32}  # as wide as published, since the denoiser takes it so
THEIR_IMAGE_ENCODER = {"hidden_act": "gelu", "hidden_size": CLIP_DIM, "image_size": 224, "intermediate_size": 32,
                       "num_attention_heads": 16, "num_hidden_layers": 2, "patch_size": 14, "projection_dim": 16}
VAE = {"base_dim": 4}
VAE_38 = {"base_dim": 4, "decoder_base_dim": 6}
THEIR_VAE_38 = {**VAE_38, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
                "scale_factor_spatial": 16, "latents_mean": STATISTICS[48][0], "latents_std": STATISTICS[48][1]}
SHIFT = 5.0


def randomized(model: nn.Module) -> nn.Module:
    """Every weight moved away from its initial value: norms that start at one would hide a swapped pair."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5).add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def write_tokenizer(folder: Path) -> Path:
    """A tiny vocabulary in the published file's form."""
    tokenizer = Tokenizer(models.Unigram([(token, 0.0) for token in SPECIAL]
                                         + [(piece, -float(i)) for i, piece in enumerate(PIECES)], unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class WanEuler(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler steps over Wan's grid: n points from 1 towards 0, which is left out."""

    def set_timesteps(self, num_inference_steps: int, device: torch.device | None = None) -> None:
        super().set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps), device=device)


@dataclass
class Theirs:
    """diffusers' models, of which its pipelines are made."""

    tokenizer: PreTrainedTokenizerFast
    text_encoder: UMT5EncoderModel
    vae: AutoencoderKLWan
    transformer: WanTransformer3DModel
    transformer_2: WanTransformer3DModel | None = None
    image_encoder: CLIPVisionModel | None = None

    def pipeline(self, cls: type, **config: Any) -> Any:
        shared = {"tokenizer": self.tokenizer, "text_encoder": self.text_encoder, "vae": self.vae,
                  "transformer": self.transformer, "transformer_2": self.transformer_2,
                  "scheduler": WanEuler(shift=SHIFT)}
        if cls is WanImageToVideoPipeline:
            shared |= {"image_encoder": self.image_encoder, "image_processor": None}
        pipe = cls(**shared, **config)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def from_pictures(self, width: int, height: int, **config: Any) -> WanImageToVideoPipeline:
        """The pipeline for first and last pictures; they reach CLIP through our filter, which has a test of its own."""
        def encode_image(pictures: Any, device: Any) -> Tensor:
            pictures = pictures if isinstance(pictures, list) else [pictures]
            pixels = torch.cat([clip_pixels(picture, width, height, 224) for picture in pictures])
            return self.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]

        pipe = self.pipeline(WanImageToVideoPipeline, **config)
        pipe.encode_image = encode_image
        return pipe

    def latents(self, pipe: Any, noise: Tensor, cfg_scale: float, prompt: str, negative: str, **options: Any) -> Tensor:
        """Finished latents."""
        height, width = (side * self.vae.config.scale_factor_spatial for side in noise.shape[-2:])
        positive, negative = self.pipeline(WanPipeline).encode_prompt(prompt, negative, max_sequence_length=512)
        return pipe(**{"prompt_embeds": positive, "negative_prompt_embeds": negative, "guidance_scale": cfg_scale,
                       "height": height, "width": width, "latents": noise, "output_type": "latent",
                       "num_frames": (noise.shape[2] - 1) * 4 + 1, **options}).frames


def make_text(folder: Path) -> tuple[TextPrompts, WanTextEncoder, PreTrainedTokenizerFast, UMT5EncoderModel]:
    """Tokenizer and text encoder, ours and theirs."""
    theirs = randomized(UMT5EncoderModel(UMT5Config(d_ff=40, d_kv=16, d_model=24, feed_forward_proj="gated-gelu",
                                                    num_heads=2, num_layers=2, vocab_size=VOCAB)))
    ours = WanTextEncoder(**TEXT_ENCODER).eval().requires_grad_(False)
    state_dict = {key: tensor for key, tensor in theirs.state_dict().items() if key != "encoder.embed_tokens.weight"}
    ours.load_state_dict(WanTextEncoderFromDiffusers(state_dict), strict=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>",
                                        eos_token="</s>", unk_token="<unk>")
    return TextPrompts.load(folder), ours, tokenizer, theirs


def make_vae(fused: bool) -> tuple[WanVideoVAE, AutoencoderKLWan]:
    """2.1's autoencoder, or 2.2's; pictures of small values, of which little is clipped."""
    theirs = randomized(AutoencoderKLWan(**(THEIR_VAE_38 if fused else VAE)))
    with torch.no_grad():
        theirs.decoder.conv_out.weight.mul_(0.5)
        theirs.decoder.conv_out.bias.mul_(0.5)
    ours = (WanVideoVAE38(**VAE_38) if fused else WanVideoVAE(**VAE)).eval().requires_grad_(False)
    ours.load_state_dict((WanVideoVAE38FromDiffusers if fused else WanVideoVAEFromDiffusers)(theirs.state_dict()))
    return ours, theirs


def make_image_encoder() -> tuple[WanImageEncoder, CLIPVisionModel]:
    theirs = randomized(CLIPVisionModel(CLIPVisionConfig(**THEIR_IMAGE_ENCODER)))
    ours = WanImageEncoder(**IMAGE_ENCODER).eval().requires_grad_(False)
    ours.load_state_dict(WanImageEncoderFromDiffusers({f"vision_model.{key.removeprefix('vision_model.')}": tensor
                                                       for key, tensor in theirs.state_dict().items()}), strict=True)
    return ours, theirs


def make_wan(folder: Path, experts: int = 1, vace: bool = False, **dit: Any) -> tuple[WanVideoPipeline, Theirs]:
    """Ours, in float32 on the CPU, and theirs; `folder` has the tokenizer, `dit` are changes to the denoiser's sizes.
    """
    torch.manual_seed(0)
    pipe = WanVideoPipeline(device="cpu", torch_dtype=torch.float32)
    pipe.prompts, pipe.text_encoder, tokenizer, text_encoder = make_text(folder)
    pipe.vae, their_vae = make_vae(bool(dit.get("seperated_timestep")))
    if vace:
        pipe.dit, pipe.vace, transformer = make_vace_pair(randomized)
    else:
        pipe.dit, transformer = _pair(dit)
    theirs = Theirs(tokenizer, text_encoder, their_vae, transformer)
    if experts == 2:
        pipe.dit2, theirs.transformer_2 = _pair(dit)
    if pipe.dit.has_image_input:
        pipe.image_encoder, theirs.image_encoder = make_image_encoder()
    pipe.check_belong_together()
    return pipe, theirs


def _pair(sizes: dict[str, Any]) -> tuple[WanModel, WanTransformer3DModel]:
    ours, theirs = make_pair(randomized, **sizes)
    ours.fuse_vae_embedding_in_latents = bool(sizes.get("seperated_timestep"))
    return ours, theirs


def picture(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


__all__ = ["Theirs", "WanPipeline", "WanVACEPipeline", "make_wan", "picture",
           "write_tokenizer"]
