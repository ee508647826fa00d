"""What tests of several folders share: the published checkpoints in full size, and a tiny model that draws."""
from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from diffsynth_backend.core.vram import streaming
from tests.helpers.sparse import CHECKPOINTS, DIT, makes_holes


@pytest.fixture(autouse=True)
def readers_are_worth_waking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are streamed as large ones are, by threads that read ahead."""
    monkeypatch.setattr(streaming, "WORTH_WAKING", 0)


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that their layers wait for each other's threads most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def full_size_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every published checkpoint below `models/`, in full size as sparse files."""
    folder = tmp_path_factory.mktemp("full_size")
    if not makes_holes(folder):
        pytest.skip(f"{folder} lies on a file system without sparse files, and 65 GB are too much to write")
    for checkpoint in CHECKPOINTS:
        checkpoint.write(folder, values={"img_in.bias": torch.arange(3072) % 256} if checkpoint is DIT else None)
    return folder


@pytest.fixture
def full_size(full_size_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`full_size_folder` as the working directory, in an environment without settings. Leave the files as they are."""
    without_settings(monkeypatch)
    monkeypatch.chdir(full_size_folder)
    return full_size_folder


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory):
    """Files of a model with random weights, see `TinyFiles`."""
    from tests.helpers.tiny import write_tiny_files  # needs transformers, as the tests that ask for it

    return write_tiny_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No DIFFSYNTH_ variable of the machine reaches the test."""
    without_settings(monkeypatch)


def without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DIFFSYNTH_")]:
        monkeypatch.delenv(name)
