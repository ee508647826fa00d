"""Model files: hashes against registered ones, headers against the format's rules, loading against what was saved."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth_backend.core.loader.containment import PathRefused
from diffsynth_backend.core.loader.file import (
    DTYPES,
    CorruptFile,
    MissingFile,
    MissingShards,
    ModelFileError,
    TensorInfo,
    hash_model_file,
    hash_state_dict,
    load_state_dict,
    read_tensor_infos,
)

STATUS = Path("/proc/self/status")
Layout = dict[str, tuple[str, list[int]]]
EMPTY_HASH = "d41d8cd98f00b204e9800998ecf8427e"


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with this header, sound or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def write_sparse(path: Path, layout: Layout) -> Path:
    """A safetensors file of full size whose data are holes: it takes no disk space and reads as zeros."""
    header, end = {}, 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + torch.Size(shape).numel() * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    write_raw(path, header)
    os.truncate(path, path.stat().st_size + end)
    return path


def anonymous_bytes() -> int:
    """This process's memory that is not backed by a file."""
    if not STATUS.exists() or "RssAnon" not in STATUS.read_text():
        pytest.skip("this system does not tell anonymous memory")
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(4, 3, generator=generator),
        "a.weight": torch.randn(2, 5, 7, generator=generator).bfloat16(),
        "scale": torch.tensor(2.5),
        "positions": torch.arange(6),
        "none": torch.empty(0, 3),
    }


@pytest.fixture
def model_file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


class TestHash:
    def test_full_size_checkpoint_of_qwen_image_has_its_registered_hash(self, tmp_path: Path) -> None:
        """1933 tensors, 40.9 GB declared in 9 shards; the layout comes from diffusers, the hash from the registry."""
        diffusers = pytest.importorskip("diffusers")
        with torch.device("meta"):
            layout = diffusers.QwenImageTransformer2DModel(num_layers=60).state_dict()
        assert hash_state_dict(layout) == "0319a1cb19835fb510907dd3367c95ff"
        items = [(name, ("BF16", list(tensor.shape))) for name, tensor in layout.items()]
        shards = [
            write_sparse(tmp_path / f"diffusion_pytorch_model-{i + 1:05d}-of-00009.safetensors", dict(items[i::9]))
            for i in range(9)
        ]
        assert sum(path.stat().st_size for path in shards) > 40e9
        assert hash_model_file(shards) == hash_model_file(tmp_path) == "0319a1cb19835fb510907dd3367c95ff"
        assert len(read_tensor_infos(shards)) == 1933

    def test_registered_hash_of_the_qwen_image_vae(self) -> None:
        diffusers = pytest.importorskip("diffusers")
        with torch.device("meta"):
            layout = diffusers.AutoencoderKLQwenImage().state_dict()
        assert hash_state_dict(layout) == "ed4ea5824d55ec3107b09815e318123a"

    def test_formula(self, model_file: Path) -> None:
        parts = ["a.weight", "a.weight:2_5_7", "b.weight", "b.weight:4_3", "none", "none:0_3"]
        parts += ["positions", "positions:6", "scale", "scale:"]
        assert hash_model_file(model_file) == hashlib.md5(",".join(sorted(parts)).encode()).hexdigest()

    def test_nested_dictionaries(self, tmp_path: Path) -> None:
        torch.save({"params": {"w": torch.ones(2)}, "v": torch.ones(3, 1), "step": 7}, tmp_path / "m.pth")
        expected = hashlib.md5(b"params|w,w:2,v,v:3_1").hexdigest()
        assert hash_model_file(tmp_path / "m.pth") == expected

    def test_blind_to_values_dtype_order_format_and_sharding(self, tmp_path: Path, model_file: Path) -> None:
        expected = hash_model_file(str(model_file))
        other = {name: torch.zeros_like(tensor).half() for name, tensor in reversed(load_file(model_file).items())}
        assert hash_state_dict(other) == expected
        first = dict(list(other.items())[:2])
        second = dict(list(other.items())[2:])
        save_file(first, tmp_path / "x-00001-of-00002.safetensors")
        save_file(second, tmp_path / "x-00002-of-00002.safetensors")
        shards = [tmp_path / f"x-0000{i}-of-00002.safetensors" for i in (2, 1)]
        assert hash_model_file(shards) == expected
        for wrapper in ("state_dict", "module", "model_state"):
            torch.save({wrapper: other}, tmp_path / f"{wrapper}.ckpt")
            assert hash_model_file(tmp_path / f"{wrapper}.ckpt") == expected
        torch.save(other, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
        assert hash_model_file(tmp_path / "old.bin") == expected

    def test_only_a_lone_wrapper_is_unwrapped_and_only_once(self, tmp_path: Path) -> None:
        weights = {"w": torch.ones(2)}
        torch.save({"state_dict": weights, "other": torch.ones(1)}, tmp_path / "a.pth")
        torch.save({"state_dict": {"module": weights}}, tmp_path / "b.pth")
        assert set(read_tensor_infos(tmp_path / "a.pth")) == {"state_dict|w", "other"}
        assert set(read_tensor_infos(tmp_path / "b.pth")) == {"module|w"}

    def test_a_rewritten_file_is_hashed_again(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(2)}, tmp_path / "m.safetensors")
        first = hash_model_file(tmp_path / "m.safetensors")
        save_file({"a": torch.ones(3)}, tmp_path / "m.safetensors")
        assert hash_model_file(tmp_path / "m.safetensors") != first

    def test_a_pickle_is_hashed_without_its_data(self, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(64 << 20, dtype=torch.uint8)}, tmp_path / "m.pth")
        before = anonymous_bytes()
        hash_model_file(tmp_path / "m.pth")
        assert anonymous_bytes() - before < 16 << 20


class TestInfos:
    def test_place_of_every_tensor(self, model_file: Path, tensors: dict[str, torch.Tensor]) -> None:
        infos, raw = read_tensor_infos(model_file), model_file.read_bytes()
        assert infos.keys() == tensors.keys()
        for name, tensor in tensors.items():
            info = infos[name]
            data = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
            assert info == TensorInfo(name, tensor.dtype, tuple(tensor.shape), str(model_file), info.offset, len(data))
            assert raw[info.offset : info.offset + info.nbytes] == data

    def test_pickles_of_the_old_format_have_no_offsets(self, tmp_path: Path) -> None:
        torch.save({"outer": {"w": torch.ones(2, 3)}}, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
        expected = TensorInfo("outer|w", torch.float32, (2, 3), str(tmp_path / "m.pth"), None, 24)
        assert read_tensor_infos(tmp_path / "m.pth") == {"outer|w": expected}

    @pytest.mark.parametrize("key", sorted(DTYPES))
    def test_every_dtype_is_the_one_of_the_library(self, tmp_path: Path, key: str) -> None:
        path = write_sparse(tmp_path / "m.safetensors", {"w": (key, [2, 3])})
        assert read_tensor_infos(path)["w"].dtype == load_file(path)["w"].dtype == DTYPES[key]


def entry(start: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BROKEN_HEADERS: dict[str, tuple[Any, int, str]] = {  # header, bytes of data, what the error says
    "truncated": ({"w": entry()}, 5, r"describes \d+ bytes, the file has \d+"),
    "too long": ({"w": entry()}, 9, r"describes \d+ bytes, the file has \d+"),
    "overlap": ({"a": entry(), "b": entry(4, 12)}, 12, "'b' starts at byte .* overlaps"),
    "same place": ({"a": entry(), "b": entry()}, 8, "overlaps"),
    "hole": ({"a": entry(), "b": entry(12, 20)}, 20, "'b' starts at byte .* leaves a hole"),
    "hole at the start": ({"a": entry(4, 12)}, 12, "leaves a hole"),
    "size": ({"w": entry(shape=[3])}, 8, r"'w': torch.float32 \[3\] needs 12 bytes.*\[0, 8\]"),
    "reversed": ({"w": entry(8, 0)}, 8, r"needs 8 bytes.*\[8, 0\]"),
    "negative": ({"w": entry(shape=[-2])}, 8, "sizes from 0"),
    "negative offset": ({"w": entry(-8, 0)}, 8, "sizes from 0"),
    "huge": ({"w": entry(0, 0, shape=[2**70, 0])}, 0, "sizes from 0"),
    "boolean": ({"w": entry(shape=[True, 2])}, 8, "sizes from 0"),
    "fraction": ({"w": entry(shape=[2.0])}, 8, "sizes from 0"),
    "text as shape": ({"w": entry(shape="2")}, 8, "sizes from 0"),
    "number as shape": ({"w": entry(shape=2)}, 8, "lacks dtype, shape or data_offsets"),
    "three offsets": ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}}, 8, "lacks dtype"),
    "list as dtype": ({"w": entry(dtype=[])}, 8, "lacks dtype"),
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, 8, "lacks dtype"),
    "no object": ({"w": 3}, 8, "lacks dtype"),
    "array": ([1], 0, "not valid JSON of tensors: 0 {, 1 .,"),
    "text": ("w", 0, "a JSON str, an object expected"),
    "brackets": ({"w": [[] for _ in range(100)]}, 0, "not valid JSON of tensors: 1 {, 101 "),
    "objects": ({"w": {}, **{f"{i}": {} for i in range(100)}}, 0, "not valid JSON of tensors: 102 {"),
    "dimensions": ({"w": entry(0, 0, shape=[0] * 65)}, 0, "has 65 dimensions, at most 64"),
    "more than can be counted": ({"w": entry(0, 0, shape=[2**40, 2**40, 0])}, 0, "more elements than can be counted"),
    "no JSON": (b"not json", 0, "not valid JSON"),
    "no text": (b'{"\xff\xfe": 1}', 0, "not valid JSON"),
    "nested": (b"[" * 100_000, 0, "not valid JSON"),
    "duplicate": (f'{{"w": {json.dumps(entry())}, "w": {json.dumps(entry())}}}'.encode(), 8, "duplicate key 'w'"),
}


class TestCorruptFiles:
    @pytest.mark.parametrize(("header", "data", "message"), BROKEN_HEADERS.values(), ids=BROKEN_HEADERS)
    @pytest.mark.parametrize("read", [read_tensor_infos, hash_model_file, load_state_dict])
    def test_header(self, tmp_path: Path, header: Any, data: int, message: str, read: Callable[..., Any]) -> None:
        path = write_raw(tmp_path / "bad.safetensors", header, bytes(data))
        with pytest.raises(CorruptFile, match=message) as error:
            read(path)
        assert str(path) in str(error.value)
        assert "download it again" in str(error.value)

    def test_truncated_download_gives_both_sizes(self, model_file: Path) -> None:
        size = model_file.stat().st_size
        os.truncate(model_file, size - 10)
        with pytest.raises(CorruptFile, match=f"describes {size} bytes, the file has {size - 10}"):
            load_state_dict(model_file)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"abc", "8 bytes of header length expected, the file has 3"),
            (struct.pack("<Q", 10**12), "claims 1000000000000 bytes, 5000000 allowed"),
            (struct.pack("<Q", 1000) + b"{}", "a header of 1008 bytes expected, the file has 10"),
        ],
    )
    def test_length_of_the_header(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "bad.safetensors").write_bytes(content)
        with pytest.raises(CorruptFile, match=message):
            hash_model_file(tmp_path / "bad.safetensors")

    def test_unknown_dtype_lists_the_known_ones(self, tmp_path: Path) -> None:
        path = write_raw(tmp_path / "m.safetensors", {"w": entry(dtype="F3")}, bytes(8))
        with pytest.raises(ModelFileError, match="'w' has dtype 'F3'.*known: BOOL.*BF16"):
            hash_model_file(path)

    def test_no_tensor_at_all(self, tmp_path: Path) -> None:
        path = write_raw(tmp_path / "m.safetensors", {"__metadata__": {"a": "b"}})
        with pytest.raises(ModelFileError, match="no tensor in"):
            hash_model_file(path)

    @pytest.mark.parametrize("content", [b"garbage", b"PK\x03\x04 cut short", b"\x80\x02}q\x00("])
    def test_pickles(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "bad.bin").write_bytes(content)
        for read in (hash_model_file, load_state_dict):
            with pytest.raises(CorruptFile, match="cannot be read as tensors only"):
                read(tmp_path / "bad.bin")

    def test_a_pickle_that_runs_code_is_refused(self, tmp_path: Path) -> None:
        class Attack:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "owned"),)

        torch.save({"w": Attack()}, tmp_path / "bad.pth")
        for read in (hash_model_file, load_state_dict):
            with pytest.raises(ModelFileError, match="other Python objects.*safetensors"):
                read(tmp_path / "bad.pth")
        assert not (tmp_path / "owned").exists()

    def test_a_pickle_of_something_else(self, tmp_path: Path) -> None:
        torch.save(torch.ones(2), tmp_path / "t.pth")
        with pytest.raises(ModelFileError, match="holds a Tensor; a state dict"):
            load_state_dict(tmp_path / "t.pth")


class TestFileLists:
    @pytest.mark.parametrize("nothing", [[], (), "", None])
    def test_empty(self, nothing: Any) -> None:
        for read in (hash_model_file, load_state_dict, read_tensor_infos):
            with pytest.raises(ModelFileError, match="no model file given"):
                read(nothing)

    def test_missing_file_is_also_a_file_not_found_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"absent.safetensors does not exist") as error:
            hash_model_file(tmp_path / "absent.safetensors")
        assert isinstance(error.value, MissingFile)
        assert isinstance(error.value, ValueError)

    def test_zero_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "m.safetensors").touch()
        with pytest.raises(CorruptFile, match=r"empty \(0 bytes\).*download it again"):
            hash_model_file(tmp_path / "m.safetensors")

    @pytest.mark.parametrize("name", ["m.gguf", "m", "m.safetensors.tmp"])
    def test_unknown_suffix(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ModelFileError, match="unknown suffix.*.safetensors, .bin, .pth, .ckpt"):
            load_state_dict(tmp_path / name)

    def test_a_file_given_twice(self, model_file: Path) -> None:
        with pytest.raises(ModelFileError, match="given more than once"):
            hash_model_file([model_file, model_file])

    def test_the_same_key_in_two_files(self, tmp_path: Path) -> None:
        for name in ("high", "low"):
            save_file({"w": torch.ones(1), name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
        for read in (hash_model_file, load_state_dict):
            with pytest.raises(ModelFileError, match=r"1 keys.*'w' is in .*high.safetensors and in .*low.safetensors"):
                read([tmp_path / "high.safetensors", tmp_path / "low.safetensors"])


class TestShards:
    @pytest.fixture
    def shards(self, tmp_path: Path) -> list[Path]:
        paths = [tmp_path / f"model-{i:05d}-of-00009.safetensors" for i in range(1, 10)]
        for i, path in enumerate(paths):
            save_file({f"w{i}": torch.full((2,), float(i))}, path)
        return paths

    def test_complete(self, shards: list[Path], tmp_path: Path) -> None:
        assert load_state_dict(shards).keys() == load_state_dict(tmp_path).keys() == {f"w{i}" for i in range(9)}

    @pytest.mark.parametrize("given", ["list", "shortened list", "folder"])
    def test_two_of_nine_missing(self, shards: list[Path], tmp_path: Path, given: str) -> None:
        shards[2].unlink()
        shards[6].unlink()
        files = {"list": shards, "shortened list": [path for path in shards if path.exists()], "folder": tmp_path}
        for read in (hash_model_file, load_state_dict, read_tensor_infos):
            with pytest.raises(MissingShards) as error:
                read(files[given])
            names = "model-00003-of-00009.safetensors, model-00007-of-00009.safetensors"
            assert f"9 of 9 shards expected, 2 missing: {names}" in str(error.value)
            assert "download them" in str(error.value)

    def test_not_given_but_on_disk(self, shards: list[Path]) -> None:
        with pytest.raises(FileNotFoundError, match="8 missing.*pass the whole set.*lie in that folder"):
            load_state_dict(shards[0])

    def test_long_lists_are_cut(self, tmp_path: Path) -> None:
        save_file({"w": torch.ones(1)}, tmp_path / "m-00001-of-00099.safetensors")
        with pytest.raises(MissingShards, match="98 missing: .*m-00009-of-00099.safetensors and 90 more"):
            load_state_dict(tmp_path)

    def test_two_sets_in_a_list(self, shards: list[Path], tmp_path: Path) -> None:
        others = [tmp_path / f"other-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for path in others:
            save_file({path.stem: torch.ones(1)}, path)
        assert len(load_state_dict([*shards, *others])) == 11
        with pytest.raises(MissingShards, match="other: 2 of 2 shards expected, 1 missing"):
            load_state_dict([*shards, others[1]])

    def test_counting_from_zero(self, tmp_path: Path) -> None:
        for i in range(2):
            save_file({f"w{i}": torch.ones(1)}, tmp_path / f"m-0000{i}-of-00002.safetensors")
        assert len(load_state_dict(tmp_path)) == 2


class TestFolders:
    def test_without_model_files(self, tmp_path: Path) -> None:
        with pytest.raises(MissingFile, match="folder without .safetensors"):
            hash_model_file(tmp_path)

    def test_index_tells_which_files_belong_together(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "x-00001-of-00002.safetensors")
        save_file({"b": torch.ones(1)}, tmp_path / "x-00002-of-00002.safetensors")
        save_file({"a": torch.ones(1)}, tmp_path / "x.fp16.safetensors")
        with pytest.raises(ModelFileError, match="'a' is in"):
            load_state_dict(tmp_path)
        index = {"weight_map": {"a": "x-00001-of-00002.safetensors", "b": "x-00002-of-00002.safetensors"}}
        (tmp_path / "x.safetensors.index.json").write_text(json.dumps(index))
        assert set(load_state_dict(tmp_path)) == {"a", "b"}
        (tmp_path / "x-00002-of-00002.safetensors").unlink()
        with pytest.raises(MissingShards, match="1 missing: x-00002-of-00002"):
            load_state_dict(tmp_path)

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ('{"weight_map": {"a": "../x.safetensors"}}', "lists '../x.safetensors'"),
            ('{"weight_map": {"a": "x.py"}}', "lists 'x.py'"),
            ('{"weight_map": 3}', "not an index"),
            ("{", "not an index"),
        ],
    )
    def test_bad_index(self, tmp_path: Path, index: str, message: str) -> None:
        (tmp_path / "m.safetensors.index.json").write_text(index)
        with pytest.raises((CorruptFile, PathRefused), match=message):
            load_state_dict(tmp_path)


class TestLoading:
    def test_equal_to_what_was_saved(self, model_file: Path, tensors: dict[str, torch.Tensor]) -> None:
        assert_equal(load_state_dict(model_file), tensors)
        assert_equal(load_state_dict([str(model_file)]), tensors)

    def test_cast_touches_floating_point_only(self, model_file: Path, tensors: dict[str, torch.Tensor]) -> None:
        state_dict = load_state_dict(model_file, torch_dtype=torch.float16)
        assert_equal(state_dict, {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()})
        assert state_dict["positions"].dtype == torch.int64

    def test_device(self, model_file: Path) -> None:
        assert {tensor.device.type for tensor in load_state_dict(model_file, device="meta").values()} == {"meta"}

    def test_sixteen_gigabytes_cost_no_memory(self, tmp_path: Path) -> None:
        shards = []
        for i in range(1, 5):
            layout = {f"{i}.{k}.weight": ("BF16", [1024, 1024 * 256]) for k in range(8)}
            shards.append(write_sparse(tmp_path / f"m-0000{i}-of-00004.safetensors", layout))
        before = anonymous_bytes()
        state_dict = load_state_dict(shards)
        assert sum(tensor.nbytes for tensor in state_dict.values()) == 16 << 30
        assert state_dict["3.7.weight"][-1, -1] == 0
        assert anonymous_bytes() - before < 32 << 20

    def test_writing_to_a_view_does_not_change_the_file(self, model_file: Path, tensors: dict[str, Any]) -> None:
        before = model_file.read_bytes()
        load_state_dict(model_file)["b.weight"].zero_()
        assert model_file.read_bytes() == before
        assert_equal(load_state_dict(model_file), tensors)

    @pytest.mark.parametrize("new_format", [True, False])
    def test_tensors_made_inside_inference_mode(self, tmp_path: Path, model_file: Path, new_format: bool) -> None:
        torch.save({"w": torch.ones(2)}, tmp_path / "m.pth", _use_new_zipfile_serialization=new_format)
        with torch.inference_mode():
            for path in (model_file, tmp_path / "m.pth"):
                for dtype in (None, torch.float16):
                    assert not any(t.is_inference() for t in load_state_dict(path, dtype).values())

    @pytest.mark.parametrize("new_format", [True, False])
    @pytest.mark.parametrize("suffix", [".bin", ".pth", ".ckpt"])
    def test_pickles(
        self, tmp_path: Path, tensors: dict[str, Any], suffix: str, new_format: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / f"m{suffix}"
        torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=new_format)
        assert_equal(load_state_dict(path), tensors)
        assert f"{path} is a pickle" in caplog.text
        assert load_state_dict(path, torch_dtype=torch.float16)["a.weight"].dtype == torch.float16

    def test_parameters_and_nested_values(self, tmp_path: Path) -> None:
        content = {"params": {"w": torch.nn.Parameter(torch.ones(2))}, "step": 7}
        torch.save(content, tmp_path / "m.pth")
        loaded = load_state_dict(tmp_path / "m.pth", torch_dtype=torch.float64)
        assert loaded["step"] == 7
        assert loaded["params"]["w"].dtype == torch.float64
        assert not loaded["params"]["w"].requires_grad

    def test_a_mapped_pickle_costs_no_memory(self, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(64 << 20, dtype=torch.uint8)}, tmp_path / "m.pth")
        before = anonymous_bytes()
        assert load_state_dict(tmp_path / "m.pth")["w"][-1] == 1
        assert anonymous_bytes() - before < 16 << 20

    def test_a_file_that_the_system_cannot_map(self, tmp_path: Path) -> None:
        path = tmp_path / "m.safetensors"
        try:
            write_sparse(path, {"w": ("U8", [8 << 40])})
        except OSError:
            pytest.skip("this file system has no files of 8 TiB")
        try:
            with pytest.raises(ModelFileError, match=r"cannot map \d+ bytes.*disk offload"):
                load_state_dict(path)
        except pytest.fail.Exception:
            pytest.skip("this system maps files of any size")
        finally:
            path.unlink()
