"""The design's arrows and house rules, read from the source: who imports whom, and what stays in one place.

nodes → pipelines → diffusion, models → core; imports inside functions and for type checking count too.
"""
from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from diffsynth_backend.pipelines.families import FAMILIES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffsynth_backend"
HOST_MODULES = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "server"}

# What each part of the package may import from the others.
ALLOWED = {
    "core": set(),
    "configs": {"core"},
    "utils": {"core"},
    "models": {"core", "configs", "utils"},
    "diffusion": {"core", "models", "utils"},
    "pipelines": {"core", "configs", "models", "diffusion", "utils"},
    "demo": {"core", "configs", "models", "diffusion", "pipelines", "utils"},
    "__main__": {"core", "configs", "models", "diffusion", "pipelines", "utils"},
    "__init__": {"core", "configs", "models", "diffusion", "pipelines", "utils"},
}


class Import(NamedTuple):
    """What a file imports, as a full dotted name, and where. `local`: inside a function."""

    file: Path
    line: int
    name: str
    local: bool
    relative: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.name}"


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


@cache
def imports(file: Path) -> tuple[Import, ...]:
    return tuple(_imports(file))


def _imports(file: Path) -> Iterator[Import]:
    tree = parse(file)
    local = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
             for node in ast.walk(function)}
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[:len(package) - node.level + 1], *([node.module] if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        yield from (Import(file, node.lineno, name, id(node) in local, relative) for name in names)


def package_imports() -> list[Import]:
    return [found for file in files(PACKAGE) for found in imports(file)]


def pack_imports() -> list[Import]:
    """Of the package and of what surrounds it in ComfyUI."""
    around = [ROOT / "__init__.py", *files(ROOT / "nodes")]
    return package_imports() + [found for file in around if file.exists() for found in imports(file)]


def part_of(file: Path) -> str:
    """"core", "models" … of a file of the package."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def inside(found: Import, *names: str) -> bool:
    return any(f"{found.name}.".startswith(f"{name}.") for name in names)


def listed(found: list) -> str:
    return "\n".join(map(str, found))


# ---- arrows ---------------------------------------------------------------------------------------------------------

def test_every_part_of_the_package_has_a_rule():
    assert {part_of(file) for file in files(PACKAGE)} <= set(ALLOWED)


@pytest.mark.parametrize("part", ALLOWED)
def test_arrows_point_down(part):
    allowed = [f"diffsynth_backend.{name}" for name in (*ALLOWED[part], part)]
    wrong = [found for found in package_imports()
             if part_of(found.file) == part and inside(found, "diffsynth_backend") and not inside(found, *allowed)]
    assert not wrong, listed(wrong)


def test_the_package_does_not_know_the_nodes():
    wrong = [found for found in package_imports() if inside(found, "nodes")]
    assert not wrong, listed(wrong)


def test_model_files_import_torch_general_modules_and_attention():
    # The pool is the one file of the folder that is no architecture.
    allowed = ("torch", "diffsynth_backend.models.general_modules", "diffsynth_backend.core.attention")
    wrong = [found for file in files(PACKAGE / "models") if file.name != "model_loader.py" for found in imports(file)
             if found.name.partition(".")[0] not in sys.stdlib_module_names and not inside(found, *allowed)
             and not (found.local and inside(found, "transformers"))]
    assert not wrong, listed(wrong)


def test_heavy_libraries_are_imported_when_they_are_needed():
    heavy = ("transformers", "modelscope", "modelscope_hub", "huggingface_hub", "diffusers", "tokenizers",
             "requests")
    wrong = [found for found in pack_imports() if inside(found, *heavy) and not found.local
             and not is_for_type_checking(found)]
    assert not wrong, listed(wrong)


def is_for_type_checking(found: Import) -> bool:
    blocks = [node for node in ast.walk(parse(found.file)) if isinstance(node, ast.If)
              and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"]
    return any(block.lineno <= found.line <= block.end_lineno for block in blocks)


def test_what_all_families_share_knows_none():
    """A new family is new files and an entry in `families` and `presets`; classes are named there, not imported."""
    begins = {family.pipeline.split(".")[1].partition("_")[0] for family in FAMILIES.values()}  # "qwen", "wan"

    def is_of_a_family(module: str) -> bool:
        return any(part.partition("_")[0] in begins for part in module.split("."))

    shared = [file for part in ("core", "configs", "utils", "diffusion", "pipelines") for file in files(PACKAGE / part)
              if not is_of_a_family(file.stem)]
    wrong = [found for file in shared for found in imports(file)
             if inside(found, "diffsynth_backend") and is_of_a_family(found.name)]
    assert len(shared) > 50 and not wrong, listed(wrong)


def test_configs_are_data():
    allowed = ("diffsynth_backend.configs", "diffsynth_backend.core.lookup", "diffsynth_backend.core.vram.layers")
    wrong = [found for file in files(PACKAGE / "configs") for found in imports(file)
             if found.name.partition(".")[0] not in sys.stdlib_module_names and not inside(found, *allowed)]
    assert not wrong, listed(wrong)


# ---- one place for each thing ---------------------------------------------------------------------------------------

def test_only_the_host_file_imports_comfyui():
    host = ROOT / "nodes" / "host.py"
    # The node API itself is what nodes are declared with.
    wrong = [found for found in pack_imports() if found.file != host and inside(found, *HOST_MODULES)
             and not (PACKAGE not in found.file.parents and inside(found, "comfy_api"))]
    assert not wrong, listed(wrong)


def test_imports_within_the_package_are_relative():
    wrong = [found for found in pack_imports() if inside(found, "diffsynth_backend") and not found.relative]
    assert not wrong, listed(wrong)


def test_the_existing_implementation_is_no_dependency():
    wrong = [found for found in pack_imports() if inside(found, "diffsynth")]
    assert not wrong, listed(wrong)


def test_only_platform_uses_what_systems_lack():
    names = {"pread", "preadv", "posix_fadvise", "posix_memalign", "sched_setaffinity", "sched_getaffinity"}
    platform = PACKAGE / "core" / "platform.py"
    modules = ("resource", "fcntl", "msvcrt")
    wrong = [found for found in pack_imports() if found.file != platform and inside(found, *modules)]
    uses = [f"{file.relative_to(ROOT)}:{node.lineno} uses os.{node.attr}" for file in files(PACKAGE) if file != platform
            for node in ast.walk(parse(file)) if isinstance(node, ast.Attribute) and node.attr in names]
    assert not wrong and not uses, listed([*wrong, *uses])


# Where a path is not pathlib's: for each file what it uses, and why.
STRING_PATHS = {
    "diffsynth_backend/core/loader/containment.py": (
        {"os.path.realpath", "os.path.commonpath", "os.path.normcase", "os.path.normpath", "os.path.lexists"},
        "what is contained is decided by what the system resolves, and pathlib has no commonpath"),
    "diffsynth_backend/core/loader/pickle_layout.py": ({"+ '/'"}, "names inside an archive, on every system with '/'"),
}


def string_paths(file: Path) -> Iterator[tuple[int, str]]:
    """Where a file handles paths as strings: functions of `os` and `glob` for that, separators, and joins with them.
    A slash in a formatted name ("qwen-image/vae", an address) is no path."""
    old = {"os.sep", "os.altsep", "os.listdir", "os.walk", "os.scandir", "os.getcwd", "glob.glob", "glob.iglob"}
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name in old or name.rpartition(".")[0] == "os.path":
                yield node.lineno, name
            elif node.attr == "join" and _is_separator(node.value):
                yield node.lineno, f"{ast.unparse(node.value)}.join"
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            yield from ((node.lineno, f"+ {ast.unparse(part)}") for part in (node.left, node.right)
                        if _is_separator(part))
        elif isinstance(node, ast.ImportFrom) and node.module in ("os.path", "posixpath", "ntpath", "glob"):
            yield node.lineno, f"from {node.module}"


def _is_separator(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in ("/", "\\")


def test_paths_are_those_of_pathlib():
    wrong = [f"{file.relative_to(ROOT)}:{line} uses {name}" for file in [*files(PACKAGE), *files(ROOT / "nodes")]
             for line, name in sorted(string_paths(file))
             if name not in STRING_PATHS.get(file.relative_to(ROOT).as_posix(), ((), ""))[0]]
    assert not wrong, listed(wrong)


@pytest.mark.parametrize("source", ["os.path.join(a, b)", "from os.path import join", "glob.glob(a)", "os.listdir(a)",
                                    "os.walk(a)", "'/'.join(a)", "a + '/' + b", "a.split(os.sep)"])
def test_a_path_that_is_a_string_is_seen(source, tmp_path):
    (tmp_path / "a.py").write_text(source)
    assert list(string_paths(tmp_path / "a.py"))


@pytest.mark.parametrize("name", ["print", "eval", "exec"])
def test_nobody_calls(name):
    calls = [f"{file.relative_to(ROOT)}:{node.lineno}" for file in [*files(PACKAGE), *files(ROOT / "nodes")]
             for node in ast.walk(parse(file))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name]
    assert not calls, listed(calls)


def test_every_file_opens_with_a_docstring():
    without = [file.relative_to(ROOT) for file in files(PACKAGE) if file.read_text(encoding="utf-8").strip()
               and not ast.get_docstring(parse(file))]
    assert not without, listed(without)
