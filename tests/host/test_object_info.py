"""The nodes' interface, frozen: widgets travel by position in saved workflows, so they may only be added at the end.

A change that is meant: UPDATE_OBJECT_INFO=1 pytest tests/host/test_object_info.py, then read the difference.
"""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.helpers.pack import ROOT

FROZEN = Path(__file__).parent / "object_info.json"
FOLDERS = ("diffusion_models/", "text_encoders/", "vae/", "diffsynth/", "loras/")


def reported(client) -> dict[str, Any]:
    """What the server says about our nodes, without what depends on the files that it has."""
    return {name: _without_files(entry) for name, entry in sorted(client.object_info().items())
            if name.startswith("DiffSynthBackend_")}


def _without_files(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_files(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_files(entry) for entry in value
                if not (isinstance(entry, str) and entry.startswith(FOLDERS))]
    return value


def test_the_interface_is_the_frozen_one(client):
    now = reported(client)
    if os.environ.get("UPDATE_OBJECT_INFO"):
        FROZEN.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert now == json.loads(FROZEN.read_text(encoding="utf-8")), __doc__


def declared(entry) -> tuple[str, dict[str, Any]]:
    """What the stand-in recorded about an input, in the server's form."""
    options = {key: value for key, value in entry.options.items() if key not in ("optional", "choices", "template")}
    renamed = {"dynamic_prompts": "dynamicPrompts"}
    if "choices" in entry.options:
        options["options"] = [{"key": key, "inputs": by_need(inputs)}
                              for key, inputs in entry.options["choices"].items()]
    if "template" in entry.options:
        template = entry.options["template"]
        options["template"] = {"input": by_need([template.input]), "prefix": template.prefix, "min": template.min,
                               "max": template.max}
    return entry.io_type, {renamed.get(key, key): value for key, value in options.items()}


def by_need(inputs) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"required": {}}
    for entry in inputs:
        found.setdefault("optional" if entry.optional else "required", {})[entry.id] = list(declared(entry))
    return found


def test_the_stand_in_records_what_the_real_one_reports(client, tmp_path):
    """The node tests without ComfyUI rest on the stand-in: what it records must be what ComfyUI makes of it."""
    from tests.helpers.fake_host import FakeHost
    from tests.helpers.pack import load_pack, submodule

    load_pack(FakeHost(tmp_path), "/another/pack")
    real = reported(client)
    for node in submodule("nodes", "/another/pack").NODES:
        schema = node.define_schema()
        info = real[schema.node_id]
        inputs = {key: value for key, value in info["input"].items() if key != "hidden"}
        assert json.loads(json.dumps(by_need(schema.inputs))) == _without_defaults(inputs)
        assert [output.io_type for output in schema.outputs] == info["output"]
        assert [output.options["tooltip"] for output in schema.outputs] == info["output_tooltips"]
        assert (schema.display_name, schema.category, schema.description, schema.search_aliases) == (
            info["display_name"], info["category"], info["description"], info["search_aliases"])


def _without_defaults(value: Any) -> Any:
    """Without the options that ComfyUI adds by itself."""
    if isinstance(value, dict):
        return {key: _without_defaults(entry) for key, entry in value.items()
                if (key, entry) not in (("multiselect", False), ("multiline", False), ("forceInput", True))}
    return [_without_defaults(entry) for entry in value] if isinstance(value, list) else value


def test_help_pages_and_workflows_are_served(client):
    for name in reported(client):
        for language in ("en", "zh"):
            page = client.request(f"/extensions/diffsynth_backend/docs/{name}/{language}.md").decode()
            assert page == (ROOT / "web/docs" / name / f"{language}.md").read_text(encoding="utf-8")
    templates = client.get("/workflow_templates")["diffsynth_backend"]
    assert sorted(templates) == sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
