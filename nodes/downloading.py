"""Behind Download Models: what may be downloaded, by whose word, and what is said about it.

Notable: a workflow is a file from a stranger, so what it may download is decided on the server: by the environment's
DIFFSYNTH_DOWNLOAD_POLICY, else by the user's setting DiffSynth.Downloads. Both are off unless switched on. With "ask" a
prompt must carry the user's word beside the workflow, where only the page's own question puts it.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..diffsynth_backend.core import environment
from ..diffsynth_backend.core.loader.download import DownloadPolicy, Progress, allowed
from ..diffsynth_backend.core.loader.download_file import gigabytes
from ..diffsynth_backend.core.loader.file import MissingFile
from ..diffsynth_backend.pipelines.known_files import KnownFiles, bring, files_of, known_pairs, known_sources, licences
from ..diffsynth_backend.pipelines.presets import LORA_PRESETS, MODEL_PRESETS
from . import host

SETTING = "DiffSynth.Downloads"
OFF, ASK, KNOWN = POLICIES = ("off", "ask", "known")
SWITCH = ("in ComfyUI's settings under DiffSynth, Downloads, choose ask or known; or start ComfyUI with "
          f"{environment.DOWNLOAD_POLICY}=known")


class DownloadRefused(PermissionError):
    """The user's settings do not allow it."""


def policy() -> tuple[str, str]:
    """One of POLICIES, and what says so. Raises EnvironmentValueError for a value that is none."""
    if environment.skip_download():
        return OFF, environment.SKIP_DOWNLOAD
    if environment.text(environment.DOWNLOAD_POLICY, ""):
        return environment.choice(environment.DOWNLOAD_POLICY, OFF, POLICIES), environment.DOWNLOAD_POLICY
    chosen = host.setting(SETTING, OFF)
    if chosen not in POLICIES:
        raise environment.EnvironmentValueError(SETTING, chosen, POLICIES)
    return chosen, f"the setting {SETTING}"


def check_allowed(name: str, missing: Sequence[KnownFiles]) -> None:
    """Raises DownloadRefused, with what to do, unless the user lets this run download these files of a known name."""
    chosen, origin = policy()
    may = chosen == KNOWN or (chosen == ASK and host.confirmed_download() == name)
    effective = DownloadPolicy.KNOWN if may else DownloadPolicy.OFF
    if all(allowed(*known.pair, effective, known_pairs()) for known in missing):
        return
    if chosen == ASK:
        raise DownloadRefused(f"{name} is not downloaded without being asked for: press the Download button below this "
                              f"node in the page, and say yes. ({origin} says ask; known would not ask.)")
    by_hand = "; ".join(f"{pattern} of https://huggingface.co/{model_id}" for model_id, pattern in
                        (known.pair for known in missing))
    folder = Path(host.model_bases()[0], "<owner>", "<name>")
    raise DownloadRefused(f"downloads are off, so says {origin}. To switch them on: {SWITCH}. "
                          f"To get the files by hand: {by_hand}, into {folder}")


@contextmanager
def missing_files_can_be_had(name: str) -> Iterator[None]:
    """What is said about the missing files of a known model or LoRA is followed by the node that brings them."""
    try:
        yield
    except MissingFile as error:
        if name not in known_sources():
            raise
        raise type(error)(f"{error}\nOr let the node Download Models (DiffSynth) bring them.") from error


def files_behind(name: str) -> list[KnownFiles]:
    """The files of a known name, looked for on this machine. Raises KeyError for another name."""
    family = MODEL_PRESETS[name].family if name in MODEL_PRESETS else None
    has_tokenizer = family is not None and any(Path(folder).is_dir() for folder in host.native_tokenizers(family))
    return files_of(name, host.model_bases(), has_tokenizer)


def missing_behind(name: str) -> list[KnownFiles]:
    """Those of `files_behind` that are not here."""
    return [known for known in files_behind(name) if known.size is None]


def download(name: str, node_id: str) -> str:
    """Bring what is missing of a known name, if the user allows it; returns what was done in words.

    Raises DownloadRefused, and what `core.loader.download.download` raises.
    """
    missing = missing_behind(name)
    if missing:
        check_allowed(name, missing)
        host.watch(lambda progress, cancelled: bring(missing, host.model_bases()[0], progress, cancelled), figures,
                   node_id)
    size = sum(known.size or 0 for known in files_behind(name))
    brought = ", ".join(known.title for known in missing)
    return f"{name} is here, {gigabytes(size)}: " + (f"{brought} came now" if brought else "nothing was missing")


def state(query: Mapping[str, str]) -> dict[str, Any] | None:
    """What the page shows about the `name` in a query: sizes in bytes, no paths. None for what nobody can download."""
    name = query.get("name")
    if name not in known_sources():
        return None
    files, model, lora = files_behind(name), MODEL_PRESETS.get(name), LORA_PRESETS.get(name)
    titled = model or lora
    return {"name": name, "title": titled.title if titled else name, "policy": policy()[0],
            "bytes": round(model.gigabytes * 1e9) if model else None, "licences": licences(files),
            "parts": [{"title": known.title, "bytes": known.size, "model_id": known.pair[0], "pattern": known.pair[1]}
                      for known in files]}


def figures(progress: Progress) -> dict[str, Any]:
    """What the page words: the file that comes ("" while the hub is asked), how much of how much, how fast."""
    return {"file": Path(progress.file).name, "done_bytes": progress.done, "total_bytes": progress.total,
            "bytes_per_second": progress.bytes_per_second}
