"""DiskMap against the tensors that were saved: same values by every way of reading, in little memory, with a converter
that is also run on the real tensors."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import einops
import pytest
import torch
from safetensors.torch import save_file

from diffsynth_backend.core import platform
from diffsynth_backend.core.loader.file import CorruptFile, ModelFileError, load_state_dict
from diffsynth_backend.core.vram.disk_map import CHUNK_BYTES, DiskMap
from diffsynth_backend.core.vram.tensor_reference import TensorReference, UnrecordableOperation

STATUS = Path("/proc/self/status")
OPEN_FILES = Path("/proc/self/fd")
State = dict[str, torch.Tensor]


def anonymous_bytes() -> int:
    """This process's memory that is not backed by a file."""
    if not STATUS.exists() or "RssAnon" not in STATUS.read_text():
        pytest.skip("this system does not tell anonymous memory")
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def open_handles(folder: Path) -> int:
    """How many files of the folder this process has open."""
    if not OPEN_FILES.exists():
        pytest.skip("this system does not list open files")
    targets = [os.path.realpath(link) for link in OPEN_FILES.iterdir()]
    return sum(target.startswith(str(folder.resolve()) + os.sep) for target in targets)


def assert_equal(actual: Any, expected: State) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


@pytest.fixture
def tensors() -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        "qkv.weight": torch.randn(12, 8, generator=generator),
        "q.weight": torch.randn(4, 8, generator=generator).bfloat16(),
        "k.weight": torch.randn(4, 8, generator=generator).bfloat16(),
        "fp8": torch.randn(6, generator=generator).to(torch.float8_e4m3fn),
        "scale": torch.tensor(2.5),
        "positions": torch.arange(6).reshape(1, 6),
        "mask": torch.tensor([True, False, True]),
        "complex": torch.randn(3, dtype=torch.complex64, generator=generator),
        "none": torch.empty(0, 3),
    }


@pytest.fixture(params=["safetensors", "zip pickle", "old pickle"])
def files(request: pytest.FixtureRequest, tmp_path: Path, tensors: State) -> list[Path]:
    """The tensors in two files of each format; the old one has no fp8."""
    if request.param == "old pickle":
        del tensors["fp8"]
    suffix = ".safetensors" if request.param == "safetensors" else ".pth"
    paths = [tmp_path / f"m-0000{i}-of-00002{suffix}" for i in (1, 2)]
    items = list(tensors.items())
    for path, part in zip(paths, (dict(items[:3]), dict(items[3:])), strict=True):
        if suffix == ".safetensors":
            save_file(part, path)
        else:
            torch.save(part, path, _use_new_zipfile_serialization=request.param == "zip pickle")
    return paths


@pytest.fixture
def model_file(tmp_path: Path, tensors: State) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


class TestReading:
    def test_equal_to_what_was_saved(self, files: list[Path], tensors: State) -> None:
        with DiskMap(files) as disk_map:
            assert_equal(disk_map, tensors)
            assert len(disk_map) == len(tensors)
            assert "scale" in disk_map
            assert "absent" not in disk_map
            with pytest.raises(KeyError, match="absent"):
                disk_map["absent"]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn])
    def test_cast_as_load_state_dict_does(self, files: list[Path], dtype: torch.dtype) -> None:
        assert_equal(DiskMap(files, torch_dtype=dtype), load_state_dict(files, torch_dtype=dtype))

    def test_tensors_larger_than_a_chunk(self, tmp_path: Path) -> None:
        weight = torch.randn(CHUNK_BYTES // 4 * 2 + 1234)
        save_file({"small": torch.ones(1), "w": weight}, tmp_path / "m.safetensors")
        for dtype in (None, torch.bfloat16, torch.float64):
            assert torch.equal(DiskMap(tmp_path, torch_dtype=dtype)["w"], weight.to(dtype or torch.float32))

    def test_device(self, files: list[Path], tensors: State) -> None:
        for name, tensor in DiskMap(files, device="meta").items():
            assert (tensor.device.type, tensor.shape) == ("meta", tensors[name].shape)

    def test_questions_answered_without_reading(self, files: list[Path], tensors: State, tmp_path: Path) -> None:
        disk_map = DiskMap(files, torch_dtype=torch.float16)
        for name, tensor in tensors.items():
            assert disk_map.shape(name) == tuple(tensor.shape)
            assert disk_map.dtype(name) == tensor.dtype
            assert disk_map.nbytes(name) == tensor.nbytes
            assert disk_map.sources(name) == [disk_map.infos[name]]
        assert open_handles(tmp_path) == 0

    def test_every_read_gives_memory_of_its_own(self, files: list[Path], tensors: State) -> None:
        disk_map = DiskMap(files)
        for name in tensors:
            disk_map[name].zero_()
        assert_equal(disk_map, tensors)

    def test_inside_inference_mode_tensors_are_ordinary(self, files: list[Path], tensors: State) -> None:
        with torch.inference_mode():
            for dtype in (None, torch.float64):
                disk_map = DiskMap(files, torch_dtype=dtype, state_dict_converter=stack_q_and_k)
                assert not any(tensor.is_inference() for tensor in disk_map.values())

    def test_a_relative_path_survives_a_change_of_folder(
        self, model_file: Path, tensors: State, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(model_file.parent)
        disk_map = DiskMap(model_file.name)
        monkeypatch.chdir("/")
        assert_equal(disk_map, tensors)


class TestReadInto:
    def test_typed_and_byte_buffers(self, files: list[Path], tensors: State) -> None:
        disk_map = DiskMap(files, torch_dtype=torch.float16)
        for name, tensor in tensors.items():
            typed = torch.zeros_like(tensor)
            assert disk_map.read_into(name, typed) is typed
            assert torch.equal(typed, tensor)
            arena = torch.full((tensor.nbytes + 16,), 0xAA, dtype=torch.uint8)
            disk_map.read_into(name, arena[8:-8])
            assert bytes(arena[8:-8].tolist()) == bytes(tensor.reshape(-1).view(torch.uint8).tolist())
            assert set(arena[:8].tolist() + arena[-8:].tolist()) == {0xAA}

    def test_converted_tensors(self, files: list[Path], tensors: State) -> None:
        disk_map = DiskMap(files, state_dict_converter=stack_q_and_k)
        expected = stack_q_and_k(tensors)["qk"]
        assert torch.equal(disk_map.read_into("qk", torch.empty_like(expected)), expected)
        raw = disk_map.read_into("qk", torch.empty(disk_map.nbytes("qk"), dtype=torch.uint8))
        assert torch.equal(raw.view(expected.dtype).view(expected.shape), expected)

    @pytest.mark.parametrize(
        "out",
        [
            torch.empty(12, 8, dtype=torch.float16),
            torch.empty(8, 12),
            torch.empty(383, dtype=torch.uint8),
            torch.empty(8, 12).t(),
            torch.empty(12, 8, device="meta"),
        ],
    )
    def test_unfit_buffers(self, model_file: Path, out: torch.Tensor) -> None:
        with pytest.raises(ValueError, match=r"'qkv.weight'.*\(12, 8\) and torch.float32, or of 384 torch.uint8; got"):
            DiskMap(model_file).read_into("qkv.weight", out)


def stack_q_and_k(state_dict: dict[str, Any]) -> dict[str, Any]:
    return {"qk": torch.stack([state_dict["q.weight"], state_dict["k.weight"]]), "scale": state_dict["scale"]}


# What converters do to tensors; each is also run on the real ones.
RECORDED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "rename": lambda s: s["qkv.weight"],
    "chunk": lambda s: s["qkv.weight"].chunk(3)[1],
    "torch.chunk": lambda s: torch.chunk(s["qkv.weight"], 3, dim=1)[2],
    "split": lambda s: s["qkv.weight"].split([2, 10])[1],
    "torch.split": lambda s: torch.split(s["qkv.weight"], 5, dim=0)[2],
    "unbind": lambda s: torch.stack(s["q.weight"].unbind(1)[::2]),
    "iteration": lambda s: torch.stack(list(s["q.weight"])[1:]),
    "slice": lambda s: s["qkv.weight"][2:-1, ::3],
    "index": lambda s: s["qkv.weight"][3, None, ..., -1],
    "narrow": lambda s: torch.narrow(s["qkv.weight"], 0, 1, 4).narrow(1, 2, 2),
    "select": lambda s: s["qkv.weight"].select(0, 2),
    "cat": lambda s: torch.cat([s["q.weight"], s["k.weight"]], dim=1),
    "cat of a tuple": lambda s: torch.cat((s["k.weight"], s["q.weight"][:2])),
    "concat": lambda s: torch.concat([s["q.weight"], s["k.weight"], s["q.weight"]]),
    "halves swapped": lambda s: torch.cat(s["qkv.weight"].chunk(2, dim=0)[::-1], dim=0),
    "stack": lambda s: torch.stack([s["q.weight"], s["k.weight"]], dim=-1),
    "with a constant": lambda s: torch.cat([s["qkv.weight"], torch.full((1, 8), 7.0)]),
    "reshape": lambda s: s["qkv.weight"].reshape(3, 4, -1),
    "view": lambda s: s["qkv.weight"].view(2, 48),
    "flatten": lambda s: s["qkv.weight"].flatten(),
    "unflatten": lambda s: s["qkv.weight"].unflatten(0, (3, 4)).flatten(1),
    "squeeze": lambda s: s["positions"].squeeze(0),
    "unsqueeze": lambda s: s["qkv.weight"].unsqueeze(-1).unsqueeze(0),
    "transpose": lambda s: s["qkv.weight"].transpose(0, 1),
    "permute": lambda s: s["qkv.weight"].view(3, 4, 8).permute(2, 0, 1).reshape(8, 12),
    "t": lambda s: s["qkv.weight"].t().contiguous(),
    "T": lambda s: s["qkv.weight"].T,
    "clone": lambda s: s["qkv.weight"].clone().detach().contiguous(),
    "to": lambda s: torch.cat([s["q.weight"].to(torch.float32), s["qkv.weight"].to(dtype=torch.float32)]),
    "scale": lambda s: s["qkv.weight"].mul(s["scale"]),
    "scale of another dtype": lambda s: s["q.weight"] * s["scale"],
    "scale of rows": lambda s: torch.mul(s["q.weight"].to(torch.float32), s["qkv.weight"][:4, :1]).to(torch.bfloat16),
    "scale from the right": lambda s: 0.3 * s["q.weight"],
    "constant scale": lambda s: torch.full((1, 8), 0.7) * s["q.weight"],
    "whole numbers scaled": lambda s: s["positions"] * s["scale"],
    "by shape": lambda s: s["qkv.weight"].view(s["qkv.weight"].shape[0] // 3, 3, s["qkv.weight"].size(1)),
    "deepcopy": lambda s: copy.deepcopy(s)["qkv.weight"][1:],
    "a new constant": lambda s: torch.arange(3.0),
}
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "addition": (lambda w: w + 1, "Tensor.add"),
    "from the right": (lambda w: 1 - w, "__rsub__"),
    "float8 scaled": (lambda w: w.to(torch.float8_e4m3fn) * 2.0, "Tensor.mul.*float8 has to be cast before"),
    "float8 as scale": (lambda w: w.mul(other=w.to(torch.float8_e5m2)), "Tensor.mul"),
    "scaled in place": (lambda w: w.mul_(2.0), "Tensor.mul_"),
    "scaled into another": (lambda w: torch.mul(w, w, out=torch.empty(0)), "torch.mul"),
    "product": (lambda w: w @ w.t(), "Tensor.matmul|Tensor.__matmul__"),
    "negation": (lambda w: -w, "Tensor.neg|Tensor.__neg__"),
    "comparison": (lambda w: w == 0, "Tensor.__eq__|Tensor.eq"),
    "truth": (lambda w: bool(w), "Tensor.__bool__"),
    "number": (lambda w: float(w[0, 0]), "Tensor.__float__"),
    "item": (lambda w: w[0, 0].item(), "Tensor.item"),
    "numpy": (lambda w: w.numpy(), "Tensor.numpy"),
    "in place": (lambda w: w.add_(1), "Tensor.add_"),
    "assignment": (lambda w: w.__setitem__(0, 0), "Tensor.__setitem__"),
    "function": (lambda w: torch.sqrt(w), "torch.sqrt"),
    "sum": (lambda w: w.sum(), "Tensor.sum"),
    "device": (lambda w: w.to("cpu"), "Tensor.to"),
    "device and dtype": (lambda w: w.to("cuda", torch.float16), "Tensor.to"),
    "mask": (lambda w: w[torch.ones(12, dtype=torch.bool)], "Tensor.__getitem__"),
    "list index": (lambda w: w[[0, 1]], "Tensor.__getitem__"),
    "output": (lambda w: torch.cat([w], out=torch.empty(0)), "torch.cat"),
    "norm of a part": (lambda w: w.chunk(2)[0].norm(), "Tensor.norm"),
}


class TestConverter:
    @pytest.mark.parametrize("operation", RECORDED.values(), ids=RECORDED)
    def test_recorded_operations(
        self, files: list[Path], tensors: State, operation: Callable[[dict[str, Any]], Any]
    ) -> None:
        expected = operation(dict(tensors))
        for dtype in (None, torch.float64):
            disk_map = DiskMap(files, torch_dtype=dtype, state_dict_converter=lambda s: {"x": operation(s)})
            assert (disk_map.shape("x"), disk_map.dtype("x")) == (tuple(expected.shape), expected.dtype)
            assert disk_map.nbytes("x") == expected.nbytes
            for current in (disk_map, pickle.loads(pickle.dumps(disk_map))):
                actual = current["x"]
                wanted = expected.to(dtype) if dtype and expected.is_floating_point() else expected
                assert actual.dtype == wanted.dtype
                assert torch.equal(actual, wanted)
                assert actual.is_contiguous()

    @pytest.mark.parametrize(("operation", "name"), REFUSED.values(), ids=REFUSED)
    def test_refused_operations(self, model_file: Path, operation: Callable[[Any], Any], name: str) -> None:
        with pytest.raises(UnrecordableOperation) as error:
            DiskMap(model_file, state_dict_converter=lambda s: {"x": operation(s["qkv.weight"])})
        assert re.search(name, str(error.value))
        assert "'qkv.weight'" in str(error.value)
        assert "without disk offload" in str(error.value)
        assert isinstance(error.value, ModelFileError)

    def test_impossible_shapes_raise_at_construction(self, model_file: Path) -> None:
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            DiskMap(model_file, state_dict_converter=lambda s: {"x": s["qkv.weight"].reshape(5, 5)})

    def test_einops(self, model_file: Path, tensors: State) -> None:
        def converter(state_dict: dict[str, Any]) -> dict[str, Any]:
            return {"x": einops.rearrange(state_dict["qkv.weight"], "(n d) c -> c n d", n=3)}

        assert_equal(DiskMap(model_file, state_dict_converter=converter), converter(tensors))

    def test_references_look_like_tensors(self, model_file: Path) -> None:
        def converter(state_dict: dict[str, Any]) -> dict[str, Any]:
            weight = state_dict["q.weight"]
            assert isinstance(weight, TensorReference)
            assert isinstance(weight, torch.Tensor)
            assert (weight.name, weight.shape, weight.dtype) == ("q.weight", (4, 8), torch.bfloat16)
            assert (weight.ndim, weight.dim(), weight.numel(), len(weight)) == (2, 2, 32, 4)
            assert (weight.element_size(), weight.nbytes, weight.is_floating_point()) == (2, 64, True)
            assert weight.device.type == "meta"
            assert repr(weight[1:]) == "TensorReference('q.weight', shape=(3, 8), dtype=torch.bfloat16)"
            return state_dict

        assert len(DiskMap(model_file, state_dict_converter=converter)) == 9

    def test_runs_once_and_may_change_its_argument(self, model_file: Path, tensors: State) -> None:
        calls = []

        def converter(state_dict: dict[str, Any]) -> dict[str, Any]:
            calls.append(1)
            state_dict["renamed"] = state_dict.pop("scale")
            return {name: state_dict[name] for name in ("renamed", "fp8")}

        disk_map = DiskMap(model_file, state_dict_converter=converter)
        assert_equal(disk_map, {"renamed": tensors["scale"], "fp8": tensors["fp8"]})
        assert_equal(DiskMap(model_file), tensors)
        assert calls == [1]
        assert "scale" in disk_map.infos

    def test_only_the_leaves_are_read(self, model_file: Path) -> None:
        disk_map = DiskMap(model_file, state_dict_converter=stack_q_and_k)
        assert [info.name for info in disk_map.sources("qk")] == ["q.weight", "k.weight"]
        read: list[str] = []
        fill = disk_map._fill
        disk_map._fill = lambda info, *rest: (read.append(info.name), fill(info, *rest))  # type: ignore[method-assign]
        disk_map["qk"]
        assert read == ["q.weight", "k.weight"]

    def test_a_part_does_not_keep_the_whole_in_memory(self, model_file: Path) -> None:
        part = DiskMap(model_file, state_dict_converter=lambda s: {"q": s["qkv.weight"].chunk(3)[0]})["q"]
        assert part.untyped_storage().nbytes() == part.nbytes

    def test_nested_files_need_a_converter(self, tmp_path: Path) -> None:
        torch.save({"params": {"w": torch.ones(2)}, "step": 3}, tmp_path / "m.pth")
        with pytest.raises(ModelFileError, match="'params' is a dict and not a stored tensor.*converter"):
            DiskMap(tmp_path / "m.pth")
        assert_equal(DiskMap(tmp_path / "m.pth", state_dict_converter=lambda s: s["params"]), {"w": torch.ones(2)})


class TestFiles:
    def test_handles_are_few_lazy_and_given_back(self, model_file: Path) -> None:
        disk_map = DiskMap(model_file)
        assert open_handles(model_file.parent) == 0
        tensors = dict(disk_map)
        assert open_handles(model_file.parent) == 1
        disk_map.close()
        assert open_handles(model_file.parent) == 0
        assert tensors["scale"] == 2.5

    def test_a_closed_map_says_so(self, files: list[Path]) -> None:
        with DiskMap(files) as disk_map:
            disk_map["scale"]
        for current in (disk_map, copy.deepcopy(disk_map)):
            with pytest.raises(ModelFileError, match="closed; create a new one"):
                current["scale"]
            assert current.shape("scale") == ()

    def test_a_forgotten_map_leaves_no_handle(self, model_file: Path) -> None:
        DiskMap(model_file)["scale"]
        gc.collect()
        assert open_handles(model_file.parent) == 0

    @pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_are_independent(self, files: list[Path], tensors: State, copied: Callable[[Any], Any]) -> None:
        disk_map = DiskMap(files, torch_dtype=None)
        disk_map["scale"]
        twin = copied(disk_map)
        disk_map.close()
        assert_equal(twin, tensors)

    def test_a_file_changed_in_between(self, model_file: Path, tensors: State) -> None:
        disk_map = DiskMap(model_file)
        save_file({**tensors, "more": torch.ones(1)}, model_file)
        with pytest.raises(CorruptFile, match="was changed after its header was read"):
            disk_map["scale"]

    def test_a_file_cut_while_open(self, model_file: Path) -> None:
        disk_map = DiskMap(model_file)
        disk_map["scale"]
        last = max(disk_map.infos.values(), key=lambda info: info.offset + info.nbytes)
        os.truncate(model_file, last.offset + 1)
        with pytest.raises(CorruptFile, match=f"'{last.name}' needs {last.nbytes} bytes from byte.*, 1 are"):
            disk_map[last.name]

    def test_pickles_are_named_in_a_warning(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        torch.save({"w": torch.ones(1)}, tmp_path / "m.bin")
        DiskMap(tmp_path / "m.bin")
        assert "m.bin is a pickle" in caplog.text

    def test_errors_of_the_files(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="does not exist"):
            DiskMap(tmp_path / "absent.safetensors")


class TestThreadsAndMemory:
    @pytest.mark.parametrize("read_at", ["_positioned_read", "_seek_and_read"])
    def test_many_threads(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_at: str) -> None:
        if read_at == "_positioned_read" and not hasattr(os, "preadv"):
            pytest.skip("this system has no positioned reads")
        monkeypatch.setattr(platform, "_read_at", getattr(platform, read_at))
        state = {f"w{i}": torch.full((257 + i,), float(i)) for i in range(64)}
        save_file(state, tmp_path / "m.safetensors")
        maps = [DiskMap(tmp_path), DiskMap(tmp_path, torch_dtype=torch.float64)]

        def read(i: int) -> bool:
            name = f"w{i % 64}"
            return all(torch.equal(disk_map[name], state[name].to(disk_map[name].dtype)) for disk_map in maps)

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(512)))

    def test_a_large_model_takes_the_memory_of_one_tensor(self, tmp_path: Path) -> None:
        count, size = 1250, 32 << 20  # 1250 tensors of 32 MiB: 40 GiB of holes
        header = {
            f"w{i}": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [i * size, (i + 1) * size]}
            for i in range(count)
        }
        raw = json.dumps(header).encode()
        path = tmp_path / "m.safetensors"
        path.write_bytes(struct.pack("<Q", len(raw)) + raw)
        os.truncate(path, path.stat().st_size + count * size)
        before = anonymous_bytes()
        disk_map = DiskMap(path, torch_dtype=torch.float32)
        for i in (0, 77, 1249):
            assert disk_map[f"w{i}"].count_nonzero() == 0
        assert anonymous_bytes() - before < CHUNK_BYTES + (48 << 20)
        buffer = torch.empty(size // 2, dtype=torch.bfloat16)
        disk_map.read_into("w1000", buffer)
        before = anonymous_bytes()
        for i in range(0, count, 300):
            disk_map.read_into(f"w{i}", buffer)
        assert anonymous_bytes() - before < 1 << 20
