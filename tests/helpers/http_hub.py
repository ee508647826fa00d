"""Both model hubs on this machine: a server that speaks their list and file requests, and fails as it is told.

`faults[path]` is a list of functions, of which each request for that file uses up one; then the file is served well.
"""
from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

COMMIT = "c" * 40


class Request(NamedTuple):
    """A request for a file: the first byte that was asked for, and what came along."""

    path: str
    start: int
    headers: dict[str, str]


class HubServer(ThreadingHTTPServer):
    """Serves `files` (path -> content) as the repository `model_id` of both hubs."""

    daemon_threads = True

    def __init__(self, model_id: str, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model_id = model_id
        self.files = files
        self.faults: dict[str, list[Fault]] = {}
        self.listed: dict[str, dict[str, Any]] = {}  # what the list says in place of the truth: size, sha256
        self.lists: list[str] = []
        self.requests: list[Request] = []
        self.sent = 0
        self.go_on = threading.Event()  # lets those continue that `stall`
        self.stalled = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def starts(self, path: str) -> list[int]:
        """The first byte of each request for a file."""
        return [request.start for request in self.requests if request.path == path]

    def facts(self, path: str) -> dict[str, Any]:
        content = self.files[path]
        truth = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        return {**truth, **self.listed.get(path, {})}

    def handle_error(self, *_: object) -> None:
        """Clients that leave are what these tests are about."""


@contextmanager
def serve(model_id: str, files: dict[str, bytes]) -> Iterator[HubServer]:
    """A server in a thread of its own."""
    with HubServer(model_id, files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.go_on.set()
            server.shutdown()
            thread.join()


def use_as_both_hubs(server: HubServer, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    """The hubs' own libraries, pointed to the server; what they keep of a user goes to `home`."""
    from huggingface_hub import constants  # read from the environment once, at import

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    monkeypatch.setenv("MODELSCOPE_HOME", home)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


# ---- faults ---------------------------------------------------------------------------------------------------------

Fault = Callable[["_Handler", bytes, int], None]


def cut(after: int) -> Fault:
    """Promise everything, send `after` bytes, and hang up."""
    def fault(handler: _Handler, content: bytes, start: int) -> None:
        handler.promise(content, start)
        handler.send(content[start:start + after])
    return fault


def stall(after: int) -> Fault:
    """Send `after` bytes, and then nothing until the test lets us."""
    def fault(handler: _Handler, content: bytes, start: int) -> None:
        handler.promise(content, start)
        handler.send(content[start:start + after])
        handler.server.stalled.set()
        handler.server.go_on.wait(30)
        handler.send(content[start + after:])
    return fault


def answer(status: int) -> Fault:
    def fault(handler: _Handler, content: bytes, start: int) -> None:
        handler.send_error(status)
    return fault


def redirect(location: str) -> Fault:
    def fault(handler: _Handler, content: bytes, start: int) -> None:
        handler.send_response(302)
        handler.send_header("Location", location)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
    return fault


def instead(other: bytes, status: int = 200, **headers: str) -> Fault:
    """Other content than asked for."""
    def fault(handler: _Handler, content: bytes, start: int) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(other)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.send(other)
    return fault


def without_length(other: bytes) -> Fault:
    """Content that ends when the connection does."""
    def fault(handler: _Handler, content: bytes, start: int) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.send(other)
    return fault


def without_ranges(handler: _Handler, content: bytes, start: int) -> None:
    """The whole file, whatever was asked for."""
    handler.promise(content, 0)
    handler.send(content)


def corrupted(handler: _Handler, content: bytes, start: int) -> None:
    """As many bytes as promised, but others."""
    handler.promise(content, start)
    handler.send(bytes(255 - byte for byte in content[start:]))


# ---- requests -------------------------------------------------------------------------------------------------------

class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        model, modelscope = self.server.model_id, f"/api/v1/models/{self.server.model_id}/repo"
        if address.path == f"{modelscope}/files":
            self.list_modelscope(query)
        elif address.path == modelscope:
            self.file(query["FilePath"])
        elif address.path in (f"/api/models/{model}", f"/api/models/{model}/revision/main"):
            self.list_huggingface()
        elif address.path.startswith(f"/{model}/resolve/{COMMIT}/"):
            self.file(unquote(address.path.removeprefix(f"/{model}/resolve/{COMMIT}/")))
        else:
            self.send_error(404)

    def list_modelscope(self, query: dict[str, str]) -> None:
        self.server.lists.append("modelscope")
        facts = {path: self.server.facts(path) for path in self.server.files}
        files = [{"Path": path, "Name": path, "Type": "blob", "Size": fact["size"], "Sha256": fact["sha256"]}
                 for path, fact in facts.items()]
        folders = {path.rpartition("/")[0] for path in facts if "/" in path}
        files += [{"Path": folder, "Name": folder, "Type": "tree", "Size": 0, "Sha256": ""} for folder in folders]
        self.json({"Code": 200, "Success": True, "Message": "", "Data": {"Files": files}})

    def list_huggingface(self) -> None:
        self.server.lists.append("huggingface")
        siblings = []
        for path, content in self.server.files.items():
            fact = self.server.facts(path)
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            lfs = {"size": fact["size"], "sha256": fact["sha256"], "pointerSize": 130}
            siblings.append({"rfilename": path, "size": fact["size"], "blobId": blob,
                             **({"lfs": lfs} if path.endswith((".safetensors", ".bin")) else {})})
        self.json({"id": self.server.model_id, "modelId": self.server.model_id, "sha": COMMIT, "private": False,
                   "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def file(self, path: str) -> None:
        given = self.headers.get("Range", "bytes=0-")
        start = int(given.removeprefix("bytes=").rstrip("-"))
        self.server.requests.append(Request(path, start, dict(self.headers)))
        if path not in self.server.files:
            return self.send_error(404)
        fault = next(iter(self.server.faults.get(path, [])), None)
        if fault is not None:
            self.server.faults[path].remove(fault)
            return fault(self, self.server.files[path], start)
        self.promise(self.server.files[path], start)
        return self.send(self.server.files[path][start:])

    def promise(self, content: bytes, start: int) -> None:
        """The header of an answer that has everything from `start`."""
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()

    def send(self, data: bytes) -> None:
        self.server.sent += len(data)
        self.wfile.write(data)
        self.wfile.flush()

    def json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the requests are kept."""
