"""Model ids, file names and patterns, and the files they lead to: the one place that decides what may be opened.

A workflow comes from a stranger, so none of these strings is trusted: what they may look like is checked first, and
each file found is checked again through links, since a harmless pattern may meet a link that leads elsewhere. Whatever
is refused is refused with PathRefused. What is safe on one system and not on another is refused on all.

The loader opens files here and in `core.platform` only, and only regular ones: to open a pipe is to wait for ever.

Notable: paths that are not trusted yet go through `os.path`, which answers False where pathlib raises (names that are
too long, folders that may not be entered), and takes nothing out of the text before it is checked.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

MAX_TEXT = 1024  # characters of a pattern; systems take names of 255 and paths of 4096 bytes at most
MAX_MATCHES = 10_000  # files of a pattern; published models have tens
# Component by component: "..", and what Windows makes of dots and blanks at a name's end (".. " is "..", "a." is "a").
_ONLY_DOTS = re.compile(r"[. ]+")
_ENDS_LOST = re.compile(r".*[. ]")
# Names that are devices on Windows, in any case and with any suffix.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE)
# What a name or pattern must not contain, and how to call it.
_REFUSED = (
    (re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]"),
     "control characters or invisible ones"),
    (re.compile(r"[\ud800-\udfff]"), "half a character (a lone surrogate)"),
    (re.compile(r"\\"), "a backslash; separate folders by /"),
    (re.compile(r"^/"), "an absolute path"),
    (re.compile(r":"), "a drive or stream (':')"),
    (re.compile(r"%[0-9A-Fa-f]{2}"), "percent-encoding"),
    (re.compile(r"^~"), "a home folder ('~')"),
)
_ADVICE = "name a file below the model's folder"
_WILDCARDS = re.compile(r"[*?\[\]]")


class PathRefused(ValueError):
    """A model id, name, pattern or file that would lead out of its folder, or to something that is no file."""


def check_model_id(model_id: str) -> str:
    """Return `model_id` if it is exactly `owner/name`, as model hubs write it. Raises PathRefused."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if (not isinstance(model_id, str) or model_id.count("/") != 1 or len(model_id) > MAX_TEXT
            or not model_id.isprintable()):  # some versions of huggingface_hub let a line's end pass
        raise PathRefused(f"model id {model_id!r:.80} refused: exactly 'owner/name' expected, e.g. 'Qwen/Qwen-Image'")
    try:
        validate_repo_id(model_id)
    except HFValidationError as error:
        raise PathRefused(f"model id {model_id!r} refused: 'owner/name' expected "
                          f"({' '.join(str(error).split())}); write it as on the model's page") from error
    if device := next(filter(_DEVICE.fullmatch, model_id.split("/")), None):
        raise PathRefused(f"model id {model_id!r} refused: 'owner/name' expected, {device!r} is a device on Windows; "
                          "use its files by their path")
    return model_id


def check_pattern(pattern: str) -> str:
    """Return `pattern`, wildcards below a model's folder, if it cannot point elsewhere. Raises PathRefused."""
    if not isinstance(pattern, str) or not pattern:
        raise PathRefused(f"file pattern {pattern!r:.80} refused: text such as 'transformer/*.safetensors' expected")
    return _check_text("file pattern", pattern)


def check_file_name(name: str, what: str = "file name") -> str:
    """Return `name` if it is the plain name of a file in a folder that is known, without wildcards. Raises PathRefused.

    For what other files list, such as the index of a set of shards; `what` says in the error what the name is.
    """
    if not isinstance(name, str) or not name:
        raise PathRefused(f"{what} {name!r:.80} refused: text such as 'model.safetensors' expected")
    _check_text(what, name)
    if "/" in name or _WILDCARDS.search(name):
        raise PathRefused(f"{what} {name!r} refused: the plain name of a file in the same folder expected")
    return name


def _check_text(what: str, text: str) -> str:
    if len(text) > MAX_TEXT:
        raise PathRefused(f"{what} {text[:60]!r}… refused: it has {len(text)} characters, at most {MAX_TEXT} allowed; "
                          "shorten it")
    for expression, meaning in _REFUSED:
        if expression.search(text):
            raise PathRefused(f"{what} {text!r} refused: it contains {meaning}; {_ADVICE}")
    for component in text.split("/"):
        if _ONLY_DOTS.fullmatch(component):
            raise PathRefused(f"{what} {text!r} refused: '.' and '..' as folders are not allowed; {_ADVICE}")
        if _ENDS_LOST.fullmatch(component):
            raise PathRefused(f"{what} {text!r} refused: {component!r} ends in a dot or blank, which Windows drops; "
                              "rename it")
        if _DEVICE.fullmatch(component):
            raise PathRefused(f"{what} {text!r} refused: {component!r} is a device on Windows; rename it")
    return text


def check_inside(base: str, path: str) -> str:
    """Return `path` if it lies in the folder `base`, all links followed. Raises PathRefused."""
    try:
        real_base, real_path = os.path.realpath(base), os.path.realpath(path)
        common = os.path.commonpath((real_base, real_path))
    except (ValueError, OSError) as error:  # two drives, NUL, half a character, endless links
        raise PathRefused(f"{path!r} refused: it cannot be a file in {base!r} ({error}); pass the file as a path of "
                          "that folder") from error
    if os.path.normcase(common) != os.path.normcase(real_base):
        raise PathRefused(
            f"{path} refused: it leads to {real_path}, outside of {real_base}; "
            "make that folder the model folder, or pass the file as a path"
        )
    return path


def check_inside_any(bases: Iterable[str], path: str) -> str:
    """Return `path` if it lies in one of the folders `bases`, all links followed. Raises PathRefused."""
    bases, reasons = list(bases), []
    for base in bases:
        try:
            return check_inside(base, path)
        except PathRefused as error:
            reasons.append(error)
    raise PathRefused(f"{path!r} refused: it leads outside of {', '.join(bases) or 'everything: no folder is known'}; "
                      "make the folder that it leads to a model folder of its own") from (reasons or [None])[0]


def resolve_matches(base: str, pattern: str) -> list[str]:
    """The existing files and folders that `pattern` matches below `base`, sorted, as paths that start with `base`.

    Wildcards are those of `glob`; a pattern that ends in "/" matches folders. Raises PathRefused for a refused pattern,
    for one that matches too much, and if any match, or a folder on the way to it, lies outside of `base`, links
    followed: such a folder is not even listed.
    """
    found = [base]
    for component in check_pattern(pattern).split("/"):
        found = [path for folder in found for path in _matches_in(base, folder, component)]
        if len(found) > MAX_MATCHES:
            raise PathRefused(f"file pattern {pattern!r} refused: more than {MAX_MATCHES} files match; name fewer")
    return sorted(check_inside(base, os.path.normpath(path)) for path in found)


def _matches_in(base: str, folder: str, component: str) -> list[str]:
    if not os.path.isdir(check_inside(base, folder)):
        return []
    if not _WILDCARDS.search(component):
        path = os.path.join(folder, component)
        return [path] if not component or os.path.lexists(path) else []
    names = list_folder(folder, hidden=component.startswith("."))
    return [os.path.join(folder, name) for name in fnmatch.filter(names, component)]


# ---- opening --------------------------------------------------------------------------------------------------------


def check_regular(path: str) -> os.stat_result:
    """The status of a file, links followed, if it is one of data. Raises PathRefused for devices, pipes and sockets,
    OSError if it is not there."""
    try:
        status = os.stat(path)
    except ValueError as error:  # NUL, half a character
        raise PathRefused(f"{path!r} refused: no file can have this name ({error}); check the path") from error
    return check_is_file(path, status)


def check_is_file(path: str, status: os.stat_result) -> os.stat_result:
    """`status`, that of `path`, if it is one of a file of data. Raises PathRefused."""
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
                 stat.S_IFDIR: "a folder"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "something else")
        raise PathRefused(f"{path} refused: a file expected, this is {kind}; choose the model's file")
    return status


def open_regular(path: str, buffering: int = -1) -> BinaryIO:
    """A file of data, opened for reading, with a buffer as `open` has it. Raises as `check_regular`."""
    check_regular(path)
    return open(path, "rb", buffering)


def read_small(path: str, limit: int) -> bytes | None:
    """The content of a file of at most `limit` bytes, None of a longer one. Raises as `check_regular`."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    return content if len(content) <= limit else None


def list_folder(path: str, hidden: bool = False) -> list[str]:
    """The names in a folder, sorted, with those that are hidden or without."""
    return sorted(entry.name for entry in Path(path).iterdir() if hidden or not entry.name.startswith("."))
