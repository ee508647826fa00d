"""Fetching model files from a hub into `<base>/<owner>/<name>/`, where they keep the author's names and folders.

The hub is asked what it has (`download_hubs`), then only what is not here is fetched (`download_file`), several files
at a time. A file is there under its name when it is whole, so what lies there with the right size is not touched.
Notable: what has another size but is whole in itself stays too, with a warning: it may be somebody's own work.
"""

from __future__ import annotations

import enum
import fnmatch
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from ..platform import free_space
from .containment import check_inside, check_model_id, check_pattern
from .download_file import (
    PATIENT,
    DownloadCancelled,
    DownloadFailed,
    Monitor,
    NotEnoughSpace,
    Patience,
    SourceFailed,
    fetch,
    gigabytes,
    part_size,
    size_of,
)
from .download_hubs import HUBS, RemoteFile
from .file import SAFETENSORS_SUFFIX, CorruptFile, ModelFileError, read_layout

logger = logging.getLogger(__name__)

REPORT_SECONDS = 0.1
LOG_SECONDS = 10.0


class DownloadPolicy(str, enum.Enum):
    """What a workflow may have downloaded: nothing, the files of known models, or anything."""

    OFF = "off"
    KNOWN = "known"
    ANY = "any"


def allowed(model_id: str, pattern: str | None, policy: DownloadPolicy | str,
            known: Collection[tuple[str, str | None]]) -> bool:
    """Whether a workflow may download `pattern` of `model_id`; `known` has such pairs, as the presets spell them.

    The pair must be there as it is: a wildcard or another case may mean other files. Raises ValueError for a policy
    that is none.
    """
    policy = DownloadPolicy(policy)
    return policy is DownloadPolicy.ANY or (policy is DownloadPolicy.KNOWN and (model_id, pattern) in known)


@dataclass(frozen=True)
class Progress:
    """How far a download is. file: the one of which bytes came last, as a path in the repository; done, total: bytes
    of all files asked for, those that were here included; bytes_per_second: over the last seconds."""

    file: str
    done: int
    total: int
    bytes_per_second: float


def download(
    model_id: str,
    patterns: Sequence[str] | None,
    base: str,
    sources: Sequence[str] | None = None,
    *,
    revision: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    patience: Patience = PATIENT,
) -> list[str]:
    """Bring the files of `model_id` that match `patterns` (None: all) into `<base>/<model_id>`; returns their paths.

    A pattern may contain wildcards, which stop at "/"; one that ends in "/" means everything in that folder.
    sources: names in HUBS (None: all); each is asked if those before it fail. revision: branch, tag or commit.
    progress, cancelled: called ten times a second by the thread that called; what they raise ends the download too.
    Without `progress` the log tells every ten seconds.

    Raises PathRefused for an id, pattern, folder or listed file that leads out of `base`; DownloadFailed, of which
    NotEnoughSpace and DownloadCancelled are kinds. What has come by then is kept and continued the next time.
    """
    local_dir = Path(check_inside(base, str(Path(base, check_model_id(model_id)))))
    for pattern in patterns or ():
        check_pattern(pattern)
    sources = list(HUBS) if sources is None else list(sources)
    if not sources or not set(sources) <= set(HUBS):
        raise DownloadFailed(f"unknown download source in {sources}; one or several of {', '.join(HUBS)} expected")
    failures, report = [], progress or _LogProgress(model_id)
    for source in sources:
        try:
            wanted = _list(source, model_id, revision, patterns)
            targets = {remote: _target(base, local_dir, remote) for remote in wanted}
            _fetch_missing(source, model_id, targets, local_dir, report, cancelled, patience)
            return list(map(str, targets.values()))
        except SourceFailed as error:
            failures.append(error)
            logger.warning("%s from %s: %s", model_id, source, error)
    reasons = ". ".join(f"{source}: {error}" for source, error in zip(sources, failures))
    raise DownloadFailed(
        f"downloading {patterns or 'all files'} of {model_id} failed. {reasons}. Try again, which continues what has "
        f"come; or choose another source by DIFFSYNTH_DOWNLOAD_SOURCE ({', '.join(HUBS)}); "
        f"or set DIFFSYNTH_SKIP_DOWNLOAD=true if {local_dir} has the files"
    ) from failures[-1]


# ---------------------------------------------------------------------------------------------- what to fetch


def _list(source: str, model_id: str, revision: str | None, patterns: Sequence[str] | None) -> list[RemoteFile]:
    try:
        files = HUBS[source](model_id, revision)
    except ImportError as error:
        package = {"modelscope": "modelscope-hub", "huggingface": "huggingface-hub"}.get(source, error.name)
        raise SourceFailed(f"needs `pip install -U {package}` ({error})") from error
    except Exception as error:  # each hub has its own exceptions, and those of its network library
        raise SourceFailed(f"cannot list the files of {model_id} ({error}); check the id and the network") from error
    wanted = files
    if patterns is not None:
        wanted = [file for file in files if any(_is_meant(file.path, pattern) for pattern in patterns)]
    for pattern in patterns or ("",):
        if not any(_is_meant(file.path, pattern) for file in wanted):
            names = ", ".join(file.path for file in files[:12]) + (" …" if len(files) > 12 else "")
            raise SourceFailed(f"no file of {model_id} matches {pattern or '*'!r}; choose one that it has: "
                               f"{names or 'none'}")
    return wanted


def _is_meant(path: str, pattern: str) -> bool:
    """As the files are looked for on the disk afterwards; and everything in a folder, if the pattern is one."""
    parts, wanted = path.split("/"), pattern.rstrip("/").split("/") if pattern else []
    whole_folder = not pattern or pattern.endswith("/")
    if (len(parts) <= len(wanted)) if whole_folder else (len(parts) != len(wanted)):
        return False
    return all(fnmatch.fnmatchcase(part, want) and (part[:1] != "." or want[:1] == ".")
               for part, want in zip(parts, wanted))


def _target(base: str, local_dir: Path, remote: RemoteFile) -> Path:
    """Where a listed file goes. Its name comes from the network, and a folder on the way may be a link."""
    return Path(check_inside(base, str(local_dir.joinpath(*check_pattern(remote.path).split("/")))))


def _is_here(remote: RemoteFile, target: Path) -> bool:
    """Whether there is nothing to fetch. A file that is there but not whole is to be fetched, and named in the log."""
    size = size_of(target)
    if size is None:
        return False
    if size == remote.size:
        return True
    if size == 0 or not _is_whole(target, size, remote.size):
        logger.warning("%s is not whole (%d of %d bytes): downloading it again", target, size, remote.size)
        return False
    logger.warning("%s (%d bytes) is not the hub's version (%d bytes): it is used as it is; delete it to download that",
                   target, size, remote.size)
    return True


def _is_whole(target: Path, size: int, listed: int) -> bool:
    """Whether a file that differs from the hub's is another version rather than a piece."""
    if target.suffix != SAFETENSORS_SUFFIX:
        return size > listed
    try:
        read_layout([str(target)])
    except CorruptFile:
        return False
    except ModelFileError:  # whole, though of no use to us
        return True
    return True


def _check_space(local_dir: Path, missing: dict[RemoteFile, Path]) -> None:
    needed = sum(remote.size - min(part_size(remote, target), remote.size) for remote, target in missing.items())
    free = free_space(str(local_dir))
    if needed > free:
        raise NotEnoughSpace(
            f"{gigabytes(needed)} are to be downloaded to {local_dir}, where {gigabytes(free)} are free: free "
            f"{gigabytes(needed - free)} more, or set DIFFSYNTH_MODEL_BASE_PATH or local_model_path to a larger disk"
        )


# ---------------------------------------------------------------------------------------------- fetching


def _fetch_missing(source: str, model_id: str, targets: dict[RemoteFile, Path], local_dir: Path,
                   progress: Callable[[Progress], None], cancelled: Callable[[], bool] | None,
                   patience: Patience) -> None:
    """Fetch what is not here, in threads, while this one reports. Raises the first thread's failure."""
    missing = {remote: target for remote, target in targets.items() if not _is_here(remote, target)}
    if not missing:
        return
    _check_space(local_dir, missing)
    logger.info("downloading %d files (%s) of %s from %s to %s", len(missing),
                gigabytes(sum(remote.size for remote in missing)), model_id, source, local_dir)
    monitor = Monitor()
    meter = _Meter(monitor, targets, missing)
    pool = ThreadPoolExecutor(patience.parallel, thread_name_prefix="download")
    futures = [pool.submit(fetch, remote, target, monitor, patience) for remote, target in missing.items()]
    try:
        for _ in _until_done(futures):
            if cancelled is not None and cancelled():
                raise DownloadCancelled(f"the download of {model_id} was cancelled; what has come to {local_dir} is "
                                        "kept, and continued when it is started again")
            progress(meter.read())
    finally:
        monitor.stop()
        pool.shutdown(wait=False, cancel_futures=True)
        wait(futures, timeout=1.0)  # longer only for one that waits for a server's first answer; it then writes nothing


def _until_done(futures: Iterable[Future[None]]) -> Iterable[None]:
    """Yield at the start, now and then, and when all are done. Raises the exception of the first that fails."""
    pending = set(futures)
    while pending:
        yield
        done, pending = wait(pending, timeout=REPORT_SECONDS, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    yield


class _Meter:
    """Bytes and speed of a download, of which the files that were here before count as done."""

    def __init__(self, monitor: Monitor, all_files: Iterable[RemoteFile], missing: Collection[RemoteFile]):
        self.monitor = monitor
        self.total = sum(remote.size for remote in all_files)
        self.here = self.total - sum(remote.size for remote in missing)
        self.samples: deque[tuple[float, int]] = deque(maxlen=round(5 / REPORT_SECONDS))

    def read(self) -> Progress:
        done = self.here + sum(self.monitor.done.copy().values())
        self.samples.append((time.monotonic(), done))
        (start, before), (now, _) = self.samples[0], self.samples[-1]
        speed = max(0, done - before) / (now - start) if now > start else 0.0
        return Progress(self.monitor.latest, done, self.total, speed)


class _LogProgress:
    """Tells the log, for callers that show nothing themselves."""

    def __init__(self, model_id: str):
        self.model_id = model_id
        self.next = time.monotonic() + LOG_SECONDS

    def __call__(self, state: Progress) -> None:
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + LOG_SECONDS
            logger.info("%s: %s of %s, %s/s, %s", self.model_id, gigabytes(state.done), gigabytes(state.total),
                        gigabytes(round(state.bytes_per_second)), state.file)
