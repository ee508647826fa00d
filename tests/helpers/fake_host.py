"""Takes the place of `nodes/host.py` where there is no ComfyUI: the same functions over plain folders.

Notable: a test compares the names with those of the real module, so that the two cannot drift apart.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from diffsynth_backend.core.loader.file import MODEL_SUFFIXES, SAFETENSORS_SUFFIX


class FakeHost(ModuleType):
    """A module whose folders of models lie below `models`; what nodes report is kept."""

    def __init__(self, models: Path) -> None:
        super().__init__("host")
        self.models = models
        self.steps: list[int] = []
        self.interrupt_at: int | None = None
        self.settings: dict[str, Any] = {}
        self.confirmed: str | None = None
        self.told: list[Mapping[str, Any]] = []
        self.feed = self.MemoryFeed()

    def register(self) -> None:
        (self.models / "diffsynth").mkdir(parents=True, exist_ok=True)

    def model_bases(self) -> list[str]:
        return [str(self.models / "diffsynth")]

    def model_files(self) -> list[str]:
        return [entry for entry in self._files("*", MODEL_SUFFIXES) if not entry.startswith("loras/")]

    def model_path(self, entry: str) -> tuple[str, ...]:
        return (str(self.models / entry),)

    def lora_files(self) -> list[str]:
        return self._files("loras", (SAFETENSORS_SUFFIX,))

    def lora_path(self, entry: str) -> str:
        return str(self.models / entry)

    def _files(self, folder: str, suffixes: tuple[str, ...]) -> list[str]:
        return sorted(path.relative_to(self.models).as_posix() for path in self.models.glob(f"{folder}/*.*")
                      if path.name.endswith(suffixes))

    def output_file(self, prefix: str, suffix: str) -> tuple[str, str]:
        name = f"{prefix}_00001_{suffix}"
        path = self.models.parent / "output" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path), name

    def native_tokenizers(self, family: str) -> list[str]:
        return []

    def setting(self, name: str, default: Any) -> Any:
        return self.settings.get(name, default)

    def confirmed_download(self) -> str | None:
        return self.confirmed

    def serve(self, path: str, answer: Callable[[Any], Any]) -> None:
        """There is no server."""

    def watch(self, work: Callable[..., None], figures: Callable[[Any], Mapping[str, Any]], node_id: str) -> None:
        work(lambda state: self.told.append(figures(state)), lambda: False)

    class SharedMemory:
        """Nothing is shared."""

    class MemoryFeed:
        """Nobody listens."""

        def state(self, query: Any) -> None:
            """Nothing was said."""

    class LoadProgress:
        """Nobody watches."""

    def compute_device(self) -> str:
        return "cpu"

    def device_gib(self, device: str) -> float:
        return 16.0

    def prefers_bfloat16(self, device: str) -> bool:
        return False

    def DenoiseProgress(self, device: str) -> Callable[[Any], None]:  # noqa: N802, a class in the real one
        def progress(step: Any) -> None:
            self.steps.append(step.index)
            if step.index == self.interrupt_at:
                raise KeyboardInterrupt
        return progress

    def each(self, parts: Iterable[Any]) -> Iterator[Any]:
        yield from parts
