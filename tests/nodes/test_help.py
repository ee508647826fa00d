"""The nodes' help pages: one in each language, alike in build, naming every input and output as the page does."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.pack import ROOT
from tests.nodes.test_locales import words_of
from tests.nodes.test_schemas import NODE_NAMES, every_input

DOCS = ROOT / "web/docs"
PARTS = {"en": ("Inputs", "Outputs", "Example", "Good to know"), "zh": ("输入", "输出", "示例", "须知")}
BESIDES = {"en": ("Who decides",), "zh": ("由谁决定",)}  # parts that some page has, before the last
CODE = re.compile(r"`([^`\n]+)`")
BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
WORDS = {language: json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
         for language in PARTS}


class Page:
    """A help page, taken apart: its title, what stands before the first heading, and its parts by heading."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        first, *parts = re.split(r"^## ", self.text, flags=re.MULTILINE)
        title, _, self.purpose = first.partition("\n")
        self.title = title.removeprefix("# ")
        self.parts = {heading: body.strip() for heading, _, body in (part.partition("\n") for part in parts)}
        self.inputs, self.outputs, self.example, *_, self.to_know = self.parts.values()


def page(name: str, language: str) -> Page:
    return Page(DOCS / f"DiffSynthBackend_{name}" / f"{language}.md")


def words(name: str, language: str) -> dict:
    return WORDS[language][f"DiffSynthBackend_{name}"]


def bullets(text: str) -> list[int]:
    """How deep each item of the lists lies."""
    return [len(line) - len(line.lstrip()) for line in text.splitlines() if line.lstrip().startswith("- ")]


def test_every_node_has_its_pages_and_there_are_no_others():
    found = {(path.parent.name, path.stem) for path in DOCS.rglob("*") if path.is_file()}
    assert found == {(f"DiffSynthBackend_{name}", language) for name in NODE_NAMES for language in PARTS}


@pytest.mark.parametrize("language", PARTS)
@pytest.mark.parametrize("name", NODE_NAMES)
def test_pages_are_built_alike(name, language):
    it = page(name, language)
    assert f"{it.title} (DiffSynth)" == words(name, language)["display_name"]
    assert tuple(part for part in it.parts if part not in BESIDES[language]) == PARTS[language]
    assert list(it.parts)[-1] == PARTS[language][-1]
    assert all(it.parts.values()) and len(it.purpose.strip()) > 10
    assert it.example.startswith("```\n")
    assert bullets(it.to_know), "what there is to know is a list"


@pytest.mark.parametrize("name", NODE_NAMES)
def test_every_input_and_output_is_named(nodes, name):
    schema = nodes[name].define_schema()
    for language in PARTS:
        it, known = page(name, language), words(name, language)
        inputs = set(CODE.findall(it.inputs))
        assert {entry.id for entry in every_input(schema.inputs)} <= inputs
        assert set(BOLD.findall(it.outputs)) == {output["name"] for output in known["outputs"].values()}


@pytest.mark.parametrize("name", NODE_NAMES)
def test_chinese_gives_each_input_the_name_that_the_page_shows(nodes, name):
    text = page(name, "zh").inputs
    for key, entry in words_of(nodes[name].define_schema())["inputs"].items():
        if f"`{entry['name']}`" in text:
            assert words(name, "zh")["inputs"][key]["name"] in text, key


@pytest.mark.parametrize("name", NODE_NAMES)
def test_the_languages_say_the_same(name):
    """As far as that can be seen: literal words, choices, numbers, and the lists' shapes agree."""
    english, chinese = page(name, "en"), page(name, "zh")
    assert set(CODE.findall(english.text)) == set(CODE.findall(chinese.text))
    assert set(BOLD.findall(english.inputs)) == set(BOLD.findall(chinese.inputs))
    assert len(english.parts) == len(chinese.parts)
    for heading, *parts in zip(english.parts, english.parts.values(), chinese.parts.values()):
        assert bullets(parts[0]) == bullets(parts[1]), heading
    numbers = [sorted(re.findall(r"\d+(?:\.\d+)?", re.sub(r"```.*?```", "", it.text, flags=re.DOTALL)))
               for it in (english, chinese)]
    assert not set(numbers[0]) - set(numbers[1]), "numbers that the translation lacks"


def explained_options(schema) -> list[str]:
    """The options that a page has to speak of: those that open inputs, and those whose names say little."""
    found = []
    for entry in schema.inputs:
        if entry.id in ("preset", "variant"):
            found += entry.options["options"]
        else:  # a number, a known model and "off" speak for themselves
            found += [option for option, inputs in entry.options.get("choices", {}).items()
                      if not option.isdigit() and (inputs or entry.id == "vram_limit")]
    return found


@pytest.mark.parametrize("name", NODE_NAMES)
def test_options_are_explained(nodes, name):
    for option in explained_options(nodes[name].define_schema()):
        for language in PARTS:
            assert f"*{option}*" in page(name, language).inputs, f"{option} in {language}"


def test_the_names_in_the_chinese_help_are_those_of_the_nodes():
    """A node of ours that a page speaks of in quotation marks exists under that name."""
    ours = {entry["display_name"].removesuffix(" (DiffSynth)") for entry in WORDS["zh"].values()}
    native = {"K采样器", "加载图像", "保存图像", "加载ControlNet模型", "一个红苹果", "一个绿瓶子", "下载"}
    for name in NODE_NAMES:
        quoted = set(re.findall(r"“([^”]+)”", page(name, "zh").text))
        assert quoted <= ours | native, f"{name}: {sorted(quoted - ours - native)}"
