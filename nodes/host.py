"""ComfyUI, as far as the nodes need it: folders of models, the device, progress, previews, interruption.

Notable: the only file that imports ComfyUI's own modules, so a change there is met here. A folder name or file name in
a workflow comes from a stranger: what is opened is checked again to lie in one of the user's folders.
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.utils
import folder_paths
import latent_preview
import torch
from torch import nn

from ..diffsynth_backend.core import environment
from ..diffsynth_backend.core.device import GIB
from ..diffsynth_backend.core.loader.containment import check_inside_any
from ..diffsynth_backend.core.loader.file import SAFETENSORS_SUFFIX, MissingFile
from ..diffsynth_backend.diffusion import Step
from ..diffsynth_backend.pipelines.handle import PipelineHandle, computation_gib
from ..diffsynth_backend.pipelines.locate import is_later_shard, whole_set
from ..diffsynth_backend.pipelines.owner import DeviceMemory, file_bytes, owner
from .memory import adapter_of

OWN_FOLDER = "diffsynth"
MODEL_FOLDERS = ("diffusion_models", "text_encoders", "vae", OWN_FOLDER)
LORA_FOLDERS = ("loras",)
LATENT_FORMATS = {"qwen-image": comfy.latent_formats.Wan21}
NATIVE_TOKENIZERS = {"qwen-image": "qwen25_tokenizer"}


# ---- folders --------------------------------------------------------------------------------------------------------

def register() -> None:
    """Add our folder of models to ComfyUI's, after those of `extra_model_paths.yaml`, and share the card's memory."""
    owner.memory = SharedMemory()
    folder_paths.add_model_folder_path(OWN_FOLDER, os.path.join(folder_paths.models_dir, OWN_FOLDER))


def model_bases() -> list[str]:
    """Folders under which known models lie as `<owner>/<name>/…`: the environment's first, then ComfyUI's."""
    own = environment.text(environment.BASE_PATH, "")
    return ([os.path.abspath(own)] if own else []) + folder_paths.get_folder_paths(OWN_FOLDER)


def model_files() -> list[str]:
    """Every safetensors file in ComfyUI's folders as "folder/name", one entry for a set of shards."""
    return [entry for entry in _entries(MODEL_FOLDERS) if not is_later_shard(entry)]


def model_path(entry: str) -> tuple[str, ...]:
    """The file of an entry of `model_files`, with its shards.

    Raises MissingFile for what is not there, PathRefused for what leads out of ComfyUI's folders.
    """
    path, roots = _find(entry, MODEL_FOLDERS)
    return tuple(check_inside_any(roots, file) for file in whole_set(path))


def lora_files() -> list[str]:
    """Every safetensors file in ComfyUI's folder of LoRAs as "loras/name"."""
    return _entries(LORA_FOLDERS)


def lora_path(entry: str) -> str:
    """The file of an entry of `lora_files`. Raises as `model_path`."""
    path, roots = _find(entry, LORA_FOLDERS)
    return check_inside_any(roots, path)


def _entries(folders: Sequence[str]) -> list[str]:
    return [f"{folder}/{name.replace(os.sep, '/')}" for folder in folders
            for name in folder_paths.get_filename_list(folder) if name.endswith(SAFETENSORS_SUFFIX)]


def _find(entry: str, folders: Sequence[str]) -> tuple[str, list[str]]:
    """The path of an entry, and the folders that it may lie in."""
    folder, _, name = entry.partition("/")
    path = folder_paths.get_full_path(folder, name) if folder in folders else None
    if path is None:
        raise MissingFile(f"{entry!r} is not among ComfyUI's model files: put the file into one of the folders "
                          f"{', '.join(folders)} and press R in the page, or choose another file")
    if not path.endswith(SAFETENSORS_SUFFIX):
        raise MissingFile(f"{entry!r} is no {SAFETENSORS_SUFFIX} file: workflows may open only those")
    return path, folder_paths.get_folder_paths(folder)


def output_file(prefix: str, suffix: str) -> tuple[str, str]:
    """Path and name (in ComfyUI's output folder) of a new file, numbered as Save Image numbers its own.

    Raises PathRefused for a prefix that leads out of the folder.
    """
    root = folder_paths.get_output_directory()
    check_inside_any([root], os.path.join(root, os.path.dirname(prefix)))
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root)
    path = check_inside_any([root], os.path.join(folder, f"{name}_{counter:05}_{suffix}"))
    return path, os.path.join(subfolder, os.path.basename(path)).replace(os.sep, "/")


def native_tokenizers(family: str) -> list[str]:
    """Folders of ComfyUI itself that hold a family's tokenizer."""
    encoders = os.path.join(os.path.dirname(comfy.model_management.__file__), "text_encoders")
    return [os.path.join(encoders, NATIVE_TOKENIZERS[family])] if family in NATIVE_TOKENIZERS else []


# ---- devices --------------------------------------------------------------------------------------------------------

def compute_device() -> str:
    """Where ComfyUI computes."""
    return str(comfy.model_management.get_torch_device())


def device_gib(device: str) -> float:
    """All memory of a device, in GiB."""
    return comfy.model_management.get_total_memory(torch.device(device)) / GIB


def prefers_bfloat16(device: str) -> bool:
    """Whether a device computes in bfloat16 well. CPUs do it slowly, and ComfyUI uses float32 there."""
    torch_device = torch.device(device)
    return torch_device.type != "cpu" and comfy.model_management.should_use_bf16(torch_device)


class SharedMemory(DeviceMemory):
    """Our models among those of ComfyUI: they make room for each other. A CPU's memory is nobody's to manage."""

    def before_build(self, handle: PipelineHandle) -> None:
        device = torch.device(handle.device)
        if device.type != "cpu":
            size = 0 if handle.vram.managed else file_bytes(handle)
            comfy.model_management.free_memory(size + _computation_bytes(handle), device)

    @contextmanager
    def in_use(self, handle: PipelineHandle, models: Sequence[nn.Module]) -> Iterator[None]:
        device = torch.device(handle.device)
        if device.type == "cpu":
            yield
            return
        limit = None if handle.vram.vram_limit is None else int(handle.vram.vram_limit * GIB)
        adapters = [adapter_of(model, device, handle.torch_dtype, limit) for model in models]
        comfy.model_management.load_models_gpu(adapters, memory_required=_computation_bytes(handle))
        try:
            for adapter in adapters:
                adapter.in_use = True
            yield
        finally:
            for adapter in adapters:
                adapter.in_use = False


def _computation_bytes(handle: PipelineHandle) -> int:
    return int(computation_gib(device_gib(handle.device)) * GIB)


# ---- while a node runs ----------------------------------------------------------------------------------------------

class DenoiseProgress:
    """A step callback: one progress event a step, with a preview if the user wants those; raises when interrupted."""

    def __init__(self, family: str, device: str) -> None:
        self._previewer = latent_preview.get_previewer(torch.device(device), LATENT_FORMATS[family]())

    def __call__(self, step: Step) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None
        if self._previewer is not None:  # previewers take one frame of a video, too: of layers the first, the whole
            denoised = step.denoised.float()
            frames = denoised if denoised.ndim == 5 else denoised.unsqueeze(2)
            preview = self._previewer.decode_latent_to_preview_image("JPEG", frames)
        # A bar of its own for each step, because one bar leaves out events that follow quickly.
        comfy.utils.ProgressBar(step.total).update_absolute(step.index + 1, step.total, preview)


def each(parts: Iterable[Any]) -> Iterator[Any]:
    """The parts of a task one by one (tiles, pictures), with progress; raises when interrupted."""
    parts = list(parts)
    bar = comfy.utils.ProgressBar(len(parts))
    for index, part in enumerate(parts):
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield part
        bar.update_absolute(index + 1, len(parts))
