"""The pack, loaded without ComfyUI, over a folder with tiny models."""
from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.helpers.fake_host import FakeHost
from tests.helpers.models_folder import fill_models_folder
from tests.helpers.pack import load_pack, submodule


@pytest.fixture(scope="session")
def host(tmp_path_factory, tiny_files) -> FakeHost:
    return FakeHost(fill_models_folder(tmp_path_factory.mktemp("models"), tiny_files))


@pytest.fixture(scope="session")
def pack(host) -> Iterator[ModuleType]:
    yield load_pack(host)
    submodule("diffsynth_backend.pipelines.owner").owner.free_all()


@pytest.fixture(scope="session")
def nodes(pack) -> dict[str, type]:
    """Node classes by their id without the prefix."""
    return {node.define_schema().node_id.removeprefix("DiffSynthBackend_"): node for node in submodule("nodes").NODES}
