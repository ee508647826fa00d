"""The DIFFSYNTH_* environment variables, read in one place.

Each accessor takes the caller's explicit argument first: given, it wins; None means "ask the environment".
Variables are read at every call, never at import, so a program may set them after importing the package.
An empty variable counts as unset, since that is what `VARIABLE= command` means in a shell.
A value that is not understood is an error: guessing here would start a 40 GB download that was meant to be off.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

BASE_PATH = "DIFFSYNTH_MODEL_BASE_PATH"
SKIP_DOWNLOAD = "DIFFSYNTH_SKIP_DOWNLOAD"
DOWNLOAD_SOURCE = "DIFFSYNTH_DOWNLOAD_SOURCE"
ATTENTION = "DIFFSYNTH_ATTENTION_IMPLEMENTATION"
DOWNLOAD_POLICY = "DIFFSYNTH_DOWNLOAD_POLICY"  # what a workflow in ComfyUI may download: see nodes/downloading.py
PICKLE_POLICY = "DIFFSYNTH_PICKLE_POLICY"  # which pickles a workflow in ComfyUI may load: see nodes/pickles.py

FLAGS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class EnvironmentValueError(ValueError):
    """A setting (environment variable or explicit argument) has a value that is not one of those allowed."""

    def __init__(self, name: str, value: object, allowed: Sequence[str]):
        super().__init__(f"{name}={value!r} is not understood; use one of {', '.join(allowed)}, or leave it unset")


def text(name: str, default: str) -> str:
    """The variable's value without surrounding blanks, or `default` when unset or empty."""
    return os.environ.get(name, "").strip() or default


def choice(name: str, default: str, allowed: Sequence[str]) -> str:
    """The variable's value in lower case, one of `allowed`. Raises EnvironmentValueError for anything else."""
    value = text(name, default)
    if value.lower() not in allowed:
        raise EnvironmentValueError(name, value, allowed)
    return value.lower()


def flag(name: str, default: bool = False) -> bool:
    """A switch: 1/true/yes/on or 0/false/no/off in any case. Raises EnvironmentValueError for anything else."""
    return FLAGS[choice(name, str(default).lower(), tuple(FLAGS))]


def model_base_path(explicit: str | None = None) -> str:
    """The folder under which models lie as `<owner>/<name>/…`; relative paths count from the working directory."""
    return text(BASE_PATH, "./models") if explicit is None else os.fspath(explicit)


def skip_download(explicit: bool | None = None) -> bool:
    """True: never contact a model hub, use what is on disk."""
    if explicit is None:
        return flag(SKIP_DOWNLOAD)
    if not isinstance(explicit, bool):
        raise EnvironmentValueError("skip_download", explicit, ("True", "False"))
    return explicit


def download_sources(explicit: str | None, allowed: Sequence[str]) -> tuple[str, ...]:
    """The hubs to download from: the one that is named, else all of `allowed`, each in case the one before fails."""
    if explicit is None:
        return (choice(DOWNLOAD_SOURCE, "", allowed),) if text(DOWNLOAD_SOURCE, "") else tuple(allowed)
    if explicit not in allowed:
        raise EnvironmentValueError("download_source", explicit, allowed)
    return (explicit,)
