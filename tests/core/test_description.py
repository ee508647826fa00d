"""Descriptions of tensors against torch's own unpickler, and programs that are no descriptions."""
from __future__ import annotations

import collections
import io
import pickletools
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from diffsynth_backend.core.loader import description
from diffsynth_backend.core.loader.description import read_description
from diffsynth_backend.core.loader.file import CorruptFile, ModelFileError, hash_model_file
from diffsynth_backend.core.loader.pickle_names import NoDescription, StoredTensor
from tests.security.hostile import description_of, torch_zip

START = b"\x80\x02"
OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00."  # what precedes the content
EMPTY = b")q\x01"
DOUBLED = b"h\x01h\x01\x86q\x01"  # a pair of what was note 1
NESTED = b"\x85"
TEXTS = st.text(max_size=6)
SCALARS = st.none() | st.booleans() | st.integers(-2**200, 2**200) | st.floats(allow_nan=False) | TEXTS
TENSORS = st.sampled_from((torch.ones(3), torch.zeros(2, 5).half(), torch.arange(12).view(3, 4).t(), torch.tensor(True),
                           torch.nn.Parameter(torch.rand(2)), torch.empty(0, 4), torch.ones(2, dtype=torch.bfloat16)))
CONTENTS = st.dictionaries(TEXTS | st.integers(-2**31, 2**31 - 1), st.recursive(
    SCALARS | TENSORS, lambda parts: st.lists(parts, max_size=4) | st.dictionaries(TEXTS, parts, max_size=4)
    | st.tuples(parts, parts, parts, parts) | st.tuples(parts) | st.just(collections.OrderedDict(a=1)), max_leaves=12))


def saved(content: Any, **options: Any) -> bytes:
    """The file that torch.save makes of this."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def without_values(value: Any) -> Any:
    """Tensors by what a description says of them, and functions and the like, where damage left them, by nothing."""
    if isinstance(value, (torch.Tensor, StoredTensor)):
        return value.dtype, tuple(value.shape)
    if isinstance(value, dict):
        return {key: without_values(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_values(item) for item in value)
    return value if isinstance(value, (str, int, float, torch.dtype)) else None


class TestSound:
    @settings(max_examples=150, deadline=None)
    @given(CONTENTS)
    def test_the_same_as_torch(self, content: dict[Any, Any]) -> None:
        expected = torch.load(io.BytesIO(saved(content)), weights_only=True)
        found = read_description(description_of(content))
        assert without_values(found.content) == without_values(expected)
        assert not found.others

    def test_where_tensors_lie(self) -> None:
        base = torch.arange(24.0)
        content = {"all": base, "rows": base.view(6, 4)[2:4], "turned": base.view(6, 4).t(), "none": base[24:]}
        found = read_description(description_of(content)).content
        assert found == {
            "all": StoredTensor(torch.float32, (24,), "0", 0, 24, True),
            "rows": StoredTensor(torch.float32, (2, 4), "0", 8, 8, True),
            "turned": StoredTensor(torch.float32, (4, 6), "0", 0, 24, False),
            "none": StoredTensor(torch.float32, (0,), "0", 24, 0, True),
        }

    def test_a_state_dict_with_its_versions(self) -> None:
        state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
        found = read_description(description_of(state)).content
        assert without_values(found) == without_values(dict(state))

    def test_in_the_old_format(self) -> None:
        file, end, found = saved({"w": torch.ones(3)}, _use_new_zipfile_serialization=False), 0, []
        for _ in range(5):
            content, _, end = read_description(file, end)
            found.append(content)
        assert found[3] == {"w": StoredTensor(torch.float32, (3,), found[4][0], 0, 3, True)}
        assert end + 8 + 12 == len(file)  # the number of elements, and they

    @pytest.mark.filterwarnings("ignore")  # of quantized and sparse tensors
    @pytest.mark.parametrize(("make", "name"), [
        (lambda: torch.eye(3).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "torch._utils._rebuild_qtensor"),
        (lambda: torch.ones(3, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (lambda: {1, 2}, "builtins.set"),
    ])
    def test_what_only_torch_can_make(self, make: Any, name: str) -> None:
        found = read_description(description_of({"a": torch.ones(2), "x": make()}))
        assert name.rpartition(".")[2] in {other.rpartition(".")[2] for other in found.others}
        assert found.content["a"] == StoredTensor(torch.float32, (2,), "0", 0, 2, True)

    def test_what_the_user_allowed_torch(self) -> None:
        code = description_of({"x": torch.ones(2).as_subclass(Subclass)})
        with pytest.raises(NoDescription, match=r"it names .*test_description' 'Subclass', which is no part of a tens"):
            read_description(code)
        with torch.serialization.safe_globals([Subclass]):
            assert f"{__name__}.Subclass" in read_description(code).others

    def test_every_instruction_that_torch_reads(self) -> None:
        """By CPython's list of instructions, and the code of torch's unpickler."""
        source = Path(torch.__file__).with_name("_weights_only_unpickler.py").read_text()
        read = {opcode.code for opcode in pickletools.opcodes if f"== {opcode.name}[0]" in source
                or f"[{opcode.name}[0]," in source or f", {opcode.name}[0]]" in source}
        assert len(read) > 30
        assert {ord(code) for code in read} == {*description._INSTRUCTIONS, description._STOP}


class Subclass(torch.Tensor):
    """A tensor of another class."""


WORK = "refer to each other more than"
PROGRAMS = {
    "a key that is a pair of pairs": (EMPTY + 60 * DOUBLED + b"}h\x01K\x01s", "a key that is no text|" + WORK),
    "a key nested deeply": (b"})" + 190_000 * NESTED + b"K\x01s", "a key that is no text"),
    "keys that collide": (b"}(" + b"\x8a\x08" + (2**61 - 1).to_bytes(8, "little") + b"Nu", "a key that is no .*number"),
    "a set of nested tuples": (b"c__builtin__\nset\n])" + 40 * NESTED + b"a\x85R", "or 32 deep"),
    "a set of many, many times": (b"c__builtin__\nset\nq\x02](" + 1000 * b"K\x01" + b"eq\x01"
                                  + 1000 * b"h\x02h\x01\x85R0", WORK + "|no instruction"),
    "sets of shared lists": (b"](" + 1000 * b"K\x01" + b"eq\x01" + 1000 * b"c__builtin__\nset\nh\x01\x85R", WORK),
    "any number of bytes": (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R", "it names 'builtins' 'bytearray'"),
    "a tensor type": (b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R", "it names 'torch' 'FloatTensor'"),
    "a function": (b"cos\nsystem\nX\x02\0\0\0id\x85R", "it names 'os' 'system'"),
    "a call of a text": (b"X\x02\0\0\0id)R", "a str is called"),
    "arguments that are no tuple": (b"ccollections\nOrderedDict\n]R", "arguments are a list"),
    "more steps than tensors need": (b"N" * 200_001, "more than 200000 steps"),
    "an unknown instruction": (b"\x93", "no instruction or note 147"),
    "an unknown note": (b"h\x07", "no instruction or note 7"),
    "an empty stack": (b"a", "takes more from its stack"),
    "nothing": (b"", "ends too early|takes more"),
    "a text without end": (b"X\xff\xff\xff\xff", "ends too early"),
    "half a character": (b"X\x01\0\0\0\xff", "decode"),
    "a key without value": (b"}(K\x01u", "argument 2 is shorter"),
    "another thing than storage": (b"(X\x01\0\0\0aNNNNtQ", "no storage"),
    "a storage without type": (b"(X\x07\0\0\0storageNX\x01\0\0\0aNNtQ", "a storage without type"),
    "a list filled as a dictionary": (b"]K\x01K\x02s", "a list where a dict is filled"),
    "a tensor of no storage": (b"ctorch._utils\n_rebuild_tensor_v2\n(NK\0))NNtR", "without storage, shape or stride"),
    "a parameter of no tensor": (b"ctorch._utils\n_rebuild_parameter\nNNN\x87R", "a parameter without tensor"),
}


def view(shape: bytes, stride: bytes, first: bytes = b"K\0") -> bytes:
    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + first + shape + stride + b"\x89NtR"


TENSOR_PROGRAMS = {
    "a negative shape": view(b"J\xff\xff\xff\xff\x85", b"K\x01\x85"),
    "a negative stride": view(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"),
    "a negative start": view(b"K\x02\x85", b"K\x01\x85", b"J\xff\xff\xff\xff"),
    "a truth for a length": view(b"\x88\x85", b"K\x01\x85"),
    "more strides than lengths": view(b"K\x02\x85", b"K\x01K\x01\x86"),
    "two dtypes of one storage": view(b"K\x02\x85", b"K\x01\x85")
    + view(b"K\x02\x85", b"K\x01\x85").replace(b"Float", b"Int"),
    "a call of a tensor": view(b"K\x02\x85", b"K\x01\x85") + b")R",
    "65 dimensions": view(b"(" + 65 * b"K\x01" + b"t", b"(" + 65 * b"K\x01" + b"t"),
    "more than can be counted": view(3 * b"J\xff\xff\xff\x7f" + b"\x87", b"K\x01K\x01K\x01\x87"),
    "more than can be counted, times 0": view(b"(" + 3 * b"J\xff\xff\xff\x7f" + b"K\0t", b"(K\x01K\x01K\x01K\x01t"),
}


class TestNoDescription:
    @pytest.mark.parametrize(("steps", "message"), PROGRAMS.values(), ids=PROGRAMS)
    def test_programs(self, steps: bytes, message: str) -> None:
        with pytest.raises(NoDescription, match=message):
            read_description(START + steps + b".")

    @pytest.mark.parametrize("steps", TENSOR_PROGRAMS.values(), ids=TENSOR_PROGRAMS)
    def test_sizes(self, steps: bytes) -> None:
        assert read_description(START + view(b"K\x02\x85", b"K\x01\x85") + b".").content.shape == (2,)
        with pytest.raises(NoDescription, match="sizes are not num|more elements than can|StoredTensor is|two dtypes"):
            read_description(START + steps + b".")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("seed", range(10))
    def test_damaged_bytes(self, tmp_path: Path, seed: int) -> None:
        """Whatever is damaged, the error is the same, or torch finds the same tensors, or none."""
        rng, sound = random.Random(seed), description_of({"w": torch.ones(3, 4), "inner": [{"x": torch.ones(2).t()}]})
        outcomes: collections.Counter[str] = collections.Counter()
        for _ in range(500):
            code = bytearray(sound)
            for _ in range(rng.randint(1, 3)):
                code[rng.randrange(len(code))] = rng.randrange(256)
            try:
                found = read_description(bytes(code))
            except NoDescription:
                outcomes["refused"] += 1
                continue
            file = torch_zip(tmp_path / "m.pth", bytes(code), {"data/0": bytes(48), "data/1": bytes(8)})
            try:
                expected = torch.load(file, weights_only=True)
            except Exception:  # noqa: BLE001 - damaged bytes can raise any exception
                outcomes["refused by torch"] += 1
            else:
                outcomes["the same"] += without_values(found.content) == without_values(expected)
                outcomes["read by both"] += 1
        assert outcomes["the same"] == outcomes["read by both"] > 10 and outcomes["refused"] > 400

    @pytest.mark.parametrize("name", ["a key nested deeply", "sets of shared lists",
                                      "any number of bytes"])
    @pytest.mark.parametrize("kind", ["stored", "compressed", "old format"])
    def test_torch_never_gets_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
        code, path = START + PROGRAMS[name][0] + b".", tmp_path / "m.pth"
        if kind == "old format":
            path.write_bytes(OLD_FORMAT + code)
        else:
            torch_zip(path, code, compression=zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED)
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was asked"))
        with pytest.raises(CorruptFile, match="cannot be read as tensors only"):
            hash_model_file(path)

    def test_of_two_records_torch_reads_the_one_that_was_looked_at(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hostile, path = START + PROGRAMS["sets of shared lists"][0] + b".", tmp_path / "m.pth"
        for first, second in ((hostile, b"\x80\x02}."), (b"\x80\x02}.", hostile)):
            torch_zip(path, first)
            with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr("archive/data.pkl", second)
            seen = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
            with pytest.raises(ModelFileError, match=WORK if seen == hostile else "no tensor"):
                hash_model_file(path)
