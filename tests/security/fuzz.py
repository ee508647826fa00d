"""Feeds the loader mutated input for as long as it is told to: `python -m tests.security.fuzz --minutes 10 [--seed N]`.

Whatever is fed in, what comes out must be a result or an error of this package, in less than a second of this
process's time. Prints what was tried, and for a finding its seed. Run by hand; the tests of this folder feed less.
"""
from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from diffsynth_backend.configs.model_configs import MODEL_CONFIGS, resolve
from diffsynth_backend.core.loader.containment import PathRefused, check_file_name, check_model_id, resolve_matches
from diffsynth_backend.core.loader.file import (
    ModelFileError,
    check_model_files,
    hash_model_file,
    load_state_dict,
    read_tensor_infos,
)
from diffsynth_backend.core.loader.registry_file import read_registry_file
from tests.security import hostile

OURS = (ModelFileError, PathRefused)
SECONDS = 1.0
STEPS = b"(.0123FIJKLMNPQRSTUVX]abcdeghijloprstu}\x80\x81\x85\x86\x87\x88\x89\x8a\x8c\x93\x94\x95)q"  # of pickles


def feed_headers(rng: random.Random, folder: Path) -> None:
    path = folder / "m.safetensors"
    path.write_bytes(hostile.mutated_header(rng))
    hash_model_file(path)
    load_state_dict(path)


def feed_damaged_headers(rng: random.Random, folder: Path) -> None:
    path = folder / "m.safetensors"
    header, size = hostile.sound_header(rng)
    path.write_bytes(hostile.flipped(rng, hostile.safetensors_bytes(header, bytes(size))))
    read_tensor_infos(path)
    load_state_dict(path)


def feed_pickles(rng: random.Random, folder: Path) -> None:
    path = folder / "m.pth"
    torch.save({f"w{i}": torch.zeros(i, 2) for i in range(3)}, path,
               _use_new_zipfile_serialization=rng.random() < 0.7)
    path.write_bytes(hostile.flipped(rng, path.read_bytes()))
    hash_model_file(path)
    load_state_dict(path)


def feed_descriptions(rng: random.Random, folder: Path) -> None:
    steps = bytes(rng.choice(STEPS) if rng.random() < 0.8 else rng.randrange(256) for _ in range(rng.randint(1, 60)))
    description = b"\x80\x02}q\x00" + steps + b"."
    hash_model_file(hostile.torch_zip(folder / "m.pth", description, {"data/0": bytes(16)}))


def feed_damaged_descriptions(rng: random.Random, folder: Path) -> None:
    content = {"w": torch.ones(3, 4), "inner": {"x": [torch.ones(2).t()], "n": 1}}
    description = bytearray(hostile.description_of(content))
    for _ in range(rng.randint(1, 3)):
        at, other = rng.randrange(len(description)), rng.randrange(len(description))
        damage = rng.choice([bytes([rng.choice(STEPS)]), bytes([rng.randrange(256)]),
                             description[other:other + rng.randint(1, 12)]])
        description[at:at + rng.randint(0, 6)] = damage
    compression = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    hash_model_file(hostile.torch_zip(folder / "m.pth", bytes(description), {"data/0": bytes(48), "data/1": bytes(8)},
                                      compression=compression))
    load_state_dict(folder / "m.pth")


def feed_names(rng: random.Random, folder: Path) -> None:
    name = hostile.text(rng)
    for check in (check_model_id, check_file_name):
        try:
            check(name)
        except PathRefused:
            continue
    for match in resolve_matches(str(folder), name):
        assert os.path.realpath(match).startswith(str(folder)), match


def feed_indexes(rng: random.Random, folder: Path) -> None:
    (folder / "index").mkdir(exist_ok=True)
    names = {hostile.text(rng): rng.choice([hostile.text(rng, 3), hostile.value(rng)])
             for _ in range(rng.randint(0, 5))}
    (folder / "index/m.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    check_model_files(folder / "index")


def feed_registry_files(rng: random.Random, folder: Path) -> None:
    row = {"model_hash": "0" * 32, "model_name": "qwen_image_dit", "model_class": "models.qwen_image_dit.QwenImageDiT",
           "extra_kwargs": {"num_layers": 2}}
    for _ in range(rng.randint(1, 3)):
        target = rng.choice([row, row["extra_kwargs"] if isinstance(row.get("extra_kwargs"), dict) else row])
        target[rng.choice([*row, "num_layers", "axes_dims_rope", hostile.text(rng, 2)])] = rng.choice(
            [hostile.value(rng), "os.system", "models.qwen_image_dit.__builtins__", hostile.text(rng, 2)])
    (folder / "registry.json").write_text(json.dumps({"models": [row]}))
    read_registry_file(str(folder / "registry.json"), MODEL_CONFIGS, resolve)


FEEDS: dict[str, Callable[[random.Random, Path], None]] = {
    function.__name__.removeprefix("feed_"): function
    for function in (feed_headers, feed_damaged_headers, feed_pickles, feed_descriptions,
                     feed_damaged_descriptions, feed_names, feed_indexes,
                     feed_registry_files)}


def feed_once(kind: str, seed: int, folder: Path) -> str:
    """What came of it: "accepted", "refused", "slow" or the name of a foreign error, with its traceback on stderr."""
    began = time.process_time()
    try:
        FEEDS[kind](random.Random(f"{kind}{seed}"), folder)
        outcome = "accepted"
    except OURS:
        outcome = "refused"
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        traceback.print_exc()
        outcome = type(error).__name__
    return outcome if time.process_time() - began < SECONDS else "slow"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="the first one; each round takes the next")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", "Detected pickle protocol")
    torch.set_num_threads(1)
    outcomes: Counter[tuple[str, str]] = Counter()
    findings: list[tuple[str, int, str]] = []
    seed, end = args.seed, time.monotonic() + args.minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        while time.monotonic() < end:
            for kind in FEEDS:
                outcome = feed_once(kind, seed, Path(folder).resolve())
                outcomes[kind, outcome] += 1
                if outcome not in ("accepted", "refused"):
                    findings.append((kind, seed, outcome))
                if Path(hostile.MARKER).exists():
                    findings.append((kind, seed, "ran code"))
            seed += 1
        os.chdir("/")
    for (kind, outcome), count in sorted(outcomes.items()):
        sys.stdout.write(f"{kind:<16} {outcome:<10} {count}\n")
    sys.stdout.write(f"{sum(outcomes.values())} inputs, {len(findings)} findings: {findings[:20]}\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
