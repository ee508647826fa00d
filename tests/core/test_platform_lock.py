"""File locks between threads and processes, and the space on a disk."""
from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffsynth_backend.core import platform
from diffsynth_backend.core.platform import FileLock, free_space

MODULE = Path(platform.__file__)
HOLDER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("only_this_module", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
lock = module.FileLock(sys.argv[2])
print(lock.acquire(), flush=True)
sys.stdin.read()
"""


def test_one_holder_at_a_time(tmp_path):
    path = str(tmp_path / "lock")
    first, second = FileLock(path), FileLock(path)
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()
    assert not os.path.exists(path)
    second.release()  # nothing is held


@pytest.mark.skipif(platform.fcntl is None, reason="Windows removes no file that is open")
def test_who_waited_for_a_removed_lock_takes_the_new_one(tmp_path, monkeypatch):
    """Between opening and locking the file its holder may remove it, and somebody may make another."""
    path = str(tmp_path / "lock")
    first, waiting, third = FileLock(path), FileLock(path), FileLock(path)
    assert first.acquire()
    lock = platform._try_lock

    def late(descriptor: int, name: str) -> bool:
        monkeypatch.setattr(platform, "_try_lock", lock)
        first.release()
        assert third.acquire()
        return lock(descriptor, name)

    monkeypatch.setattr(platform, "_try_lock", late)
    assert not waiting.acquire()
    third.release()
    assert waiting.acquire()
    waiting.release()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no kill -9")
def test_a_lock_goes_with_its_process(tmp_path):
    path = str(tmp_path / "lock")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(MODULE), path], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "True\n"
        assert not FileLock(path).acquire()
        other.kill()
    ours = FileLock(path)
    assert ours.acquire()
    ours.release()


@pytest.mark.skipif(platform.fcntl is None, reason="this is how POSIX says it")
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(platform.fcntl, "flock", flock)
    lock = FileLock(str(tmp_path / "lock"))
    with caplog.at_level(logging.WARNING):
        assert lock.acquire()
    assert "cannot be locked" in caplog.text
    lock.release()


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path):
    assert free_space(str(tmp_path / "a" / "b")) == pytest.approx(free_space(str(tmp_path)), rel=0.1)
    assert free_space(str(tmp_path)) > 0
