"""Fetching model files from a hub into `<base>/<owner>/<name>/`, where they keep the author's names and folders.

The hub libraries do the work: they resume, verify and skip what is complete. They are imported only when a download
is really asked for. HUBS may be extended: name -> function(model_id, patterns, local_dir).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from .containment import check_inside, check_model_id, check_pattern, resolve_matches
from .file import PICKLE_SUFFIXES, SAFETENSORS_SUFFIX, ModelFileError

logger = logging.getLogger(__name__)

Hub = Callable[[str, "list[str] | None", str], None]


class DownloadFailed(ModelFileError):
    """A hub library is not installed, or could not deliver the files."""


def _from_modelscope(model_id: str, patterns: list[str] | None, local_dir: str) -> None:
    from modelscope import snapshot_download

    snapshot_download(model_id, allow_file_pattern=patterns, local_dir=local_dir)


def _from_huggingface(model_id: str, patterns: list[str] | None, local_dir: str) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(model_id, allow_patterns=patterns, local_dir=local_dir)


HUBS: dict[str, Hub] = {"modelscope": _from_modelscope, "huggingface": _from_huggingface}


def download(model_id: str, patterns: list[str] | None, base: str, source: str) -> None:
    """Bring the files of `model_id` that match `patterns` (None: all) from HUBS[source] into `<base>/<model_id>`.

    A pattern may contain wildcards; one that ends in "/" means everything in that folder.
    Raises PathRefused for an id, pattern or folder that leads out of `base`, DownloadFailed for the rest.
    """
    local_dir = check_inside(base, os.path.join(base, check_model_id(model_id)))
    wanted = None if patterns is None else [_hub_pattern(pattern) for pattern in patterns]
    for pattern in wanted or ():
        _remove_empty_weights(base, f"{model_id}/{pattern}")
    logger.info("downloading %s of %s from %s to %s", wanted or "all files", model_id, source, local_dir)
    try:
        HUBS[source](model_id, wanted, local_dir)
    except ImportError as error:
        raise DownloadFailed(f"downloading {model_id} needs `pip install {error.name or source}` ({error})") from error
    except Exception as error:  # each hub has its own exceptions, and those of its network library
        raise DownloadFailed(
            f"downloading {wanted or 'all files'} of {model_id} from {source} failed: {error}. Try again to resume, "
            f"try another source ({', '.join(HUBS)}), or set DIFFSYNTH_SKIP_DOWNLOAD=true if {local_dir} has the files"
        ) from error


def _hub_pattern(pattern: str) -> str:
    return check_pattern(pattern) + "*" if pattern.endswith("/") else check_pattern(pattern)


def _remove_empty_weights(base: str, pattern: str) -> None:
    """Delete what a broken download left, since a hub may take an empty file for a complete one."""
    for path in resolve_matches(base, pattern):
        if path.endswith((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES)) and os.path.getsize(path) == 0:
            logger.warning("%s is empty (0 bytes): deleted, to be downloaded again", path)
            os.remove(path)
