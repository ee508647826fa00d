"""One file from a hub into its place over HTTP: continued, checked against its checksum, and put there in one step.

Notable:
* The bytes are collected in `.<name>.<checksum>.part` beside the file, so a part says by itself what it is a part of:
  it is continued after a kill and by the other hub if that has the same content, and never mixed with another version.
* A part is trusted in nothing. It is hashed again before it is continued, and the whole decides.
* One `FileLock` per file lets several threads and programs ask for it; the others find it there.
* Redirects are followed here: to https only, and the user's token stays with the hub that it is for.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..platform import FileLock
from .download_hubs import RemoteFile
from .file import ModelFileError

if TYPE_CHECKING:
    from requests import Response

logger = logging.getLogger(__name__)

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers that another attempt may change
DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
PROXY = "check whether a proxy or login page answers in the hub's place"
PART_NAME = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.part", re.DOTALL)
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class DownloadFailed(ModelFileError):
    """Files could not be brought here. The message says why, what is kept, and what to do."""


class SourceFailed(DownloadFailed):
    """One hub does not deliver; another may."""


class DownloadCancelled(DownloadFailed):
    """The caller's `cancelled` said so."""


class NotEnoughSpace(DownloadFailed):
    """The disk has no room for the files."""


@dataclass(frozen=True)
class Patience:
    """How long to try. timeout: seconds without a byte; attempts: in a row without `chunk` bytes of progress;
    pause: seconds before the second attempt, doubled for each further one; parallel: files at a time."""

    timeout: float = 20.0
    attempts: int = 5
    pause: float = 1.0
    chunk: int = 1 << 16  # what a break in the connection may lose
    parallel: int = 4


PATIENT = Patience()


class Monitor:
    """What the threads of a download tell the caller, and the caller them: bytes done per file, and when to stop."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}
        self.latest = ""
        self._stopped = threading.Event()
        self._open: set[Response] = set()

    def report(self, file: str, done: int) -> None:
        """`done` bytes of `file` are here."""
        self.done[file] = done
        self.latest = file

    def check(self) -> None:
        """Raises DownloadCancelled after `stop`."""
        if self._stopped.is_set():
            raise DownloadCancelled("the download was stopped; what has come is kept, and continued when it is "
                                    "started again")

    def wait(self, seconds: float) -> None:
        """Sleep, but not beyond `stop`. Raises DownloadCancelled."""
        self._stopped.wait(seconds)
        self.check()

    def stop(self) -> None:
        """End all threads at their next step, those that wait for a silent server at once."""
        self._stopped.set()
        for response in tuple(self._open):
            if hasattr(response.raw, "shutdown"):  # urllib3 from 2.3; before that they wait for `Patience.timeout`
                with suppress(ValueError, OSError):  # it has just ended by itself
                    response.raw.shutdown()

    @contextmanager
    def receiving(self, response: Response) -> Iterator[None]:
        """Let `stop` interrupt the response."""
        self._open.add(response)
        try:
            self.check()
            yield
        finally:
            self._open.discard(response)
            response.close()


# ---------------------------------------------------------------------------------------------- on the disk


class Part:
    """The bytes of a file that are here, in a hidden file beside it, and their hash."""

    def __init__(self, remote: RemoteFile, target: Path):
        self.remote = remote
        self.path = part_path(remote, target)
        self.size = 0
        self.hash = remote.new_hash()
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()

    def resume(self, monitor: Monitor, chunk: int) -> None:
        """Hash what an earlier attempt left; without a checksum to be held to, or if it is too long, start again."""
        left = os.fstat(self._file.fileno()).st_size
        if left > self.remote.size or self.remote.checksum is None:
            self.restart()
        self._file.seek(0)
        while data := self._file.read(chunk):
            monitor.check()
            self.hash.update(data)
            self.size += len(data)
            monitor.report(self.remote.path, self.size)

    def restart(self) -> None:
        """Forget all bytes."""
        self._file.truncate(0)
        self.size, self.hash = 0, self.remote.new_hash()

    def write(self, data: bytes) -> None:
        """Append; what an error leaves on the disk is hashed when the part is resumed."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self.size += len(data)
        self.hash.update(data)

    def close(self) -> None:
        """Stop, keeping what is there."""
        self._file.close()

    def become(self, target: Path) -> None:
        """Be the file, even if the power fails now, and remove parts of other versions of it."""
        os.fsync(self._file.fileno())
        self.close()
        os.replace(self.path, target)
        for old, name in _parts(target.parent):
            if name == target.name:
                old.unlink()


def part_path(remote: RemoteFile, target: Path) -> Path:
    """Where the bytes are collected; equal contents have the same name."""
    content = f"{remote.checksum} {remote.size}"
    return target.with_name(f".{target.name}.{hashlib.sha256(content.encode()).hexdigest()[:16]}.part")


def part_size(remote: RemoteFile, target: Path) -> int:
    """Bytes that an earlier attempt left."""
    return size_of(part_path(remote, target)) or 0


def size_of(path: Path) -> int | None:
    """Bytes of a file; None if it is not there, or no file can have this name."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _parts(folder: Path) -> list[tuple[Path, str]]:
    """The parts in a folder, each with the name of the file that it is a part of; none if nobody can look there."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    return [(path, match["name"]) for path in entries if (match := PART_NAME.fullmatch(path.name))]


def unfinished(folder: Path) -> str:
    """A sentence about the downloads that have stopped in a folder, empty without any."""
    names = [f"{name} ({gigabytes(path.stat().st_size)} are there)" for path, name in _parts(folder)[:8]]
    return f". A download stopped in the middle of {', '.join(names)}; start it again, it continues" if names else ""


def gigabytes(size: int) -> str:
    """A size for people."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


# ---------------------------------------------------------------------------------------------- one file


def fetch(remote: RemoteFile, target: Path, monitor: Monitor, patience: Patience) -> None:
    """Bring `remote` to the path `target`, unless somebody else has done it when our turn comes.

    Raises SourceFailed, NotEnoughSpace, DownloadCancelled (after `monitor.stop`), DownloadFailed for other errors of
    the disk. What has come so far is kept in the part.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target, monitor):
            if size_of(target) != remote.size:
                _fetch_locked(remote, target, monitor, patience)
        monitor.report(remote.path, remote.size)
    except OSError as error:  # those of the network do not come here, see `_chunks`
        raise _disk_error(error, remote, target) from error


@contextmanager
def _alone(target: Path, monitor: Monitor) -> Iterator[None]:
    lock = FileLock(str(target.with_name(f".{target.name}.lock")))
    if not lock.acquire():
        logger.info("%s is being downloaded by somebody else: waiting", target)
        while not lock.acquire():
            monitor.wait(0.1)
    try:
        yield
    finally:
        lock.release()


def _fetch_locked(remote: RemoteFile, target: Path, monitor: Monitor, patience: Patience) -> None:
    part = Part(remote, target)
    try:
        part.resume(monitor, patience.chunk)
        _receive_rest(part, monitor, patience)
        if not remote.is_content(part.hash):
            logger.warning("%s: what has come is not %s; fetching it again from the start", target, remote.checksum)
            part.restart()
            _receive_rest(part, monitor, patience)
        if not remote.is_content(part.hash):
            part.restart()
            raise SourceFailed(f"{remote.path} has come twice with another content than the hub promises "
                               f"({remote.checksum}); nothing of it is kept: try the other source")
        part.become(target)
    finally:
        part.close()


def _receive_rest(part: Part, monitor: Monitor, patience: Patience) -> None:
    failures, before = 0, part.size
    while part.size < part.remote.size:
        try:
            _receive(part, monitor, patience)
            if part.size < part.remote.size:
                raise _Interrupted("the connection ended early")
        except _Interrupted as error:
            monitor.check()
            failures = 1 if part.size - before >= patience.chunk else failures + 1
            before = part.size
            if failures >= patience.attempts:
                raise SourceFailed(f"{part.remote.path} stopped at {part.size} of {part.remote.size} bytes, "
                                   f"{failures} attempts in a row failed, the last: {error}; start it again, it "
                                   "continues there") from error
            logger.info("%s: %s at byte %d, trying again", part.remote.path, error, part.size)
            monitor.wait(patience.pause * 2 ** (failures - 1))


def _receive(part: Part, monitor: Monitor, patience: Patience) -> None:
    """Append what one request brings. Raises _Interrupted if the network fails."""
    remote = part.remote
    response = _ask(remote, part.size, patience)
    with monitor.receiving(response):
        if part.size and response.status_code == 200:
            logger.info("%s: the server cannot continue, fetching it from the start", remote.path)
            part.restart()
        _check_promise(response, part)
        for data in _chunks(response, patience.chunk):
            monitor.check()
            if part.size + len(data) > remote.size:
                part.restart()
                raise SourceFailed(f"{remote.path}: more bytes come than the {remote.size} that the hub lists; try "
                                   "again later, it may just be publishing another version")
            part.write(data)
            monitor.report(remote.path, part.size)


def _disk_error(error: OSError, remote: RemoteFile, target: Path) -> DownloadFailed:
    folder = target.parent
    if error.errno in DISK_FULL:
        return NotEnoughSpace(f"the disk of {folder} is full ({error.strerror}): {part_size(remote, target)} of "
                              f"{remote.size} bytes of {remote.path} are kept; free some space and start again")
    return DownloadFailed(f"{target} cannot be written ({error}); check that the folder may be written to "
                          "and that no program uses the file, then start again: what has come is kept")


# ---------------------------------------------------------------------------------------------- HTTP


class _Interrupted(Exception):
    """The network or the server failed in a way that may pass."""


def _ask(remote: RemoteFile, start: int, patience: Patience) -> Response:
    """The answer to a request for the bytes from `start`, redirects followed: 200 or 206."""
    headers = {**remote.headers, "Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    url = remote.url
    for _ in range(MAX_REDIRECTS + 1):
        response = _get(url, headers, patience)
        if response.status_code not in REDIRECTS:
            return _accept(response, remote)
        response.close()
        here, url = url, urllib.parse.urljoin(url, response.headers.get("Location", ""))
        _check_redirect(remote, here, url)
        if _origin(here) != _origin(url):  # the token is for the hub alone
            headers = {name: value for name, value in headers.items() if name not in remote.headers}
    raise SourceFailed(f"{remote.path}: more than {MAX_REDIRECTS} redirects, the last to {_shown(url)}; {PROXY}")


def _get(url: str, headers: dict[str, str], patience: Patience) -> Response:
    import requests
    from requests.exceptions import InvalidSchema, InvalidURL, MissingSchema

    def as_it_is(request: Any) -> Any:  # in place of what ~/.netrc may hold, which would replace the hub's token
        return request

    try:
        return requests.get(url, headers=headers, stream=True, allow_redirects=False, auth=as_it_is,
                            timeout=patience.timeout)
    except (InvalidURL, InvalidSchema, MissingSchema) as error:
        raise SourceFailed(f"{_shown(url)} is not an address to download from; check the hub's endpoint in the "
                           "environment") from error
    except requests.RequestException as error:
        raise _Interrupted(f"{_shown(url)} does not answer ({_reason(error)})") from error


def _chunks(response: Response, size: int) -> Iterator[bytes]:
    import requests
    from urllib3.exceptions import HTTPError

    try:
        yield from response.iter_content(size)
    except (requests.RequestException, HTTPError, OSError) as error:
        raise _Interrupted(f"the connection broke ({_reason(error)})") from error


def _accept(response: Response, remote: RemoteFile) -> Response:
    status = response.status_code
    if status in (200, 206):
        return response
    response.close()
    if status in PASSING:
        raise _Interrupted(f"{_shown(response.url)} answers {status} {response.reason}")
    advice = {401: "log in to the hub with its own command",
              403: "log in to the hub with its own command, and accept the model's licence on its page",
              404: "the hub lists a file that it does not have: try the other source",
              416: f"the hub's file is shorter than the {remote.size} bytes that it lists: try again later",
              }.get(status, "try again later")
    raise SourceFailed(f"{remote.path}: {_shown(response.url)} answers {status} {response.reason}; {advice}")


def _check_promise(response: Response, part: Part) -> None:
    """Raises SourceFailed if the answer's headers contradict the size that the hub lists, or what was asked for."""
    remote, headers = part.remote, response.headers
    if response.status_code == 206:
        expected = f"bytes {part.size}-{remote.size - 1}/{remote.size}"
        answered = headers.get("Content-Range", "")
        if answered.replace("/*", f"/{remote.size}") != expected:
            raise SourceFailed(f"{remote.path}: the server sends {answered!r}, {expected!r} expected; {PROXY}")
    length = headers.get("Content-Length")
    rest = remote.size - part.size
    if length is not None and headers.get("Content-Encoding", "identity") == "identity" and length != str(rest):
        raise SourceFailed(f"{remote.path}: the server sends {length} bytes, {rest} expected as the hub lists "
                           f"{remote.size}; {PROXY}")


def _check_redirect(remote: RemoteFile, here: str, there: str) -> None:
    """Raises SourceFailed unless it stays with the server or on this machine, or leads to another by https."""
    scheme, here_local, there_local = _origin(there)[0], _is_local(here), _is_local(there)
    stays = _origin(here) == _origin(there) or (here_local and there_local and scheme in ("http", "https"))
    if not stays and (scheme != "https" or there_local):
        raise SourceFailed(f"{remote.path}: {_shown(here)} redirects to {_shown(there)}; https to another machine "
                           f"expected, so it is not followed; {PROXY}")


def _is_local(url: str) -> bool:
    return urllib.parse.urlsplit(url).hostname in LOCAL_HOSTS


def _origin(url: str) -> tuple[str, str]:
    return urllib.parse.urlsplit(url)[:2]


def _shown(url: str) -> str:
    """An address without its query, which may hold a signature."""
    return urllib.parse.urlsplit(url)._replace(query="", fragment="").geturl()


def _reason(error: Exception) -> str:
    """The first cause, in a few words: addresses with signatures stay out of messages."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {error}"[:200]
