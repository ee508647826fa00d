"""The pack, loaded without ComfyUI, over a folder with tiny models."""
from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest

from tests.helpers.fake_host import FakeHost
from tests.helpers.models_folder import FILES, fill_models_folder
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


@pytest.fixture(scope="module")
def run(nodes):
    """Execute a node by its short name; gives its first output, or all that it returned."""
    def execute(name: str, node_id: str = "1", whole: bool = False, **inputs):
        cls = type(name, (nodes[name],), {"hidden": SimpleNamespace(unique_id=node_id)})
        output = cls.execute(**inputs)
        return output if whole else output.args[0]
    return execute


@pytest.fixture(scope="module")
def load(run):
    """Load files with a Model Loader."""
    def make(*names: str, node_id: str = "1", **inputs):
        configs = {f"config{i}": run("ModelConfig", model=name) for i, name in enumerate(names)}
        return run("ModelLoader", node_id=node_id, dtype="automatic",
                   model={"model": "model configs", "family": "qwen-image", "configs": configs}, **inputs)
    return make


@pytest.fixture(scope="module")
def pipeline(load):
    return load(*FILES)


@pytest.fixture(scope="module")
def conditioning(run, pipeline):
    return run("PromptEncode", pipeline=pipeline, positive="a red circle", negative="")
