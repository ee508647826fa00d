"""Any model file as safetensors: the same tensors, a file only when it is whole, and refusals that say what to do."""
from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth_backend.core.loader import convert
from diffsynth_backend.core.loader.convert import convert_to_safetensors
from diffsynth_backend.core.loader.file import ModelFileError, hash_model_file
from diffsynth_backend.core.vram.disk_map import DiskMap

TENSORS = {"a": torch.randn(3, 5).bfloat16(), "b": torch.arange(7, dtype=torch.uint8), "c": torch.randn(2).double(),
           "none": torch.empty(0, 3), "scale": torch.tensor(2.0), "t": torch.randn(4, 6).t(),
           "f8": torch.randn(4).to(torch.float8_e4m3fn)}


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle(tmp_path: Path, new_format: bool) -> None:
    # torch does not read float8 of the old format.
    tensors = TENSORS if new_format else {name: tensor for name, tensor in TENSORS.items() if name != "f8"}
    torch.save({"state_dict": tensors}, tmp_path / "m.ckpt", _use_new_zipfile_serialization=new_format)
    seen: list[tuple[int, int]] = []
    count = convert_to_safetensors(tmp_path / "m.ckpt", str(tmp_path / "m.safetensors"), lambda *p: seen.append(p))
    assert count == len(tensors) == len(seen) and seen[-1][0] == seen[-1][1]
    written = load_file(tmp_path / "m.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype and written[name].shape == tensor.shape
        assert torch.equal(written[name].float(), tensor.float())
    assert hash_model_file(tmp_path / "m.safetensors") == hash_model_file(tmp_path / "m.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["m.ckpt", "m.safetensors"]


def test_shards_become_one_file(tmp_path: Path) -> None:
    for i in (1, 2):
        save_file({f"w{i}": torch.full((2,), float(i))}, tmp_path / f"m-0000{i}-of-00002.safetensors")
    convert_to_safetensors(tmp_path, str(tmp_path.parent / "whole.safetensors"))
    assert load_file(tmp_path.parent / "whole.safetensors")["w2"].tolist() == [2, 2]


@pytest.mark.parametrize(("content", "output", "message"), [
    (TENSORS, "m.pth2", "ends in .safetensors expected"),
    (TENSORS, "there.safetensors", "exists already; choose another name"),
    (TENSORS, "no/m.safetensors", "there is no such folder; create it"),
    ({"a": {"w": torch.ones(1)}, "v": torch.ones(1)}, "o.safetensors", "are dictionaries of their own, such as 'a'"),
    ({"w": torch.ones(1, dtype=torch.complex128)}, "o.safetensors", "'w' is torch.complex128, which safetensors"),
])
def test_refusals(tmp_path: Path, content: dict, output: str, message: str) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"kept")
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(ModelFileError, match=message):
        convert_to_safetensors(tmp_path / "m.pth", str(tmp_path / output))
    assert sorted(os.listdir(tmp_path)) == ["m.pth", "there.safetensors"]
    assert (tmp_path / "there.safetensors").read_bytes() == b"kept"


def test_what_is_no_tensor_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"w": torch.ones(1), "step": 7}, tmp_path / "m.pth")
    assert convert_to_safetensors(tmp_path / "m.pth", str(tmp_path / "o.safetensors")) == 1
    assert "left out, since safetensors holds tensors only: 'step'" in caplog.text


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(TENSORS, tmp_path / "m.pth")
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(ModelFileError, match="the disk has 1000 free; make room"):
        convert_to_safetensors(tmp_path / "m.pth", str(tmp_path / "o.safetensors"))


def test_nothing_is_left_of_an_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(TENSORS, tmp_path / "m.pth")

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskMap, "read_into", broken)
    with pytest.raises(OSError, match="No space left"):
        convert_to_safetensors(tmp_path / "m.pth", str(tmp_path / "o.safetensors"))
    assert os.listdir(tmp_path) == ["m.pth"]
