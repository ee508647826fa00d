"""How long it takes to know what a model file is, against opening it as others do.

    python -m benchmarks.hashing [section …] [--repeats N] [--folder DIR]

`shards`: the 9 files of Qwen-Image's transformer in full size (40.9 GB of holes behind true headers). The baseline
opens each with safetensors' `safe_open` and asks the shape of each tensor; it neither checks nor hashes in Python. The
baseline with a hash makes of these shapes what ours gives, and is thus the same work.
`pickle`: a torch.save file of 1 GB, against `torch.load` of it. Everything is a ratio within a turn.

Notable: "cold" forgets the files' pages before each step, off the clock, and in all cases but "cached" ours forgets
what it knows of them then. A hole costs no reading, so on a real disk the cold baseline, where it reads ahead, can be
slower.
"""
from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

from diffsynth_backend.core import hash_model_file
from diffsynth_backend.core.loader import file as loader, model_files, safetensors_header
from diffsynth_backend.core.platform import forget_cached
from tests.helpers.sparse import DIT, makes_holes

from . import harness
from .harness import Case, Seconds, Setup, Step, Target, installed, measure, plain, ratios, say, table

MIB = 1 << 20
PICKLE_TENSORS, PICKLE_TENSOR_BYTES = 250, 4 * MIB


def shards(setup: Setup) -> None:
    """The hash of the full-size layout in 9 files."""
    if not makes_holes(setup.folder):
        say("shards: skipped, the folder's file system has no sparse files")
        return
    files = DIT.write(setup.folder)
    flush(files)
    if hash_model_file(files) != DIT.model_hash:
        raise RuntimeError("the layout that was written has not the registered hash")
    if hash_shapes(files) != DIT.model_hash:
        raise RuntimeError("the baseline with a hash has another one")
    steps = {"baseline": partial(ask_shapes, files), "hashed": partial(hash_shapes, files),
             "ours": partial(hash_model_file, files)}
    steps |= installed({"diffsynth": diffsynth_hash}, files)
    seconds: dict[str, Seconds] = {}
    for state, before in (("warm", do_nothing), ("cold", partial(forget, files))):
        seconds[state] = measure({name: Case(plain(step), partial(forget_known, before) if name == "ours" else before)
                                  for name, step in steps.items()}, setup.turns, 5)
    cached = measure({"baseline": Case(plain(steps["baseline"])), "ours": Case(plain(partial(hash_model_file, files)))},
                     setup.turns, 20)
    rows = [(f"safe_open and the shapes / ours, {state}", ratios(times["baseline"], times["ours"]), Target(bound, True))
            for (state, times), bound in zip(seconds.items(), (1.5, 4.0))]
    rows.append(("safe_open and the shapes / ours, cached", ratios(cached["baseline"], cached["ours"]),
                 Target(50.0, True)))
    rows += [(f"safe_open, the shapes and their hash / ours, {state}", ratios(times["hashed"], times["ours"]), None)
             for state, times in seconds.items()]
    rows += [(f"diffsynth / ours, {state}", ratios(times["diffsynth"], times["ours"]), None)
             for state, times in seconds.items() if "diffsynth" in times]
    table(f"shards: {len(files)} files, {setup.turns} turns", rows)
    say(f"\n(ours, warm: {1000 * min(seconds['warm']['ours']):.1f} ms; cached: {1e6 * min(cached['ours']):.0f} µs)")


def pickle(setup: Setup) -> None:
    """The hash of a pickle of 1 GB."""
    path = str(setup.folder / "model.pth")
    torch.save({f"layer.{i}.weight": torch.rand(PICKLE_TENSOR_BYTES // 4096, 1024) for i in range(PICKLE_TENSORS)},
               path)
    flush([path])
    for state, before in (("warm", do_nothing), ("cold", partial(forget, [path]))):
        seconds = measure({"read": Case(plain(partial(read_pickle, path)), before),
                           "ours": Case(plain(partial(hash_model_file, [path])), partial(forget_known, before))},
                          setup.turns, 1)
        table(f"pickle of {os.path.getsize(path) / MIB:.0f} MiB, {state}, {setup.turns} turns",
              [("torch.load / ours", ratios(seconds["read"], seconds["ours"]), Target(50.0, True))])
        say(f"\n(ours, {state}: {1000 * min(seconds['ours']):.1f} ms)")


# ---- what is measured -----------------------------------------------------------------------------------------------

def ask_shapes(files: Sequence[str]) -> list[tuple[str, list[int]]]:
    shapes = []
    for path in files:
        with safe_open(path, framework="pt", device="cpu") as file:
            shapes += [(name, file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 - no mapping
    return shapes


def hash_shapes(files: Sequence[str]) -> str:
    parts = []
    for name, shape in ask_shapes(files):
        parts += [name, f"{name}:{'_'.join(map(str, shape))}"]
    return hashlib.md5(",".join(sorted(parts)).encode(), usedforsecurity=False).hexdigest()


def forget_known(before: Step) -> None:
    """Ours is to hash files that it has not seen."""
    loader._cached_hash.cache_clear()
    loader._cached_layout.cache_clear()
    loader._cached_header.cache_clear()
    safetensors_header._kind.cache_clear()
    model_files._check_shards.cache_clear()
    before()


def diffsynth_hash(files: Sequence[str]) -> Step:
    from diffsynth.core.loader.file import hash_model_file as theirs

    return partial(theirs, list(files))


def read_pickle(path: str) -> None:
    torch.load(path, map_location="cpu", weights_only=True)


def do_nothing() -> None:
    pass


def forget(files: Sequence[str]) -> None:
    for path in files:
        forget_cached(path)


def flush(files: Sequence[str]) -> None:
    """Put the files on the disk, since pages that are not there yet cannot be forgotten."""
    for path in files:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


# ---- the command ----------------------------------------------------------------------------------------------------

SECTIONS = {"shards": shards, "pickle": pickle}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hashing", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; by default all")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="turns of each comparison")
    parser.add_argument("--folder", metavar="DIR", help="on a disk with 2 GB of room")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    say(harness.machine(torch.device("cpu")))
    for name in arguments.sections or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="hashing-", dir=arguments.folder) as folder:
            SECTIONS[name](Setup(torch.device("cpu"), arguments.repeats, 0, Path(folder)))


if __name__ == "__main__":
    main()
