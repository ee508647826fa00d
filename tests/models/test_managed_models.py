"""Each model of the Qwen-Image family, small, under management: the bits of the unmanaged model, also from fp8."""
from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth_backend.configs.vram_management_module_maps import module_map_of
from diffsynth_backend.core import load_model
from diffsynth_backend.core.vram import offload_model, onload_model
from diffsynth_backend.models.dinov3_image_encoder import DINOv3ImageEncoder
from diffsynth_backend.models.qwen_image_controlnet import QwenImageBlockWiseControlNet
from diffsynth_backend.models.qwen_image_dit import QwenImageDiT
from diffsynth_backend.models.qwen_image_image2lora import QwenImageImage2LoRAModel
from diffsynth_backend.models.qwen_image_text_encoder import QwenImageTextEncoder
from diffsynth_backend.models.qwen_image_vae import QwenImageVAE
from diffsynth_backend.models.siglip2_image_encoder import Siglip2ImageEncoder

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
TEXT_ENCODER = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 64,
                "vocab_size": 152064, "vision_hidden_size": 32, "vision_depth": 1, "vision_num_heads": 2,
                "vision_intermediate_size": 32}
DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 24,
       "axes_dims_rope": (4, 6, 6)}


pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(BF16)


def encode_text_and_picture(model: QwenImageTextEncoder) -> Tensor:
    """The vision tower takes part: it casts pixels to the dtype that it finds its own weights in."""
    ids = torch.tensor([[5, 6, 151652, *[151655] * 4, 151653, 9]])
    return model.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=random(16, 3 * 2 * 14 * 14),
                       image_grid_thw=torch.tensor([[1, 4, 4]]), mm_token_type_ids=(ids == 151655).int(),
                       use_cache=False).last_hidden_state


CASES: dict[str, tuple[type[nn.Module], dict, Callable[[nn.Module], Tensor]]] = {
    "dit": (QwenImageDiT, DIT, lambda m: m(random(1, 16, 4, 4), torch.tensor([500.0]), random(1, 3, 24))),
    "controlnet": (QwenImageBlockWiseControlNet, {"num_layers": 2, "dim": 32},
                   lambda m: m(random(1, 5, 32), m.process_controlnet_conditioning(random(1, 5, 64)), 1)),
    "vae": (QwenImageVAE, {"base_dim": 4, "num_res_blocks": 1}, lambda m: m.decode(m.encode(random(1, 3, 8, 8)))),
    "text encoder": (QwenImageTextEncoder, TEXT_ENCODER, encode_text_and_picture),
    "siglip2": (Siglip2ImageEncoder, {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48,
                                      "image_size": 32}, lambda m: m(random(2, 3, 32, 32))),
    "dinov3": (DINOv3ImageEncoder, {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48},
               lambda m: m(random(2, 3, 32, 48))),
    "image to LoRA": (QwenImageImage2LoRAModel, {"num_blocks": 1, "dim": 16, "residual_length": 3}, lambda m: torch.cat(
        [weights.flatten() for weights in m(random(2, 5632), random(2, 3, 3584)).values()])),
}


def saved(model: nn.Module, path: Path, storage: torch.dtype) -> str:
    save_file({name: tensor.to(BF16).to(storage).to(BF16) for name, tensor in model.state_dict().items()}, path)
    return str(path)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.inference_mode()
def test_same_bits_as_unmanaged(case, tmp_path):
    model_class, config, run = case
    torch.manual_seed(0)
    model = model_class(**config)
    for parameter in model.parameters():
        parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.normal_(std=0.1)
    paths = {storage: saved(model, tmp_path / f"{storage}.safetensors", storage) for storage in (BF16, FP8)}
    expected = {storage: run(load_model(model_class, path, config)) for storage, path in paths.items()}
    for (offload, onload), vram_limit in itertools.product(((FP8, FP8), (None, FP8), (None, None)), (0, None)):
        vram_config = {"computation_dtype": BF16, "computation_device": "cpu",
                       "offload_dtype": offload or "disk", "offload_device": "cpu" if offload else "disk",
                       "onload_dtype": onload or "disk", "preparing_dtype": onload or BF16}
        managed = load_model(model_class, paths[BF16], config, module_map=module_map_of(model_class),
                             vram_config=vram_config, vram_limit=vram_limit)
        for change in (onload_model, offload_model):
            change(managed)
            storage = onload if change is onload_model else offload
            assert torch.equal(run(managed), expected[storage or BF16])
