"""Talk to a running ComfyUI as its web page does: queue a prompt, follow the websocket, fetch the results.

    with ComfyClient(server.url) as client:
        run = client.run({"1": {"class_type": ..., "inputs": {...}}, ...})
        run.status, run.outputs, run.executed, run.cached, run.progress, run.previews, run.error

Needs websocket-client; the rest is the standard library.
"""
from __future__ import annotations

import json
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from typing import Any

import websocket  # the package websocket-client

PREVIEW_IMAGE, TEXT, PREVIEW_WITH_METADATA = 1, 3, 4
ENDINGS = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}


class PromptRejected(ValueError):
    """ComfyUI did not accept the prompt; .node_errors tells, by node id, why."""

    def __init__(self, body: dict):
        self.error, self.node_errors = body.get("error", body), body.get("node_errors", {})
        super().__init__(json.dumps(body, indent=1)[:4000])


@dataclass
class Preview:
    node: str | None
    mime: str
    data: bytes


@dataclass
class Run:
    prompt_id: str
    status: str = "pending"  # success, error, interrupted
    outputs: dict = field(default_factory=dict)  # node id -> what the node's "ui" said
    executed: list = field(default_factory=list)  # node ids in the order in which they ran
    cached: list = field(default_factory=list)  # node ids that were answered from the cache
    progress: list = field(default_factory=list)  # (node id, value, max)
    previews: list = field(default_factory=list)
    error: dict | None = None
    events: list = field(default_factory=list)  # (seconds since queued, type, data)

    def add_progress(self, *step) -> None:
        """Note (node, value, max) unless it was the last one noted: newer servers report each step in two events."""
        if step not in self.progress[-1:]:
            self.progress.append(step)

    def files(self, node: str | None = None) -> list[dict]:
        """Every {filename, subfolder, type} in the outputs, of one node or of all."""
        chosen = self.outputs.values() if node is None else [self.outputs.get(node, {})]
        return [f for out in chosen for value in out.values() if isinstance(value, list)
                for f in value if isinstance(f, dict) and "filename" in f]


class ComfyClient:
    def __init__(self, url: str, timeout: float = 120, preview_metadata: bool = True):
        self.url, self.timeout, self.client_id = url.rstrip("/"), timeout, uuid.uuid4().hex
        self.socket = websocket.create_connection(
            self.url.replace("http", "ws", 1) + f"/ws?clientId={self.client_id}", timeout=timeout)
        if preview_metadata:  # must be the first message; servers that do not know it ignore it
            self.socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))

    # ---- plain requests -------------------------------------------------------------------------------------------
    def request(self, path: str, body=None, method: str | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        req = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(req, timeout=self.timeout) as reply:
            return reply.read()

    def get(self, path: str):
        return json.loads(self.request(path))

    def object_info(self, node: str | None = None) -> dict:
        return self.get("/object_info" + (f"/{urllib.parse.quote(node)}" if node else ""))

    def history(self, prompt_id: str) -> dict:
        return self.get(f"/history/{prompt_id}").get(prompt_id, {})

    def interrupt(self, prompt_id: str | None = None) -> None:
        self.request("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self, unload_models: bool = True, free_memory: bool = True, settle: float = 1.0) -> None:
        """Have models unloaded and caches dropped. The worker does it when it next looks at its queue and tells nobody:
        a prompt queued at once may run before it, so this waits a little."""
        self.request("/free", {"unload_models": unload_models, "free_memory": free_memory})
        time.sleep(settle)

    def fetch(self, file: dict) -> bytes:
        keys = {k: file.get(k, "") for k in ("filename", "subfolder", "type")}
        return self.request("/view?" + urllib.parse.urlencode(keys))

    # ---- prompts --------------------------------------------------------------------------------------------------
    def queue(self, prompt: dict, **extra) -> Run:
        """Queue an API-format prompt. extra: preview_method="latent2rgb", extra_pnginfo={...}."""
        try:
            reply = self.request("/prompt", {"prompt": prompt, "client_id": self.client_id, "extra_data": extra})
        except urllib.error.HTTPError as err:
            if err.code != 400:
                raise
            raise PromptRejected(json.load(err)) from None
        return Run(json.loads(reply)["prompt_id"])

    def follow(self, run: Run, on_event=None, timeout: float | None = None) -> Run:
        """Read the websocket until the run has ended. on_event(run, type, data) sees each event, previews too."""
        began = time.monotonic()
        until = began + (timeout or self.timeout)
        while run.status == "pending":
            self.socket.settimeout(max(0.01, until - time.monotonic()))
            try:
                message = self.socket.recv()
            except websocket.WebSocketTimeoutException:
                raise TimeoutError(f"no end of {run.prompt_id}; last events: {run.events[-3:]}") from None
            kind, data = self._decode(message)
            if isinstance(data, dict) and data.get("prompt_id", run.prompt_id) != run.prompt_id:
                continue
            run.events.append((time.monotonic() - began, kind, data))
            self._note(run, kind, data)
            if on_event:
                on_event(run, kind, data)
        return run

    def run(self, prompt: dict, on_event=None, timeout: float | None = None, **extra) -> Run:
        return self.follow(self.queue(prompt, **extra), on_event, timeout)

    @staticmethod
    def _decode(message):
        if isinstance(message, str):
            event = json.loads(message)
            return event["type"], event.get("data")
        kind, first = struct.unpack(">II", message[:8])
        if kind == PREVIEW_WITH_METADATA:
            meta = json.loads(message[8:8 + first])
            return "preview", Preview(meta.get("node_id"), meta.get("image_type", ""), message[8 + first:])
        if kind == PREVIEW_IMAGE:
            return "preview", Preview(None, "image/png" if first == 2 else "image/jpeg", message[8:])
        if kind == TEXT:
            return "text", (message[8:8 + first].decode(), message[8 + first:].decode())
        return f"binary {kind}", message[4:]

    @staticmethod
    def _note(run: Run, kind: str, data) -> None:
        if kind == "preview":
            run.previews.append(data)
        elif kind == "executing" and data.get("node") is not None:
            run.executed.append(data["node"])
        elif kind == "executed" and data.get("output"):
            run.outputs[data["node"]] = data["output"]
        elif kind == "execution_cached":
            run.cached = data["nodes"]
        elif kind == "progress":  # comfy.utils.ProgressBar
            run.add_progress(data.get("node"), data["value"], data["max"])
        elif kind == "progress_state":  # that and, alone, ComfyAPI.execution.set_progress
            for node, state in data["nodes"].items():
                if state["state"] == "running" and state["value"]:
                    run.add_progress(node, state["value"], state["max"])
        elif kind in ENDINGS:
            run.status = ENDINGS[kind]
            run.error = data if run.status == "error" else None

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> ComfyClient:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def run_probe(client: ComfyClient, kind: str, others: dict | None = None, **inputs: Any) -> Any:
    """What a node of the probe pack says. Other nodes may be given for it to look at."""
    result = client.run({**(others or {}), "probe": {"class_type": kind, "inputs": inputs}})
    assert result.status == "success", result.error
    return json.loads(result.outputs["probe"]["text"][0])
