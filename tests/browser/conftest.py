"""A real ComfyUI with this pack and tiny models, and its page in a browser; one server for all tests of this folder."""
from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import http_hub
from tests.helpers.http_hub import HubServer
from tests.helpers.models_folder import LORA, fill_models_folder
from tests.host.comfy_server import PROBES, ComfyServer, why_not

if TYPE_CHECKING:
    from tests.browser.page import Frontend

ROOT = Path(__file__).parents[2]


def why_no_page() -> str | None:
    """Why the page cannot be tested here, None if it can."""
    if importlib.util.find_spec("playwright") is None:
        return "no playwright: pip install playwright"
    if not (os.environ.get("CHROMIUM") or shutil.which("chromium")):
        return "no browser: set CHROMIUM, or install chromium"
    return why_not()


WHY_NOT = why_no_page()
collect_ignore_glob = ["test_*.py"] if WHY_NOT else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WHY_NOT:
        terminalreporter.write_line(f"tests/browser not run: {WHY_NOT}")


@pytest.fixture(scope="session")
def hub() -> Iterator[HubServer]:
    """A model hub on this machine, with one LoRA; the server downloads from nowhere else."""
    with http_hub.serve("DiffSynth-Studio/Qwen-Image-EliGen", {}) as running:
        yield running


@pytest.fixture(scope="session")
def server(tmp_path_factory, tiny_files, hub) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("comfyui")
    fill_models_folder(base / "models", tiny_files)
    hub.files["model.safetensors"] = (base / "models" / LORA).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        patch.setenv("MODELSCOPE_HOME", str(base / "home"))
        with ComfyServer({"diffsynth_backend": ROOT, "probe_pack": PROBES}, base=base) as running:
            yield running


@pytest.fixture(scope="session")
def ui(server) -> Iterator[Frontend]:
    from tests.browser.page import Frontend

    with Frontend(server.url) as page:
        yield page


@pytest.fixture
def probe(server) -> Iterator[Callable[..., Any]]:
    """Run a node of the probe pack; gives what it says."""
    from tests.host.comfy_client import ComfyClient, run_probe

    with ComfyClient(server.url) as client:
        yield partial(run_probe, client)


@pytest.fixture(scope="session")
def shots(tmp_path_factory) -> Path:
    """Where screenshots go: SCREENSHOTS, if somebody wants to look at them."""
    named = os.environ.get("SCREENSHOTS")
    return Path(named) if named else tmp_path_factory.mktemp("screenshots")
