"""Which tokenizer a folder holds, told by its files alone: how many tokens it knows.

Notable: text encoders of other models come with files of the same names, and a wrong tokenizer draws something else
without an error. Their vocabularies differ in size, and each is a little smaller than its text encoder's table.
"""
from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

WHOLE, CONFIG = "tokenizer.json", "tokenizer_config.json"
MAX_BYTES = 128 * 1024**2  # umT5's has 17 MB
UNUSED_PART, UNUSED_TOKENS = 100, 64  # of a text encoder's table: this part of it, or in a small one so many


def tokens_known(folder: Path, parts: Collection[str]) -> int | None:
    """How many tokens the tokenizer in a folder knows; None if there is none, or none that can be read.

    It is one file, tokenizer.json, or all of `parts`, which have a vocab.json with the tokens.
    """
    try:
        if (folder / WHOLE).is_file():
            return _of_whole(_read(folder / WHOLE))
        if all((folder / name).is_file() for name in parts):
            return _of_parts(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # somebody else's file
        pass
    return None


def fits(tokens: int, table: int) -> bool:
    """Whether a tokenizer with so many tokens may be that of a text encoder with a table of so many.

    Published tables are padded to a round number: about 400 of Qwen2.5-VL's 152064 entries are not used, and of umT5's
    256384 less than that. mT5 has 250112.
    """
    return table - max(table // UNUSED_PART, UNUSED_TOKENS) <= tokens <= table


def _of_whole(content: dict[str, Any]) -> int:
    vocabulary = content["model"]["vocab"]
    names = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    return len(names | {token["content"] for token in content.get("added_tokens") or ()})


def _of_parts(folder: Path) -> int:
    names = set(_read(folder / "vocab.json"))
    if (folder / CONFIG).is_file():
        names |= {token["content"] for token in _read(folder / CONFIG).get("added_tokens_decoder", {}).values()}
    return len(names)


def _read(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} is larger than any tokenizer")
    return json.loads(file.read_text(encoding="utf-8"))
