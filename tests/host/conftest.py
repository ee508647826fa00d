"""A real ComfyUI with this pack, tiny models and the probe pack; one server for all tests of this folder."""
from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from diffsynth_backend.core.loader.registry_file import REGISTRY_VARIABLE
from tests.helpers.models_folder import VAE, fill_models_folder, fill_wan_folder
from tests.host.comfy_server import PROBES, ComfyServer, why_not

if TYPE_CHECKING:
    from tests.host.comfy_client import ComfyClient

WHY_NOT = why_not()
collect_ignore_glob = ["test_*.py"] if WHY_NOT else []
ROOT = Path(__file__).parents[2]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WHY_NOT:
        terminalreporter.write_line(f"tests/host not run: {WHY_NOT}")


@pytest.fixture(scope="session")
def server(tmp_path_factory, tiny_files) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("comfyui")
    fill_models_folder(base / "models", tiny_files)
    registry = fill_wan_folder(base / "models", tmp_path_factory.mktemp("wan"))
    elsewhere = base / "elsewhere"
    (elsewhere / "vae").mkdir(parents=True)
    shutil.copy(base / "models" / VAE, elsewhere / "vae/far_vae.safetensors")
    paths = base / "extra_model_paths.yaml"
    paths.write_text(f"more:\n  base_path: {elsewhere}\n  vae: vae\n  diffsynth: hub\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(REGISTRY_VARIABLE, str(registry))
        with ComfyServer({"diffsynth_backend": ROOT, "probe_pack": PROBES}, base,
                         ["--extra-model-paths-config", str(paths)]) as running:
            yield running


@pytest.fixture
def client(server) -> Iterator[ComfyClient]:
    from tests.host.comfy_client import ComfyClient

    with ComfyClient(server.url) as connected:
        yield connected


@pytest.fixture
def probe(client) -> Callable[..., Any]:
    """Run a probe node; gives what it says."""
    from tests.host.comfy_client import run_probe

    return partial(run_probe, client)
