"""Zip-format pickles against torch.load: the same values from the offsets, few bytes read, what is unusual left to
torch, damage and hostile content refused."""

from __future__ import annotations

import builtins
import io
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.serialization import LoadEndianness, set_default_load_endianness

from diffsynth_backend.core import platform
from diffsynth_backend.core.loader import pickle_layout
from diffsynth_backend.core.loader.file import (
    DTYPES,
    CorruptFile,
    ModelFileError,
    hash_model_file,
    hash_state_dict,
    load_state_dict,
    read_tensor_infos,
    tensor_leaves,
)
from diffsynth_backend.core.platform import PositionedFile
from diffsynth_backend.core.vram.disk_map import DiskMap

MAPS = Path("/proc/self/maps")
OPEN_FILES = Path("/proc/self/fd")
FOREIGN_ORDER = {"little": "big", "big": "little"}[sys.byteorder]
State = dict[str, torch.Tensor]


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def repack(path: Path, change: Callable[[dict[str, bytes]], Any], **options: Any) -> None:
    """Write the archive again with changed records {name: content}; `options` are those of ZipFile."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    folder = next(iter(records)).partition("/")[0]
    records = {name.removeprefix(folder + "/"): content for name, content in records.items()}
    change(records)
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in records.items():
            with archive.open(f"{folder}/{name}", "w", force_zip64=True) as record:
                record.write(content)


def flatten(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A converter that takes every tensor, nested ones by their full names."""
    return dict(tensor_leaves(state_dict))


def as_bytes(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_reads_as_torch(path: Path, mapped: set[str]) -> None:
    """DiskMap gives what torch.load does, from offsets for the tensors `mapped` and through torch for all others."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    content = content.get("state_dict", content)
    expected: State = flatten(content)
    with DiskMap(path, state_dict_converter=flatten) as disk_map:
        assert set(disk_map) == set(expected)
        assert {name for name, info in disk_map.infos.items() if info.offset is not None} == mapped
        for name, tensor in expected.items():
            buffer = torch.empty(disk_map.nbytes(name), dtype=torch.uint8)
            assert (disk_map[name].dtype, disk_map[name].shape) == (tensor.dtype, tensor.shape)
            assert as_bytes(disk_map[name]) == as_bytes(tensor), name
            assert as_bytes(disk_map.read_into(name, buffer)) == as_bytes(tensor), name
    assert hash_model_file(path) == hash_state_dict(content)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(20 + i, 5, generator=generator) for i in range(4)}
    return save(tmp_path / "model.bin", {"state_dict": tensors})


class TestMapped:
    @pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.complex128], ids=str)
    def test_every_dtype(self, tmp_path: Path, dtype: torch.dtype) -> None:
        raw = torch.arange(16 * dtype.itemsize, dtype=torch.uint8) % 2
        path = save(tmp_path / "m.pth", {"w": raw.view(dtype).view(2, 8), "first": torch.ones(3)})
        info = read_tensor_infos(path)["w"]
        assert (info.dtype, info.shape, info.nbytes) == (dtype, (2, 8), len(raw))
        assert path.read_bytes()[info.offset : info.offset + info.nbytes] == as_bytes(raw)
        assert_reads_as_torch(path, {"w", "first"})

    def test_shared_storages_and_views(self, tmp_path: Path) -> None:
        base = torch.arange(24.0)
        content = {"all": base, "again": base, "rows": base.view(6, 4)[2:4], "tail": base[20:], "one": base[7]}
        path = save(tmp_path / "m.pth", content)
        assert_reads_as_torch(path, set(content))
        start = read_tensor_infos(path)["all"].offset
        places = {name: info.offset - start for name, info in read_tensor_infos(path).items()}
        assert places == {"all": 0, "again": 0, "rows": 32, "tail": 80, "one": 28}

    def test_scalars_empty_tensors_and_odd_strides(self, tmp_path: Path) -> None:
        content = {
            "scalar": torch.tensor(2.5),
            "empty": torch.empty(0, 3),
            "empty view": torch.ones(4)[4:],
            "one row": torch.arange(6.0).as_strided((1, 2), (5, 1), 3),
        }
        assert_reads_as_torch(save(tmp_path / "m.pth", content), set(content))

    def test_parameters_modules_and_nesting(self, tmp_path: Path) -> None:
        module = torch.nn.BatchNorm1d(3)
        half = torch.nn.Parameter(torch.ones(2).half())
        content = {"ema": {"state": module.state_dict()}, "model": {"p": half}, "step": 7, "names": ["a", None]}
        names = {f"ema|state|{name}" for name in module.state_dict()} | {"model|p"}
        assert_reads_as_torch(save(tmp_path / "m.ckpt", content), names)

    def test_one_wrapper_is_taken_off(self, model_file: Path) -> None:
        assert set(DiskMap(model_file)) == {"w0", "w1", "w2", "w3"}

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_cast(self, model_file: Path, dtype: torch.dtype) -> None:
        expected = load_state_dict(model_file, torch_dtype=dtype)
        for name, tensor in DiskMap(model_file, torch_dtype=dtype).items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, expected[name])

    def test_inside_inference_mode(self, model_file: Path) -> None:
        with torch.inference_mode():
            assert not any(tensor.is_inference() for tensor in DiskMap(model_file).values())

    def test_an_archive_packed_again(self, model_file: Path) -> None:
        """Other lengths and another order of records than torch writes, from which torch would compute offsets."""

        def reverse(records: dict[str, bytes]) -> None:
            records["data/unused"] = b"x" * 77
            for name in sorted(records, reverse=True):
                records[name] = records.pop(name)

        names = set(read_tensor_infos(model_file))
        before = torch.load(model_file, weights_only=True)["state_dict"]
        repack(model_file, reverse)
        assert_reads_as_torch(model_file, names)
        assert all(torch.equal(DiskMap(model_file)[name], before[name]) for name in names)

    def test_files_of_older_versions_do_not_tell_their_byte_order(self, model_file: Path) -> None:
        def remove(records: dict[str, bytes]) -> None:
            for name in ("byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"):
                records.pop(name, None)

        if sys.byteorder == "big":
            pytest.skip("such files are little-endian")
        repack(model_file, remove)
        names = set(read_tensor_infos(model_file))
        assert_reads_as_torch(model_file, names)
        for order, mapped in ((LoadEndianness.NATIVE, names), (LoadEndianness.BIG, set())):
            os.utime(model_file, ns=(0, order.value))  # another file, as far as the cache of layouts knows
            set_default_load_endianness(order)
            try:
                assert_reads_as_torch(model_file, mapped)
            finally:
                set_default_load_endianness(None)


class TestReadsLittle:
    @pytest.fixture
    def reads(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
        """Collects (position, bytes) of whatever is read from files."""
        seen: list[tuple[int, int]] = []
        read_into = PositionedFile.read_into

        class Raw(io.FileIO):
            def readinto(self, buffer: Any) -> int:
                position = self.tell()
                count = super().readinto(buffer)
                seen.append((position, count))
                return count

            def read(self, size: int = -1) -> bytes:
                position = self.tell()
                content = super().read(size)
                seen.append((position, len(content)))
                return content

            def readall(self) -> bytes:
                position = self.tell()
                content = super().readall()
                seen.append((position, len(content)))
                return content

        def counted(file: PositionedFile, buffer: memoryview, offset: int) -> int:
            seen.append((offset, count := read_into(file, buffer, offset)))
            return count

        monkeypatch.setattr(PositionedFile, "read_into", counted)
        monkeypatch.setattr(pickle_layout, "open_regular", lambda path: io.BufferedReader(Raw(path)))
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load is not needed"))
        return seen

    @pytest.mark.parametrize("read_header", [hash_model_file, DiskMap, read_tensor_infos])
    def test_headers_without_data(
        self, model_file: Path, reads: list[tuple[int, int]], read_header: Callable[[Path], Any]
    ) -> None:
        read_header(model_file)
        header_reads = list(reads)
        assert header_reads
        infos = read_tensor_infos(model_file)
        assert len(infos) == 4
        for info in infos.values():
            for start, count in header_reads:
                assert start + count <= info.offset or start >= info.offset + info.nbytes

    @pytest.mark.parametrize("read_at", ["_positioned_read", "_seek_and_read"])
    def test_only_the_tensor_asked_for(
        self, model_file: Path, reads: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, read_at: str
    ) -> None:
        if read_at == "_positioned_read" and not hasattr(os, "preadv"):
            pytest.skip("this system has no positioned reads")
        monkeypatch.setattr(platform, "_read_at", getattr(platform, read_at))
        disk_map = DiskMap(model_file)
        info = disk_map.infos["w2"]
        for read in (
            lambda: disk_map["w2"],
            lambda: disk_map.read_into("w2", torch.empty(22, 5)),
            lambda: DiskMap(model_file, torch_dtype=torch.float16)["w2"],
        ):
            reads.clear()
            read()
            assert reads == [(info.offset, info.nbytes)]

    def test_nothing_is_mapped_and_no_handle_is_left(self, model_file: Path) -> None:
        if not MAPS.exists():
            pytest.skip("this system does not list mapped files")

        def opened() -> bool:
            return str(model_file) in [os.path.realpath(link) for link in OPEN_FILES.iterdir()]

        hash_model_file(model_file)
        assert not opened()
        with DiskMap(model_file) as disk_map:
            tensors = dict(disk_map)
            assert opened()
            assert str(model_file) not in MAPS.read_text()
        assert not opened()
        assert len(tensors) == 4


class TestThroughTorch:
    @pytest.mark.parametrize(
        "tensor",
        [
            torch.arange(6.0).view(2, 3).t(),
            torch.arange(12.0)[::2],
            torch.ones(1).expand(4),
            torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
            torch.tensor([1j, 2 - 3j]).conj(),
            torch.tensor([1j, 2 - 3j]).conj().imag,
        ],
        ids=["transposed", "step", "expanded", "channels last", "conjugate", "negative"],
    )
    def test_tensors_not_stored_as_they_are_in_memory(self, tmp_path: Path, tensor: torch.Tensor) -> None:
        """Their neighbours are mapped all the same."""
        path = save(tmp_path / "m.pth", {"a": torch.ones(3), "x": tensor, "inner": {"b": torch.zeros(2)}})
        assert_reads_as_torch(path, {"a", "inner|b"})
        loaded = load_state_dict(path)
        assert as_bytes(loaded["x"]) == as_bytes(tensor)

    def test_old_format(self, tmp_path: Path) -> None:
        torch.save({"a": torch.ones(3)}, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
        assert_reads_as_torch(tmp_path / "m.pth", set())

    def test_compressed_records(self, model_file: Path) -> None:
        before = load_state_dict(model_file)
        before = {name: tensor.clone() for name, tensor in before.items()}
        repack(model_file, lambda records: None, compression=zipfile.ZIP_DEFLATED)
        assert_reads_as_torch(model_file, set())
        assert all(torch.equal(tensor, before[name]) for name, tensor in load_state_dict(model_file).items())

    def test_foreign_byte_order(self, model_file: Path) -> None:
        before = {name: tensor.clone() for name, tensor in load_state_dict(model_file).items()}

        def swap(records: dict[str, bytes]) -> None:
            records["byteorder"] = FOREIGN_ORDER.encode()
            for name in records:
                if name.startswith("data/"):
                    words = torch.frombuffer(bytearray(records[name]), dtype=torch.uint8).view(-1, 4)
                    records[name] = as_bytes(words.flip(1))

        repack(model_file, swap)
        assert_reads_as_torch(model_file, set())
        for source in (load_state_dict(model_file), DiskMap(model_file)):
            assert all(torch.equal(source[name], tensor) for name, tensor in before.items())

    @pytest.mark.parametrize(
        "make",
        [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, lambda tensor: tensor.to("meta")],
        ids=["coo", "csr", "meta"],
    )
    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
    def test_no_dense_data(self, tmp_path: Path, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        path = save(tmp_path / "m.pth", {"x": make(torch.eye(3)), "a": torch.ones(3)})
        assert hash_model_file(path) == hash_state_dict({"x": torch.ones(3, 3), "a": torch.ones(3)})
        disk_map = DiskMap(path)
        assert torch.equal(disk_map["a"], torch.ones(3))
        with pytest.raises(ModelFileError, match="'x' is sparse, quantized or without data.*without disk offload"):
            disk_map["x"]

    @pytest.mark.filterwarnings("ignore")  # torch announces the end of its quantized dtypes
    def test_quantized(self, tmp_path: Path) -> None:
        tensor = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
        path = save(tmp_path / "m.pth", {"x": tensor})
        assert torch.equal(load_state_dict(path)["x"].dequantize(), tensor.dequantize())
        with pytest.raises(ModelFileError, match="'x' is sparse, quantized"):
            DiskMap(path)["x"]

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_nested_tensors_are_refused(self, tmp_path: Path) -> None:
        path = save(tmp_path / "m.pth", {"x": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])})
        with pytest.raises(ModelFileError, match="'x' is a nested tensor.*save its parts"):
            hash_model_file(path)

    def test_subclasses(self, tmp_path: Path) -> None:
        path = save(tmp_path / "m.pth", {"x": torch.ones(3).as_subclass(Subclass), "a": torch.ones(3)})
        with pytest.raises(CorruptFile, match="other Python objects"):
            hash_model_file(path)
        with torch.serialization.safe_globals([Subclass]):
            infos = read_tensor_infos(path)
            assert {name: info.offset for name, info in infos.items()} == {"x": None, "a": None}
            assert torch.equal(DiskMap(path)["x"], torch.ones(3))


class Subclass(torch.Tensor):
    """A tensor of another class, which a user may have allowed."""


READERS = [hash_model_file, read_tensor_infos, load_state_dict, DiskMap]


class TestDamage:
    @pytest.mark.parametrize("read", READERS)
    @pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
    def test_truncated(self, model_file: Path, read: Callable[[Path], Any], part: float) -> None:
        os.truncate(model_file, int(model_file.stat().st_size * part))
        with pytest.raises(CorruptFile, match="download it again") as error:
            read(model_file)
        assert str(model_file) in str(error.value)

    @pytest.mark.parametrize("read", READERS)
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda r: r.update({"data/1": r["data/1"][:-4]}), "needs 420 bytes of record 'data/1', which has 416"),
            (lambda r: r.pop("data/1"), "a tensor lies in record 'data/1', which is not there"),
            (lambda r: r.update({"data.pkl": r["data.pkl"][:50]}), "cannot be read as tensors only"),
            (lambda r: r.pop("data.pkl"), "cannot be read as tensors only"),
            (lambda r: r.update({"byteorder": b"odd"}), "cannot be read as tensors only"),
        ],
        ids=["short record", "no record", "short description", "no description", "byte order"],
    )
    def test_records(self, model_file: Path, read: Callable[[Path], Any], change: Any, message: str) -> None:
        repack(model_file, change)
        with pytest.raises(CorruptFile, match=message) as error:
            read(model_file)
        assert str(model_file) in str(error.value)
        assert "download it again" in str(error.value)

    def test_a_view_beyond_its_storage(self, model_file: Path) -> None:
        """As a transposed tensor too, which torch.load would read."""
        with zipfile.ZipFile(model_file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            description = archive.read(name)
        assert description.count(b"K\x14K\x05\x86") == 1  # the tuple (20, 5), shape of the first tensor
        for shape in (b"K\x15K\x05\x86", b"K\x14K\x06\x86"):
            changed = description.replace(b"K\x14K\x05\x86", shape)
            repack(model_file, lambda records, changed=changed: records.update({"data.pkl": changed}))
            with pytest.raises(CorruptFile, match="a tensor needs 4[02][40] bytes of record 'data/0', which has 400"):
                hash_model_file(model_file)

    def test_any_byte_of_the_headers(self, model_file: Path) -> None:
        """Whatever is damaged, errors are those of this package."""
        sound, infos = model_file.read_bytes(), read_tensor_infos(model_file).values()
        first, last = min(info.offset for info in infos), max(info.offset + info.nbytes for info in infos)
        refused = 0
        for position in [*range(0, first, 9), *range(last, len(sound), 9)]:
            damaged = bytearray(sound)
            damaged[position] ^= 0xFF
            model_file.write_bytes(damaged)
            os.utime(model_file, ns=(0, position))
            try:
                read_tensor_infos(model_file)
            except ModelFileError:
                refused += 1
        assert refused > 20

    def test_endless_nesting(self, tmp_path: Path) -> None:
        content: dict[str, Any] = {"w": torch.ones(1)}
        content["again"] = content
        with pytest.raises(CorruptFile, match="nested without end"):
            hash_model_file(save(tmp_path / "m.pth", content))

    def test_changed_after_its_header_was_read(self, model_file: Path) -> None:
        disk_map = DiskMap(model_file)
        save(model_file, {"w0": torch.ones(5)})
        with pytest.raises(CorruptFile, match="was changed after its header was read; load the model again"):
            disk_map["w0"]

    def test_cut_while_open(self, model_file: Path) -> None:
        disk_map = DiskMap(model_file)
        disk_map["w0"]
        last = max(disk_map.infos.values(), key=lambda info: info.offset)
        os.truncate(model_file, last.offset + 3)
        with pytest.raises(CorruptFile, match=f"'{last.name}' needs {last.nbytes} bytes from byte.*, 3 are there"):
            disk_map[last.name]


class TestHostile:
    @pytest.mark.parametrize("read", READERS)
    @pytest.mark.parametrize(
        ("function", "arguments"),
        [(os.system, ("touch owned",)), (os.mkdir, ("owned",)), (builtins.eval, ("open('owned', 'w')",))],
    )
    def test_code_does_not_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any, function: Any, arguments: Any
    ) -> None:
        class Attack:
            def __reduce__(self) -> tuple[Any, ...]:
                return function, arguments

        monkeypatch.chdir(tmp_path)
        save(tmp_path / "m.pth", {"w": torch.ones(2), "x": Attack()})
        with pytest.raises(CorruptFile, match="or holds other Python objects; download it again, or .*safetensors"):
            read(tmp_path / "m.pth")
        assert os.listdir(tmp_path) == ["m.pth"]

    def test_a_state_dict_is_needed(self, tmp_path: Path) -> None:
        with pytest.raises(ModelFileError, match="holds a list; a state dict"):
            hash_model_file(save(tmp_path / "m.pth", [torch.ones(2)]))
