"""What the nodes declare: ids, help, tooltips, bounds. Read without ComfyUI, through the stand-in."""
from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.pack import ROOT, submodule

NODE_NAMES = ("ModelLoader", "ModelConfig", "VramConfig", "PromptEncode", "EmptyLatent", "Denoise", "VaeDecode",
              "VaeEncode", "EditImages", "Inpaint", "Control", "ControlNetApply", "InContextControl", "Entity",
              "Entities", "Layers", "LoraLoader", "LoraStack", "ImageToLora", "ApplyLora", "DownloadModels",
              "EmptyVideoLatent", "ImageToVideo", "VACE", "VideoControl", "Camera", "VideoOptions")


def every_input(inputs) -> Iterator:
    for entry in inputs:
        yield entry
        for nested in entry.options.get("choices", {}).values():
            yield from every_input(nested)
        if "template" in entry.options:
            yield entry.options["template"].input


def test_these_are_the_nodes(nodes):
    assert tuple(nodes) == NODE_NAMES


@pytest.mark.parametrize("name", NODE_NAMES)
def test_every_node_explains_itself(nodes, name):
    schema = nodes[name].define_schema()
    assert schema.category == "DiffSynth" and schema.display_name.endswith("(DiffSynth)")
    assert len(schema.description) > 40 and "diffsynth" in schema.search_aliases and len(schema.search_aliases) > 2
    for entry in [*every_input(schema.inputs), *schema.outputs]:
        assert entry.options.get("tooltip"), f"{name}: {entry.id or entry.options} has no tooltip"
    assert all(output.options.get("display_name") for output in schema.outputs)


@pytest.mark.parametrize("name", NODE_NAMES)
def test_every_node_has_a_help_page_that_names_its_inputs(nodes, name):
    schema = nodes[name].define_schema()
    page = (ROOT / "web" / "docs" / schema.node_id / "en.md").read_text(encoding="utf-8")
    for entry in every_input(schema.inputs):
        assert f"`{entry.id}`" in page, f"{entry.id} is not explained"


@pytest.mark.parametrize("name", NODE_NAMES)
def test_numbers_have_bounds(nodes, name):
    for entry in every_input(nodes[name].define_schema().inputs):
        if entry.io_type in ("INT", "FLOAT"):
            low, high, default = (entry.options[key] for key in ("min", "max", "default"))
            assert low <= default <= high


@pytest.mark.parametrize("name", NODE_NAMES)
def test_execute_takes_what_is_declared(nodes, name):
    schema = nodes[name].define_schema()
    parameters = inspect.signature(nodes[name].execute).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        assert {entry.id for entry in schema.inputs} == set(parameters)
    else:
        assert set(parameters) - {"fields"} <= {entry.id for entry in schema.inputs}


def test_presets_are_appended(nodes):
    preset = next(entry for entry in nodes["VramConfig"].define_schema().inputs if entry.id == "preset")
    assert preset.options["options"] == ["full", "balanced", "low", "fp8", "disk", "auto", "custom"]


def test_results_below_nodes_are_sent_again_from_the_cache(nodes):
    shown = {name for name, node in nodes.items() if getattr(node.define_schema(), "has_intermediate_output", False)}
    script = (ROOT / "web/js/loader_text.js").read_text(encoding="utf-8")
    assert shown == {"ModelLoader", "Denoise", "LoraLoader", "LoraStack", "ImageToLora", "ApplyLora"}
    assert all(f"DiffSynthBackend_{name}:" in script for name in shown)


@pytest.mark.parametrize("file", ["models", "prompts", "sampling", "vae", "editing", "control", "entities", "layers",
                                  "lora", "downloads", "video"])
def test_node_ids_are_literal_and_bases_direct(file):
    """ComfyUI-Manager reads node ids from the source, by this pattern alone; execute() stays short."""
    tree = ast.parse((ROOT / "nodes" / f"{file}.py").read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for cls in classes:
        assert [ast.unparse(base) for base in cls.bases] == ["io.ComfyNode"]
        ids = [keyword.value for call in ast.walk(cls) if isinstance(call, ast.Call) for keyword in call.keywords
               if keyword.arg == "node_id"]
        assert len(ids) == 1 and isinstance(ids[0], ast.Constant) and ids[0].value.startswith("DiffSynthBackend_")
        execute = next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "execute")
        assert execute.end_lineno - execute.lineno < 30
    assert classes


def test_only_host_imports_comfyui():
    forbidden = ("comfy", "folder_paths", "latent_preview", "server", "execution")
    for path in [*(ROOT / "nodes").glob("*.py"), *(ROOT / "diffsynth_backend").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            used = [name for name in names if name.split(".")[0] in forbidden]
            assert not used or path.name == "host.py", f"{path} imports {used}"


def test_the_stand_in_for_host_has_its_functions(host):
    tree = ast.parse((ROOT / "nodes" / "host.py").read_text(encoding="utf-8"))
    public = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
              if not node.name.startswith("_")}
    assert public == {name for name in vars(type(host)) if not name.startswith("_")}


def test_the_entry_point_hands_out_the_nodes(pack):
    import asyncio

    async def load() -> list:
        extension = await pack.comfy_entrypoint()
        await extension.on_load()
        return await extension.get_node_list()

    with ThreadPoolExecutor(1) as elsewhere:  # this thread may have a loop: the tests of the page leave one running
        assert elsewhere.submit(asyncio.run, load()).result() == submodule("nodes").NODES
    assert (ROOT / pack.WEB_DIRECTORY).is_dir()
