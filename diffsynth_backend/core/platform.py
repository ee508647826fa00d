"""What differs between operating systems; the rest of the package calls these and never `os.preadv` and its like.

`PositionedFile` reads byte ranges of a file straight into a caller's buffer, from any number of threads. Where the
system has a positioned read there is no shared file position and so no lock; elsewhere (Windows) a lock guards
seek + read, which gives the same bytes.
"""

from __future__ import annotations

import os
import threading
import weakref

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


def _positioned_read(file: PositionedFile, buffer: memoryview, offset: int) -> int:
    return os.preadv(file.file.fileno(), [buffer], offset)


def _seek_and_read(file: PositionedFile, buffer: memoryview, offset: int) -> int:
    with file.lock:
        file.file.seek(offset)
        return file.file.readinto(buffer)


_read_at = _positioned_read if hasattr(os, "preadv") else _seek_and_read
