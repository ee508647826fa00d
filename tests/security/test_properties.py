"""Properties of the header reader and of containment, for whatever hypothesis thinks of."""
from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings, strategies as st
from safetensors import safe_open

from diffsynth_backend.core.loader import safetensors_header
from diffsynth_backend.core.loader.containment import (
    PathRefused,
    check_file_name,
    check_inside,
    check_model_id,
    check_pattern,
    resolve_matches,
)
from diffsynth_backend.core.loader.file import DTYPES, ModelFileError, hash_model_file, read_tensor_infos
from diffsynth_backend.core.loader.safetensors_header import read_header

from . import hostile

QUICK = settings(max_examples=150, deadline=None, derandomize=True, database=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(hostile.WORDS), max_size=6).map("".join))
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
                    max_leaves=10)
SHAPES = st.lists(st.integers(0, 5), max_size=4)
ENTRIES = st.fixed_dictionaries({}, optional={
    "dtype": st.sampled_from([*DTYPES, "F3", ""]) | JSON, "shape": SHAPES | JSON,
    "data_offsets": st.tuples(st.integers(-1, 40), st.integers(-1, 40)) | JSON})


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def sound(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return hostile.safetensors_bytes(header, bytes(end))


# ---- headers --------------------------------------------------------------------------------------------------------

@QUICK
@given(tensors=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]),
                                       max_size=12).filter("__metadata__".__ne__),
                               st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), min_size=1, max_size=6))
def test_sound_headers_are_read(tmp_path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """Names, dtypes, shapes and places, as the format's own library reads them."""
    path = written(tmp_path / "m.safetensors", sound(tensors))
    infos = read_header(str(path)).infos()
    with safe_open(path, "pt") as file:
        assert set(infos) == set(file.keys())
        assert all(list(infos[name].shape) == file.get_slice(name).get_shape() for name in infos)
    assert {name: (info.dtype, list(info.shape)) for name, info in infos.items()} == {
        name: (DTYPES[dtype], shape) for name, (dtype, shape) in tensors.items()}


@QUICK
@given(header=st.dictionaries(NAMES, ENTRIES | JSON, max_size=4) | JSON, size=st.integers(0, 64))
@example(header={"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, size=8)
def test_what_is_accepted_fills_the_file(tmp_path: Path, header: Any, size: int) -> None:
    """Whatever the header says: an error of ours, or tensors that cover all bytes behind it once; and what the format's
    own library refuses is refused."""
    path = written(tmp_path / "m.safetensors", hostile.safetensors_bytes(header, bytes(size)))
    try:
        infos = read_header(str(path)).infos()
    except ModelFileError:
        return
    covered = sorted((info.offset, info.offset + info.nbytes) for info in infos.values())
    edges = [path.stat().st_size - size, *(end for _, end in covered)]
    assert [begin for begin, _ in covered] == edges[:-1] and edges[-1] == path.stat().st_size
    assert all(info.nbytes == torch.empty(info.shape, dtype=info.dtype,
                                          device="meta").nbytes for info in infos.values())
    if infos:
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(infos)


@QUICK
@given(content=st.binary(max_size=200), length=st.integers(0, 2**64 - 1) | st.integers(0, 200))
def test_bytes_of_any_kind(tmp_path: Path, content: bytes, length: int) -> None:
    path = written(tmp_path / "m.safetensors", struct.pack("<Q", length) + content)
    with pytest.raises(ModelFileError):
        hash_model_file(path)


@QUICK
@given(data=st.data())
def test_no_byte_can_be_lost(tmp_path: Path, data: st.DataObject) -> None:
    """A file cut at any place is refused."""
    whole = sound({"a": ("F32", [3, 2]), "b": ("BF16", [5])})
    path = written(tmp_path / "m.safetensors", whole[:data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ModelFileError):
        read_tensor_infos(path)


SPELLED = [b'{"__metadata__":{"format":"pt"},', b'"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},',
           b'"b":{"dtype":"F32","shape":[],"data_offsets":[24,28]},',
           b'"c":{"dtype":"BF16","shape":[5],"data_offsets":[28,38]}}']
PIECES = [b'"', b",", b":", b"[", b"]", b"{", b"}", b"\\", b"\0", b" ", b"0", b"1", b"00", b"-", b".0", b"\xff",
          b"\xc3\xa4", b"],", b"},", b']},"', b'":{"dtype":"', b'","shape":[', b'],"data_offsets":[', b'"\0F32 ',
          b"F32", b"F16", b"24", b"[24,28]},", b"__metadata__", b"2,3", *SPELLED]


@settings(QUICK, max_examples=3000)
@given(edits=st.lists(st.tuples(st.integers(0, 220), st.integers(0, 30), st.sampled_from([b"", *PIECES])), max_size=3))
@example(edits=[])
def test_the_quick_reader_accepts_nothing_that_the_parser_refuses(edits: list[tuple[int, int, bytes]]) -> None:
    """Whatever is replaced in a header that is spelled as the library does: where both read, they read the same."""
    raw = b"".join(SPELLED)
    for at, length, piece in edits:
        raw = raw[:at] + piece + raw[at + length:]
    quick = safetensors_header._as_written("m", raw, 100, 138)
    assert quick is not None or edits
    if quick is not None:
        entries = safetensors_header._parse("m", raw)
        assert quick.infos() == safetensors_header._check_each("m", entries, 100, 138).infos()


@pytest.mark.parametrize("raw", [
    SPELLED[0], SPELLED[0][:-1] + b"}", b"{}", b"{", b'{"', b'{"__metadata__":',
    b'{"__metadata__":{"a":"}"},' + SPELLED[1],
    b"".join(SPELLED).replace(b'"a"', b'"b"'), b"".join(SPELLED).replace(b'"a"', b'"__metadata__"'),
    b"".join(SPELLED).replace(b"[0,24]", b"[0]").replace(b"[24,28]", b"[24,24,28]"),
    b"".join(SPELLED).replace(b"[2,3]", b"[02,3]"), b"".join(SPELLED).replace(b'"a":{"dtype":"', b'"\0'),
    b"".join(SPELLED).replace(b'"pt"', b'"pt","format":"x"'), b'"' * 5000, b'{"' + b'"' * 5000,
])
def test_the_quick_reader_leaves_to_the_parser(raw: bytes) -> None:
    assert safetensors_header._as_written("m", raw, 100, 138) is None


# ---- containment ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files, and links that leave it."""
    root = tmp_path_factory.mktemp("root")
    inside = root / "models"
    (inside / "a").mkdir(parents=True)
    (root / "secret").mkdir()
    for path in (inside / "x.safetensors", inside / "a/x.pth", root / "secret/secret.safetensors"):
        path.touch()
    try:
        (inside / "models").symlink_to(root / "secret")
    except OSError:
        pytest.skip("this system does not let us make links")
    return inside


def lies_in(base: Path, path: str) -> bool:
    return f"{os.path.realpath(path)}{os.sep}".startswith(f"{os.path.realpath(base)}{os.sep}")


@QUICK
@given(name=NAMES)
@example(name="models/*")
@example(name="a/../x.safetensors")
def test_matches_lie_in_the_base(base: Path, name: str) -> None:
    try:
        matches = resolve_matches(str(base), name)
    except PathRefused:
        return
    assert all(lies_in(base, match) and os.path.lexists(match) for match in matches)


@QUICK
@given(name=NAMES)
def test_what_is_inside_is_inside(base: Path, name: str) -> None:
    path = os.path.join(base, name)
    try:
        check_inside(str(base), path)
    except PathRefused:
        return
    assert lies_in(base, path)


@QUICK
@given(name=NAMES)
def test_accepted_names_are_harmless_on_every_system(name: str) -> None:
    """Joined below a folder by the rules of both systems, they stay there."""
    import ntpath
    import posixpath

    for check in (check_pattern, check_file_name, check_model_id):
        try:
            check(name)
        except PathRefused:
            continue
        for system, folder in ((posixpath, "/base/in"), (ntpath, "C:\\base\\in")):
            joined = system.normpath(system.join(folder, name))
            assert joined.startswith(folder + system.sep) or joined == folder, (check, joined)
        assert not name.startswith("~") and "\0" not in name and "%2" not in name.lower()
        if check is check_file_name:
            assert ntpath.basename(name) == posixpath.basename(name) == name


@QUICK
@given(value=JSON | st.binary(max_size=5))
def test_other_types_are_refused_and_never_crash(value: Any) -> None:
    for check in (check_pattern, check_file_name, check_model_id):
        try:
            assert check(value) == value and isinstance(value, str)
        except PathRefused as error:
            assert "refused" in str(error) and len(str(error)) < 2000


@QUICK
@given(names=st.lists(st.one_of(NAMES, JSON), max_size=5))
def test_indexes(tmp_path: Path, names: list[Any]) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}))
    with pytest.raises((ModelFileError, PathRefused)):
        read_tensor_infos(tmp_path)
