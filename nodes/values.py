"""What nodes make of the values on their inputs: batches that must be one picture, inputs that grow."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def one(what: str, batch: Tensor) -> Tensor:
    """The only picture of an IMAGE batch (B, H, W, C), or mask of a MASK batch (B, H, W). Raises ValueError for more.
    """
    if len(batch) != 1:
        raise ValueError(f"{what} is a batch of {len(batch)}, and one is taken: choose one with Image From Batch (a "
                         "mask with Mask To Image before it and Image To Mask behind it)")
    return batch[0]


def one_mask(what: str, mask: Tensor) -> Tensor:
    """As `one`, for a MASK, which may come without a batch axis (H, W)."""
    return mask if mask.ndim == 2 else one(what, mask)


def every(grown: Mapping[str, Any]) -> list[Any]:
    """The values of an input that grows, in the order of its sockets, without those that are not connected."""
    return [value for value in grown.values() if value is not None]
