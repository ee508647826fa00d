"""Several LoRAs as one: laid side by side in rank, they add to a layer what they add one after the other."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

A, B = ".lora_A.", ".lora_B."


def merge_lora(loras: Sequence[Mapping[str, Tensor]], alpha: float = 1.0) -> dict[str, Tensor]:
    """One LoRA that adds to every layer `alpha` times what all of these add together.

    Names hold `.lora_A.` (rank, in) or `.lora_B.` (out, rank); a LoRA may lack layers that others have. The tensors are
    new, on the device of the first LoRA that has them.
    Raises ValueError for no LoRAs, for other names, for one matrix without the other and for shapes that do not fit.
    """
    if not loras:
        raise ValueError("no LoRAs to merge: give at least one")
    for lora in loras:
        check_mergeable(lora)
    merged = {}
    for a in dict.fromkeys(name for lora in loras for name in lora if A in name):
        b = a.replace(A, B)
        parts = [(lora[a], lora[b]) for lora in loras if a in lora]
        if len({(down.shape[1], up.shape[0]) for down, up in parts}) > 1:
            raise ValueError(f"{a}: the LoRAs are for layers of different sizes, so for different models")
        device = parts[0][0].device
        merged[a] = torch.cat([down.to(device) for down, _ in parts]) * alpha
        merged[b] = torch.cat([up.to(device) for _, up in parts], dim=1)
    return merged


def check_mergeable(lora: Mapping[str, Tensor]) -> None:
    """Raises ValueError for what `merge_lora` does not take as a LoRA."""
    for name, tensor in lora.items():
        other = name.replace(A, B) if A in name else name.replace(B, A)
        if other == name:
            raise ValueError(f"{name} is no matrix of a LoRA: expected names with {A} and {B}")
        if other not in lora:
            raise ValueError(f"{name} is there and {other} is not: the LoRA is incomplete")
        if tensor.ndim != 2 or lora[other].ndim != 2 or (A in name and tensor.shape[0] != lora[other].shape[1]):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} and {other} {tuple(lora[other].shape)}; expected "
                             "(rank, in) and (out, rank)")
