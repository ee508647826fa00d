"""Each piece of the corpus is refused by an error of ours, in a second and 256 MiB, touching nothing outside."""
from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from mmap import PAGESIZE, mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth_backend.core.loader.containment import PathRefused
from diffsynth_backend.core.loader.file import ModelFileError
from diffsynth_backend.models.model_loader import nearest_known
from tests.helpers.pack import submodule

from . import comfy_stubs, hostile
from .corpus import Case, Place, cases
from .watch import watching

SECONDS = 1.0
BYTES = 256 << 20
CASES = cases()
FOLDERS = ("vae", "diffusion_models", "text_encoders", "diffsynth", "loras")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A folder of models with traps in it, and beside it a file that is to stay secret."""
    root = tmp_path_factory.mktemp("world")
    base, outside, output = root / "models", root / "outside", root / "output"
    for folder in (outside, output, *(base / name for name in FOLDERS)):
        folder.mkdir(parents=True)
    secret = outside / "secret.safetensors"
    save_file({"w": torch.ones(2)}, secret)
    torch.save({"w": torch.ones(2)}, outside / "secret.pth")
    for folder in (base, output, *(base / name for name in FOLDERS), base / "owner/name"):
        folder.mkdir(parents=True, exist_ok=True)
        _trap(folder, outside, secret)
    nearest_known([str(secret)])  # builds the known layouts, which takes a second once
    loaded = comfy_stubs.load_real_host(base, output)
    yield Place(base, base / "case", secret, loaded.nodes, loaded.host)
    comfy_stubs.remove()


def _trap(folder: Path, outside: Path, secret: Path) -> None:
    try:
        (folder / "leave.safetensors").symlink_to(secret)
        (folder / "out").symlink_to(outside, target_is_directory=True)
        (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
        (folder / "device.safetensors").symlink_to("/dev/zero")
        os.mkfifo(folder / "pipe.safetensors")
    except (OSError, AttributeError):
        pytest.skip("this system does not let us make links and pipes")
    (folder / "folder.safetensors").mkdir()


@pytest.fixture
def place(world: Place, monkeypatch: pytest.MonkeyPatch, no_settings: None) -> Iterator[Place]:
    world.folder.mkdir()
    monkeypatch.chdir(world.folder)
    yield world
    os.chdir(world.base)
    shutil.rmtree(world.folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_corpus_is_large() -> None:
    assert len(CASES) >= 200
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=[ascii(case.name) for case in CASES])
def test_it_is_refused(case: Case, place: Place) -> None:
    ours = (ModelFileError, PathRefused, submodule("diffsynth_backend.core.loader.file",
                                                   comfy_stubs.PACK).ModelFileError,
            submodule("diffsynth_backend.core.loader.containment", comfy_stubs.PACK).PathRefused)
    before, refusal = contents(place.secret.parent), None
    with watching(place.base) as watched:
        try:
            refusal = case.run(place)
        except ours as error:
            refusal = str(error)
    assert isinstance(refusal, str) and len(refusal) > 20, f"accepted: {refusal!r:.200}"
    assert len(refusal) < 5000 and "\n" not in refusal.strip(), refusal
    assert not watched.violations
    assert watched.seconds < SECONDS
    assert watched.growth.peak is None or watched.growth.peak < BYTES
    assert contents(place.secret.parent) == before
    assert not list(place.folder.rglob(hostile.MARKER)) and not Path(hostile.MARKER).exists()


class TestTheWatchSees:
    """A test that could not fail would prove nothing."""

    @pytest.mark.parametrize("act", [
        lambda place: open(place.secret, "rb").close(), lambda place: (place.base / "leave.safetensors").read_bytes(),
        lambda place: os.listdir("/etc"), lambda place: os.mkdir("x"), lambda place: os.system("true"),
    ], ids=["a file", "a link", "a folder", "a change", "a program"])
    def test_what_is_forbidden(self, place: Place, act) -> None:
        with watching(place.base) as watched:
            act(place)
        assert watched.violations

    def test_time_and_memory(self, place: Place) -> None:
        gc.collect()  # what earlier tests left would be freed meanwhile, and hide a part
        with watching(place.base) as watched, mmap(-1, 192 << 20) as block:  # malloc has memory in hand by now
            for page in range(0, len(block), PAGESIZE):
                block[page] = 1
        assert watched.seconds > 0
        assert watched.growth.peak is None or watched.growth.peak > 60 << 20
