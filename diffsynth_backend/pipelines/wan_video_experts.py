"""Wan 2.2's two denoisers of equal layout: which one is for high noise is read from where the files lie, or stated.

Notable: nothing in the files tells them apart, and the wrong order draws mush without an error. So it is never guessed:
names say it ("high_noise_model/", "…_low_noise_14B…"; diffusers' transformer/ and transformer_2/), or people do.
"""
from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TypeVar

from ..core.loader.file import ModelFileError

HIGH, LOW = "high_noise", "low_noise"
EXPERTS = (HIGH, LOW)
_SAID = {HIGH: re.compile(r"high[ _-]?noise", re.IGNORECASE), LOW: re.compile(r"low[ _-]?noise", re.IGNORECASE)}
_DIFFUSERS = {"transformer": HIGH, "transformer_2": LOW}

Entry = TypeVar("Entry")


def noise_of(path: str) -> str | None:
    """What a file is for, by its name or the nearest folder that says so; None if nothing does."""
    names = re.split(r"[\\/]", os.fspath(path))
    for name in reversed(names):
        said = [noise for noise, pattern in _SAID.items() if pattern.search(name)]
        if said:
            return said[0] if len(said) == 1 else None
    return _DIFFUSERS.get(names[-2]) if len(names) > 1 else None


def in_order(what: str, entries: Sequence[tuple[Entry, Sequence[str]]], stated: Sequence[str] | None = None
             ) -> list[Entry]:
    """Of up to two entries, each with its files: the one for high noise, then the one for low noise.

    `stated`: what each is for, in the order of the entries. Raises ModelFileError for more than two, and if neither
    the names nor `stated` tell which is which; ValueError for a statement that is about something else.
    """
    if stated is not None and sorted(stated) != sorted(EXPERTS):
        raise ValueError(f"experts is {tuple(stated)!r}; expected {HIGH!r} and {LOW!r}, in the order of model_configs")
    if len(entries) > 2:
        raise ModelFileError(f"{len(entries)} models are a {what}; a pipeline has one, or two for high and low noise")
    if len(entries) < 2:
        return [entry for entry, _ in entries]
    said = list(stated) if stated is not None else [_agreed(paths) for _, paths in entries]
    if sorted(map(str, said)) != sorted(EXPERTS):
        files = "; ".join(", ".join(paths) or "a state dict" for _, paths in entries)
        raise ModelFileError(f"two models are a {what}, and their names do not tell which one is for high and which "
                             f"for low noise: {files}. Put them into folders called high_noise_model and "
                             f"low_noise_model, or state it, experts=({HIGH!r}, {LOW!r}) if high noise comes first")
    return [entry for noise in EXPERTS for (entry, _), of_entry in zip(entries, said) if of_entry == noise]


def _agreed(paths: Sequence[str]) -> str | None:
    """What all of a model's files are for."""
    said = {noise_of(path) for path in paths}
    return said.pop() if len(said) == 1 else None
