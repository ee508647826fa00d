"""What both hubs hold, asked through their own libraries from a server that speaks their languages."""
from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffsynth_backend.core.loader.download import DownloadFailed, download
from diffsynth_backend.core.loader.download_hubs import HUBS, RemoteFile, _modelscope_url
from tests.helpers import http_hub
from tests.helpers.http_hub import HubServer

FILES = {"vae/w.safetensors": b"weights", "a b/ü.json": b"{}", ".gitattributes": b"*.bin"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    pytest.importorskip("modelscope_hub")
    with http_hub.serve("owner/name", dict(FILES)) as server:
        http_hub.use_as_both_hubs(server, monkeypatch, str(tmp_path / "home"))
        yield server


@pytest.mark.parametrize("hub", HUBS)
def test_files_with_sizes_and_checksums(server, hub):
    files = {file.path: file for file in HUBS[hub]("owner/name", None)}
    assert {path: file.size for path, file in files.items()} == {path: len(FILES[path]) for path in FILES}
    assert files["vae/w.safetensors"].checksum == "sha256:" + hashlib.sha256(b"weights").hexdigest()
    for path, file in files.items():
        content = file.new_hash()
        content.update(FILES[path])
        assert file.is_content(content)
        content.update(b"more")
        assert not file.is_content(content)


@pytest.mark.parametrize("hub", HUBS)
def test_files_are_fetched_with_the_users_token_which_is_shown_nowhere(server, hub, tmp_path, caplog):
    caplog.set_level("DEBUG", "diffsynth_backend")
    download("owner/name", None, str(tmp_path), [hub])
    assert {path: (tmp_path / "owner/name" / path).read_bytes() for path in FILES} == FILES
    for request in server.requests:
        headers = {name.lower(): value for name, value in request.headers.items()}
        assert "hf_secret" in headers.get("authorization", "") or "ms-secret" in headers.get("cookie", "")
    assert "secret" not in caplog.text + repr(HUBS[hub]("owner/name", None))


@pytest.mark.parametrize("hub", HUBS)
def test_a_revision(server, hub):
    assert len(HUBS[hub]("owner/name", "main")) == len(FILES)


@pytest.mark.parametrize("hub", HUBS)
def test_a_model_that_is_not_there(server, hub, tmp_path):
    with pytest.raises(DownloadFailed, match=f"{hub}: cannot list the files of owner/other"):
        download("owner/other", None, str(tmp_path), [hub])
    assert not (tmp_path / "owner").exists()


@pytest.mark.parametrize("hub, package, line", [("modelscope", "modelscope_hub", "pip install -U modelscope-hub"),
                                                ("huggingface", "huggingface_hub", "pip install -U huggingface-hub")])
def test_a_missing_library_says_how_to_get_it(monkeypatch, tmp_path, hub, package, line):
    from diffsynth_backend.core.loader import download as module

    monkeypatch.setattr(module, "check_model_id", str)  # which needs huggingface_hub too
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DownloadFailed, match=line):
        download("owner/name", None, str(tmp_path), [hub])


def test_the_address_is_the_librarys(server):
    """The library that lists gives the same address to itself, whatever is in the path."""
    from modelscope_hub import HubApi, HubConfig

    client = HubApi(HubConfig()).legacy
    for path in FILES:
        theirs = client.get_download_url("owner/name", "model", path, "v1.0")
        assert _modelscope_url(server.url, "owner/name", "v1.0", path) == theirs


def test_no_checksum(server):
    server.listed["vae/w.safetensors"] = {"sha256": ""}
    for hub in HUBS.values():
        file = next(file for file in hub("owner/name", None) if file.path == "vae/w.safetensors")
        assert file.checksum is None
        assert file.is_content(hashlib.sha256(b"anything"))


def test_headers_do_not_tell_files_apart():
    files = {RemoteFile("a", 1, None, "u", {"token": "1"}), RemoteFile("a", 1, None, "u", {"token": "2"})}
    assert len(files) == 1
