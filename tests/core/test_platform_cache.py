"""Dropping a file from the page cache, where the system can."""
from __future__ import annotations

import os

from diffsynth_backend.core import platform


def test_a_forgotten_file_is_read_again_the_same(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 16))
    before = path.read_bytes()
    assert platform.forget_cached(str(path)) is hasattr(os, "posix_fadvise")
    assert path.read_bytes() == before


def test_a_system_without_it_says_so(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    path = tmp_path / "file"
    path.write_bytes(b"x")
    assert platform.forget_cached(str(path)) is False
