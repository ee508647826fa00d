"""Blockwise ControlNet for Qwen-Image: a small residual net beside each of the 60 blocks.

Notable: it does not repeat the denoiser. Each block compares the image tokens with the condition's tokens and returns
a correction that is added after the denoiser's block of the same number.
Key names: `DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-{Canny,Depth,Inpaint}` (362 tensors).
"""
from __future__ import annotations

from torch import Tensor, nn

from .general_modules import RMSNorm


class BlockWiseControlBlock(nn.Module):
    """Correction for one block of the denoiser."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.x_rms = RMSNorm(dim)
        self.y_rms = RMSNorm(dim)
        self.input_proj = nn.Linear(dim, dim)
        self.act = nn.GELU()
        self.output_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.output_proj(self.act(self.input_proj(self.x_rms(x) + self.y_rms(y))))


class QwenImageBlockWiseControlNet(nn.Module):
    """One `BlockWiseControlBlock` for each of the denoiser's blocks.

    `additional_in_dim` widens the condition (4 for inpainting: one mask value per latent pixel of a 2×2 patch).
    """

    def __init__(self, num_layers: int = 60, in_dim: int = 64, additional_in_dim: int = 0, dim: int = 3072) -> None:
        super().__init__()
        self.additional_in_dim = additional_in_dim
        self.img_in = nn.Linear(in_dim + additional_in_dim, dim)
        self.controlnet_blocks = nn.ModuleList(BlockWiseControlBlock(dim) for _ in range(num_layers))

    def init_weight(self) -> None:
        """A fresh ControlNet that changes nothing: the last layer of each block is zero."""
        for block in self.controlnet_blocks:
            nn.init.zeros_(block.output_proj.weight)
            nn.init.zeros_(block.output_proj.bias)

    def process_controlnet_conditioning(self, conditioning: Tensor) -> Tensor:
        """Patched condition latents (B, S, in_dim + additional_in_dim) → tokens (B, S, dim)."""
        return self.img_in(conditioning)

    def forward(self, image: Tensor, conditioning: Tensor, block_id: int) -> Tensor:
        """Correction (B, S, dim) for the image tokens after block `block_id`; both inputs (B, S, dim)."""
        return self.controlnet_blocks[block_id](image, conditioning)
