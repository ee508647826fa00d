"""Start a ComfyUI checkout on a free loopback port, in a throw-away base directory, and stop it again.

    with ComfyServer({"my_pack": "path/to/its/folder"}) as server:
        ... server.url, server.log(), server.base ...

COMFYUI_DIR     the ComfyUI checkout (its main.py); not needed where this pack lies in ComfyUI/custom_nodes
COMFYUI_PYTHON  the interpreter that has its requirements (else the one that runs the tests)
COMFYUI_ARGS    more arguments for main.py, split as a shell would
It runs on the CPU. Nothing leaves the machine.
"""
from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

PROBES = Path(__file__).parent / "probe_pack"  # nodes that look at things from the inside
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
           "DO_NOT_TRACK": "1", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
# Settings of the page: no template gallery at the first visit, no workflow kept from the last one.
UI_SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False, "Comfy.Locale": "en"}


class ServerFailed(RuntimeError):
    """ComfyUI ended, or did not answer in time; the message closes with the tail of its log."""


def find_comfyui() -> Path | None:
    """The checkout to test with: COMFYUI_DIR, else the one in whose custom_nodes this pack lies."""
    named, around = os.environ.get("COMFYUI_DIR"), Path(__file__).absolute().parents[4]
    if named:
        return Path(named).resolve()
    return around if (around / "main.py").is_file() and (around / "custom_nodes").is_dir() else None


def why_not() -> str | None:
    """Why tests with a real ComfyUI cannot run here, None if they can."""
    if find_comfyui() is None:
        return "no ComfyUI: set COMFYUI_DIR, or put this pack into ComfyUI/custom_nodes"
    if importlib.util.find_spec("websocket") is None:
        return "no websocket-client: pip install websocket-client"
    return None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class ComfyServer:
    """One running ComfyUI. `extensions` are folders by the name that each has in custom_nodes; `base`, if given, is a
    base directory that may hold models already and is kept."""

    def __init__(self, extensions: Mapping[str, Path], base: Path | None = None, arguments: Sequence[str] = (),
                 timeout: float = 300) -> None:
        comfy_dir = find_comfyui()
        if comfy_dir is None:
            raise ServerFailed("no ComfyUI: set COMFYUI_DIR to the checkout to test with")
        self.comfy_dir, self.extensions = comfy_dir, dict(extensions)
        self.python = os.environ.get("COMFYUI_PYTHON") or sys.executable
        self.given_base, self.arguments, self.timeout = base, list(arguments), timeout
        self.process: subprocess.Popen | None = None
        self.startup_seconds = 0.0

    # ---- starting -------------------------------------------------------------------------------------------------
    def _prepare(self) -> None:
        self.base = Path(self.given_base or tempfile.mkdtemp(prefix="comfy-base-")).resolve()
        for name in ("custom_nodes", "input", "output", "temp", "models", "user/default"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for name, folder in self.extensions.items():
            (self.base / "custom_nodes" / name).symlink_to(folder, target_is_directory=True)
        (self.base / "user/default/comfy.settings.json").write_text(json.dumps(UI_SETTINGS))

    def _arguments(self) -> list[str]:
        known = (self.comfy_dir / "comfy/cli_args.py").read_text()  # options have come and gone between versions
        args = ["--listen", "127.0.0.1", "--port", str(self.port), "--cpu", "--base-directory", str(self.base)]
        for flag in ("--disable-auto-launch", "--disable-api-nodes"):
            if f'"{flag}"' in known:
                args.append(flag)
        if '"--database-url"' in known:
            args += ["--database-url", f"sqlite:///{self.base / 'user/comfyui.db'}"]
        return args + self.arguments + shlex.split(os.environ.get("COMFYUI_ARGS", ""))

    def start(self) -> ComfyServer:
        self._prepare()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = self.base / "comfy.log"
        env = os.environ | OFFLINE
        env.pop("PYTHONPATH", None)  # the tests' own path must not leak into the server
        command = [self.python, "main.py", *self._arguments()]
        began = time.monotonic()
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(command, cwd=self.comfy_dir, env=env, stdin=subprocess.DEVNULL,
                                            stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            self._wait(began + self.timeout)
        except BaseException:
            self.stop()
            raise
        self.startup_seconds = time.monotonic() - began
        return self

    def _wait(self, until: float) -> None:
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise ServerFailed(f"ComfyUI ended with {self.process.returncode} before it was ready\n"
                                   f"{self.log()[-4000:]}")
            try:
                with urllib.request.urlopen(self.url + "/system_stats", timeout=5) as reply:
                    self.stats = json.load(reply)
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise ServerFailed(f"ComfyUI was not ready in {self.timeout} s\n{self.log()[-4000:]}")

    # ---- looking --------------------------------------------------------------------------------------------------
    def log(self) -> str:
        """What the server wrote."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def failed_imports(self) -> list[str]:
        """Folders below custom_nodes that ComfyUI reported as IMPORT FAILED."""
        return [line.rsplit("/", 1)[-1].strip() for line in self.log().splitlines() if "(IMPORT FAILED)" in line]

    def version(self) -> str:
        return self.stats["system"]["comfyui_version"]

    # ---- stopping -------------------------------------------------------------------------------------------------
    def stop(self) -> None:
        """As Ctrl-C does, so that buffered output reaches the log; then harder. Only this one process is ended."""
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            if self.process is None or self.process.poll() is not None:
                return
            self.process.send_signal(sign)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                continue

    def __enter__(self) -> ComfyServer:
        return self.start()

    def __exit__(self, *exc) -> None:
        self.stop()
        if exc[0] is None and self.given_base is None:
            shutil.rmtree(self.base, ignore_errors=True)  # kept after a failure, for its log
