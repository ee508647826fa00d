"""One file over HTTP: whatever server, disk or a kill do, it ends right or says why, and is never half there."""
from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import urllib3

from diffsynth_backend.core.loader import download_file
from diffsynth_backend.core.loader.download_file import (
    DownloadCancelled,
    DownloadFailed,
    Monitor,
    NotEnoughSpace,
    Patience,
    SourceFailed,
    fetch,
    part_path,
    unfinished,
)
from diffsynth_backend.core.loader.download_hubs import RemoteFile
from tests.helpers import http_hub
from tests.helpers.http_hub import HubServer, answer, corrupted, cut, instead, redirect, stall, without_ranges

CONTENT = bytes(range(256)) * 800  # 200 KB
PATIENCE = Patience(timeout=0.3, attempts=3, pause=0, chunk=4096)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def server() -> Iterator[HubServer]:
    with http_hub.serve("a/b", {"w.bin": CONTENT, "empty": b""}) as server:
        yield server


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "w.bin"


CHILD = """
import sys
from pathlib import Path
from diffsynth_backend.core.loader import download_file
from diffsynth_backend.core.loader.download_hubs import RemoteFile

class Loud(download_file.Monitor):
    def report(self, file, done):
        print(done, flush=True)

print("ready", flush=True)
*facts, target = sys.stdin.readline().rstrip("\\n").split("\\t")
remote = RemoteFile(facts[0], int(facts[1]), *facts[2:])
try:
    download_file.fetch(remote, Path(target), Loud(), download_file.Patience(timeout=30, chunk=4096))
    print("done")
except download_file.DownloadFailed as error:
    print(f"{type(error).__name__}: {error}")
"""
READY = "ready\n"
Child = subprocess.Popen[str]


@pytest.fixture(scope="module", autouse=True)
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Child, Path]]]:
    """Processes with a folder each, which import while other tests run; `go` tells them what to fetch."""
    commands = {"killed": [], "first": [], "small disk": ["unshare", "-rm", "sh", "-c",
                                                          'mount -t tmpfs -o size=64k none "$0" && exec "$@"']}
    started = {}
    for name, prefix in commands.items():
        folder = tmp_path_factory.mktemp("child")
        if prefix and shutil.which(prefix[0]) is None:
            continue
        command = [*prefix, *([str(folder)] if prefix else []), sys.executable, "-c", CHILD]
        started[name] = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.DEVNULL), folder
    yield started
    for child, _ in started.values():
        child.kill()
        child.communicate()


def go(child: Child, file: RemoteFile, target: Path) -> None:
    child.stdin.write("\t".join([file.path, str(file.size), file.checksum, file.url, str(target)]) + "\n")
    child.stdin.flush()


def remote(server: HubServer, path: str = "w.bin", **facts: object) -> RemoteFile:
    content = server.files[path]
    url = f"{server.url}/a/b/resolve/{http_hub.COMMIT}/{path}"
    checksum = "sha256:" + hashlib.sha256(content).hexdigest()
    return RemoteFile(**{"path": path, "size": len(content), "checksum": checksum, "url": url, **facts})


def bring(file: RemoteFile, target: Path, patience: Patience = PATIENCE) -> Monitor:
    monitor = Monitor()
    fetch(file, target, monitor, patience)
    return monitor


def leave_a_part(file: RemoteFile, target: Path, content: bytes) -> Path:
    part = part_path(file, target)
    part.parent.mkdir(exist_ok=True)
    part.write_bytes(content)
    return part


def only_file(target: Path) -> bool:
    """The file is right, and neither parts nor locks are left."""
    return target.read_bytes() == CONTENT and [path.name for path in target.parent.iterdir()] == [target.name]


# ---- it ends right --------------------------------------------------------------------------------------------------

def test_a_file_comes_whole_and_leaves_nothing_else(server, target):
    monitor = bring(remote(server), target)
    assert only_file(target)
    assert monitor.done == {"w.bin": len(CONTENT)}
    assert server.starts("w.bin") == [0]


def test_an_empty_file_needs_no_request(server, target):
    bring(remote(server, "empty"), target)
    assert target.read_bytes() == b""
    assert server.requests == []


def test_a_git_checksum_is_that_of_git(server, target):
    """Small files of one hub come with the hash that `git hash-object` gives."""
    blob = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()
    bring(remote(server, checksum=f"git:{blob}"), target)
    assert only_file(target)
    with pytest.raises(SourceFailed, match="another content than the hub promises"):
        bring(remote(server, checksum=f"git:{'0' * 40}"), target.with_name("other"))


def test_what_is_cut_goes_on_where_it_stopped(server, target):
    server.faults["w.bin"] = [cut(50_000), cut(70_000), cut(9_000)]
    bring(remote(server), target)
    assert only_file(target)
    starts = server.starts("w.bin")
    assert len(starts) == 4
    for start, most in zip(starts, (0, 50_000, 120_000, 129_000)):
        assert most - PATIENCE.chunk * 3 <= start <= most, "no more than what the last chunk held is fetched again"


def test_a_silent_server_is_asked_again(server, target):
    server.faults["w.bin"] = [stall(60_000)]
    bring(remote(server), target)
    assert only_file(target)
    assert len(server.starts("w.bin")) == 2


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_answers_that_pass_are_tried_again(server, target, status):
    server.faults["w.bin"] = [answer(status)]
    bring(remote(server), target)
    assert only_file(target)


def test_a_server_that_cannot_continue_is_asked_for_everything(server, target):
    server.faults["w.bin"] = [cut(100_000), without_ranges]
    bring(remote(server), target)
    assert only_file(target)


def test_wrong_bytes_are_fetched_again_once(server, target, caplog):
    server.faults["w.bin"] = [corrupted]
    bring(remote(server), target)
    assert only_file(target)
    assert "fetching it again from the start" in caplog.text


def test_a_damaged_part_is_noticed(server, target):
    """Nobody vouches for what lies on the disk: a power failure may have left zeros."""
    file = remote(server)
    leave_a_part(file, target, b"\0" * 100_000)
    bring(file, target)
    assert only_file(target)
    assert server.starts("w.bin") == [100_000, 0]


def test_a_sound_part_is_not_fetched_again(server, target):
    file = remote(server)
    leave_a_part(file, target, CONTENT[:150_000])
    bring(file, target)
    assert only_file(target)
    assert server.starts("w.bin") == [150_000]
    assert server.sent == len(CONTENT) - 150_000


def test_a_whole_part_needs_no_request(server, target):
    file = remote(server)
    leave_a_part(file, target, CONTENT)
    bring(file, target)
    assert only_file(target)
    assert server.requests == []


@pytest.mark.parametrize("left", [CONTENT + b"x", b"something else entirely" * 20_000])
def test_a_part_that_is_too_long_is_dropped(server, target, left):
    file = remote(server)
    leave_a_part(file, target, left)
    bring(file, target)
    assert only_file(target)
    assert server.starts("w.bin") == [0]


def test_a_part_of_another_version_is_neither_used_nor_left(server, target):
    other = leave_a_part(remote(server, checksum="sha256:" + "0" * 64), target, CONTENT[:1000])
    stranger = target.with_name(".w.bin.mine.part")
    stranger.touch()
    bring(remote(server), target)
    assert server.starts("w.bin") == [0]
    assert not other.exists()
    assert stranger.exists()


def test_without_a_checksum_nothing_is_continued(server, target):
    """Only the whole's checksum proves that two halves belong together."""
    file = remote(server, checksum=None)
    leave_a_part(file, target, CONTENT[:150_000])
    bring(file, target)
    assert only_file(target)
    assert server.starts("w.bin") == [0]


def test_a_piece_under_the_right_name_is_replaced_only_by_the_whole(server, target):
    target.parent.mkdir()
    target.write_bytes(b"half")
    server.faults["w.bin"] = [answer(403)]
    with pytest.raises(SourceFailed):
        bring(remote(server), target)
    assert target.read_bytes() == b"half"
    bring(remote(server), target)
    assert only_file(target)


# ---- it says why ----------------------------------------------------------------------------------------------------

def test_a_server_that_keeps_cutting_is_given_up_and_the_part_kept(server, target):
    server.faults["w.bin"] = [cut(50_000), *[cut(100)] * 3]
    with pytest.raises(SourceFailed, match=r"w.bin stopped at \d{5} of 204800 bytes, 3 attempts in a row failed, "
                                           r"the last: the connection broke"):
        bring(remote(server), target)
    assert not target.exists()
    assert 40_000 < part_path(remote(server), target).stat().st_size < 51_000
    bring(remote(server), target)
    assert only_file(target)


def test_nobody_there(server, target):
    with pytest.raises(SourceFailed, match=r"w.bin stopped at 0 of .*3 attempts.*does not answer \(Connection"):
        bring(remote(server, url="http://127.0.0.1:9/w.bin?Signature=secret"), target)


def test_messages_do_not_show_signatures(server, target):
    with pytest.raises(SourceFailed) as error:
        bring(remote(server, url=f"{server.url}/gone?Signature=secret"), target)
    assert "Signature" not in str(error.value)
    assert "/gone answers 404" in str(error.value)


@pytest.mark.parametrize("status, advice", [(401, "log in to the hub"), (403, "accept the model's licence"),
                                            (404, "lists a file that it does not have"), (410, "Gone"),
                                            (416, "shorter than the 204800 bytes")])
def test_refusals_are_final(server, target, status, advice):
    server.faults["w.bin"] = [answer(status)] * 2
    with pytest.raises(SourceFailed, match=f"w.bin: .*answers {status}.*{advice}"):
        bring(remote(server), target)
    assert len(server.requests) == 1


def test_a_login_page_is_not_taken_for_the_file(server, target):
    server.faults["w.bin"] = [instead(b"<html>please log in</html>")]
    with pytest.raises(SourceFailed, match="sends 26 bytes, 204800 expected.*login page"):
        bring(remote(server), target)
    assert not target.exists()


@pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_a_list_that_lies_about_the_length(server, target, size):
    with pytest.raises(SourceFailed, match=f"sends 204800 bytes, {size} expected as the hub lists {size}"):
        bring(remote(server, size=size), target)


def test_more_bytes_than_listed_without_a_length(server, target):
    server.faults["w.bin"] = [http_hub.without_length(CONTENT * 3)]
    with pytest.raises(SourceFailed, match="more bytes come than the 204800"):
        bring(remote(server), target)


def test_fewer_bytes_than_listed_without_a_length(server, target):
    server.faults["w.bin"] = [http_hub.without_length(CONTENT[:1000])] * 3
    with pytest.raises(SourceFailed, match="3 attempts in a row failed, the last: the connection ended early"):
        bring(remote(server), target)


@pytest.mark.parametrize("answered", ["bytes 0-204799/204800", "bytes 1000-204799/999999", "", "nonsense"])
def test_another_range_than_asked_for(server, target, answered):
    file = remote(server)
    leave_a_part(file, target, CONTENT[:1000])
    server.faults["w.bin"] = [instead(CONTENT[1000:], 206, Content_Range=answered)]
    with pytest.raises(SourceFailed, match="'bytes 1000-204799/204800' expected"):
        bring(file, target)


def test_wrong_bytes_twice(server, target):
    server.faults["w.bin"] = [corrupted] * 2
    with pytest.raises(SourceFailed, match="has come twice with another content.*sha256:.*nothing of it is kept"):
        bring(remote(server), target)
    assert not target.exists()
    assert part_path(remote(server), target).stat().st_size == 0


# ---- redirects ------------------------------------------------------------------------------------------------------

def test_redirects_are_followed_and_the_token_stays_behind(server, target):
    with http_hub.serve("c/d", {"w.bin": CONTENT}) as store:
        place = f"{store.url}/c/d/resolve/{http_hub.COMMIT}/w.bin"
        server.faults["w.bin"] = [redirect(f"/a/b/resolve/{http_hub.COMMIT}/w.bin"), redirect(place)]
        bring(remote(server, headers={"authorization": "Bearer secret"}), target)
        assert only_file(target)
        assert [request.headers.get("authorization") for request in server.requests] == ["Bearer secret"] * 2
        assert "authorization" not in {name.lower() for name in store.requests[0].headers}


def test_a_netrc_does_not_replace_the_token(server, target, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password something\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    bring(remote(server, headers={"authorization": "Bearer secret"}), target)
    assert server.requests[0].headers["authorization"] == "Bearer secret"


@pytest.mark.parametrize("location", ["http://example.com/w.bin", "ftp://127.0.0.1/w.bin", "file:///etc/passwd",
                                      "gopher://x", "https:///nowhere"])
def test_redirects_elsewhere_are_not_followed(server, target, location):
    server.faults["w.bin"] = [redirect(location)]
    with pytest.raises(SourceFailed, match="redirects to .*https to another machine expected|is not an address"):
        bring(remote(server), target)


@pytest.mark.parametrize("location", ["http://127.0.0.1/x", "https://localhost/x", "https://[::1]/x"])
def test_a_hub_does_not_lead_to_this_machine(server, location):
    with pytest.raises(SourceFailed, match="it is not followed"):
        download_file._check_redirect(remote(server), "https://hub.example/x", location)


def test_a_mirror_without_https_may_redirect_within_itself(server):
    download_file._check_redirect(remote(server), "http://mirror.example/x", "http://mirror.example/y")
    with pytest.raises(SourceFailed, match="it is not followed"):
        download_file._check_redirect(remote(server), "http://mirror.example/x", "http://other.example/y")


def test_redirects_without_end(server, target):
    server.faults["w.bin"] = [redirect(f"/a/b/resolve/{http_hub.COMMIT}/w.bin")] * 10
    with pytest.raises(SourceFailed, match="more than 5 redirects"):
        bring(remote(server), target)


# ---- the disk -------------------------------------------------------------------------------------------------------

class FullDisk:
    """A file that takes `room` bytes."""

    def __init__(self, file, room: int, error: int):
        self.file, self.room, self.error = file, room, error

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if self.room <= 0:
            raise OSError(self.error, os.strerror(self.error))
        written = self.file.write(data[:self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_keeps_what_has_come(server, target, monkeypatch, error):
    def opened(*args, **kwargs) -> FullDisk:
        return FullDisk(open(*args, **kwargs), 90_000, error)  # noqa: SIM115 - as the original

    monkeypatch.setattr(download_file, "open", opened, raising=False)
    with pytest.raises(NotEnoughSpace, match="disk of .* is full.*: 90000 of 204800 bytes of w.bin are kept; free"):
        bring(remote(server), target)
    assert not target.exists()
    monkeypatch.undo()
    bring(remote(server), target)
    assert only_file(target)
    assert server.starts("w.bin") == [0, 90_000]


def test_an_unwritable_place(server, target):
    target.parent.write_text("a file where the folder should be")
    with pytest.raises(DownloadFailed, match="cannot be written.*check that the folder may be written to"):
        bring(remote(server), target)
    assert server.requests == []


def test_a_folder_in_the_place_of_the_file(server, target):
    target.mkdir(parents=True)
    with pytest.raises(DownloadFailed, match="cannot be written.*what has come is kept"):
        bring(remote(server), target)


# ---- stop, kill, and others who want the same -----------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(urllib3.HTTPResponse, "shutdown"), reason="urllib3 before 2.3: it wakes by its timeout")
def test_stop_wakes_who_waits_for_a_silent_server(server, target):
    server.faults["w.bin"] = [stall(50_000)]
    monitor, outcome = Monitor(), []

    def work() -> None:
        try:
            fetch(remote(server), target, monitor, Patience(timeout=20))
        except DownloadCancelled:
            outcome.append("cancelled")

    thread = threading.Thread(target=work)
    thread.start()
    assert server.stalled.wait(10)
    monitor.stop()
    thread.join(5)
    assert outcome == ["cancelled"]
    server.go_on.set()
    bring(remote(server), target)
    assert only_file(target)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no kill -9")
def test_killed_in_the_middle_and_resumed(server, children):
    child, folder = children["killed"]
    target = folder / "w.bin"
    server.faults["w.bin"] = [stall(120_000)]
    assert child.stdout.readline() == READY
    go(child, remote(server), target)
    for line in child.stdout:
        if int(line) >= 110_000:
            break
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    part = part_path(remote(server), target)
    there = part.stat().st_size
    assert there >= 110_000
    assert not target.exists()
    server.go_on.set()
    bring(remote(server), target)
    assert only_file(target)
    assert server.starts("w.bin") == [0, there]
    assert hashlib.sha256(target.read_bytes()).hexdigest() == remote(server).checksum.removeprefix("sha256:")


def test_two_processes_at_once(server, children, caplog):
    """The second waits for the first, and then finds the file."""
    child, folder = children["first"]
    target = folder / "w.bin"
    caplog.set_level(logging.INFO)
    server.faults["w.bin"] = [stall(50_000)]
    assert child.stdout.readline() == READY
    go(child, remote(server), target)
    assert server.stalled.wait(20)
    monitor = Monitor()
    monitor.wait = lambda seconds: server.go_on.set() or threading.Event().wait(0.01)  # it waits: the other may go on
    fetch(remote(server), target, monitor, PATIENCE)
    assert "being downloaded by somebody else: waiting" in caplog.text
    assert child.stdout.read().endswith("done\n")
    assert only_file(target)
    assert server.starts("w.bin") == [0]


def test_many_threads_at_once(server, target):
    threads = [threading.Thread(target=bring, args=(remote(server), target)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert only_file(target)
    assert server.starts("w.bin") == [0]


def test_a_folder_that_cannot_be_has_no_unfinished_downloads(tmp_path):
    assert unfinished(tmp_path / "missing") == unfinished(tmp_path / ("x" * 300)) == ""


def test_unfinished_downloads_are_named(server, target):
    assert unfinished(target.parent) == ""
    leave_a_part(remote(server), target, CONTENT[:150_000])
    assert unfinished(target.parent) == (
        ". A download stopped in the middle of w.bin (150.0 KB are there); start it again, it continues")


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a system with unshare")
def test_a_real_small_disk(server, children):
    """A file system of 64 KB, mounted for one process only."""
    child, folder = children["small disk"]
    if child.stdout.readline() != READY:
        pytest.skip("this system does not let us mount")
    go(child, remote(server), folder / "w.bin")
    outcome = child.stdout.read().splitlines()[-1]
    assert outcome.startswith(f"NotEnoughSpace: the disk of {folder} is full")
    assert "65536 of 204800 bytes of w.bin are kept" in outcome
