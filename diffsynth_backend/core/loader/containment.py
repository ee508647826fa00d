"""Model ids, file patterns and the files they lead to: the one place that decides what stays inside a model folder.

A workflow comes from a stranger, so none of these strings is trusted: what they may look like is checked first, and
each file found is checked again through links, since a harmless pattern may meet a link that leads elsewhere.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable

# Component by component: "..", and what Windows makes of dots and blanks at a name's end (".. " is "..").
_ONLY_DOTS = re.compile(r"[. ]+")
# What a pattern must not contain, and how to call it.
_REFUSED = (
    (re.compile(r"[\x00-\x1f\x7f-\x9f]"), "control characters"),
    (re.compile(r"\\"), "a backslash; separate folders by /"),
    (re.compile(r"^/"), "an absolute path"),
    (re.compile(r":"), "a drive or stream (':')"),
    (re.compile(r"%[0-9A-Fa-f]{2}"), "percent-encoding"),
)


class PathRefused(ValueError):
    """A model id, file pattern or file that would lead out of the model folder."""


def check_model_id(model_id: str) -> str:
    """Return `model_id` if it is exactly `owner/name`, as model hubs write it. Raises PathRefused."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(model_id, str) or model_id.count("/") != 1:
        raise PathRefused(f"model id {model_id!r} refused: exactly 'owner/name' expected, e.g. 'Qwen/Qwen-Image'")
    try:
        validate_repo_id(model_id)
    except HFValidationError as error:
        raise PathRefused(f"model id {model_id!r} refused: 'owner/name' expected ({error})") from error
    return model_id


def check_pattern(pattern: str) -> str:
    """Return `pattern`, wildcards below a model's folder, if it cannot point elsewhere. Raises PathRefused."""
    if not isinstance(pattern, str) or not pattern:
        raise PathRefused(f"file pattern {pattern!r} refused: text such as 'transformer/*.safetensors' expected")
    for expression, meaning in _REFUSED:
        if expression.search(pattern):
            raise PathRefused(f"file pattern {pattern!r} refused: it contains {meaning}")
    if any(_ONLY_DOTS.fullmatch(component) for component in pattern.split("/")):
        raise PathRefused(f"file pattern {pattern!r} refused: '.' and '..' as folders are not allowed")
    return pattern


def check_inside(base: str, path: str) -> str:
    """Return `path` if it lies in the folder `base`, all links followed. Raises PathRefused."""
    real_base, real_path = os.path.realpath(base), os.path.realpath(path)
    try:
        inside = os.path.commonpath((real_base, real_path)) == real_base
    except ValueError:  # two drives
        inside = False
    if not inside:
        raise PathRefused(
            f"{path} refused: it leads to {real_path}, outside of {real_base}; "
            "make that folder the model folder, or pass the file as a path"
        )
    return path


def check_inside_any(bases: Iterable[str], path: str) -> str:
    """Return `path` if it lies in one of the folders `bases`, all links followed. Raises PathRefused."""
    bases = list(bases)
    for base in bases:
        try:
            return check_inside(base, path)
        except PathRefused:
            continue
    raise PathRefused(f"{path} refused: it leads to {os.path.realpath(path)}, outside of {', '.join(bases)}; "
                      "make the folder that it leads to a model folder of its own")


def resolve_matches(base: str, pattern: str) -> list[str]:
    """The existing files and folders that `pattern` matches below `base`, sorted, as paths that start with `base`.

    Raises PathRefused for a refused pattern and if any match, links followed, lies outside of `base`.
    """
    found = glob.glob(check_pattern(pattern), root_dir=base)
    return sorted(check_inside(base, os.path.normpath(os.path.join(base, match))) for match in found)
