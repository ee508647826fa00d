"""The nodes' words in both languages: locales/en follows the schemas, and locales/zh has all that locales/en has.

After a change to a schema: UPDATE_LOCALES=1 pytest tests/nodes/test_locales.py writes locales/en. What locales/zh then
lacks is named by the tests here.

Notable: the page looks an input up by its whole name with "_" for ".": one inside a choice is `schedule_steps`, the
sockets of one that grows are `images_image0`, `images_image1` … It knows no translations of a choice's options.
"""
from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.pack import ROOT

LOCALES = ROOT / "locales"
CHINESE = re.compile(r"[\u4e00-\u9fff]")
SYNTAX = re.compile(r"[{}@|]")  # parameters, links and plurals, to the page
SAME_IN_BOTH = {"Latent", "LoRA", "GiB", "cfg", "mu", "Sigmas"}
Words = dict[str, Any]


def named_inputs(inputs, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """The key under which the page looks each input up, its name in English, and the input."""
    for entry in inputs:
        key = prefix + entry.id
        yield key, entry.options.get("display_name", entry.id), entry
        for nested in entry.options.get("choices", {}).values():
            yield from named_inputs(nested, f"{key}_")
        if "template" in entry.options:
            template = entry.options["template"]
            for name in (f"{template.prefix}{i}" for i in range(template.max)):
                yield f"{key}_{name}", name, template.input


def words_of(schema) -> Words:
    """A node's entry in nodeDefs.json, in the words of its schema."""
    inputs: dict[str, Words] = {}
    for key, name, entry in named_inputs(schema.inputs):
        words = {"name": name, "tooltip": entry.options["tooltip"]}
        assert inputs.setdefault(key, words) == words, f"{schema.node_id}: two inputs are {key}, with different words"
    outputs = {str(i): {"name": output.options["display_name"], "tooltip": output.options["tooltip"]}
               for i, output in enumerate(schema.outputs)}
    return {"display_name": schema.display_name, "description": schema.description, "inputs": inputs,
            "outputs": outputs}


def read(path: Path) -> Words:
    return json.loads(path.read_text(encoding="utf-8"))


def flat(words: Words, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text with the keys that lead to it."""
    for key, value in words.items():
        if isinstance(value, dict):
            yield from flat(value, (*path, key))
        else:
            yield (*path, key), value


@pytest.fixture(scope="module")
def schemas(nodes) -> Words:
    return {schema.node_id: words_of(schema) for schema in (node.define_schema() for node in nodes.values())}


def test_english_is_what_the_schemas_say(schemas):
    path = LOCALES / "en/nodeDefs.json"
    if os.environ.get("UPDATE_LOCALES"):
        path.write_text(json.dumps(schemas, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    saved = dict(flat(read(path)))
    differing = {key for key, _ in saved.items() ^ dict(flat(schemas)).items()}
    assert not differing, f"{sorted(map('.'.join, differing))} differ from the schemas. {__doc__}"


@pytest.mark.parametrize("language", sorted(path.name for path in LOCALES.iterdir()))
def test_each_language_has_every_word_and_no_other(language):
    known = {path.name for path in (LOCALES / "en").iterdir()}
    assert {path.name for path in (LOCALES / language).iterdir()} == known
    for name in known:
        english, translated = (dict(flat(read(LOCALES / code / name))) for code in ("en", language))
        missing, unknown = english.keys() - translated.keys(), translated.keys() - english.keys()
        assert not missing, f"locales/{language}/{name} lacks {sorted(map('.'.join, missing))}"
        assert not unknown, f"locales/{language}/{name} has {sorted(map('.'.join, unknown))}, which nothing has"
        assert all(text.strip() == text != "" for text in translated.values())


def test_the_settings_of_the_page_are_known():
    """The words of settings stand in the page's scripts: locales/en has the same ones."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "web").rglob("*.js")))
    source = re.sub(r'"\s*\+\s*"', "", source)  # texts of several lines
    declared = re.findall(r'\{ id: "([\w.]+)", category: \[([^\]]*)\], name: "([^"]*)".*?tooltip:\s*"([^"]*)"', source,
                          re.DOTALL)
    saved, main = read(LOCALES / "en/settings.json"), read(LOCALES / "en/main.json")
    assert {key.replace(".", "_"): (name, tooltip) for key, _, name, tooltip in declared} == {
        key: (entry["name"], entry["tooltip"]) for key, entry in saved.items()}
    categories = {word for _, path, *_ in declared for word in re.findall(r'"(.*?)"', path)}
    assert main == {"settingsCategories": {word: word for word in categories}}
    for key, entry in saved.items():
        options = re.search(rf'id: "{key.replace("_", ".", 1)}".*?options: \[(.*?)\],\n', source, re.DOTALL)[1]
        texts = re.findall(r'text: "([^"]*)"', options) or re.findall(r'"([^"]*)"', options)
        assert entry["options"] == {text: text for text in texts}


def test_chinese_is_chinese():
    for name in ("nodeDefs.json", "settings.json", "main.json"):
        english = dict(flat(read(LOCALES / "en" / name)))
        for key, text in flat(read(LOCALES / "zh" / name)):
            where, word = ".".join(key), re.sub(r"\d+$", "", text).strip()
            same = (key[-1] == "name" and word in SAME_IN_BOTH) or "options" in key or word == "DiffSynth"
            assert CHINESE.search(text) or same, f"{where}: {text!r}"
            assert english[key] != text or same, f"{where} is not translated"


def test_chinese_names_the_same_files_models_and_choices():
    """What is literal (names of files, folders, options, models) stands in a translation as it is."""
    english = dict(flat(read(LOCALES / "en/nodeDefs.json")))
    literal = re.compile(r"\b(?:models/\S+?diffsynth|diffusion_models|text_encoders|safetensors|automatic|lightning|"
                         r"qwen-image-i2l-style|Qwen-Image-[\w-]+|FireRed-Image-Edit|Edit-25\d\d|EliGen|diffusers|"
                         r"bfloat16|float32|\d+\.\d+)(?!\w)", re.ASCII)
    for key, text in flat(read(LOCALES / "zh/nodeDefs.json")):
        lacking = set(literal.findall(english[key])) - set(literal.findall(text))
        assert not lacking, f"{'.'.join(key)} does not mention {sorted(lacking)}"


@pytest.mark.parametrize(("typed", "name"), [
    ("qwen", "ModelLoader"), ("low vram", "VramConfig"), ("offload", "VramConfig"), ("edit", "EditImages"),
    ("ksampler", "Denoise"), ("img2img", "Denoise"), ("显存", "VramConfig"), ("卸载", "VramConfig"),
    ("换装", "EditImages"), ("采样器", "Denoise"), ("提示词", "PromptEncode"),
    ("图生图", "Denoise"), ("重绘", "Inpaint"), ("图层", "Layers")])
def test_what_people_type_is_an_alias(nodes, typed, name):
    assert typed in nodes[name].define_schema().search_aliases


def test_aliases_are_in_both_languages_and_each_once(nodes):
    for name, node in nodes.items():
        aliases = node.define_schema().search_aliases
        assert len(set(aliases)) == len(aliases) and {bool(CHINESE.search(alias)) for alias in aliases} == {
            True, False}, name


@pytest.mark.parametrize("language", sorted(path.name for path in LOCALES.iterdir()))
def test_nothing_is_taken_for_syntax(language):
    """The page reads names and descriptions as messages, with parameters and plurals; tooltips are raw."""
    for key, text in flat(read(LOCALES / language / "nodeDefs.json")):
        assert key[-1] == "tooltip" or not SYNTAX.search(text), f"{'.'.join(key)}: {text!r}"
