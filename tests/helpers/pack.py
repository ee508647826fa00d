"""Loads the pack as ComfyUI does, under a name that is no importable path, with stand-ins for ComfyUI itself."""
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from . import comfy_api_stand_in

ROOT = Path(__file__).parents[2]
NAME = "/some/folder/ComfyUI/custom_nodes/the_pack"


def load_pack(host: ModuleType, pack: str = NAME) -> ModuleType:
    """The pack's root module; `host` takes the place of `nodes/host.py`, the only file that needs ComfyUI."""
    comfy_api_stand_in.install()
    sys.modules[f"{pack}.nodes.host"] = host
    spec = importlib.util.spec_from_file_location(pack, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = sys.modules[pack] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def submodule(name: str, pack: str = NAME) -> ModuleType:
    """A module of the loaded pack, such as "nodes.models"."""
    return importlib.import_module(f"{pack}.{name}")
