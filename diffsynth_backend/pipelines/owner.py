"""The one owner of live weights in a process: handles in, loaded pipelines out.

Notable: each slot of a graph (a loader node) has one set of weights. When a slot's handle changes, its old weights are
freed *before* the new ones are built, because two models often do not fit. Other slots' weights stay while there is
memory and leave by least recent use; a handle whose weights are gone is simply loaded again.
"""
from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ..core import ModelConfig
from ..core.device import empty_cache
from ..core.loader.file import ModelFileError
from ..core.vram.placement import DISK
from ..diffusion import BasePipeline
from .families import family, pipeline_class
from .handle import RESERVED_BYTES, LoraChoice, ModelSource, PipelineHandle
from .lora import LoraState, lora_state, put_loras

logger = logging.getLogger(__name__)


def build_pipeline(handle: PipelineHandle) -> BasePipeline:
    """Load what a handle describes, from the disk alone. Raises ModelFileError and what `from_pretrained` raises."""
    _check_models(handle)
    if handle.tokenizer is None and handle.text_encoder_files:
        raise ModelFileError(f"{handle.titles()}: there is a text encoder and no tokenizer; "
                             f"get {', '.join(family(handle.family).tokenizer_files)} and name their folder")
    configs = [ModelConfig(path=list(source.files), skip_download=True, **handle.vram.fields())
               for source in handle.sources]
    tokenizer = None if handle.tokenizer is None else ModelConfig(path=handle.tokenizer, skip_download=True)
    return pipeline_class(handle.family).from_pretrained(
        torch_dtype=handle.torch_dtype, device=handle.device, model_configs=configs, tokenizer_config=tokenizer,
        vram_limit=handle.vram.vram_limit, ram_limit=handle.vram.ram_limit)


def _check_models(handle: PipelineHandle) -> None:
    """Raises ModelFileError for models that the family has no place for, before a weight is read."""
    kind, found = family(handle.family), {}
    for source in handle.sources:
        for name in source.model_names(handle.family):
            if name not in kind.attributes:
                raise ModelFileError(f"{source.title} is a {name}, which a {kind.title} pipeline does not use "
                                     f"(it uses {', '.join(kind.attributes)}): leave it out")
            titles = found.setdefault(name, [])
            titles.append(source.title)
            most = kind.most_of(name)
            if most is not None and len(titles) > most:
                raise ModelFileError(f"{' and '.join(titles)} are {'both' if most == 1 else 'each'} a {name}: a "
                                     f"pipeline has {'one' if most == 1 else most}, so leave one of them out")


def file_bytes(handle: PipelineHandle) -> int:
    """The size of all files."""
    return sum(map(bytes_on_disk, handle.sources))


def bytes_on_disk(source: ModelSource) -> int:
    """The size of the files of one source that are there."""
    return sum(path.stat().st_size for path in map(Path, source.files) if path.is_file())


def available_ram() -> int:
    """Bytes that could be allocated now without swapping."""
    import psutil  # only this figure needs it

    return psutil.virtual_memory().available


def private_bytes() -> int:
    """Bytes of RAM that this process alone has. Mapped files are not among them: those count as available."""
    import psutil

    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)  # Linux says what is shared


class DeviceMemory:
    """What the program around us does about a device's memory, which it may share with models of its own.

    This one does nothing: we have the device to ourselves.
    """

    @contextmanager
    def building(self, handle: PipelineHandle) -> Iterator[None]:
        """For the time of a `with` block a pipeline is loaded, by this thread."""
        yield

    def changed(self) -> None:
        """Weights were loaded or freed. May be called from any thread, with the owner locked for others."""

    @contextmanager
    def in_use(self, handle: PipelineHandle, models: Sequence[nn.Module]) -> Iterator[None]:
        """For the time of a `with` block these models are at work: the program makes room and takes none of them."""
        yield


@dataclass
class _Entry:
    pipeline: BasePipeline
    in_use: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)
    loras: LoraState | None = ()  # on the pipeline now; None: not known

    def put(self, choices: tuple[LoraChoice, ...]) -> None:
        """Have these LoRAs on the pipeline and no others; nothing happens if that is so."""
        wanted = lora_state(choices)
        if self.loras != wanted:
            self.loras = None
            put_loras(self.pipeline, choices)
            self.loras = wanted


class WeightsOwner:
    """Loads, keeps and frees pipelines by handle. All methods may be called from any thread.

    `build` makes a pipeline from a handle; `available` says how many bytes of memory are free, of which `reserved` are
    left to the system when the weights of another slot could make room. `memory` may be set to what the program around
    us does about the device.
    """

    def __init__(self, build: Callable[[PipelineHandle], BasePipeline] = build_pipeline,
                 available: Callable[[], int] = available_ram, reserved: int = RESERVED_BYTES) -> None:
        self._build, self._available, self._reserved = build, available, reserved
        self.memory = DeviceMemory()
        self._lock = threading.RLock()
        self._slots: dict[str, PipelineHandle] = {}
        self._ties: dict[str, object] = {}  # which handle of a slot counts: a mark for each
        self._entries: OrderedDict[PipelineHandle, _Entry] = OrderedDict()  # least recently used first

    def get(self, handle: PipelineHandle) -> BasePipeline:
        """The pipeline of a handle, loaded if it is not, with whatever LoRAs its last user had. Do not keep it: hold
        the handle and ask again.

        Raises what building raises; the slot is then empty.
        """
        return self._entry(handle).pipeline

    @contextmanager
    def use(self, handle: PipelineHandle) -> Iterator[BasePipeline]:
        """The pipeline with the handle's LoRAs for the time of a `with` block: one thread at a time, and not given up
        to make room. Raises what building raises, and LoraError for a LoRA that does not fit."""
        with self._lock:
            entry = self._entry(handle)
            entry.in_use += 1
        try:
            with entry.lock:
                entry.put(handle.loras)
                yield entry.pipeline
        finally:
            with self._lock:
                entry.in_use -= 1

    def free(self, slot: str) -> None:
        """Free the weights of a slot, unless another slot has them too."""
        with self._lock:
            previous = self._slots.pop(slot, None)
            if previous is not None and previous not in self._slots.values():
                self._drop(previous)

    def tie(self, handle: PipelineHandle) -> None:
        """Free the slot's weights when this handle is gone, unless a later one has been tied to the slot.

        A graph keeps handles as long as it may use them: what it lets go of needs no memory.
        """
        mark = object()
        with self._lock:
            self._ties[handle.slot] = mark
        weakref.finalize(handle, self._untie, handle.slot, mark).atexit = False

    def _untie(self, slot: str, mark: object) -> None:
        with self._lock:
            if self._ties.get(slot) is mark:
                del self._ties[slot]
                self.free(slot)

    def free_all(self) -> None:
        """Free everything. What is in use goes when its user is done."""
        with self._lock:
            self._slots.clear()
            for weights in list(self._entries):
                self._drop(weights)

    def ram_for(self, handle: PipelineHandle) -> int:
        """Bytes of RAM that the weights of a handle could have, whatever its settings.

        What is free, what idle weights would give up, and what the same models have already: so asking again, when
        they are loaded, gives no other answer.
        """
        with self._lock:
            held = sum(_bytes_in_ram(entry.pipeline) for other, entry in self._entries.items()
                       if not entry.in_use or other.models == handle.models)
            return self._available() + min(held, private_bytes())

    def loaded(self) -> tuple[PipelineHandle, ...]:
        """The handles (without slots) whose weights are loaded, least recently used first."""
        with self._lock:
            return tuple(self._entries)

    def pipelines(self) -> tuple[tuple[PipelineHandle, BasePipeline], ...]:
        """The same with their pipelines, to look at and not to keep."""
        with self._lock:
            return tuple((weights, entry.pipeline) for weights, entry in self._entries.items())

    def _entry(self, handle: PipelineHandle) -> _Entry:
        weights = handle.weights
        with self._lock:
            if self._slots.get(handle.slot, weights) != weights:
                self.free(handle.slot)
            if weights not in self._entries:
                self._make_room(weights)
                with self.memory.building(weights):
                    self._entries[weights] = _Entry(self._build(weights))
                self.memory.changed()
            self._entries.move_to_end(weights)
            self._slots[handle.slot] = weights
            return self._entries[weights]

    def _make_room(self, weights: PipelineHandle) -> None:
        stays_on_disk = weights.vram.offload_device == DISK
        needed = self._reserved + (0 if stays_on_disk else file_bytes(weights))
        idle = [other for other, entry in self._entries.items() if not entry.in_use]
        while idle and self._available() < needed:
            self._drop(idle.pop(0))

    def _drop(self, weights: PipelineHandle) -> None:
        entry = self._entries.pop(weights, None)
        if entry is None:
            return
        device = entry.pipeline.device
        logger.info("Freeing %s (%s)", weights.titles(), weights.family)
        del entry
        empty_cache(device)
        self.memory.changed()


def _bytes_in_ram(pipeline: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in pipeline.parameters() if tensor.device.type == "cpu")


owner = WeightsOwner()
