"""Paths as they are on Windows, where folders are separated by another character and POSIX calls are missing.

Nothing here needs Windows: the modules are given a system whose separator is the backslash.
"""
from __future__ import annotations

import ast
import ntpath
from collections.abc import Iterator
from pathlib import PureWindowsPath
from types import ModuleType, SimpleNamespace

import pytest

from diffsynth_backend.core import platform
from diffsynth_backend.core.loader.file import MissingFile
from diffsynth_backend.pipelines import locate
from diffsynth_backend.pipelines.handle import ModelSource
from tests.helpers.pack import ROOT
from tests.security import comfy_stubs

BASE = "D:\\ComfyUI\\models"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
# What Python's os has on every system, as far as files are concerned.
PORTABLE = {"path", "sep", "stat", "stat_result", "listdir", "scandir", "walk", "environ", "makedirs", "replace",
            "remove", "fspath", "PathLike"}


class WindowsPath(PureWindowsPath):
    """A path on a system whose files are `known`."""

    known: frozenset[str] = frozenset()

    def is_file(self) -> bool:
        return ntpath.normcase(str(self)) in self.known

    def absolute(self) -> WindowsPath:
        return self

    def iterdir(self) -> Iterator[WindowsPath]:
        return (type(self)(name) for name in self.known if ntpath.dirname(name) == ntpath.normcase(str(self)))


def windows_path(*files: str) -> type[WindowsPath]:
    """A `Path` as Windows has it, and these files."""
    return type("Path", (WindowsPath,), {"known": frozenset(map(ntpath.normcase, files))})


def windows(*files: str) -> SimpleNamespace:
    """An `os` with Windows' paths, and these files."""
    known = {ntpath.normcase(path) for path in files}
    path = SimpleNamespace(**{name: getattr(ntpath, name) for name in ntpath.__all__})
    path.isfile = lambda name: ntpath.normcase(name) in known
    path.abspath = ntpath.normpath
    return SimpleNamespace(sep="\\", path=path, listdir=lambda folder: [
        ntpath.basename(name) for name in files if ntpath.dirname(name) == folder])


def windows_paths(*files: str) -> type[PureWindowsPath]:
    """A `Path` of Windows on whose disk are these files."""
    class WindowsPath(PureWindowsPath):
        def is_file(self) -> bool:
            return self in map(PureWindowsPath, files)

        def is_dir(self) -> bool:
            return any(self in PureWindowsPath(file).parents for file in files)

        def absolute(self) -> PureWindowsPath:
            return self

    return WindowsPath


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Iterator[ModuleType]:
    """`nodes/host.py` itself, over stand-ins for ComfyUI's modules."""
    folder = tmp_path_factory.mktemp("comfyui")
    yield comfy_stubs.load_real_host(folder / "models", folder / "output").host
    comfy_stubs.remove()


def test_the_lists_have_one_spelling_on_every_system(host, monkeypatch):
    """A workflow that was saved on Windows names the same file elsewhere, and the other way round."""
    names = {"vae": ["wan\\qwen_vae.safetensors"], "loras": ["style\\ink\\pen.safetensors"],
             "diffusion_models": [f"big\\{shard}" for shard in SHARDS]}
    monkeypatch.setattr(host, "Path", windows_paths())
    monkeypatch.setattr(host.folder_paths, "get_filename_list", lambda folder: names.get(folder, []))
    assert host.model_files() == [f"diffusion_models/big/{SHARDS[0]}", "vae/wan/qwen_vae.safetensors"]
    assert host.lora_files() == ["loras/style/ink/pen.safetensors"]


def test_an_entry_leads_to_its_file_and_its_shards(host, monkeypatch):
    files = [f"{BASE}\\diffusion_models\\big\\{shard}" for shard in SHARDS]
    # The functions of the pack that the host file calls are those of its own copy of the backend.
    for name in ("whole_set", "is_later_shard"):
        monkeypatch.setitem(getattr(host, name).__globals__, "Path", windows_path(*files))
    checked = []
    monkeypatch.setattr(host, "check_inside_any", lambda roots, path: checked.append((tuple(roots), path)) or path)
    monkeypatch.setattr(host.folder_paths, "get_full_path", lambda folder, name: ntpath.normpath(
        ntpath.join(BASE, folder, name)))
    monkeypatch.setattr(host.folder_paths, "get_folder_paths", lambda folder: [f"{BASE}\\{folder}"])
    assert host.model_path(f"diffusion_models/big/{SHARDS[0]}") == tuple(files)
    assert checked == [((f"{BASE}\\diffusion_models",), file) for file in files]


def test_a_saved_file_is_named_with_slashes(host, monkeypatch):
    monkeypatch.setattr(host, "Path", windows_paths())
    monkeypatch.setattr(host, "check_inside_any", lambda roots, path: path)
    monkeypatch.setattr(host.folder_paths, "get_output_directory", lambda: "D:\\out")
    monkeypatch.setattr(host.folder_paths, "get_save_image_path", lambda prefix, root: (
        "D:\\out\\loras\\mine", "pen", 7, "loras\\mine", prefix))
    assert host.output_file("loras/mine/pen", ".safetensors") == (
        "D:\\out\\loras\\mine\\pen_00007_.safetensors", "loras/mine/pen_00007_.safetensors")


def test_shards_are_found_beside_the_first(monkeypatch):
    files = [f"{BASE}\\big\\{name}" for name in (*SHARDS, "other-00001-of-00002.safetensors", "alone.safetensors")]
    monkeypatch.setattr(locate, "Path", windows_path(*files))
    assert locate.whole_set(files[0]) == tuple(files[:2]) and locate.whole_set(files[3]) == (files[3],)
    for separator in "/\\":
        assert [locate.is_later_shard(f"big{separator}{shard}") for shard in SHARDS] == [False, True]


def test_the_tokenizer_is_found_and_a_missing_one_named(monkeypatch):
    encoder = f"{BASE}\\text_encoders\\model.safetensors"
    source = ModelSource("encoder", (encoder,))
    monkeypatch.setattr(ModelSource, "model_names", lambda self, family: ("qwen_image_text_encoder",))
    monkeypatch.setattr(locate, "read_tensor_infos", lambda files: {})
    monkeypatch.setattr(locate, "tokens_known", lambda folder, parts: (folder / "vocab.json").is_file() or None)
    known = f"{BASE}\\diffsynth\\Qwen\\Qwen-Image\\tokenizer"
    for folder in (f"{BASE}\\text_encoders\\tokenizer", f"{BASE}\\tokenizer", known):
        monkeypatch.setattr(locate, "Path", windows_path(encoder, f"{folder}\\vocab.json"))
        assert locate.find_tokenizer("qwen-image", [source], [f"{BASE}\\diffsynth"]) == folder
    monkeypatch.setattr(locate, "Path", windows_path(encoder))
    with pytest.raises(MissingFile) as error:
        locate.find_tokenizer("qwen-image", [source], [f"{BASE}\\diffsynth"])
    assert known in str(error.value)


def test_the_folder_for_missing_files_is_named_as_the_system_does(monkeypatch):
    monkeypatch.setattr(locate, "Path", windows_path())
    with pytest.raises(MissingFile) as error:
        locate.locate_preset("qwen-image", [f"{BASE}\\diffsynth"])
    assert f"{BASE}\\diffsynth\\Qwen\\Qwen-Image" in str(error.value)


def test_folders_of_models_are_named_as_the_system_does(host, monkeypatch):
    monkeypatch.setattr(host, "Path", windows_paths())
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", "E:/models")
    monkeypatch.setattr(host.folder_paths, "get_folder_paths", lambda folder: [f"{BASE}\\{folder}"])
    assert host.model_bases() == ["E:\\models", f"{BASE}\\diffsynth"]
    monkeypatch.setattr(host.comfy.model_management, "__file__", "D:\\ComfyUI\\comfy\\model_management.py",
                        raising=False)
    assert host.native_tokenizers("qwen-image") == ["D:\\ComfyUI\\comfy\\text_encoders\\qwen25_tokenizer"]


def test_free_space_is_that_of_the_folder_that_exists(monkeypatch):
    asked = []
    monkeypatch.setattr(platform, "Path", windows_paths(f"{BASE}\\vae\\x.safetensors"))
    monkeypatch.setattr(platform.shutil, "disk_usage", lambda folder: asked.append(str(folder)) or SimpleNamespace(
        free=5))
    assert platform.free_space(f"{BASE}/diffsynth/Qwen/Qwen-Image") == 5 and asked == [BASE]


@pytest.mark.parametrize("folder", ["nodes", "diffsynth_backend/pipelines"])
def test_no_call_is_made_that_only_some_systems_have(folder):
    used = {(path.name, node.attr) for path in (ROOT / folder).glob("*.py")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"}
    assert not {(name, call) for name, call in used if call not in PORTABLE}
