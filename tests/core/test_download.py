"""Downloading what a pattern means: which files, from which hub, into which folder, and everything that is refused."""
from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from diffsynth_backend.core.loader import download as module
from diffsynth_backend.core.loader.containment import PathRefused
from diffsynth_backend.core.loader.download import DownloadPolicy, Progress, allowed, download
from diffsynth_backend.core.loader.download_file import (
    DownloadCancelled,
    DownloadFailed,
    NotEnoughSpace,
    Patience,
    part_path,
)
from diffsynth_backend.core.loader.download_hubs import HUBS, RemoteFile
from tests.helpers import http_hub
from tests.helpers.http_hub import HubServer, answer, corrupted, cut, stall

MODEL = "Qwen/Qwen-Image"
WEIGHTS = save({"w": torch.arange(50_000, dtype=torch.float32)})
FILES = {
    "model_index.json": b"{}",
    "top.safetensors": WEIGHTS[:-4] + b"\0\0\0\0",
    "tokenizer/vocab.json": b'{"a": 0}',
    "tokenizer/more/added.json": b"{}",
    "tokenizer/.hidden": b"x",
    "vae/model.safetensors": WEIGHTS,
    "vae/old.bin": b"p" * 5000,
}
PATIENCE = Patience(timeout=0.5, attempts=2, pause=0, chunk=4096)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    pytest.importorskip("modelscope_hub")
    with http_hub.serve(MODEL, dict(FILES)) as server:
        http_hub.use_as_both_hubs(server, monkeypatch, str(tmp_path / "home"))
        yield server


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "models"


def bring(base: Path, *patterns: str, **options: object) -> set[str]:
    """Download, and tell what has come."""
    paths = download(MODEL, list(patterns) or None, str(base), patience=PATIENCE, **options)
    return {Path(path).relative_to(base / MODEL).as_posix() for path in paths}


# ---- which files ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern, expected", [
    ("vae/model.safetensors", {"vae/model.safetensors"}),
    ("*.safetensors", {"top.safetensors"}),
    ("vae/*", {"vae/model.safetensors", "vae/old.bin"}),
    ("*/*.safetensors", {"vae/model.safetensors"}),
    ("tokenizer/", {"tokenizer/vocab.json", "tokenizer/more/added.json", "tokenizer/.hidden"}),
    ("*e*/", {"tokenizer/vocab.json", "tokenizer/more/added.json", "tokenizer/.hidden", "vae/model.safetensors",
              "vae/old.bin"}),
    ("tokenizer/*", {"tokenizer/vocab.json"}),
    ("tokenizer/.*", {"tokenizer/.hidden"}),
    ("vae/[mn]odel.*", {"vae/model.safetensors"}),
])
def test_a_pattern_means_the_files_that_it_finds_on_the_disk(server, base, pattern, expected):
    assert bring(base, pattern) == expected
    there = {path.relative_to(base / MODEL).as_posix() for path in base.rglob("*") if path.is_file()}
    assert there == expected, "nothing else is fetched, and neither parts nor locks stay"
    assert all((base / MODEL / path).read_bytes() == FILES[path] for path in expected)


def test_no_pattern_means_everything(server, base):
    assert bring(base) == set(FILES)


def test_what_is_here_is_not_fetched_again(server, base):
    bring(base)
    server.requests.clear()
    (base / MODEL / "vae/old.bin").unlink()
    assert bring(base) == set(FILES)
    assert [request.path for request in server.requests] == ["vae/old.bin"]


def test_a_pattern_without_files_names_what_there_is(server, base):
    with pytest.raises(DownloadFailed, match=r"matches 'wae/\*'; choose one that it has: model_index"):
        bring(base, "vae/*", "wae/*")
    assert server.requests == []


def test_the_address_of_a_revision(server, base):
    with pytest.raises(DownloadFailed, match="huggingface: cannot list"):
        bring(base, sources=["huggingface"], revision="v9")
    assert bring(base, "model_index.json", sources=["huggingface"], revision="main") == {"model_index.json"}


# ---- what lies there already ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content", [
    ("vae/model.safetensors", b""), ("vae/model.safetensors", WEIGHTS[:1000]), ("vae/model.safetensors", b"\0" * 64),
    ("vae/old.bin", b""), ("vae/old.bin", b"p" * 100), ("tokenizer/vocab.json", b"")])
def test_pieces_are_named_and_replaced(server, base, caplog, name, content):
    path = base / MODEL / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    bring(base, name)
    assert path.read_bytes() == FILES[name]
    assert f"{path} is not whole ({len(content)} of {len(FILES[name])} bytes)" in caplog.text


@pytest.mark.parametrize("name, content", [("vae/model.safetensors", save({"mine": torch.ones(3)})),
                                           ("tokenizer/vocab.json", b'{"a": 0, "mine": 1}')])
def test_somebodys_own_version_stays(server, base, caplog, name, content):
    path = base / MODEL / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    bring(base, name)
    assert path.read_bytes() == content
    assert "is not the hub's version" in caplog.text
    assert server.requests == []


# ---- which hub ------------------------------------------------------------------------------------------------------

def test_the_second_source_continues_what_the_first_began(server, base, caplog):
    """The content has the same checksum, so the part has the same name."""
    server.faults["vae/model.safetensors"] = [cut(100_000), answer(403)]
    bring(base, "vae/model.safetensors")
    assert (base / MODEL / "vae/model.safetensors").read_bytes() == WEIGHTS
    assert server.lists == ["modelscope", "huggingface"]
    assert [start > 0 for start in server.starts("vae/model.safetensors")] == [False, True, True]
    assert "from modelscope: vae/model.safetensors: " in caplog.text


def test_a_named_source_is_the_only_one(server, base):
    server.faults["model_index.json"] = [answer(403)]
    with pytest.raises(DownloadFailed) as error:
        bring(base, "model_index.json", sources=["huggingface"])
    assert server.lists == ["huggingface"]
    assert "modelscope:" not in str(error.value)


def test_the_message_has_both_failures_and_what_to_do(server, base):
    server.faults["vae/old.bin"] = [answer(403), *[corrupted] * 2]
    with pytest.raises(DownloadFailed) as error:
        bring(base, "vae/*.bin")
    for part in ("downloading ['vae/*.bin'] of Qwen/Qwen-Image failed", "modelscope: vae/old.bin: ", "answers 403",
                 "huggingface: vae/old.bin has come twice with another content", "Try again",
                 "DIFFSYNTH_DOWNLOAD_SOURCE (modelscope, huggingface)", "DIFFSYNTH_SKIP_DOWNLOAD=true"):
        assert part in str(error.value)


@pytest.mark.parametrize("sources", [[], ["elsewhere"], ["modelscope", "elsewhere"]])
def test_unknown_sources(base, sources):
    with pytest.raises(DownloadFailed, match="unknown download source.*modelscope, huggingface expected"):
        bring(base, sources=sources)


def test_a_hub_that_breaks_is_not_our_error(base, monkeypatch):
    def broken(model_id: str, revision: str | None) -> list[RemoteFile]:
        raise KeyError("Data")

    monkeypatch.setitem(HUBS, "mine", broken)
    with pytest.raises(DownloadFailed, match="mine: cannot list the files of Qwen/Qwen-Image .'Data'"):
        bring(base, sources=["mine"])


# ---- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("listed", ["../../evil", "/etc/evil", "a/../../evil", "C:/evil", "a\\..\\evil", "a/\0evil",
                                    "vae/../../../evil", "%2e%2e/evil"])
def test_a_list_that_leads_out_of_the_folder(base, monkeypatch, listed):
    """File names come from the network."""
    monkeypatch.setitem(HUBS, "mine", lambda model_id, revision: [RemoteFile(listed, 0, None, "http://127.0.0.1:9/x")])
    with pytest.raises(PathRefused):
        bring(base, sources=["mine"])
    assert not base.exists()


def test_a_listed_name_that_no_file_can_have(base, monkeypatch):
    listed = [RemoteFile("x" * 300, 3, None, "https://hub.invalid/x")]
    monkeypatch.setitem(HUBS, "modelscope", lambda model_id, revision: listed)
    with pytest.raises(DownloadFailed, match="cannot be written"):
        bring(base, sources=["modelscope"])


def test_a_folder_on_the_way_that_links_elsewhere(server, base, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (base / MODEL).mkdir(parents=True)
    try:
        (base / MODEL / "vae").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("this system does not let us make links")
    with pytest.raises(PathRefused, match="outside of"):
        bring(base)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert server.requests == []


@pytest.mark.parametrize("model_id, pattern", [("../x", "a"), ("a/b", "../a"), ("a/b", "/etc/passwd")])
def test_hostile_arguments_ask_nobody(server, base, model_id, pattern):
    with pytest.raises(PathRefused):
        download(model_id, [pattern], str(base))
    assert server.lists == []


KNOWN = {("Qwen/Qwen-Image", "vae/*.safetensors"), ("a/b", None)}


@pytest.mark.parametrize("policy, model_id, pattern, expected", [
    ("off", "Qwen/Qwen-Image", "vae/*.safetensors", False),
    ("known", "Qwen/Qwen-Image", "vae/*.safetensors", True),
    (DownloadPolicy.KNOWN, "a/b", None, True),
    ("known", "Qwen/Qwen-Image", "vae/*", False),
    ("known", "Qwen/Qwen-Image", None, False),
    ("known", "qwen/qwen-image", "vae/*.safetensors", False),
    ("known", "Evil/Qwen-Image", "vae/*.safetensors", False),
    ("any", "Evil/Qwen-Image", "x", True),
])
def test_policy(policy, model_id, pattern, expected):
    assert allowed(model_id, pattern, policy, KNOWN) is expected


def test_a_policy_that_is_none():
    with pytest.raises(ValueError, match="everything"):
        allowed("a/b", None, "everything", KNOWN)


# ---- space, progress, cancel ----------------------------------------------------------------------------------------

def test_the_space_is_checked_first(server, base, monkeypatch):
    monkeypatch.setattr(module, "free_space", lambda folder: len(WEIGHTS) - 50_001)
    with pytest.raises(NotEnoughSpace, match=r"200.1 KB are to be downloaded to .*, where 150.1 KB are free: free "
                                             r"50.0 KB more, or set DIFFSYNTH_MODEL_BASE_PATH"):
        bring(base, "vae/model.safetensors")
    assert server.requests == []
    assert server.lists == ["modelscope"], "another hub's files are no smaller"


def test_a_part_needs_no_space_again(server, base, monkeypatch):
    monkeypatch.setattr(module, "free_space", lambda folder: len(WEIGHTS) - 50_000)
    file = next(file for file in HUBS["modelscope"](MODEL, None) if file.path == "vae/model.safetensors")
    part = part_path(file, base / MODEL / file.path)
    part.parent.mkdir(parents=True)
    part.write_bytes(WEIGHTS[:50_000])
    bring(base, "vae/model.safetensors")
    assert server.starts("vae/model.safetensors") == [50_000]


def test_progress_is_told_by_the_callers_thread_and_ends_complete(server, base):
    import threading

    states: list[Progress] = []
    bring(base, "tokenizer/")
    bring(base, progress=lambda state: states.append(state) or threading.current_thread() is threading.main_thread()
          or pytest.fail("another thread"))
    total = sum(map(len, FILES.values()))
    assert {state.total for state in states} == {total}
    assert states[-1].done == total
    assert [state.done for state in states] == sorted(state.done for state in states)
    assert states[0].done >= len(FILES["tokenizer/vocab.json"])
    assert states[-1].file in FILES


def test_without_progress_the_log_tells(server, base, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "LOG_SECONDS", 0.0)
    bring(base)
    assert "downloading 7 files" in caplog.text
    assert "Qwen/Qwen-Image: 405.2 KB of 405.2 KB, " in caplog.text


def test_cancelled_and_started_again(server, base):
    server.faults["vae/model.safetensors"] = [stall(120_000)]
    with pytest.raises(DownloadCancelled, match="was cancelled; what has come to .* is kept"):
        download(MODEL, ["vae/model.safetensors"], str(base), cancelled=server.stalled.is_set,
                 patience=Patience(chunk=4096))
    assert server.lists == ["modelscope"], "cancelled means that no other hub is asked"
    server.go_on.set()
    bring(base, "vae/model.safetensors")
    assert (base / MODEL / "vae/model.safetensors").read_bytes() == WEIGHTS
    assert server.starts("vae/model.safetensors")[1] > 100_000


def test_what_progress_raises_ends_the_download(server, base):
    class Interrupt(Exception):
        pass

    def interrupt(state: Progress) -> None:
        raise Interrupt

    server.faults["vae/model.safetensors"] = [stall(1000)]
    with pytest.raises(Interrupt):
        download(MODEL, ["vae/model.safetensors"], str(base), progress=interrupt)
    server.go_on.set()
    assert bring(base) == set(FILES)


def test_several_files_at_a_time(server, base):
    """All are asked for before the first is finished."""
    names = ["top.safetensors", "vae/model.safetensors", "vae/old.bin"]
    for name in names:
        server.faults[name] = [stall(10)]
    download(MODEL, names, str(base), cancelled=lambda: len(server.requests) == 3 and server.go_on.set())
    assert sorted(request.path for request in server.requests) == names


# ---- offline --------------------------------------------------------------------------------------------------------

def test_offline_means_no_connection_tokenizer_included(monkeypatch):
    """The embedded demo, tokenizer and all, with every socket refused."""
    from diffsynth_backend.pipelines.presets import MODEL_PRESETS
    from diffsynth_backend.pipelines.qwen_image import QwenImagePipeline

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    demo = MODEL_PRESETS["demo"]
    pipe = QwenImagePipeline.from_pretrained(torch.float32, "cpu", demo.model_configs(), demo.tokenizer_config())
    assert pipe.prompts is not None
