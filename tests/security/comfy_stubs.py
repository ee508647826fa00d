"""ComfyUI's modules as far as `nodes/host.py` needs them to find files: its folders, and how it makes paths of names.

Notable: which modules there are is read from that file's imports; whatever they are asked for is an empty class, except
for `folder_paths`. `get_full_path` and `get_save_image_path` do with a name what ComfyUI does, which is not much.
"""
from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

from tests.helpers.pack import ROOT, load_pack, submodule

PACK = "/hostile/ComfyUI/custom_nodes/the_pack"
_made: list[str] = []


class Stub(ModuleType):
    """A module, or a package, that has everything."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _host_modules() -> Iterator[str]:
    """The modules that the host file imports and that are not here, packages first."""
    for node in ast.walk(ast.parse((ROOT / "nodes" / "host.py").read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module)]
        for name in names:
            parts = name.split(".")
            if parts[0] in sys.modules and not isinstance(sys.modules[parts[0]], Stub):
                continue
            if isinstance(sys.modules.get(parts[0]), Stub) or importlib.util.find_spec(parts[0]) is None:
                yield from (".".join(parts[:count + 1]) for count in range(len(parts)))


def install(models: Path, output: Path) -> None:
    """Stand-ins for ComfyUI's modules over these folders."""
    made = {}
    for name in _host_modules():
        if name not in sys.modules:
            sys.modules[name] = Stub(name)
            _made.append(name)
        made[name] = sys.modules[name]
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    made["comfy.model_management"].__file__ = str(models / "comfy.py")
    folders = made["folder_paths"]
    folders.models_dir = str(models)
    folders.get_folder_paths = lambda folder: [str(models / folder)]
    folders.add_model_folder_path = lambda folder, path: None
    folders.get_filename_list = lambda folder: sorted(
        path.relative_to(models / folder).as_posix() for path in (models / folder).glob("*.safetensors"))
    folders.get_output_directory = lambda: str(output)

    def get_full_path(folder: str, name: str) -> str | None:
        path = os.path.join(models, folder, os.path.relpath(os.path.join("/", name), "/"))
        return path if os.path.isfile(path) else None

    def get_save_image_path(prefix: str, root: str) -> tuple[str, str, int, str, str]:
        subfolder, name = os.path.split(os.path.normpath(prefix))
        return os.path.join(root, subfolder), name, 1, subfolder, prefix

    folders.get_full_path, folders.get_save_image_path = get_full_path, get_save_image_path


def load_real_host(models: Path, output: Path) -> SimpleNamespace:
    """`nodes/host.py` itself and the nodes' classes by their short ids, over stand-ins for ComfyUI's modules."""
    install(models, output)
    sys.modules.pop(f"{PACK}.nodes.host", None)
    load_pack(SimpleNamespace(register=lambda: None), PACK)  # the root, so that the rest can be imported below it
    for name in [name for name in sys.modules if name.startswith(f"{PACK}.nodes")]:
        del sys.modules[name]
    host = importlib.import_module(f"{PACK}.nodes.host")
    nodes = submodule("nodes", PACK).NODES
    return SimpleNamespace(host=host, nodes={
        node.define_schema().node_id.removeprefix("DiffSynthBackend_"): node for node in nodes})


def remove() -> None:
    """Take the stand-ins away, so that a real ComfyUI may take their places."""
    for name in [*_made, *(name for name in sys.modules if name.startswith(PACK))]:
        sys.modules.pop(name, None)
    _made.clear()
