"""Nodes that were renamed since they were saved in people's workflows: ComfyUI puts the new ones in their place.

Notable: ids, inputs and outputs are for ever, so an entry here is the exception. Widgets without a connection are saved
by position alone, so an entry names the old node's widgets in their order.
"""
from __future__ import annotations

from collections.abc import Iterable

from comfy_api.v0_0_2 import ComfyAPI, io

REPLACEMENTS: tuple[io.NodeReplace, ...] = ()


async def register(replacements: Iterable[io.NodeReplace] = REPLACEMENTS) -> None:
    """Tell ComfyUI (0.14 and newer) of them."""
    for replacement in replacements:
        await ComfyAPI().node_replacement.register(replacement)
