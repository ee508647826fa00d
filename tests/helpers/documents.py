"""Running the documents' examples as they are written, but for what this package and this machine call things."""
from __future__ import annotations

import re
from typing import Any

from diffsynth_backend.core.device import available_device

DEVICE = available_device().type


def as_here(code: str) -> str:
    """The package's name, and "cpu" for "cuda" where there is no GPU; everything else stays as it is written."""
    code = re.sub(r"\bdiffsynth\b(?=\.)", "diffsynth_backend", code)
    return code if DEVICE == "cuda" else code.replace('"cuda"', '"cpu"')


def run(code: str, **names: Any) -> dict[str, Any]:
    """Run an example in a module of its own, in which `names` exist already; returns what it has defined."""
    namespace = {"__name__": "example", **names}
    exec(compile(as_here(code), "<example>", "exec"), namespace)
    return namespace
