"""Image to LoRA for Qwen-Image: a net that reads a picture's embedding and writes the matrices of a LoRA.

Notable: each matrix of each of the denoiser's 60 blocks has two linear layers of its own, so the net is nearly nothing
but output layers: 7.9 billion weights that are each used once. Several pictures go through in one pass, so that weights
that stream are read once for all of them.
Key names: `DiffSynth-Studio/Qwen-Image-i2L`, `Qwen-Image-i2L-{Style,Coarse,Fine}.safetensors`; the default arguments
are Coarse's.
"""
from __future__ import annotations

from torch import Tensor, nn

# The denoiser's linear layers that get a LoRA, with their inputs and outputs in multiples of its width. Each line is
# written by blocks of its own, one for each of the denoiser's.
TARGETS = (
    (("attn.to_q", 1, 1), ("attn.to_k", 1, 1), ("attn.to_v", 1, 1), ("attn.to_out.0", 1, 1)),
    (("img_mlp.net.2", 4, 1), ("img_mod.1", 1, 6)),
    (("attn.add_q_proj", 1, 1), ("attn.add_k_proj", 1, 1), ("attn.add_v_proj", 1, 1), ("attn.to_add_out", 1, 1)),
    (("txt_mlp.net.2", 4, 1), ("txt_mod.1", 1, 6)),
)
RESIDUAL_SCALE = 0.05  # as in training


class CompressedMLP(nn.Module):
    """Two linear layers through a bottleneck, where the text encoder's view of the picture is added."""

    def __init__(self, in_dim: int, mid_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(in_dim, mid_dim, bias=False)
        self.proj_out = nn.Linear(mid_dim, out_dim, bias=False)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        compressed = self.proj_in(x)
        return self.proj_out(compressed if residual is None else compressed + residual)


class SequenceMLP(nn.Module):
    """A sequence of fixed length (N, length, in_dim) → one vector (N, out_dim): each token shrunk, all laid end to end.
    """

    def __init__(self, length: int, in_dim: int, mid_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(in_dim, mid_dim, bias=False)
        self.proj_out = nn.Linear(length * mid_dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(x).flatten(1))


class LoRAMatrices(nn.Module):
    """The two matrices of one linear layer's LoRA."""

    def __init__(self, in_dim: int, mid_dim: int, lora_in: int, lora_out: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.proj_a = CompressedMLP(in_dim, mid_dim, lora_in * rank)
        self.proj_b = CompressedMLP(in_dim, mid_dim, lora_out * rank)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings (N, in_dim) → A (N·rank, lora_in) and B (lora_out, N·rank): the LoRAs of N pictures in a row."""
        a = self.proj_a(x, residual).unflatten(1, (self.rank, -1))  # (N, rank, lora_in)
        b = self.proj_b(x, residual).unflatten(1, (-1, self.rank))  # (N, lora_out, rank)
        return a.flatten(0, 1), b.transpose(0, 1).flatten(1)


class LoRABlock(nn.Module):
    """The LoRA matrices of some of the layers of one of the denoiser's blocks."""

    def __init__(self, prefix: str, targets: tuple[tuple[str, int, int], ...], in_dim: int, mid_dim: int, rank: int,
                 residual: SequenceMLP | None) -> None:
        super().__init__()
        self.names = [f"{prefix}.{name}" for name, _, _ in targets]
        self.layers = nn.ModuleList(LoRAMatrices(in_dim, mid_dim, lora_in, lora_out, rank)
                                    for _, lora_in, lora_out in targets)
        self.proj_residual = residual

    def forward(self, x: Tensor, residual: Tensor | None) -> dict[str, Tensor]:
        if self.proj_residual is not None:
            residual = self.proj_residual(residual)
        lora = {}
        for name, layer in zip(self.names, self.layers):
            a, b = layer(x, residual)
            lora |= {f"{name}.lora_A.default.weight": a, f"{name}.lora_B.default.weight": b}
        return lora


class QwenImageImage2LoRAModel(nn.Module):
    """Picture embeddings → a LoRA for the denoiser.

    image_dim            numbers in an embedding: SigLIP 2's 1536 and DINOv3's 4096
    use_residual         whether the net also reads the text encoder's states of the picture: `residual_length` tokens
                         of `residual_dim` numbers
    compress_dim, residual_mid_dim   widths inside
    rank                 of one picture's LoRA
    dim, num_blocks      the denoiser's width and depth
    """

    def __init__(self, num_blocks: int = 60, use_residual: bool = True, compress_dim: int = 128, rank: int = 4,
                 residual_length: int = 71, residual_mid_dim: int = 1024, dim: int = 3072, image_dim: int = 5632,
                 residual_dim: int = 3584) -> None:
        super().__init__()
        self.image_dim = image_dim
        self.residual_shape = (residual_length, residual_dim) if use_residual else None

        def block(number: int, line: tuple[tuple[str, int, int], ...]) -> LoRABlock:
            targets = tuple((name, wide_in * dim, wide_out * dim) for name, wide_in, wide_out in line)
            residual = (SequenceMLP(residual_length, residual_dim, residual_mid_dim, compress_dim) if use_residual
                        else None)
            return LoRABlock(f"transformer_blocks.{number}", targets, image_dim, compress_dim, rank, residual)

        self.blocks = nn.ModuleList(block(number, line) for line in TARGETS for number in range(num_blocks))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> dict[str, Tensor]:
        """x (N, image_dim), residual (N, residual_length, residual_dim) → LoRA weights by name, in the weights' dtype.

        `transformer_blocks.{block}.{layer}.lora_A.default.weight` is (N·rank, in), `…lora_B…` (out, N·rank): what they
        add to the layer is the sum over the N pictures. Raises ValueError for inputs that the net does not take.
        """
        self._check(x, residual)
        if residual is not None:
            residual = residual * RESIDUAL_SCALE
        lora: dict[str, Tensor] = {}
        for block in self.blocks:
            lora |= block(x, residual)
        return lora

    def _check(self, x: Tensor, residual: Tensor | None) -> None:
        if x.ndim != 2 or x.shape[1] != self.image_dim:
            raise ValueError(f"picture embeddings of shape {tuple(x.shape)}; expected (pictures, {self.image_dim})")
        expected = None if self.residual_shape is None else (len(x), *self.residual_shape)
        given = None if residual is None else tuple(residual.shape)
        if given != expected:
            raise ValueError(f"this net takes {_described(expected)}, but got {_described(given)}: encode the pictures "
                             "for it, with the text encoder if it is a coarse or fine one")


def _described(shape: tuple[int, ...] | None) -> str:
    return "no states of the text encoder" if shape is None else f"states of the text encoder of shape {shape}"
