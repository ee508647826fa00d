"""A stand-in for the part of `comfy_api.v0_0_2` that the nodes use, for tests without ComfyUI.

Notable: it only records what is declared; it validates nothing and runs nothing. tests/host holds it against the real
one: what it records about our nodes must be what the real server reports.
"""
from __future__ import annotations

import enum
import sys
import types
from dataclasses import dataclass, field
from typing import Any


class Declared:
    """An input or output: its type, its id and the options given with it."""

    io_type = ""

    def __init__(self, id: str | None = None, **options: Any) -> None:
        self.id, self.options = id, options

    @property
    def optional(self) -> bool:
        return bool(self.options.get("optional"))


def socket_type(name: str, io_type: str) -> type:
    """A class with `Input` and `Output`, as each of comfy_api's types has."""
    parts = {part: type(f"{name}{part}", (Declared,), {"io_type": io_type}) for part in ("Input", "Output")}
    return type(name, (), {**parts, "Type": Any})


class Combo:
    class Input(Declared):
        io_type = "COMBO"

        def __init__(self, id: str, options: list[str], **rest: Any) -> None:
            super().__init__(id, options=options, **rest)


class DynamicCombo:
    @dataclass
    class Option:
        key: str
        inputs: list[Declared]

    class Input(Declared):
        io_type = "COMFY_DYNAMICCOMBO_V3"

        def __init__(self, id: str, options: list[DynamicCombo.Option], **rest: Any) -> None:
            super().__init__(id, choices={option.key: option.inputs for option in options}, **rest)


class Autogrow:
    @dataclass
    class TemplatePrefix:
        input: Declared
        prefix: str
        min: int
        max: int

    class Input(Declared):
        io_type = "COMFY_AUTOGROW_V3"


class Hidden(str, enum.Enum):
    unique_id = "UNIQUE_ID"


@dataclass
class Schema:
    node_id: str
    display_name: str
    category: str
    description: str
    search_aliases: list[str]
    inputs: list[Declared]
    outputs: list[Declared]
    hidden: list[Hidden] = field(default_factory=list)
    is_output_node: bool = False


class ComfyNode:
    hidden: Any = None


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


class PreviewText:
    def __init__(self, value: str) -> None:
        self.value = value


class ComfyAPI:
    """Nothing is asked of it: the table of replacements is empty."""


class ComfyExtension:
    async def on_load(self) -> None:
        """Nothing."""


SIMPLE_TYPES = {"Int": "INT", "Float": "FLOAT", "Boolean": "BOOLEAN", "String": "STRING", "Image": "IMAGE",
                "Latent": "LATENT", "Sigmas": "SIGMAS", "Mask": "MASK"}


def install() -> None:
    """Make `from comfy_api.v0_0_2 import io, ui, ComfyExtension` give the stand-in."""
    io = types.SimpleNamespace(
        **{name: socket_type(name, io_type) for name, io_type in SIMPLE_TYPES.items()},
        Custom=lambda io_type: socket_type(io_type, io_type), Combo=Combo, DynamicCombo=DynamicCombo, Autogrow=Autogrow,
        Hidden=Hidden, Schema=Schema, ComfyNode=ComfyNode, NodeOutput=NodeOutput)
    package, version = types.ModuleType("comfy_api"), types.ModuleType("comfy_api.v0_0_2")
    package.v0_0_2 = version
    version.io, version.ui = io, types.SimpleNamespace(PreviewText=PreviewText)
    version.ComfyExtension, version.ComfyAPI = ComfyExtension, ComfyAPI
    sys.modules.update({"comfy_api": package, "comfy_api.v0_0_2": version})
