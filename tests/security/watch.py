"""Watches what a piece of code does to the machine: files opened and folders listed, programs, sockets, changes.

Notable: through Python's audit events, which also the standard library's C code raises. A hook cannot be taken off
again, so there is one, which looks only while `watching`.
"""
from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.sparse import Growth, memory_growth

ROOT = Path(__file__).parents[2]
READS = {"open", "os.listdir", "os.scandir"}
NEVER = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "socket.", "os.remove", "os.rename",
         "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.chown", "os.truncate", "shutil.",
         "ctypes.dlopen")
# Python and its libraries, which load parts of themselves late.
LIBRARIES = tuple(os.path.realpath(path) for path in {sys.prefix, sys.base_prefix, str(ROOT)})


@dataclass
class Watched:
    """What was seen: forbidden events, seconds of this process's time, and memory."""

    allowed: tuple[str, ...]
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0
    growth: Growth = field(default_factory=Growth)

    def see(self, event: str, args: tuple) -> None:
        if event in READS and args and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not any(f"{path}{os.sep}".startswith(f"{folder}{os.sep}") for folder in self.allowed):
                self.violations.append(f"{event} {path}")
        elif event.startswith(NEVER):
            self.violations.append(f"{event} {args!r:.200}")


_current: list[Watched] = []


def _hook(event: str, args: tuple) -> None:
    for watched in _current[:1]:
        if event in READS or event.startswith(NEVER):
            _current.clear()  # what looking at it does is none of its doing
            try:
                watched.see(event, args)
            finally:
                _current.append(watched)


_installed: list[bool] = []


@contextmanager
def watching(*folders: Path) -> Iterator[Watched]:
    """Everything but reading in `folders` and in Python's own is a violation.

    What exists before is no business of the garbage collector's meanwhile, whose time would count.
    """
    if not _installed:
        sys.addaudithook(_hook)
        _installed.append(True)
    watched = Watched((*map(os.path.realpath, folders), *LIBRARIES))
    gc.freeze()
    with memory_growth() as watched.growth:
        began = time.process_time()
        _current.append(watched)
        try:
            yield watched
        finally:
            _current.clear()
            watched.seconds = time.process_time() - began
            gc.unfreeze()
