"""Input that means harm, made and mutated: files, names and JSON for the tests of this folder and for `fuzz`.

Notable: every maker is a function of a `random.Random`, so that a finding can be repeated from its seed.
"""
from __future__ import annotations

import copy
import io
import json
import os
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

MARKER = "code-was-run"  # a file of this name in the working directory means that a pickle's code ran

WORDS = ["..", ".", "/", "\\", "C:", "c:x", "\0", "%2e%2e", "%2F", "~", "*", "**", "?", "[a", "]", " ", "\n",
         "\x1b[2J", "con", "NUL.safetensors", "a", "models", "secret.safetensors", "x.safetensors", "x.pth", "é",
         "\u202e", "\ud800", "//host/share", "file:///etc/passwd", "\u2215", "\uff0e\uff0e", "a" * 300, "-", "$HOME",
         "${x}", "`x`", "%s"]
VALUES: list[Any] = [None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, 1e999, "", "F32", "BF16", "F99",
                     [], {}, [0], [0, 8], [8, 0], [1] * 70, [2**62, 2**62], [[]], {"a": 1}, "x" * 1000, "\ud800"]


def text(rng: random.Random, longest: int = 8) -> str:
    """A name that some of the words above make."""
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(0, longest)))


def value(rng: random.Random) -> Any:
    """One of VALUES, as an object of its own."""
    return copy.deepcopy(rng.choice(VALUES))


# ---- safetensors ----------------------------------------------------------------------------------------------------

def sound_header(rng: random.Random, tensors: int = 4) -> tuple[dict[str, Any], int]:
    """A header without a fault, and the bytes of data that it describes."""
    header, end = {}, 0
    for number in range(tensors):
        shape = [rng.randint(0, 4) for _ in range(rng.randint(0, 3))]
        count = 1
        for length in shape:
            count *= length
        begin, end = end, end + count * 4
        header[f"layer.{number}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    return header, end


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def mutated_header(rng: random.Random) -> bytes:
    """A file whose header was changed in one to three places."""
    header, size = sound_header(rng)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(list(header) or ["w"])
        entry = header.get(name)
        change = rng.randrange(5)
        if change == 0 and isinstance(entry, dict):
            entry[rng.choice(["dtype", "shape", "data_offsets", "more"])] = value(rng)
        elif change == 1 and isinstance(entry, dict):
            entry.pop(rng.choice(list(entry) or ["dtype"]), None)
        elif change == 2:
            header[text(rng)] = rng.choice([copy.deepcopy(entry), value(rng)])
        elif change == 3:
            header["__metadata__"] = value(rng)
        else:
            size += rng.choice([-8, -1, 1, 8])
    return safetensors_bytes(header, bytes(max(size, 0)), rng.choice([None, None, None, 2**63, 2**64 - 1, 7, 10**9]))


def flipped(rng: random.Random, content: bytes, changes: int = 4) -> bytes:
    """The content with some bytes changed, cut out or doubled."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, changes)):
        if not damaged:
            break
        at = rng.randrange(len(damaged))
        kind = rng.randrange(4)
        if kind == 0:
            damaged[at] = rng.randrange(256)
        elif kind == 1:
            del damaged[at:at + rng.randint(1, 64)]
        elif kind == 2:
            damaged[at:at] = damaged[at:at + rng.randint(1, 64)]
        else:
            damaged[at:at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63, 2**64 - 1]))
    return bytes(damaged)


# ---- pickles --------------------------------------------------------------------------------------------------------

class Attack:
    """Unpickled without care, it makes the marker."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


ATTACKS = (
    (os.mkdir, MARKER), (os.system, f"touch {MARKER}"), (eval, f"open({MARKER!r}, 'w')"), (os.makedirs, MARKER),
    (exec, f"open({MARKER!r}, 'w')"), (open, MARKER, "w"), (getattr, "x", "upper"), (__import__, "os"),
    (os.symlink, "/", MARKER), (os.popen, f"touch {MARKER}"), (Path, MARKER), (Path.touch, Path(MARKER)),
)


def description_of(content: Any) -> bytes:
    """What torch.save writes of this, but for the tensors' data."""
    file = io.BytesIO()
    torch.save(content, file)
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def torch_zip(path: Path, description: bytes, records: dict[str, bytes] | None = None, **options: Any) -> Path:
    """An archive as torch.save writes it, with this description of the tensors."""
    content = {"data.pkl": description, "byteorder": b"little", "version": b"3\n", **(records or {})}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in content.items():
            archive.writestr(f"archive/{name}", data)
    return path


def shared_dictionaries(levels: int, fan: int = 2) -> bytes:
    """A description of a few bytes that stands for fan ** levels tensors' entries: dictionaries that share others."""
    steps = [b"\x80\x02}q\x00"]
    for level in range(1, levels + 1):
        steps.append(b"}" + b"q" + bytes([level]) + b"(" + b"".join(
            b"X\x01\x00\x00\x00" + bytes([97 + key]) + b"h" + bytes([level - 1]) for key in range(fan)) + b"u")
    return b"".join(steps) + b"."
