"""What the source may not say, read from it: nothing runs text, and files and sockets are opened in few places.

Every call that opens, lists, writes or removes is in ALLOWED with the reason why its path may be trusted. A path that
comes from outside (a node, a workflow, a model id, a pattern, an index, an archive) is opened through
`core.loader.containment`, or by what calls one of its checks first; a new place is a new line here, and a decision.
"""
from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "diffsynth_backend"
DEMO = PACKAGE / "demo"  # makes the demo model, is run by its developers, and is imported by nothing else
SOURCES = [path for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "nodes").glob("*.py"), ROOT / "__init__.py"])
           if "__pycache__" not in path.parts]

NO_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "subprocess", "pty", "code",
              "codeop", "runpy", "pip", "ensurepip", "xmlrpc", "telnetlib", "ftplib", "smtplib", "cffi"}
NO_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.startfile", "os.fork",
            "torch.hub.load",
            "numpy.load", "np.load", "yaml.load", "importlib.util.spec_from_file_location", "torch.jit.load",
            "torch.package.PackageImporter", "os.putenv", "tempfile.mktemp"}
NO_CALL_PREFIXES = ("os.exec", "os.spawn", "os.posix_spawn", "torch.hub.", "torch.utils.cpp_extension.")
NETWORK = {"socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "websockets",
           "huggingface_hub",
           "modelscope"}
NETWORK_FILES = {"core/loader/containment.py", "core/loader/download_file.py", "core/loader/download_hubs.py"}

ANSWERS = {("host.py", "aiohttp.web")}  # the pack's route on ComfyUI's server: it answers, and asks nobody

# Calls that open, list, make, change or remove: by full name, and methods of paths by their last part.
FILE_CALLS = {
    "open", "io.open", "io.FileIO", "os.open", "os.fdopen", "os.listdir", "os.scandir", "os.walk", "os.remove",
    "os.unlink",
    "os.rename", "os.replace", "os.mkdir", "os.makedirs", "os.rmdir", "os.removedirs", "os.truncate", "os.symlink",
    "os.link",
    "os.chmod", "glob.glob", "glob.iglob", "mmap.mmap", "zipfile.ZipFile", "tarfile.open", "torch.load", "torch.save",
    "safe_open", "load_file", "save_file", "Image.open", "PIL.Image.open", "shutil.copy", "shutil.copyfile",
    "shutil.copytree",
    "shutil.move", "shutil.rmtree", "shutil.unpack_archive", "requests.get", "requests.head", "requests.post",
}
FILE_METHODS = {"read_text", "read_bytes", "write_text", "write_bytes", "iterdir", "rglob", "glob", "unlink", "touch",
                "rmdir", "symlink_to", "hardlink_to", "mkdir", "extract", "extractall"}
ALLOWED = {
    "__main__.py": ({"Image.open", "mkdir"}, "paths that the user of the command line types"),
    "core/platform.py": ({"open", "unlink", "os.open"}, "model files after check_model_files, and our own locks"),
    "core/loader/containment.py": ({"open", "iterdir"}, "the place for it"),
    "core/loader/convert.py": ({"open", "os.replace", "unlink"},
                               "the output that the user of the command line types"),
    "core/loader/download_file.py": ({"open", "iterdir", "os.replace", "mkdir", "unlink", "requests.get"},
                                     "below a folder that check_inside has let pass"),
    "core/loader/file.py": ({"mmap.mmap"}, "of a file that open_regular opened"),
    "core/loader/pickle_layout.py": ({"zipfile.ZipFile"}, "of a file that open_regular opened; nothing is unpacked"),
    "core/loader/pickles.py": ({"torch.load"}, "after check_regular, with weights_only"),
    "pipelines/known_files.py": ({"rglob"}, "below a folder of models, for sizes to offer; nothing is opened"),
    "pipelines/locate.py": ({"iterdir", "glob"}, "the folder of a file that was checked, and our own"),
    "pipelines/tokenizer_files.py": ({"read_text"}, "beside a checked file, and in the host's folders of models"),
    "pipelines/qwen_image_prompts.py": ({"read_text"}, "the tokenizer's folder, which find_tokenizer found"),
    "pipelines/wan_prompts.py": ({"read_text"}, "the tokenizer's folder, which find_tokenizer found"),
    "pipelines/qwen_image_steps.py": ({"save_file"}, "an output path that the host's output_file has checked"),
    "nodes/host.py": ({"read_text"}, "ComfyUI's own file of settings"),
    "utils/lora/files.py": ({"safe_open"}, "after check_model_files and a checked header"),
}


@cache
def calls(path: Path) -> tuple[tuple[int, str, ast.Call], ...]:
    """Every call: its line and the dotted name that is called, "?.name" for a method of something else."""
    return tuple(_calls(path))


def _calls(path: Path) -> Iterator[tuple[int, str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield node.lineno, _dotted(node.func), node


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return "?"


def imported(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def where(path: Path, line: int, what: str) -> str:
    return f"{path.relative_to(ROOT)}:{line} {what}"


def test_nothing_runs_text_or_programs():
    wrong = [where(path, line, name) for path in SOURCES for line, name, _ in calls(path)
             if name in NO_CALLS or name.startswith(NO_CALL_PREFIXES)]
    wrong += [where(path, line, name) for path in SOURCES for line, name in imported(path)
              if name.partition(".")[0] in NO_MODULES]
    assert not wrong, "\n".join(wrong)


def test_code_is_imported_by_name_where_names_are_ours():
    """Names of the registry, whose rows from files may not bring any (`registry_file`), and of attention kernels."""
    found = {path.relative_to(PACKAGE).as_posix() for path in SOURCES for _, name, _ in calls(path)
             if name.endswith("import_module")}
    assert found <= {"core/lookup.py", "core/attention/kernels.py"}


def test_no_remote_code_and_no_pickles_with_code():
    wrong = [where(path, call.lineno, keyword.arg) for path in SOURCES for _, name, call in calls(path)
             for keyword in call.keywords
             if keyword.arg in ("trust_remote_code", "use_auth_token", "allow_pickle", "shell")
             or (keyword.arg == "weights_only" and not _is_true(keyword.value))]
    wrong += [where(path, line, "torch.load without weights_only=True") for path in SOURCES
              for line, name, call in calls(path)
              if name == "torch.load" and not any(keyword.arg == "weights_only" for keyword in call.keywords)]
    assert not wrong, "\n".join(wrong)


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def test_only_the_downloader_knows_the_network():
    wrong = [where(path, line, name) for path in SOURCES for line, name in imported(path)
             if name.partition(".")[0] in NETWORK and (path.name, name) not in ANSWERS
             and not (PACKAGE in path.parents and path.relative_to(PACKAGE).as_posix() in NETWORK_FILES)]
    assert not wrong, "\n".join(wrong)


def file_calls(path: Path) -> Iterator[tuple[int, str]]:
    for line, name, _ in calls(path):
        last = name.rpartition(".")[2]
        if name in FILE_CALLS:
            yield line, name
        elif "." in name and last in FILE_METHODS and name.partition(".")[0] not in ("os", "shutil", "glob", "re"):
            yield line, last


def test_files_are_opened_in_few_places():
    wrong = []
    for path in SOURCES:
        if DEMO not in path.parents:
            key = path.relative_to(PACKAGE).as_posix() if PACKAGE in path.parents else path.relative_to(ROOT).as_posix()
            allowed, _ = ALLOWED.get(key, (set(), ""))
            wrong += [where(path, line, name) for line, name in file_calls(path) if name not in allowed]
    assert not wrong, "\n".join(wrong)


def test_the_nodes_open_nothing():
    wrong = [where(path, line, name) for path in (ROOT / "nodes").glob("*.py") if path.name != "host.py"
             for line, name in file_calls(path)]
    assert not wrong, "\n".join(wrong)


def test_the_demo_is_imported_by_nothing_else():
    wrong = [where(path, node.lineno, node.module) for path in SOURCES if DEMO not in path.parents
             for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom)
             and "demo" in (node.module or "").split(".") and "train" in (node.module or "")]
    assert not wrong, "\n".join(wrong)


def test_the_page_runs_no_text_and_calls_nobody():
    scripts = [*(ROOT / "web").rglob("*.js")]
    wrong = [f"{path.relative_to(ROOT)}: {word}" for path in scripts for word in (
        "eval(", "new Function", "innerHTML", "outerHTML", "document.write", "http://", "https://", "importScripts")
             if word in path.read_text(encoding="utf-8")]
    assert scripts and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", [
    "eval('1')", "import pickle", "import subprocess as s", "torch.load(p)", "torch.load(p, weights_only=False)",
    "from_pretrained(x, trust_remote_code=True)", "open(p)", "p.read_bytes()", "from requests import get",
    "os.system(x)",
])
def test_these_tests_can_fail(source, tmp_path, monkeypatch):
    path = tmp_path / "bad.py"
    path.write_text(f"import os, torch\n{source}\n")
    monkeypatch.setitem(globals(), "SOURCES", [path])
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    failures = 0
    for test in (test_nothing_runs_text_or_programs, test_no_remote_code_and_no_pickles_with_code,
                 test_only_the_downloader_knows_the_network, test_files_are_opened_in_few_places):
        try:
            test()
        except AssertionError:
            failures += 1
    assert failures
