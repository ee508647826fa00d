"""ComfyUI, as far as the nodes need it: folders of models, the device, progress, previews, interruption.

Notable: the only file that imports ComfyUI's own modules, so a change there is met here. A folder name or file name in
a workflow comes from a stranger: what is opened is checked again to lie in one of the user's folders.
"""
from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.ldm.modules.attention
import comfy.model_management
import comfy.utils
import folder_paths
import latent_preview
import torch
from aiohttp import web
from comfy.cli_args import args
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor, nn

from ..diffsynth_backend.core import attention, environment
from ..diffsynth_backend.core.attention.kernels import torch_attention
from ..diffsynth_backend.core.device import GIB
from ..diffsynth_backend.core.loader.containment import check_inside_any
from ..diffsynth_backend.core.loader.file import MODEL_SUFFIXES, SAFETENSORS_SUFFIX, MissingFile
from ..diffsynth_backend.core.loader.watch import LoadStep, watch_loading
from ..diffsynth_backend.diffusion import Step
from ..diffsynth_backend.pipelines.handle import PipelineHandle, computation_gib
from ..diffsynth_backend.pipelines.locate import is_later_shard, whole_set
from ..diffsynth_backend.pipelines.memory_map import loading, memory_map
from ..diffsynth_backend.pipelines.owner import DeviceMemory, bytes_on_disk, file_bytes, owner
from .memory import adapter_of

OWN_FOLDER = "diffsynth"
MODEL_FOLDERS = ("diffusion_models", "text_encoders", "vae", OWN_FOLDER)
LORA_FOLDERS, LORA_SUFFIXES = ("loras",), (SAFETENSORS_SUFFIX,)
# By the number of channels: of Qwen-Image and most of Wan, of TI2V-5B.
LATENT_FORMATS = {16: comfy.latent_formats.Wan21, 48: comfy.latent_formats.Wan22}
ATTENTION_SETTING = "DiffSynth.Attention"
CONFIRMED = "diffsynth_download"  # in a prompt's extra_data: what the user has said yes to
WATCH_SECONDS, END_SECONDS = 0.2, 0.6  # together within the second that an interrupt may take
MEMORY_EVENT, LOADING_EVENT, DOWNLOAD_EVENT = "diffsynth.memory", "diffsynth.loading", "diffsynth.download"
SAY_SECONDS = 0.25  # between two events while something runs
NATIVE_TOKENIZERS = {"qwen-image": "qwen25_tokenizer"}


# ---- folders --------------------------------------------------------------------------------------------------------

def register() -> None:
    """Add our folder of models to ComfyUI's, after those of `extra_model_paths.yaml`, and share the card's memory."""
    owner.memory = SharedMemory()
    attention.register("comfyui", _comfyui_attention)
    folder_paths.add_model_folder_path(OWN_FOLDER, str(Path(folder_paths.models_dir, OWN_FOLDER)))


def model_bases() -> list[str]:
    """Folders under which known models lie as `<owner>/<name>/…`: the environment's first, then ComfyUI's."""
    own = environment.text(environment.BASE_PATH, "")
    return ([str(Path(own).absolute())] if own else []) + folder_paths.get_folder_paths(OWN_FOLDER)


def model_files() -> list[str]:
    """Every file of weights in ComfyUI's folders as "folder/name", one entry for a set of shards."""
    return [entry for entry in _entries(MODEL_FOLDERS, MODEL_SUFFIXES) if not is_later_shard(entry)]


def model_path(entry: str) -> tuple[str, ...]:
    """The file of an entry of `model_files`, with its shards.

    Raises MissingFile for what is not there, PathRefused for what leads out of ComfyUI's folders.
    """
    path, roots = _find(entry, MODEL_FOLDERS, MODEL_SUFFIXES)
    return tuple(check_inside_any(roots, file) for file in whole_set(path))


def lora_files() -> list[str]:
    """Every safetensors file in ComfyUI's folder of LoRAs as "loras/name"."""
    return _entries(LORA_FOLDERS, LORA_SUFFIXES)


def lora_path(entry: str) -> str:
    """The file of an entry of `lora_files`. Raises as `model_path`."""
    path, roots = _find(entry, LORA_FOLDERS, LORA_SUFFIXES)
    return check_inside_any(roots, path)


def _entries(folders: Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    return [f"{folder}/{Path(name).as_posix()}" for folder in folders
            for name in folder_paths.get_filename_list(folder) if name.lower().endswith(suffixes)]


def _find(entry: str, folders: Sequence[str], suffixes: tuple[str, ...]) -> tuple[str, list[str]]:
    """The path of an entry, and the folders that it may lie in."""
    folder, _, name = entry.partition("/")
    path = folder_paths.get_full_path(folder, name) if folder in folders else None
    if path is None:
        raise MissingFile(f"{entry!r} is not among ComfyUI's model files: put the file into one of the folders "
                          f"{', '.join(folders)} and press R in the page, or choose another file")
    if not path.lower().endswith(suffixes):
        raise MissingFile(f"{entry!r} is not one of the files that workflows may open here: choose one that ends in "
                          f"{', '.join(suffixes)}")
    return path, folder_paths.get_folder_paths(folder)


def output_file(prefix: str, suffix: str) -> tuple[str, str]:
    """Path and name (in ComfyUI's output folder) of a new file, numbered as Save Image numbers its own.

    Raises PathRefused for a prefix that leads out of the folder.
    """
    root = folder_paths.get_output_directory()
    check_inside_any([root], str(Path(root, prefix)))
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root)
    path = check_inside_any([root], str(Path(folder, f"{name}_{counter:05}_{suffix}")))
    return path, Path(subfolder, Path(path).name).as_posix()


def native_tokenizers(family: str) -> list[str]:
    """Folders of ComfyUI itself that hold a family's tokenizer."""
    if family not in NATIVE_TOKENIZERS:
        return []
    return [str(Path(comfy.model_management.__file__).parent / "text_encoders" / NATIVE_TOKENIZERS[family])]


# ---- the page and its user ------------------------------------------------------------------------------------------

def setting(name: str, default: Any) -> Any:
    """A setting of the page, from the file in which ComfyUI keeps it. With --multi-user always the default: a run does
    not know whose it is."""
    if args.multi_user:
        return default
    path = Path(folder_paths.get_user_directory(), "default", "comfy.settings.json")
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(name, default)
    except (FileNotFoundError, json.JSONDecodeError):  # none was ever set; or it is being written, as ComfyUI sees it
        return default


def confirmed_download() -> str | None:
    """What the user of the page has said yes to for the run that is going on. It stands beside the workflow, so that no
    workflow can say it."""
    context = get_executing_context()
    running, _ = PromptServer.instance.prompt_queue.get_current_queue()
    return next((extra_data.get(CONFIRMED) for _, prompt_id, _, extra_data, *_ in running
                 if context is not None and prompt_id == context.prompt_id), None)


def serve(path: str, answer: Callable[[Mapping[str, str]], Mapping[str, Any] | None]) -> None:
    """Answer GET requests for `path?…`: ids and numbers go in, JSON comes out, null for an id that means nothing."""
    async def reply(request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(answer, dict(request.query)))

    PromptServer.instance.routes.get(path)(reply)


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

    @contextmanager
    def building(self, handle: PipelineHandle) -> Iterator[None]:
        device = torch.device(handle.device)
        if device.type != "cpu":
            size = 0 if handle.vram.managed else file_bytes(handle)
            comfy.model_management.free_memory(size + _computation_bytes(handle), device)
        with watch_loading(LoadProgress(handle)):
            yield

    def changed(self) -> None:
        feed.say()

    @contextmanager
    def in_use(self, handle: PipelineHandle, models: Sequence[nn.Module]) -> Iterator[None]:
        attention.prefer(setting(ATTENTION_SETTING, "auto"), ATTENTION_SETTING)
        try:
            with _room_on_card(handle, models):
                yield
        finally:
            feed.say()


@contextmanager
def _room_on_card(handle: PipelineHandle, models: Sequence[nn.Module]) -> Iterator[None]:
    """For the time of a `with` block ComfyUI knows these models to be at work."""
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


def _comfyui_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The attention that ComfyUI's start options choose; a mask goes to torch's, as with every other kernel."""
    if mask is not None:
        return torch_attention(q, k, v, mask)
    return comfy.ldm.modules.attention.optimized_attention(q, k, v, q.shape[1], skip_reshape=True,
                                                           skip_output_reshape=True)


# ---- where weights are ----------------------------------------------------------------------------------------------

class MemoryFeed:
    """Tells every page where the weights are, and keeps what it said last for pages that open later."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {"device": None, "device_bytes": None, "pipelines": []}
        self._said = 0.0

    def state(self, _query: Mapping[str, str]) -> dict[str, Any]:
        """What was said last. Nothing is looked at for it, so a page never waits for a pipeline at work."""
        return self._last

    def say(self) -> None:
        """Look where the weights are now, and say it."""
        device = compute_device()
        on_cpu = torch.device(device).type == "cpu"
        self._last = {"device": device, "device_bytes": None if on_cpu else int(device_gib(device) * GIB),
                      "pipelines": [asdict(pipeline) for pipeline in memory_map()]}
        self._said = time.monotonic()
        PromptServer.instance.send_sync(MEMORY_EVENT, self._last)

    def say_now_and_then(self) -> None:
        """For each step, tile or tensor."""
        if time.monotonic() - self._said > SAY_SECONDS:
            self.say()


feed = MemoryFeed()


# ---- while a node runs ----------------------------------------------------------------------------------------------

class DenoiseProgress:
    """A step callback: one progress event a step, with a preview if the user wants those; raises when interrupted."""

    def __init__(self, device: str) -> None:
        self._previewer_for = cache(partial(_previewer, torch.device(device)))

    def __call__(self, step: Step) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview, previewer = None, self._previewer_for(step.denoised.shape[1])
        if previewer is not None:  # they take videos, most of them to show the first frame: of layers that is the whole
            denoised = step.denoised.float()
            frames = denoised if denoised.ndim == 5 else denoised.unsqueeze(2)
            preview = previewer.decode_latent_to_preview_image("JPEG", frames)
        # A bar of its own for each step, because one bar leaves out events that follow quickly.
        comfy.utils.ProgressBar(step.total).update_absolute(step.index + 1, step.total, preview)
        feed.say_now_and_then()


def _previewer(device: torch.device, channels: int) -> latent_preview.LatentPreviewer | None:
    """What makes pictures of latents of so many channels; None if the user wants none."""
    return latent_preview.get_previewer(device, LATENT_FORMATS[channels]())


def each(parts: Iterable[Any]) -> Iterator[Any]:
    """The parts of a task one by one (tiles, pictures), with progress; raises when interrupted."""
    parts = list(parts)
    bar = comfy.utils.ProgressBar(len(parts))
    for index, part in enumerate(parts):
        comfy.model_management.throw_exception_if_processing_interrupted()
        feed.say_now_and_then()
        yield part
        bar.update_absolute(index + 1, len(parts))


class LoadProgress:
    """Watches a pipeline being loaded: figures for the node that runs and its bar, a few times a second; raises when
    interrupted."""

    def __init__(self, handle: PipelineHandle) -> None:
        self._handle = handle
        self._before, self._total = {}, 0
        for source in handle.sources:
            self._before |= {Path(file).resolve(): self._total for file in source.files}
            self._total += bytes_on_disk(source)
        self._room = None if torch.device(handle.device).type == "cpu" else int(
            (handle.vram.vram_limit or device_gib(handle.device)) * GIB)
        self._file, self._said = "", 0.0

    def __call__(self, step: LoadStep) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if step.file == self._file and time.monotonic() - self._said < SAY_SECONDS:
            return
        self._file, self._said = step.file, time.monotonic()
        done = self._before[Path(step.file).resolve()] + step.done_bytes
        comfy.utils.ProgressBar(self._total).update_absolute(done, self._total)
        server, state = PromptServer.instance, loading(self._handle, step, self._device_bytes(done), self._room)
        server.send_sync(LOADING_EVENT, {"node": server.last_node_id, **asdict(state)}, server.client_id)
        feed.say_now_and_then()

    def _device_bytes(self, done: int) -> int:
        """What all of ours takes of the device; a pipeline that is not managed goes straight there."""
        loaded = sum(model.device_bytes + model.ring_bytes for pipeline in memory_map() for model in pipeline.models)
        return loaded + (0 if self._handle.vram.managed else done)


def watch(work: Callable[[Callable[[Any], None], Callable[[], bool]], None],
          figures: Callable[[Any], Mapping[str, Any]], node_id: str) -> None:
    """Do what takes long without computing, such as a download, as `work(progress, cancelled)` in a thread of its own.

    What it tells `progress` (with done and total, in bytes) is shown as the node's bar and, as figures, below it. An
    interrupt makes `cancelled` true and raises at once, whatever the work is waiting for.
    """
    latest: list[Any] = []
    stopped = threading.Event()
    pool = ThreadPoolExecutor(1, thread_name_prefix="watched")
    future = pool.submit(work, lambda state: latest.__setitem__(slice(None), [state]), stopped.is_set)
    bar, server = comfy.utils.ProgressBar(1), PromptServer.instance
    try:
        while not future.done():
            wait([future], WATCH_SECONDS)
            comfy.model_management.throw_exception_if_processing_interrupted()
            for state in latest:
                bar.update_absolute(state.done, max(state.total, 1))
                server.send_sync(DOWNLOAD_EVENT, {"node": node_id, **figures(state)}, server.client_id)
        future.result()
    finally:
        stopped.set()
        pool.shutdown(wait=False)
        wait([future], END_SECONDS)  # longer only for what waits for a server's answer
