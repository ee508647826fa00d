"""The corpus: input from strangers, each piece with the way by which it comes in. All of it must be refused.

Notable: files are written where a case runs, not before; a case gets a folder of its own inside the base, and may name
what lies outside of it (`Place.secret`), which nothing may reach.
"""
from __future__ import annotations

import json
import os
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffsynth_backend.configs.model_configs import MODEL_CONFIGS, resolve
from diffsynth_backend.core import ModelConfig
from diffsynth_backend.core.loader.containment import check_file_name, check_inside, check_model_id, resolve_matches
from diffsynth_backend.core.loader.file import check_model_files, hash_model_file, load_state_dict
from diffsynth_backend.core.loader.registry_file import read_registry_file
from diffsynth_backend.core.vram.disk_map import DiskMap
from diffsynth_backend.models.model_loader import check_workflow_files, detect_models
from diffsynth_backend.utils.lora.files import read_lora

from . import hostile


@dataclass(frozen=True)
class Place:
    """`base` is the folder of models, `folder` one inside for the case alone; `secret` a model file beside the base."""

    base: Path
    folder: Path
    secret: Path
    nodes: dict[str, type]
    host: Any


@dataclass(frozen=True)
class Case:
    """`run` must raise an error of ours, or return the words with which a node refuses."""

    name: str
    run: Callable[[Place], str | None]


def cases() -> list[Case]:
    makers = (model_ids, patterns, names, links, file_lists, indexes, headers, attacks, pickles, loras, registries,
              workflows)
    return [Case(f"{maker.__name__}: {name}", run) for maker in makers for name, run in maker()]


Found = Iterator[tuple[str, Callable[[Place], Any]]]


# ---- names ----------------------------------------------------------------------------------------------------------

ESCAPES = (
    "../secret.safetensors", "../../etc/passwd", "a/../../secret.safetensors", "..", "../", ".. /x", "..  ", ". ./x",
    "/etc/passwd", "//etc/passwd", "///etc/passwd", "//host/share/x.safetensors", "\\\\host\\share\\x", "\\etc\\passwd",
    "..\\secret.safetensors", "a\\..\\..\\x", "C:/x.safetensors", "c:x", "C:\\x", "file:///etc/passwd",
    "x.safetensors:stream", "x.safetensors\0.png", "\0", "x\n.safetensors", "x\r", "\x1b[2Jx", "\x7f", "x\x85y",
    "%2e%2e/secret.safetensors", "%2E%2E%2Fsecret.safetensors", "..%2fx", "%00", "~/x.safetensors", "~root/x",
    "\u202ex.safetensors", "x\u200b.safetensors", "\ud800x", "CON", "nul.safetensors", "com1/x", "x/LPT9.bin",
    "aux .txt",
    "x. ", "folder./x", "./x", "a/./b", "...", "x/...", "a" * 5000, "../" * 300 + "etc/passwd", "\ufeffx", "a/..",
)


def model_ids() -> Found:
    owners = ("Qwen", "a/b/c", "/x", "x/", "x//y", ".a/b", "a/b.", "a--b/c", "a/b.git", "a/b?c", "a/b c", "a/b#c",
              "x/con", "https://huggingface.co/a/b", "datasets/a/b/c", "x/" + "y" * 5000, "", "a/b\nc", "a/$(id)")
    for text in (*owners, *(text for text in ESCAPES if text not in ("a/./b",))):
        yield repr(text)[:60], lambda place, text=text: check_model_id(text)
    for value in (None, 3, [], {}, b"a/b", ["a/b"]):
        yield repr(value), lambda place, value=value: check_model_id(value)


def patterns() -> Found:
    for text in ESCAPES:
        yield repr(text)[:60], lambda place, text=text: ModelConfig(
            model_id="owner/name", origin_file_pattern=text, local_model_path=str(place.base),
            skip_download=True).download_if_necessary()
    for text in ("../*", "**/../../*", "*/../../secret*", "leave*", "out/*", "*/secret.safetensors", "o*/*", "out/",
                 "*/*/*"):
        yield f"below the base {text!r}", lambda place, text=text: resolve_matches(str(place.base), text)
    for text in ("[.][.]/*", ".[.]/*", ".?/secret*", "[!a][!a]/secret*"):
        yield f"wildcards for dots {text!r}", lambda place, text=text: _nothing(resolve_matches(str(place.base), text))


def _nothing(matches: list[str]) -> str:
    """To find nothing is as good as a refusal."""
    return "accepted" if matches else "nothing matches outside of the base"


def names() -> Found:
    for text in (*ESCAPES[:30], "*", "a?b", "[ab].safetensors", "a/b.safetensors", "", None, 3):
        yield repr(text)[:60], lambda place, text=text: check_file_name(text)


def links() -> Found:
    for name in ("leave.safetensors", "out/secret.safetensors", "loop.safetensors", "../outside/secret.safetensors",
                 "x\0y", "\ud800", "device.safetensors"):
        yield repr(name), lambda place, name=name: [
            check_inside(str(place.base), os.path.join(place.base, name)), check_model_files(str(place.base / name))]


# ---- lists of files -------------------------------------------------------------------------------------------------

def file_lists() -> Found:
    for value in (None, [], "", [""], [3], 3, [None], [b"x"], {"a": 1}, [[]], "\0", "gone.safetensors"):
        yield f"list {value!r}", lambda place, value=value: check_model_files(value)
    for name in ("pipe.safetensors", "device.safetensors", "loop.safetensors", "folder.safetensors"):
        yield name, lambda place, name=name: hash_model_file(place.base / name)
    for name in ("m-00001-of-99999999999.safetensors", f"m-1-of-{'9' * 200}.safetensors",
                 "m-00001-of-00000.safetensors",
                 "m-5-of-2.safetensors", f"m-{'7' * 200}-of-3.safetensors", "m-00002-of-01000.safetensors"):
        yield name[:60], lambda place, name=name: check_model_files(_file(place, name, b"x"))
    yield "ten thousand times", lambda place: check_model_files([_file(place, "m.safetensors", b"x")] * 20_000)


def indexes() -> Found:
    listed: list[Any] = [
        "../outside/secret.safetensors", "/etc/passwd", "x.py", "x.pth", "..", "a/b.safetensors", "x.safetensors\0",
        "*",
        "C:x.safetensors", "..\\x.safetensors", "~.safetensors", "\ud800.safetensors", 3, None, ["x"], {"a": "b"}, "",
        "nul.safetensors", "x" * 5000 + ".safetensors", "gone.safetensors"]
    for name in listed:
        yield f"lists {name!r:.50}", lambda place, name=name: _index(place, {"weight_map": {"w": name}})
    for content in ([], {}, {"weight_map": 3}, {"weight_map": []}, "x", None, {"weight_map": {}}, b"[" * 10**5,
                    b"\xff\xfe",
                    b" " * 5_000_001, {"weight_map": {str(i): f"{i}.safetensors" for i in range(5000)}}):
        yield f"{content!r:.50}", lambda place, content=content: _index(place, content)


def _index(place: Place, content: Any) -> Any:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    _file(place, "m.safetensors.index.json", raw)
    return check_model_files(place.folder)


# ---- safetensors ----------------------------------------------------------------------------------------------------

def tensor(begin: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LARGE = 4_900_000  # bytes of header, just below what is allowed


def headers() -> Found:
    unsound: dict[str, tuple[Any, int]] = {
        "overlap": ({"a": tensor(), "b": tensor(4, 12)}, 12), "hole": ({"a": tensor(), "b": tensor(16, 24)}, 24),
        "data missing": ({"a": tensor()}, 0), "data left over": ({"a": tensor()}, 9),
        "beyond the file": ({"a": tensor(2**40, 2**40 + 8)}, 8), "negative": ({"a": tensor(-8, 0)}, 8),
        "negative shape": ({"a": tensor(shape=[-1, -2])}, 8),
        "product overflows": ({"a": tensor(shape=[2**32] * 4)}, 8),
        "zero hides size": ({"a": tensor(0, 0, shape=[2**62, 2**62, 0])}, 0), "huge": ({"a": tensor(shape=[2**70])}, 8),
        "fraction": ({"a": tensor(shape=[2.0])}, 8), "true": ({"a": tensor(shape=[True, 2])}, 8),
        "infinite": ({"a": tensor(shape=[float("inf")])}, 8), "text shape": ({"a": tensor(shape="2")}, 8),
        "object shape": ({"a": tensor(shape={"2": 1})}, 8), "null": ({"a": None}, 8), "number": ({"a": 1}, 8),
        "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8), "unknown dtype": ({"a": tensor(dtype="F3")}, 8),
        "dtype of torch": ({"a": tensor(dtype="float32")}, 8), "dtype list": ({"a": tensor(dtype=["F32"])}, 8),
        "dtype dunder": ({"a": tensor(dtype="__class__")}, 8),
        "three offsets": ({"a": {**tensor(), "data_offsets": [0, 8, 8]}}, 8),
        "offsets text": ({"a": {**tensor(), "data_offsets": "08"}}, 8),
        "64 dimensions": ({"a": tensor(shape=[1] * 65)}, 4),
        "a million dimensions": ({"a": tensor(shape=[2**62] * 100_000)}, 8), "only metadata": ({"__metadata__": {}}, 0),
        "empty": ({}, 0), "list": ([], 0), "text": ("x", 0), "nothing": (b"", 0), "not JSON": (b"{", 0),
        "trailing": (b"{}{}", 0), "not text": (b'{"\xff": 1}', 0), "comment": (b"{/**/}", 0),
        "same name twice": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":1}', 8),
        "deep": (b'{"a":' * 100_000, 0), "deep lists": (b"[" * LARGE, 0),
        "lists": (b"[" + b"[]," * (LARGE // 3) + b"[]]", 0),
        "objects": (b"[" + b"{}," * (LARGE // 3) + b"{}]", 0), "quotes": (b'"' * LARGE, 0),
        "escapes": (b'"' + b'\\"' * (LARGE // 2), 0),
        "backslashes": (b"\\" * LARGE, 0), "integers": (b'{"a":[' + b"257," * (LARGE // 4) + b"1]}", 0),
        "a number of a million digits": (b'{"a":' + b"9" * 1_000_000 + b"}", 0), "spaces": (b" " * LARGE, 0),
        "texts": (b'{"a":[' + b'"ab",' * (LARGE // 5) + b'""]}', 0),
        "many names": (json.dumps({f"{i:x}": 1 for i in range(LARGE // 10)}).encode(), 0),
        "many names, the last twice": (json.dumps({f"{i:x}": 1 for i in range(200_000)}).encode()[:-1] + b',"0":1}', 0),
    }
    for name, (header, size) in unsound.items():
        yield name, lambda place, header=header, size=size: _safetensors(place,
                                                                         hostile.safetensors_bytes(header, bytes(size)))
    for length in (0, 1, 7, 2**31, 2**32, 2**63, 2**64 - 1, 100_000_000, 5_000_001):
        yield f"length {length}", lambda place, length=length: _safetensors(place, struct.pack("<Q", length) + b"{}")
    for content in (b"", b"\0", b"\0" * 7, b"\0" * 8, b"\0" * 100, b"PK\3\4" + b"\0" * 100, b"GGUF" * 10,
                    b"<html>404</html>"):
        yield f"file {content!r:.40}", lambda place, content=content: _safetensors(place, content)
    yield "header of a sparse gigabyte", _sparse_header
    for seed in range(20):
        yield f"mutated {seed}", lambda place, seed=seed: _mutated(place, seed)


def _safetensors(place: Place, content: bytes) -> Any:
    path = _file(place, "m.safetensors", content)
    return [hash_model_file(path), load_state_dict(path), DiskMap(path)]


def _sparse_header(place: Place) -> Any:
    path = _file(place, "m.safetensors", struct.pack("<Q", 10**9))
    _grow(path, 10**9 + 8)
    return hash_model_file(path)


def _mutated(place: Place, seed: int) -> Any:
    """Mutations that leave a sound file are followed by one that does not."""
    rng = random.Random(seed)
    content = hostile.mutated_header(rng)
    _safetensors(place, content)
    return _safetensors(place, content + b"\0")


# ---- pickles --------------------------------------------------------------------------------------------------------

def attacks() -> Found:
    for number, (function, *arguments) in enumerate(hostile.ATTACKS):
        for new in (True, False):
            yield f"{number} {function.__name__} {'zip' if new else 'old'}", (
                lambda place, call=(function, *arguments), new=new: _attack(place, call, new))


def _attack(place: Place, call: tuple[Any, ...], new: bool) -> Any:
    path = place.folder / "m.pth"
    torch.save({"w": torch.ones(2), "x": hostile.Attack(*call)}, path, _use_new_zipfile_serialization=new)
    for read in (hash_model_file, load_state_dict, DiskMap, check_workflow_files):
        try:
            read(path)
        except ValueError as error:
            refusal = error
        else:
            return None
    raise refusal


N = 990_000  # bytes of description, just below what is allowed


def pickles() -> Found:
    descriptions = {
        "lists": b"]" * N, "dictionaries": b"}" * N, "marks": b"(" * N, "memo": b"}" + b"q\0" * (N // 2),
        "sets of sizes": b"ctorch\nSize\nq\0" + b"h\0)R" * (N // 4), "floats": b"G\0\0\0\0\0\0\0\0" * (N // 9),
        "ordered": b"ccollections\nOrderedDict\nq\0" + b"h\0)R" * (N // 4), "pops": b"0" * N, "nothing": b"",
        "a global": b"cos\nsystem\nX\x02\0\0\0idq\0\x85R", "builtins": b"cbuiltins\neval\nX\x01\0\0\x001\x85R",
        "extension": b"\x82\x01", "persistent": b"Px\n", "frame": b"\x95" + b"\xff" * 8,
        "long": b"\x8b\xff\xff\xff\x7f",
        "bytes": b"B\xff\xff\xff\x7f", "text": b"X\xff\xff\xff\x7f", "binary put": b"]r\xff\xff\xff\xff",
        "torch.load": b"ctorch\nload\nX\x05\0\0\0m.pth\x85R", "numpy": b"cnumpy\nload\n)R",
        "getattr": b"cbuiltins\ngetattr\n)R",
        "dunder": b"ctorch._utils\n__builtins__\n)R", "dotted": b"ctorch\nserialization.os.system\n)R",
        "codecs": b"c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0rot13\x86R",
        "a key of pairs of pairs": b")q\0" + b"h\0h\0\x86q\0" * 60 + b"}h\0Ns",
        "a deep key": b"})" + b"\x85" * (N // 8) + b"Ns",
        "any size": b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
        "tensor": b"ctorch\nFloatTensor\nJ\0\0\0\x7f\x85R",
        "sets": b"c__builtin__\nset\nq\0](" + b"N" * 20_000 + b"eq\1" + b"h\0h\1\x85R" * (N // 8),
    }
    for name, description in descriptions.items():
        yield f"steps: {name}", lambda place, description=description: _described(place,
                                                                                  b"\x80\x02" + description + b".")
    yield "shared dictionaries", lambda place: _described(place, hostile.shared_dictionaries(40))
    yield "shared dictionaries, wide", lambda place: _described(place, hostile.shared_dictionaries(30, 20))
    yield "endless", lambda place: _described(place, b"\x80\x02}q\0X\x01\0\0\0ah\0s.")
    yield "a large description", lambda place: _described(place, b"\x80\x02" + b"N0" * 600_000 + b"N.")
    records = {"version": b"3" * 2_000_000, "byteorder": b"x" * 2_000_000, "constants.pkl": b"N.",
               ".format_version": b"1" * 2_000_000}
    for name, content in records.items():
        yield f"record {name}", lambda place, name=name, content=content: _described(place, b"}.", {name: content})
    yield "compressed a thousand times", lambda place: _described(
        place, b"}.", {"data/0": bytes(40_000_000)}, compression=zipfile.ZIP_DEFLATED)
    yield "compressed description", lambda place: _described(
        place, b"\x80\x02" + b"]" * N + b".", compression=zipfile.ZIP_DEFLATED)
    yield "names that climb", lambda place: _described(place, b"}.", {"../../outside/x": b"x", "/etc/x": b"y"})
    yield "forty thousand records", lambda place: _described(place, b"}.", {f"data/{i}": b"" for i in range(40_000)})
    yield "old format without end", lambda place: _old(place, b"]" * 2_000_000)
    yield "old format, deep", lambda place: _old(place, b"]" + b"(]" * 100_000)
    yield "tar", _tar
    yield "text", lambda place: _read_all(_file(place, "m.pth", b"print('hello')\n"))
    yield "list", lambda place: _saved(place, [torch.ones(1)])
    yield "tensor", lambda place: _saved(place, torch.ones(1))
    yield "no tensor", lambda place: _saved(place, {"a": 1})
    yield "nested forty times", lambda place: _saved(place, _nested(40))
    yield "two of a name", lambda place: _saved(place, {"a": {"b": torch.ones(1)}, "a|b": torch.ones(2)})
    yield "unknown, from a workflow", lambda place: check_workflow_files(_save(place, {"w": torch.ones(1)}))


def _described(place: Place, description: bytes, records: dict[str, bytes] | None = None, **options: Any) -> Any:
    return _read_all(hostile.torch_zip(place.folder / "m.pth", description, records, **options))


def _old(place: Place, steps: bytes) -> Any:
    """The old format's magic number and version, and then these steps in place of the state dict."""
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}q\x00."
    return _read_all(_file(place, "m.pth", magic + b"\x80\x02" + steps + b"."))


def _tar(place: Place) -> Any:
    import tarfile

    with tarfile.open(place.folder / "m.pth", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(_file(place, "part", b"\x80\x02cos\nsystem\n."), name)
    return _read_all(place.folder / "m.pth")


def _nested(levels: int) -> dict[str, Any]:
    content: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(levels):
        content = {"a": content, "b": torch.ones(1)}
    return content


def _save(place: Place, content: Any) -> Path:
    torch.save(content, place.folder / "m.pth")
    return place.folder / "m.pth"


def _saved(place: Place, content: Any) -> Any:
    return _read_all(_save(place, content))


def _read_all(path: Path) -> Any:
    return [hash_model_file(path), load_state_dict(path)]


# ---- LoRA and registry files ----------------------------------------------------------------------------------------

def loras() -> Found:
    contents: dict[str, dict[str, list[int]]] = {
        "half": {"a.lora_A.weight": [4, 8]},
        "ranks differ": {"a.lora_A.weight": [4, 8], "a.lora_B.weight": [8, 5]},
        "no rank": {"a.lora_A.weight": [0, 8], "a.lora_B.weight": [8, 0]},
        "a vector": {"a.lora_A.weight": [4], "a.lora_B.weight": [8]},
    }
    for name, shapes in contents.items():
        yield name, lambda place, shapes=shapes: read_lora(_lora(place, shapes), safetensors_only=True)
    yield "pickle", lambda place: read_lora(_save(place, {"a.lora_A.weight": torch.ones(1)}), safetensors_only=True)
    yield "too large", _large_lora
    yield "as a model", lambda place: detect_models(_lora(place,
                                                          {"a.lora_A.weight": [4, 8], "a.lora_B.weight": [8, 4]}))


def _lora(place: Place, shapes: dict[str, list[int]]) -> Path:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name] = tensor(end, end + size, shape)
        end += size
    return _file(place, "lora.safetensors", hostile.safetensors_bytes(header, bytes(end)))


def _large_lora(place: Place) -> Any:
    size = 40 << 30
    path = _file(place, "lora.safetensors", hostile.safetensors_bytes({"a.lora_A.weight": tensor(0, size,
                                                                                                 [size // 4])}))
    _grow(path, path.stat().st_size + size)
    return read_lora(path, safetensors_only=True)


ROW = {"model_hash": "0" * 32, "model_name": "mine", "model_class": "models.qwen_image_dit.QwenImageDiT"}


def registries() -> Found:
    changes: list[dict[str, Any]] = [
        {"model_class": "os.system"}, {"model_class": "builtins.exec"}, {"model_class": "torch.load"},
        {"model_class": ""},
        {"model_class": "models.qwen_image_dit.__builtins__"}, {"model_class": "..x"}, {"model_class": ["os.system"]},
        {"state_dict_converter": "os.system"}, {"state_dict_converter": "torch.hub.load"}, {"state_dict_converter": {}},
        {"extra_kwargs": {"__class__": "x"}}, {"extra_kwargs": {"num_layers": 10**12}}, {"extra_kwargs": "x"},
        {"extra_kwargs": {"num_layers": {"a": 1}}}, {"extra_kwargs": {"axes_dims_rope": [10**9]}}, {"model_hash": 3},
        {"model_hash": "0" * 33}, {"model_name": "a\n"}, {"model_name": "x" * 5000}, {"more": 1}]
    for change in changes:
        yield f"{change!r:.60}", lambda place, change=change: _registry(place, {"models": [{**ROW, **change}]})
    for content in ([], 3, {"models": {}}, {"models": [[]]}, {"models": [{}] * 5000}, b"[" * 10**6, b"\xff",
                    b"x" * 2_000_000):
        yield f"{content!r:.40}", lambda place, content=content: _registry(place, content)
    for name in ("pipe.safetensors", "device.safetensors", "vae", "gone.json"):
        yield f"is {name}", lambda place, name=name: read_registry_file(str(place.base / name), MODEL_CONFIGS, resolve)


def _registry(place: Place, content: Any) -> Any:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return read_registry_file(str(_file(place, "registry.json", raw)), MODEL_CONFIGS, resolve)


# ---- workflows ------------------------------------------------------------------------------------------------------

def workflows() -> Found:
    """Values of widgets, first as ComfyUI checks them, then, as if it had not, as the node gets them."""
    entries = [f"{folder}{name}" for folder in ("vae/", "diffusion_models/", "") for name in (
        "../../outside/secret.safetensors", "/etc/passwd", "..\\..\\outside\\secret.safetensors", "leave.safetensors",
        "out/secret.safetensors", "x.safetensors\0", "secret.pth", "%2e%2e/secret.safetensors", "", "\ud800", "~/x",
        "C:/x")]
    for entry in entries:
        yield f"model {entry!r:.50}", lambda place, entry=entry: _node(place, "ModelConfig", model=entry)
        yield f"path {entry!r:.50}", lambda place, entry=entry: place.host.model_path(entry)
    for entry in ("loras/../../outside/secret.safetensors", "loras/leave.safetensors", "loras//etc/passwd",
                  "vae/x.safetensors",
                  "demo/../../x", "loras/\0", "loras/x.pth"):
        yield f"lora {entry!r}", lambda place, entry=entry: _node(place, "LoraLoader", lora=entry)
        yield f"lora path {entry!r}", lambda place, entry=entry: place.host.lora_path(entry)
    for prefix in ("../x", "/etc/x", "a/../../x", "\0", "x/../../../y", "out/x"):
        yield f"output {prefix!r}", lambda place, prefix=prefix: place.host.output_file(prefix, ".safetensors")


def _node(place: Place, name: str, **widgets: Any) -> str:
    """The words of its check, or if that lets the value pass, what comes of it."""
    answer = place.nodes[name].validate_inputs(**widgets)
    if answer is True:
        more = {"pipeline": None, "strength": 1.0} if name == "LoraLoader" else {}
        place.nodes[name].execute(**widgets, **more)
    return answer


def _grow(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


def _file(place: Place, name: str, content: bytes) -> Path:
    path = place.folder / name
    path.write_bytes(content)
    return path
