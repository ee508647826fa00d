"""What differs between operating systems; the rest of the package calls these and never `os.preadv` and its like.

`PositionedFile` reads byte ranges of a file straight into a caller's buffer, from any number of threads. Where the
system has a positioned read there is no shared file position and so no lock; elsewhere (Windows) a lock guards
seek + read, which gives the same bytes.

`FileLock` is a lock of the system's: it goes with the process that holds it, however that ends, so there is no stale
lock to recognise by age or process number.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

logger = logging.getLogger(__name__)

# Linux transfers at most 2 GiB - 4 KiB a call; a round figure below that keeps every request page aligned.
MAX_REQUEST = 1 << 30


class PositionedFile:
    """A file opened for reading at given offsets.

    The handle closes with the last reference to this object, so a reader in another thread keeps it valid: a file
    descriptor that closes under a running read may be reused by the system and return another file's bytes.
    """

    def __init__(self, path: str):
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 - lives as long as this object
        self.lock = threading.Lock()
        weakref.finalize(self, self.file.close)

    def status(self) -> os.stat_result:
        """The status of the open file, which stays that file even if the path is replaced meanwhile."""
        return os.fstat(self.file.fileno())

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` (writable bytes) from position `offset`; return the bytes read, fewer only at the end."""
        done = 0
        while done < len(buffer):
            count = _read_at(self, buffer[done : done + MAX_REQUEST], offset + done)
            if count == 0:
                break
            done += count
        return done


def forget_cached(path: str) -> bool:
    """Ask the system to drop what it keeps of a file in memory, so that the next read comes from the disk.

    False where there is no such request (Windows, macOS): nothing has happened then. Pages that a program maps, or that
    are not on the disk yet, stay.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def free_space(folder: str) -> int:
    """Bytes that may still be written below `folder`, which need not exist yet."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.is_dir())).free


class FileLock:
    """Lets one holder at a time, of all threads and processes of a machine, work on what a lock file stands for.

    The file is made on demand and removed with the lock. Where the file system knows no locks (some network drives)
    the lock is granted to everybody, with a warning.
    """

    def __init__(self, path: str):
        self.path = path
        self._close: Callable[[], None] | None = None

    def acquire(self) -> bool:
        """Take the lock if it is free, without waiting. Raises OSError if the file cannot be made."""
        file = open(self.path, "a+b")  # noqa: SIM115 - open as long as the lock is held
        if not (_try_lock(file.fileno(), self.path) and _still_there(file.fileno(), self.path)):
            file.close()
            return False
        self._close = file.close
        return True

    def release(self) -> None:
        """Give the lock back; does nothing without it."""
        if self._close is None:
            return
        if fcntl is None:  # Windows removes no open file, so it stays if somebody waits for it
            self._close()
            _remove_unless_used(self.path)
        else:  # removed while it is still locked: who waits for it sees that it is another file now
            _remove_unless_used(self.path)
            self._close()
        self._close = None


def _try_lock(descriptor: int, path: str) -> bool:
    try:
        if fcntl is None:
            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        logger.warning("%s cannot be locked (%s); do not let two programs download the same file", path, error)
    return True


def _still_there(descriptor: int, path: str) -> bool:
    """Whether the open file is the one at `path`, and not one that its last holder has removed."""
    try:
        there = Path(path).stat()
    except FileNotFoundError:
        return False
    held = os.fstat(descriptor)
    return (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino)


def _remove_unless_used(path: str) -> None:
    try:
        Path(path).unlink()
    except (FileNotFoundError, PermissionError):
        logger.debug("%s stays, it is in use or gone", path)


def _positioned_read(file: PositionedFile, buffer: memoryview, offset: int) -> int:
    return os.preadv(file.file.fileno(), [buffer], offset)


def _seek_and_read(file: PositionedFile, buffer: memoryview, offset: int) -> int:
    with file.lock:
        file.file.seek(offset)
        return file.file.readinto(buffer)


_read_at = _positioned_read if hasattr(os, "preadv") else _seek_and_read
