"""ModelConfig: where a model's files come from and how its weights are kept in memory.

Either `path` names local files, or `model_id` and `origin_file_pattern` name files of a model hub, which lie in
`<base>/<model_id>/` once downloaded. `download_if_necessary` turns the second form into the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import environment
from .containment import check_model_id, check_pattern, resolve_matches
from .download import HUBS, Progress, download
from .download_file import unfinished
from .file import (
    PICKLE_SUFFIXES,
    SAFETENSORS_SUFFIX,
    CorruptFile,
    MissingFile,
    MissingShards,
    ModelFileError,
    check_shards,
    read_layout,
)

VRAM_FIELDS = (
    "offload_dtype", "offload_device", "onload_dtype", "onload_device",
    "preparing_dtype", "preparing_device", "computation_dtype", "computation_device",
)  # fmt: skip
WHOLE_REPOSITORY = (None, "", "./")
NEVER_EMPTY = (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES, ".json", ".model")


@dataclass
class ModelConfig:
    """One model: its source, and the dtype and device of its weights in each of the four VRAM states.

    path: file, list of files (shards, or several models), or folder.
    model_id, origin_file_pattern: "owner/name" on a hub, and the files wanted: a path with wildcards, or several; one
        that ends in "/" is a folder; empty is the whole repository.
    download_source: "modelscope" or "huggingface"; local_model_path: the folder to keep models in; skip_download:
        use the files on disk and contact nobody. None: the environment decides (see core.environment), and if it names
        no source either, both hubs are tried in this order.
    …_dtype, …_device: torch.dtype and device of a state, or "disk": the weights stay in their file.
    clear_parameters: build the model's structure only and read no weight.
    state_dict: weights already loaded, used in place of the files' content.
    model_name: what the files are, by the registry's name, where their layout is one that it does not know exactly.
    """

    path: str | list[str] | None = None
    model_id: str | None = None
    origin_file_pattern: str | list[str] | None = None
    download_source: str | None = None
    local_model_path: str | None = None
    skip_download: bool | None = None
    offload_dtype: torch.dtype | str | None = None
    offload_device: torch.device | str | None = None
    onload_dtype: torch.dtype | str | None = None
    onload_device: torch.device | str | None = None
    preparing_dtype: torch.dtype | str | None = None
    preparing_device: torch.device | str | None = None
    computation_dtype: torch.dtype | str | None = None
    computation_device: torch.device | str | None = None
    clear_parameters: bool = False
    state_dict: dict[str, torch.Tensor] | None = field(default=None, repr=False, compare=False)
    model_name: str | None = None
    # `path` was filled in from `model_id`. A field, so that copies made by dataclasses.replace and pickle keep it.
    path_is_resolved: bool = field(default=False, repr=False, compare=False, kw_only=True)

    def check_input(self) -> None:
        """Raises ModelFileError unless one source is named, PathRefused if id or pattern lead out of its folder."""
        if self.path and self.model_id and not self.path_is_resolved:
            raise ModelFileError(
                f"both path={self.path!r} and model_id={self.model_id!r} are given; "
                "use path for local files, or model_id and origin_file_pattern for files of a model hub"
            )
        if not self.path and not self.model_id and self.state_dict is None:
            raise ModelFileError(
                'unset path: use ModelConfig(path="…") for local files, '
                'or ModelConfig(model_id="owner/name", origin_file_pattern="…") for files of a model hub'
            )
        if self.origin_file_pattern == [] or (self.origin_file_pattern and not self.model_id):
            raise ModelFileError(
                f"origin_file_pattern={self.origin_file_pattern!r} with model_id={self.model_id!r}: give both, "
                "and at least one pattern (None: the whole repository)"
            )
        if self.model_id:
            check_model_id(self.model_id)
        for pattern in self._patterns() or ():
            check_pattern(pattern)

    def download_if_necessary(
        self, progress: Callable[[Progress], None] | None = None, cancelled: Callable[[], bool] | None = None
    ) -> None:
        """Make the files available and fill in `path`: one file or folder as str, several as list.

        Contacts the hub unless downloads are off; then, and for local paths, only the disk is read. Does nothing the
        second time. progress, cancelled: see `download`.
        Raises what `check_input` and `download` do; MissingFile if nothing matches; MissingShards; CorruptFile for a
        file that is empty, or not as long as it says itself.
        """
        self.check_input()
        if self.path or not self.model_id:
            return
        base, patterns = environment.model_base_path(self.local_model_path), self._patterns()
        sources = environment.download_sources(self.download_source, tuple(HUBS))
        if not environment.skip_download(self.skip_download):
            download(self.model_id, patterns, base, sources, progress=progress, cancelled=cancelled)
        matches = [path for pattern in patterns or [""] for path in self._match(base, pattern)]
        _check_files(matches)
        paths = list(dict.fromkeys(matches))
        self.path, self.path_is_resolved = paths[0] if len(paths) == 1 else paths, True

    def resolved(self) -> ModelConfig:
        """A copy with `path` filled in; this config, perhaps somebody's default argument, stays as it is."""
        copy = dataclasses.replace(self)
        copy.download_if_necessary()
        return copy

    def vram_config(self) -> dict[str, torch.dtype | torch.device | str | None]:
        """The eight fields that say where and as what the weights are kept."""
        return {name: getattr(self, name) for name in VRAM_FIELDS}

    def _patterns(self) -> list[str] | None:
        """The file patterns as a list, None for the whole repository."""
        if isinstance(self.origin_file_pattern, (list, tuple)):
            return list(self.origin_file_pattern)
        return None if self.origin_file_pattern in WHOLE_REPOSITORY else [self.origin_file_pattern]

    def _match(self, base: str, pattern: str) -> list[str]:
        """The files that a pattern matches; for folders ("…/" or empty) those that hold something."""
        is_folder = not pattern or pattern.endswith("/")
        found = resolve_matches(base, f"{self.model_id}/{pattern}{'*' if is_folder else ''}")
        if not found:
            folder = Path(base, self.model_id)
            searched = folder / pattern if is_folder else (folder / pattern).parent
            raise MissingFile(
                f"no file in {folder} matches {pattern or '*'!r}; set local_model_path or DIFFSYNTH_MODEL_BASE_PATH to "
                "the folder that holds it, or download it (skip_download=False)"
                + unfinished(searched)
            )
        if not is_folder:
            return found
        _check_files(found)
        return list(dict.fromkeys(str(Path(path).parent) for path in found))


def _check_files(paths: list[str]) -> None:
    """Raises MissingShards; CorruptFile for what a broken download leaves, empty files and pieces of safetensors."""
    try:
        check_shards(paths)
    except MissingShards as error:
        raise MissingShards(f"{error}{''.join(map(unfinished, {Path(path).parent for path in paths}))}") from error
    for path in paths:
        if not Path(path).is_file():
            continue
        if Path(path).stat().st_size == 0 and path.endswith(NEVER_EMPTY):
            raise CorruptFile(f"{path} is empty (0 bytes): its download failed; delete it and download it again")
        if path.endswith(SAFETENSORS_SUFFIX):
            read_layout([path])
