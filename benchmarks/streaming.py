"""How near streaming comes to what the machine allows, and what others need for the same work.

    python -m benchmarks.streaming [section …] [--device cpu|cuda] [--repeats N] [--layers N] [--folder DIR]

A step can be no shorter than its computation nor than the reading of its weights. Both limits are measured beside the
engine, in turns, and everything is a ratio to them. Run by hand on a machine that does nothing else; never by tests.

Notable: the layers of the first sections take 10 ms of simulated device time instead of a matrix product, so the
machine's own arithmetic plays no part. They do look at a value in each page of their weights, since packages that map
files would read nothing otherwise. A layer has a file of its own, like a shard, so that "cold" can be had layer by
layer: the engine reads ahead across the end of a step, so a layer forgets its file after its use, within its own 10 ms.
Others read when they are called; all files are forgotten between their steps. Files lie in a new folder below --folder
(by default the system's temporary one; not on a disk in memory), and are removed.
"""
from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from diffsynth_backend.core.device import GIB
from diffsynth_backend.core.platform import forget_cached
from diffsynth_backend.core.vram import (
    AutoWrappedLinear,
    AutoWrappedModule,
    DiskMap,
    Loop,
    Residency,
    enable_vram_management,
    skip_model_initialization,
)
from diffsynth_backend.core.vram.placement import ResidencyBudget
from diffsynth_backend.core.vram.presets import vram_preset
from diffsynth_backend.core.vram.timestep_table import Schedule
from diffsynth_backend.models.model_loader import ModelPool
from tests.helpers.sparse import DIT, makes_holes, write_sparse

from . import harness
from .cuda import cuda
from .harness import STEPS, Case, Row, Seconds, Setup, Step, Target, measure, plain, ratios, say, table

BF16 = torch.bfloat16
DEVICE_SECONDS = 0.010  # of a simulated layer
WIDTH, INNER = 3072, 12288  # Qwen-Image's MLP: 75.5 MB in bf16
PAGE = 2048  # bf16 values
LEAVES, LEAF_WIDTH = 1000, 64
ROOMS = {"a ring of 3 leaves": LEAF_WIDTH, "a ring of 768": 256 * LEAF_WIDTH}  # by the width of the first leaf
SOAK_WARM_UP, SOAK_STEPS = 30, 50
WAITING = (0, 0.5, 1)  # parts of the weights
PAGE_KIB = 4  # memory is counted in pages: a step that grows by less has lost no weights


# ---- the simulated model --------------------------------------------------------------------------------------------

class SimulatedLinear(nn.Linear):
    """Keeps the device busy for DEVICE_SECONDS once its weight is there, and forgets its file meanwhile if it has one.
    """

    file: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        float(self.weight.view(-1)[::PAGE].sum())
        began = time.perf_counter()
        if self.file is not None:
            forget_cached(self.file)
        time.sleep(max(0.0, DEVICE_SECONDS - (time.perf_counter() - began)))
        return x


def write(path: Path, layout: Mapping[str, Tensor]) -> str:
    """A file of random weights."""
    write_sparse(path, layout, {name: torch.rand(tensor.shape, dtype=BF16) for name, tensor in layout.items()})
    return str(path)


def layer_files(setup: Setup) -> DiskMap:
    layout = simulated_model(setup).state_dict()
    paths = [write(setup.folder / f"{name}.safetensors", {name: layout[name]}) for name in layout]
    settle(setup.folder)
    return DiskMap(paths)


def settle(folder: Path) -> None:
    """Have all that was written to files be on the disk, so that nothing is written while something is measured."""
    for path in files_below(folder):
        with open(path, "r+b") as file:
            os.fsync(file.fileno())


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def simulated_model(setup: Setup) -> nn.Sequential:
    with skip_model_initialization():
        layers = [SimulatedLinear(WIDTH, INNER, bias=False, dtype=BF16) for _ in range(setup.layers)]
    return nn.Sequential(*layers).requires_grad_(False)


def with_weights(model: nn.Module, source: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    model.load_state_dict({name: source[name].to(device) for name in source}, assign=True)
    return model.requires_grad_(False)


def managed(model: nn.Module, source: DiskMap, device: torch.device,
            vram_limit: float | ResidencyBudget | None = 0) -> nn.Module:
    wrappers = {SimulatedLinear: AutoWrappedModule, nn.Linear: AutoWrappedLinear}
    return enable_vram_management(model, wrappers, vram_preset("disk", BF16, device), vram_limit, source)


def forget_all(folder: Path) -> bool:
    """Have all files be read from the disk next time; False where the system cannot do that."""
    return all(forget_cached(str(path)) for path in files_below(folder))


def temperatures(setup: Setup, model: nn.Module, source: DiskMap) -> Iterator[tuple[str, Step | None]]:
    """With the files in memory, and not: then each layer of `model` forgets its own, and the function given all."""
    yield "warm", None
    if not forget_all(setup.folder):
        say("This system has no way to forget a file's cached pages: only warm figures.")
        return
    for layer, file in zip(model, source.paths, strict=True):
        layer.file = file
    yield "cold", partial(forget_all, setup.folder)


# ---- cases ----------------------------------------------------------------------------------------------------------

def streamed(model: nn.Module, x: Tensor, sides: int = 1, together: bool = True) -> Case:
    """Ours. One step more than is run is announced: as much is read ahead at the last step's end as at the first's."""
    residency, runs = Residency([model]), runs_of(model, x, sides, together)

    @contextmanager
    def enter() -> Iterator[Step]:
        with torch.no_grad(), residency.loop(Loop((1 + STEPS + 1) * len(runs), len(runs[0]))):
            yield lambda: [residency.run(run) for run in runs]

    return Case(enter)


def single(model: nn.Module, x: Tensor) -> Step:
    """Ours from nothing: a plan, a ring and one pass, of which nothing is known before."""
    def step() -> None:
        residency = Residency([model])
        with torch.no_grad(), residency.loop(Loop(1)):
            residency.run([partial(model, x)])

    return step


def runs_of(model: nn.Module, x: Tensor, sides: int, together: bool) -> list[list[Step]]:
    """The forward passes of a step: those of all sides in one run, or each in a run of its own."""
    return [[partial(model, x)] * sides] if together else [[partial(model, x)]] * sides


def pure_read(source: DiskMap) -> Step:
    """All bytes, by one thread, into one buffer."""
    buffer = torch.empty(max(source.nbytes(name) for name in source), dtype=torch.uint8)
    return lambda: [source.read_into(name, buffer[:source.nbytes(name)]) for name in source]


def synchronous(setup: Setup, files: list[str], copied: bool) -> nn.Module:
    """safetensors reads each layer when it is called: copied to where it computes or, for the CPU, just mapped."""
    layers = simulated_model(setup)

    def read(layer: nn.Module, _: object, file: str, name: str) -> None:
        with safe_open(file, "pt", str(setup.device)) as opened:
            weight = opened.get_tensor(name)
        layer.weight = nn.Parameter(weight.clone() if copied else weight, requires_grad=False)

    def drop(layer: nn.Module, *_: object) -> None:
        layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)

    for index, (layer, file) in enumerate(zip(layers, files, strict=True)):
        layer.register_forward_pre_hook(partial(read, file=file, name=f"{index}.weight"))
        layer.register_forward_hook(drop)
    return layers


# ---- peers: packages that are measured where they are installed -----------------------------------------------------

def diffsynth(setup: Setup, source: DiskMap, x: Tensor, forget: Step | None) -> Case:
    from diffsynth.core import vram

    disk_map = vram.DiskMap(source.paths, "cpu")
    config = {f"{state}_{part}": "disk" for state in ("offload", "onload", "preparing") for part in ("dtype", "device")}
    model = vram.enable_vram_management(
        simulated_model(setup), {SimulatedLinear: vram.AutoWrappedModule},
        {**config, "computation_dtype": BF16, "computation_device": setup.device}, disk_map=disk_map)
    for layer in model:
        layer.onload()

    def between() -> None:
        disk_map.flush_files()  # what it maps cannot be forgotten
        forget()

    return Case(plain(partial(model, x), disk_map.flush_files), between if forget else None)


def diffusers(setup: Setup, source: DiskMap, x: Tensor, forget: Step | None) -> Case:
    from diffusers.hooks import apply_group_offloading

    model = with_weights(simulated_model(setup), source, torch.device("cpu"))
    apply_group_offloading(model, setup.device, offload_type="leaf_level", use_stream=setup.device.type != "cpu",
                           offload_to_disk_path=tempfile.mkdtemp(dir=setup.folder))
    return Case(plain(partial(model, x)), forget)


def accelerate(setup: Setup, source: DiskMap, x: Tensor, forget: Step | None) -> Case:
    from accelerate import disk_offload

    model = with_weights(simulated_model(setup), source, torch.device("cpu"))
    return Case(plain(partial(disk_offload(model, tempfile.mkdtemp(dir=setup.folder), setup.device), x)), forget)


PEERS = {"diffsynth, disk offload": diffsynth, "diffusers, group offloading to disk": diffusers,
         "accelerate, disk_offload": accelerate}


# ---- sections -------------------------------------------------------------------------------------------------------

def disk(setup: Setup) -> None:
    """Streaming from disk behind simulated computation."""
    source, x = layer_files(setup), torch.zeros(1, device=setup.device)
    model = managed(simulated_model(setup), source, setup.device)
    resident = with_weights(simulated_model(setup), source, setup.device)
    for temperature, forget in temperatures(setup, model, source):
        cases = {"ours": streamed(model, x), "resident": Case(plain(partial(resident, x))),
                 "read": Case(plain(pure_read(source)), forget),
                 "synchronous, copied": Case(plain(partial(synchronous(setup, source.paths, True), x)), forget),
                 "synchronous, mapped": Case(plain(partial(synchronous(setup, source.paths, False), x)), forget),
                 **harness.installed(PEERS, setup, source, x, forget)}
        settle(setup.folder)  # some packages write the weights anew
        report_disk(temperature, measure(cases, setup.turns))


def report_disk(temperature: str, seconds: Seconds) -> None:
    ours, resident, read = (seconds.pop(name) for name in ("ours", "resident", "read"))
    bound = [max(pair) for pair in zip(resident, read)]
    targets = {"synchronous, copied": Target(3, at_least=True)} if temperature == "warm" else {}
    table(f"disk, {temperature}", [
        ("our step / max(computation, pure read)", ratios(ours, bound), Target(1.05 if temperature == "warm" else 1.2)),
        ("pure read / computation", ratios(read, resident), None),
        *((f"step of {name} / ours", ratios(taken, ours), targets.get(name)) for name, taken in seconds.items()),
        ("step of synchronous, copied / max(computation, pure read): what no engine exceeds",
         ratios(seconds["synchronous, copied"], bound), None)])


def single_pass(setup: Setup) -> None:
    """One pass and no more, as of a text encoder: a plan, a ring, and an order that nobody knows yet."""
    source, x = layer_files(setup), torch.zeros(1, device=setup.device)
    model = managed(simulated_model(setup), source, setup.device)
    resident = with_weights(simulated_model(setup), source, setup.device)
    for temperature, forget in temperatures(setup, model, source):
        seconds = measure({"ours": Case(plain(single(model, x)), forget), "resident": Case(plain(partial(resident, x))),
                           "read": Case(plain(pure_read(source)), forget)}, setup.turns)
        pairs = list(zip(seconds["resident"], seconds["read"]))
        table(f"a single pass, {temperature}", [
            ("our pass / max(computation, pure read)", ratios(seconds["ours"], list(map(max, pairs))), None),
            ("our pass / computation and pure read one after the other", ratios(seconds["ours"], list(map(sum, pairs))),
             None)])


def waiting(setup: Setup) -> None:
    """Layers that wait in RAM, where the system keeps nothing of the files."""
    source, x = layer_files(setup), torch.zeros(1, device=setup.device)
    everything = sum(map(source.nbytes, source))
    models = {part: managed(simulated_model(setup), source, setup.device, ResidencyBudget(0, int(part * everything)))
              for part in WAITING}
    if not forget_all(setup.folder):
        say("waiting: skipped, this system has no way to forget a file's cached pages")
        return
    for model in models.values():
        for layer, file in zip(model, source.paths, strict=True):
            layer.file = file
    resident = with_weights(simulated_model(setup), source, setup.device)
    cases = {part: streamed(model, x) for part, model in models.items()}
    seconds = measure({**cases, "resident": Case(plain(partial(resident, x)))}, setup.turns)
    table("layers that wait in RAM, the others cold", [
        (f"our step with {part:.0%} of the weights in RAM / {against}", ratios(seconds[part], seconds[other]), None)
        for against, other in (("without", 0), ("computation", "resident")) for part in WAITING if part != other])


class Leaves(nn.ModuleList):
    """Calls its layers, all with the same input."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            layer(x)
        return x


def leaves(first: int = LEAF_WIDTH) -> Leaves:
    with skip_model_initialization():
        return Leaves(nn.Linear(LEAF_WIDTH, width, bias=False, dtype=BF16)
                      for width in (first, *[LEAF_WIDTH] * (LEAVES - 1))).requires_grad_(False)


def overhead(setup: Setup) -> None:
    """What the engine adds to the reads and calls of layers so small that nothing else counts."""
    threads, x = torch.get_num_threads(), torch.zeros(1, LEAF_WIDTH, dtype=BF16, device=setup.device)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for room, first in ROOMS.items():
        source = DiskMap(write(setup.folder / f"{first}.safetensors", leaves(first).state_dict()))
        added = microseconds_added(setup, streamed(managed(leaves(first), source, setup.device), x),
                                   Case(plain(bare_loop(source, x))))
        rows += [(f"µs added to a streamed leaf, {room}", added, Target(25)),
                 (f"the same in % of a layer of {1e3 * DEVICE_SECONDS:.0f} ms, {room}",
                  [us / (1e4 * DEVICE_SECONDS) for us in added], Target(2))]
    stays = managed(leaves(first), source, setup.device, vram_limit=None)
    added = microseconds_added(setup, streamed(stays, x),
                               Case(plain(partial(with_weights(leaves(first), source, setup.device), x))))
    table("overhead", [*rows, ("µs added to a resident Linear", added, None)])
    torch.set_num_threads(threads)


def microseconds_added(setup: Setup, ours: Case, bare: Case) -> list[float]:
    """By the engine, to each leaf, in each turn."""
    seconds = measure({"ours": ours, "bare": bare}, setup.turns)
    return [1e6 * (ours - bare) / LEAVES for ours, bare in zip(seconds["ours"], seconds["bare"])]


def bare_loop(source: DiskMap, x: Tensor) -> Step:
    """The reads into a ring of 3 times the largest layer, as the engine's, and the calls, one after the other.

    Nothing is looked up or made in a step that could be had before it.
    """
    ring = torch.empty(3 * max(source.nbytes(name) for name in source), dtype=torch.uint8, device=x.device)
    memory = memoryview(ring.numpy())
    targets, end = [], 0
    for name in source:
        start = end if end + source.nbytes(name) <= ring.numel() else 0
        end = start + source.nbytes(name)
        targets.append((name, memory[start:end], ring[start:end].view(BF16).view(source.shape(name))))

    def step() -> None:
        for name, target, weight in targets:
            source.read_stored(name, target)
            F.linear(x, weight)

    return step


def memory(setup: Setup) -> None:
    """Whether streaming step after step takes more and more memory."""
    if harness.anonymous_bytes() is None:
        say("memory: skipped, neither /proc/self/status nor psutil is there")
        return
    model, sizes = managed(simulated_model(setup), layer_files(setup), setup.device), []
    residency, (run,) = Residency([model]), runs_of(model, torch.zeros(1, device=setup.device), 2, together=True)
    steps = SOAK_WARM_UP + SOAK_STEPS
    with torch.no_grad(), residency.loop(Loop(steps, sides=2)):
        for _ in range(steps):
            residency.run(run)
            sizes.append(harness.anonymous_bytes() / 1024)
    growth, error = harness.slope(sizes[SOAK_WARM_UP:])
    say(f"\nmemory: {growth:+.2f} ± {error:.2f} KiB of anonymous memory a step of "
        f"{residency.traffic.read_bytes / steps / 1024:.0f} KiB, over {SOAK_STEPS} steps after {SOAK_WARM_UP} (these: "
        f"{sizes[SOAK_WARM_UP] - sizes[0]:+.0f} KiB in all); target 0 within two errors or a page: "
        f"{'met' if abs(growth) <= max(2 * error, PAGE_KIB) else 'MISSED'}")


def lockstep(setup: Setup) -> None:
    """Both sides of guidance together against one after the other."""
    source, x = layer_files(setup), torch.zeros(1, device=setup.device)
    model = managed(simulated_model(setup), source, setup.device)
    resident = with_weights(simulated_model(setup), source, setup.device)
    for temperature, forget in temperatures(setup, model, source):
        seconds = measure({
            "together": streamed(model, x, sides=2), "apart": streamed(model, x, sides=2, together=False),
            "one side": Case(plain(partial(resident, x))), "read": Case(plain(pure_read(source)), forget)}, setup.turns)
        bound = [max(2 * side, read) for side, read in zip(seconds["one side"], seconds["read"])]
        table(f"lock step of two sides, {temperature}", [
            ("bytes read / two sequential passes", [bytes_read(model, x, True) / bytes_read(model, x, False)], None),
            ("time / two sequential passes", ratios(seconds["together"], seconds["apart"]), None),
            ("time / max(computation of both, one pure read)", ratios(seconds["together"], bound), None)])


def bytes_read(model: nn.Module, x: Tensor, together: bool, steps: int = 2) -> int:
    """By some steps of two sides."""
    residency, runs = Residency([model]), runs_of(model, x, 2, together)
    with torch.no_grad(), residency.loop(Loop(steps * len(runs), len(runs[0]))):
        for run in runs * steps:
            residency.run(run)
    return residency.traffic.read_bytes


def full_size(setup: Setup) -> None:
    """A forward pass of the 40.9 GB transformer for a picture of 256 × 256, with holes for weights."""
    if not makes_holes(setup.folder):
        say("full_size: skipped, the folder's file system has no sparse files")
        return
    dtype = torch.float32 if setup.device.type == "cpu" else BF16
    latents, prompt = (torch.randn(shape).to(setup.device, dtype) for shape in ((1, 16, 32, 32), (1, 20, 3584)))
    timestep = torch.full((1,), 500.0, device=setup.device)
    files = DIT.write(setup.folder)
    with torch.no_grad(), harness.peak_memory() as peak:
        began = time.perf_counter()
        pool = ModelPool()
        pool.auto_load_model(files, vram_config=vram_preset("disk", dtype, setup.device), vram_limit=0)
        dit = pool.fetch_model("qwen_image_dit")
        residency, loaded = Residency([dit]), time.perf_counter()
        loop = Loop(1, activation_bytes=dit.activation_bytes(1, 32, 32, 20, dtype),
                    schedule=Schedule((timestep[0],), 1, dtype))
        with residency.loop(loop):
            residency.run([partial(dit, latents, timestep, prompt)])
        ended = time.perf_counter()
    say(f"\nfull_size: loaded in {loaded - began:.1f} s, one forward pass in {ended - loaded:.0f} s (target 300 on 2 "
        f"cores); anonymous memory at most {peak[0] / GIB:.2f} GiB above the start, activations included, which are "
        f"estimated as {loop.activation_bytes / GIB:.2f} (target 3 without them)\nplan: {residency.plan.describe()}\n"
        f"traffic: {residency.traffic.describe()}")


# ---- the command ----------------------------------------------------------------------------------------------------

SECTIONS = {"disk": disk, "single_pass": single_pass, "waiting": waiting, "overhead": overhead, "memory": memory,
            "lockstep": lockstep, "full_size": full_size, "cuda": cuda}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; by default all")
    parser.add_argument("--device", default="cpu", help="where the layers compute")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="turns of each comparison")
    parser.add_argument("--layers", type=int, default=24, metavar="N", help="simulated layers of 75.5 MB")
    parser.add_argument("--folder", metavar="DIR", help="on a disk with 10 GB of room")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    device = torch.device(arguments.device)
    say(harness.machine(device))
    for name in arguments.sections or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="streaming-", dir=arguments.folder) as folder:
            SECTIONS[name](Setup(device, arguments.repeats, arguments.layers, Path(folder)))


if __name__ == "__main__":
    main()
