"""Which modules of each model are managed as layers, and by which wrapper. Data, by class of model.

Classes are named as in the registry. A tuple holds the names that one class has had in the versions of its library; at
least one must exist. A model that is not listed is moved as one block. Whatever a map leaves out stays on the
computation device all the time, so a map should cover everything that has weights.
"""
from __future__ import annotations

from ..core.vram.layers import (
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    ManagedLayer,
    ModuleKey,
)
from .model_configs import relative_path, resolve

_QWEN2_5_VL = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"

VRAM_MANAGEMENT_MODULE_MAPS: dict[str, dict[str | tuple[str, ...], type[ManagedLayer]]] = {
    "models.qwen_image_dit.QwenImageDiT": {
        "torch.nn.Linear": AutoWrappedLinear,
        "torch.nn.Embedding": AutoWrappedModule,
        "models.qwen_image_dit.RMSNorm": AutoWrappedModule,
    },
    "models.qwen_image_text_encoder.QwenImageTextEncoder": {
        "torch.nn.Linear": AutoWrappedLinear,
        "torch.nn.Embedding": AutoWrappedModule,
        f"{_QWEN2_5_VL}.Qwen2_5_VLRotaryEmbedding": AutoWrappedModule,
        # As a whole: it casts its input to the dtype of the convolution's weight.
        f"{_QWEN2_5_VL}.Qwen2_5_VisionPatchEmbed": AutoWrappedModule,
        # Renamed in transformers 5.
        (f"{_QWEN2_5_VL}.Qwen2_5_VisionRotaryEmbedding", f"{_QWEN2_5_VL}.Qwen2_5_VLVisionRotaryEmbedding"):
            AutoWrappedModule,
        (f"{_QWEN2_5_VL}.Qwen2RMSNorm", f"{_QWEN2_5_VL}.Qwen2_5_VLRMSNorm"): AutoWrappedModule,
    },
    "models.qwen_image_vae.QwenImageVAE": {
        "torch.nn.Linear": AutoWrappedLinear,
        "torch.nn.Conv2d": AutoWrappedModule,
        "torch.nn.Conv3d": AutoWrappedModule,
        "models.qwen_image_vae.QwenImageRMSNorm": AutoWrappedModule,
    },
    "models.qwen_image_controlnet.QwenImageBlockWiseControlNet": {
        "torch.nn.Linear": AutoWrappedLinear,
        "models.qwen_image_controlnet.RMSNorm": AutoWrappedModule,
    },
    "models.siglip2_image_encoder.Siglip2ImageEncoder": {
        "torch.nn.Linear": AutoWrappedLinear,
        "torch.nn.LayerNorm": AutoWrappedModule,
        "torch.nn.Conv2d": AutoWrappedModule,
        "torch.nn.Embedding": AutoWrappedModule,
        # As a whole: it has parameters of its own, and so has the attention below it.
        "models.siglip2_image_encoder.AttentionPoolingHead": AutoWrappedModule,
    },
    "models.dinov3_image_encoder.DINOv3ImageEncoder": {
        "torch.nn.Linear": AutoWrappedLinear,
        "torch.nn.LayerNorm": AutoWrappedModule,
        "models.dinov3_image_encoder.LayerScale": AutoWrappedModule,
        # As a whole: it has parameters of its own.
        "models.dinov3_image_encoder.Embeddings": AutoWrappedModule,
    },
    "models.qwen_image_image2lora.QwenImageImage2LoRAModel": {
        "torch.nn.Linear": AutoWrappedLinear,
    },
    "models.wan_video_text_encoder.WanTextEncoder": {
        "torch.nn.Linear": AutoWrappedLinear,
        "torch.nn.Embedding": AutoWrappedModule,
        "models.wan_video_text_encoder.RMSNorm": AutoWrappedModule,
    },
    "models.wan_video_image_encoder.WanImageEncoder": {
        "torch.nn.Linear": AutoWrappedLinear,
        "torch.nn.LayerNorm": AutoWrappedModule,
        # As a whole: it has parameters of its own.
        "models.wan_video_image_encoder.Embeddings": AutoWrappedModule,
    },
    "models.wan_video_dit.WanModel": {
        "torch.nn.Linear": AutoWrappedLinear,
        "torch.nn.LayerNorm": AutoWrappedModule,
        "torch.nn.Conv2d": AutoWrappedModule,
        "torch.nn.Conv3d": AutoWrappedModule,
        "models.wan_video_dit.RMSNorm": AutoWrappedModule,
        # These have a parameter of their own beside their modules.
        "models.wan_video_dit.WanBlock": AutoWrappedNonRecurseModule,
        "models.wan_video_dit.Head": AutoWrappedNonRecurseModule,
        "models.wan_video_dit.PictureEmbedding": AutoWrappedNonRecurseModule,
    },
    "models.wan_video_dit.VaceWanModel": {
        "torch.nn.Linear": AutoWrappedLinear,
        "torch.nn.LayerNorm": AutoWrappedModule,
        "torch.nn.Conv3d": AutoWrappedModule,
        "models.wan_video_dit.RMSNorm": AutoWrappedModule,
        "models.wan_video_dit.WanBlock": AutoWrappedNonRecurseModule,
    },
    "models.wan_video_motion_controller.WanMotionControllerModel": {
        "torch.nn.Linear": AutoWrappedLinear,
    },
    "models.wan_video_vae.WanVideoVAE": {
        "torch.nn.Conv2d": AutoWrappedModule,
        "torch.nn.Conv3d": AutoWrappedModule,
        "models.wan_video_vae.WanVideoRMSNorm": AutoWrappedModule,
    },
    "models.wan_video_vae.WanVideoVAE38": {
        "torch.nn.Conv2d": AutoWrappedModule,
        "torch.nn.Conv3d": AutoWrappedModule,
        "models.wan_video_vae.WanVideoRMSNorm": AutoWrappedModule,
    },
}


def module_map_of(model_class: type) -> dict[ModuleKey, type[ManagedLayer]] | None:
    """The map of a model's class with the package's own names resolved, None if there is no map.

    Names of other libraries stay names: `enable_vram_management` imports them and chooses between alternatives.
    """
    module_map = VRAM_MANAGEMENT_MODULE_MAPS.get(relative_path(model_class))
    if module_map is None:
        return None
    return {resolve(key) if isinstance(key, str) else key: wrapper for key, wrapper in module_map.items()}
