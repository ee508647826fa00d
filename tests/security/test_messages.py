"""Every error of the loader says what to do next: `loader_messages.txt` lists each text, and below it that part.

A new or changed message fails here until it is in the list, with its advice. ("…" is what is filled in; "|" separates
advice of which the code chooses one.)
"""
from __future__ import annotations

from pathlib import Path

import pytest

from .messages import FILES, PACKAGE, messages

LINES = (Path(__file__).with_name("loader_messages.txt")).read_text(encoding="utf-8").splitlines()
LISTED = dict(zip(LINES[::2], (line.strip() for line in LINES[1::2]), strict=True))
# Goes through `refuse`, as part of "not valid JSON (…)".
INNER = {"core/loader/safetensors_header.py: ValueError: duplicate key …"}


def test_every_file_of_the_loader_is_read():
    assert {f"core/loader/{path.name}" for path in (PACKAGE / "core/loader").glob("[!_]*.py")} <= set(FILES)


def test_every_message_is_listed():
    found = set(messages()) - INNER
    assert not found - set(LISTED), "not in the list: " + "\n".join(sorted(found - set(LISTED)))
    assert not set(LISTED) - found, "no longer in the code: " + "\n".join(sorted(set(LISTED) - found))


@pytest.mark.parametrize("message", LISTED)
def test_it_says_what_to_do(message):
    advice = LISTED[message]
    if "|" in advice:
        source = (PACKAGE / message.partition(":")[0]).read_text(encoding="utf-8")
        assert all(part.strip() in source for part in advice.split("|"))
    else:
        assert advice in message and len(advice.strip("…. ")) > 5
