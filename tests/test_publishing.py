"""What is published: the archive that the registry packs (files that git tracks, less .comfyignore), and what it names.

`comfy node validate` and `comfy node pack` say the same with the network and their own packages.
"""
from __future__ import annotations

import fnmatch
import io
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_BYTES = 25_000_000
SEMANTIC = re.compile(r"\d+\.\d+\.\d+")
IMAGES = {"Icon": 1.0, "Banner": 21 / 9}  # width to height


def ignored(path: str, rule: str) -> bool:
    """Whether a line of .comfyignore is about a file; of git's rules those in use: /file, /folder/, name, name/."""
    parts, name = path.split("/"), rule.strip("/")
    assert "/" not in name and not rule.startswith("!"), f"{rule}: a rule that this test does not know"
    candidates = parts[:-1] if rule.endswith("/") else parts
    return any(fnmatch.fnmatch(part, name) for part in (candidates[:1] if rule.startswith("/") else candidates))


def tracked_files() -> list[str]:
    return subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True,
                          check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def packed() -> list[str]:
    """The files of the archive, by their path in the repository."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git repository: what is tracked is not known")
    rules = [line.strip() for line in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
             if line.strip() and not line.startswith("#")]
    return [path for path in tracked_files()
            if (ROOT / path).is_file() and not any(ignored(path, rule) for rule in rules)]


@pytest.fixture(scope="module")
def project() -> dict:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path, rule, expected", [
    ("tests/core/test_file.py", "/tests/", True), ("nodes/host.py", "/tests/", False), ("tests", "/tests/", False),
    ("diffsynth_backend/models/qwen_image_dit.py", "models/", True),
    ("diffsynth_backend/models/qwen_image_dit.py", "/models/", False),
    ("a/__pycache__/x.pyc", "__pycache__/", True), ("Makefile", "/Makefile", True),
    ("nodes/Makefile", "/Makefile", False)])
def test_the_rules_are_read_as_git_reads_them(path, rule, expected):
    assert ignored(path, rule) == expected


def test_the_archive_holds_what_the_pack_needs(packed):
    needed = ["__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "nodes/host.py"]
    needed += [path.relative_to(ROOT).as_posix() for folder, kind in (
        ("diffsynth_backend", "*.py"), ("nodes", "*.py"), ("web", "*.js"), ("web/docs", "*.md"), ("locales", "*.json"),
        ("example_workflows", "*.json"), ("subgraphs", "*.json"), ("diffsynth_backend/demo/weights", "*.*"))
        for path in (ROOT / folder).rglob(kind)]
    tracked = set(tracked_files())
    assert len(needed) > 100 and not [path for path in needed if path in tracked and path not in packed]


def test_the_archive_holds_no_tests_and_is_small(packed):
    assert not [path for path in packed if re.search(r"(^|/)(tests?|benchmarks)/|(^|/)test_|\.test\.js$|\.ci/", path)]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in packed:
            file.write(ROOT / path, path)
    assert archive.tell() < MAX_BYTES


def test_the_version_is_semantic_and_in_the_changelog(project):
    version = project["project"]["version"]
    assert SEMANTIC.fullmatch(version)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_registry_gets_what_it_asks_for(project):
    comfy, about = project["tool"]["comfy"], project["project"]
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]+", comfy["PublisherId"]) and comfy["DisplayName"]
    assert len(about["name"]) < 100 and about["description"] and about["urls"]["Repository"].startswith("https://")
    assert (ROOT / about["license"]["file"]).is_file()
    assert "includes" not in comfy and "web" not in comfy, "WEB_DIRECTORY says it, and .comfyignore the rest"


@pytest.mark.parametrize("name", IMAGES)
def test_pictures_are_in_the_repository_and_have_the_right_shape(project, name):
    address = project["tool"]["comfy"][name]
    path = ROOT / "assets" / address.rpartition("/assets/")[2]
    assert address.startswith("https://raw.githubusercontent.com/") and path.stat().st_size < 20_000
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', path.read_text(encoding="utf-8")).groups())
    assert width / height == pytest.approx(IMAGES[name])
