"""Sharing a card with ComfyUI's own models, under its real memory manager."""
from __future__ import annotations


def test_models_make_room_for_each_other(probe):
    assert probe("ProbeMemory") == {
        "loaded": [True, False], "one makes room for the other": [False, True], "loading again moves nothing": True,
        "what is at work stays": True, "unload request": [False, False], "models are not kept alive": [True, True],
        "entries left": 0}
