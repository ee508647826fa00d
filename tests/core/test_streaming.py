"""Streaming: the bits of resident weights, each byte once, at the speed of the slower of copy and computation."""
from __future__ import annotations

import copy
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth_backend.core.vram import (
    AutoWrappedLinear,
    AutoWrappedModule,
    AutoWrappedNonRecurseModule,
    DiskMap,
    Loop,
    Residency,
    enable_vram_management,
    iter_managed,
    streaming,
    transport,
)
from diffsynth_backend.core.vram.bus import Bus
from diffsynth_backend.core.vram.host_memory import HostMemory
from diffsynth_backend.core.vram.placement import ResidencyBudget
from diffsynth_backend.core.vram.planner import LayerSize, Machine, simulate
from diffsynth_backend.core.vram.streaming import WeightStream
from diffsynth_backend.core.vram.visits import Entry
from tests.helpers.fake_accelerator import FakeAccelerator, TimedLinear, TimedNet
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.vram_fields import cpu_fields

GIB = 2**30
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


class Table(nn.Module):
    """Returns its own parameter: what a call gives must outlive the ring."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, dim))

    def forward(self) -> tuple[Tensor, dict]:
        return self.weight, {"half": self.weight[:, ::2]}


class Block(nn.Module):
    """Bare parameters that its children compute inside of."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(dim))
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """`route` says which blocks run, and in which order."""

    def __init__(self, dim: int = 16, blocks: int = 5) -> None:
        super().__init__()
        self.table = Table(dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(blocks))
        self.route = list(range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        shift, parts = self.table()
        for index in self.route:
            x = self.blocks[index](x)
        return x + shift + parts["half"].repeat(1, 2)


MAP = {nn.Linear: AutoWrappedLinear, nn.LayerNorm: AutoWrappedModule, Table: AutoWrappedModule,
       Block: AutoWrappedNonRecurseModule}
INPUTS = [torch.linspace(-1, 1, 3 * 16).view(3, 16), torch.linspace(2, -2, 7 * 16).view(7, 16)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False).to(BF16)


@pytest.fixture
def disk_map(net: Net, tmp_path: Path) -> DiskMap:
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    return DiskMap(str(tmp_path / "net.safetensors"))


def states(offload, onload, preparing, computation=torch.float32) -> dict:
    """VRAM fields of storage dtypes on the CPU; None is the disk."""
    return cpu_fields(offload, onload, preparing, computation)


CONFIGS = {
    "disk": states(None, None, torch.float32),
    "disk, same dtype": states(None, None, BF16, BF16),
    "disk for ever": states(None, None, None),
    "ram": states(BF16, BF16, torch.float32),
    "fp8 in ram": states(FP8, FP8, FP8),
    "disk, then fp8": states(None, FP8, FP8),
}


def manage(model: nn.Module, disk_map: DiskMap | None, config: dict, limit: int | None, module_map=MAP) -> nn.Module:
    """A managed copy; `limit` in bytes."""
    source = disk_map if "disk" in config.values() else None
    return enable_vram_management(copy.deepcopy(model), module_map, config,
                                  None if limit is None else limit / GIB, source)


def unmanaged(model: nn.Module, config: dict) -> nn.Module:
    """The model as stored, then cast, and computed without management."""
    storage = config["onload_dtype"] if config["onload_dtype"] != "disk" else BF16
    return copy.deepcopy(model).to(storage).to(config["computation_dtype"])


def run_all(residency: Residency, model: nn.Module, loop: Loop) -> list[list[Tensor]]:
    """The results of each step of a loop, for as many of INPUTS as there are sides."""
    inputs = [x.to(next(iter_managed(model)).management.placements.computation.dtype) for x in INPUTS[:loop.sides]]
    with torch.no_grad(), residency.loop(loop):
        return [residency.run([partial(model, x) for x in inputs]) for _ in range(loop.steps)]


def assert_same_bits(got: list[list[Tensor]], expected: list[Tensor]) -> None:
    for step, results in enumerate(got):
        for side, (result, wanted) in enumerate(zip(results, expected, strict=True)):
            assert torch.equal(result, wanted), f"step {step}, side {side}"


# ---- the bits -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("limit", [0, 17_000, 30_000, None])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_same_bits_as_unmanaged(net, disk_map, config, limit, sides):
    model = manage(net, disk_map, config, limit)
    residency = Residency([model])
    plain = unmanaged(net, config)
    expected = [plain(x.to(config["computation_dtype"])) for x in INPUTS[:sides]]
    for _ in range(2):  # the second time with the order known from the beginning
        assert_same_bits(run_all(residency, model, Loop(steps=3, sides=sides)), expected)
        assert residency._budget.used_bytes == 0


def test_alternately_inside_and_outside_of_inference_mode(net, disk_map):
    model = manage(net, disk_map, CONFIGS["disk"], 30_000)
    residency, expected = Residency([model]), [unmanaged(net, CONFIGS["disk"])(x) for x in INPUTS]
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            assert_same_bits(run_all(residency, model, Loop(steps=2, sides=2)), expected)


def test_on_an_accelerator_weights_cross_as_stored_and_are_cast_there(net, disk_map):
    bus = FakeAccelerator(bandwidth=1e9)
    model = manage(net, disk_map, CONFIGS["disk"], 0)
    residency, expected = Residency([model], bus), [unmanaged(net, CONFIGS["disk"])(x) for x in INPUTS]
    assert_same_bits(run_all(residency, model, Loop(steps=3, sides=2)), expected)
    stored = sum(disk_map.nbytes(name) for name in disk_map)
    assert sum(bus.uploads) == 3 * stored


def test_what_a_converter_puts_together_is_put_together_once_for_all_chunks(net, disk_map, monkeypatch):
    monkeypatch.setattr(transport, "CHUNK_BYTES", 64)
    scaled = CountingMap(disk_map.paths, state_dict_converter=lambda s: {name: 2 * w for name, w in s.items()})
    residency = Residency([model := manage(net, scaled, CONFIGS["disk"], 0)], FakeAccelerator(bandwidth=1e9))
    doubled = unmanaged(net, CONFIGS["disk"])
    doubled.load_state_dict({name: 2 * weight for name, weight in net.state_dict().items()})
    assert_same_bits(run_all(residency, model, Loop(steps=2)), [doubled(INPUTS[0])])
    assert sorted(scaled.reads) == sorted(list(scaled) * 2)


def test_gradients_get_weights_that_last(net, disk_map):
    model = manage(net, disk_map, CONFIGS["disk"], 0)
    x = INPUTS[0].clone().requires_grad_()
    plain_x = INPUTS[0].clone().requires_grad_()
    residency = Residency([model])
    residency.onload()
    model(x).sum().backward()
    residency.offload()
    unmanaged(net, CONFIGS["disk"])(plain_x).sum().backward()
    assert torch.equal(x.grad, plain_x.grad)


# ---- the bytes ------------------------------------------------------------------------------------------------------

class CountingMap(DiskMap):
    """Knows how often each tensor was read, and by whom."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.reads: list[str] = []
        self.readers: list[threading.Thread] = []

    def note(self, name: str) -> None:
        self.readers.append(threading.current_thread())
        self.reads.append(name)

    def load_into(self, name: str, out: Tensor) -> Tensor:
        self.note(name)
        return super().load_into(name, out)

    def read_into(self, name: str, out: Tensor) -> Tensor:
        self.note(name)
        return super().read_into(name, out)

    def read_stored(self, name: str, out: memoryview) -> None:
        self.note(name)
        super().read_stored(name, out)


@pytest.mark.parametrize("config", ["disk", "disk, same dtype"])
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("steps", [1, 4])
def test_each_streamed_byte_is_read_once_a_step(net, disk_map, sides, steps, config):
    counting = CountingMap(disk_map.paths)
    model = manage(net, counting, CONFIGS[config], 0)
    residency = Residency([model])
    run_all(residency, model, Loop(steps=steps, sides=sides))
    assert sorted(counting.reads) == sorted(list(disk_map) * steps)
    assert residency.traffic.read_bytes == steps * sum(disk_map.nbytes(name) for name in disk_map)
    assert residency.traffic.passes == steps


def test_what_stays_is_spread_and_not_read_again(net, disk_map):
    counting = CountingMap(disk_map.paths)
    model = manage(net, counting, CONFIGS["disk"], 30_000)
    residency = Residency([model])
    for _ in range(4):  # with the order known, others may stay, whose visits the stream has not seen before
        del counting.reads[:]
        run_all(residency, model, Loop(steps=3))
        streamed = set(counting.reads)
        assert residency.plan.resident_bytes + residency.plan.ring_bytes <= 30_000
        assert streamed and streamed != set(disk_map)
        assert sorted(counting.reads) == sorted([*streamed] * 3), "read again after the plan has changed"
        assert residency.traffic.read_bytes == 3 * sum(disk_map.nbytes(name) for name in streamed)


@pytest.mark.parametrize("config", ["disk", "disk, same dtype", "disk for ever"])
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("limit", [0, 17_000])
@pytest.mark.parametrize("ram_limit", [0, 9_000, 10**9])
def test_what_waits_in_ram_is_read_once_a_loop(net, disk_map, config, sides, limit, ram_limit):
    counting, plain = CountingMap(disk_map.paths), unmanaged(net, CONFIGS[config])
    expected = [plain(x.to(CONFIGS[config]["computation_dtype"])) for x in INPUTS[:sides]]
    budget = ResidencyBudget(limit, ram_limit)
    model = enable_vram_management(copy.deepcopy(net), MAP, CONFIGS[config], budget, counting)
    residency, layers = Residency([model]), [layer.management for layer in iter_managed(model)]
    for _ in range(2):
        del counting.reads[:]
        assert_same_bits(run_all(residency, model, Loop(steps=3, sides=sides)), expected)
        again = {name for name in disk_map if counting.reads.count(name) == 3}
        assert again == {slot.name for layer in layers for slot in layer.slots
                         if f"0 {layer.name}" in residency.plan.disk and not slot.is_buffer}
        assert residency.plan.host_bytes <= ram_limit and bool(residency.plan.host) == bool(ram_limit)
        assert residency.traffic.read_bytes == sum(map(disk_map.nbytes, counting.reads))
        assert all(tensor is None for layer in layers for slot, tensor in zip(layer.slots, layer.current)
                   if not slot.is_buffer), "what waited is kept when its model is not in use"


@pytest.mark.parametrize("config, item_bytes", [("disk, same dtype", 2), ("ram", 4)])
@pytest.mark.parametrize("sides", [1, 2])
def test_the_accounts_are_those_of_the_allocator(tmp_path, config, item_bytes, sides):
    """What the engine says that weights take at their most is what is allocated, but for the computation's tensors."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).requires_grad_(False).to(BF16)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    layer = 256 * 257 * item_bytes
    limit = 5 * layer + 1000
    model = manage(net, DiskMap(str(tmp_path / "net.safetensors")), CONFIGS[config], limit)
    residency, x = Residency([model]), torch.zeros(1, 256, dtype=CONFIGS[config]["computation_dtype"])
    with LiveBytes() as live, torch.no_grad(), residency.loop(Loop(steps=3, sides=sides)):
        for _ in range(3):
            residency.run([partial(model, x)] * sides)
    accounted = residency.traffic.peak_device_bytes
    assert residency.plan.resident and residency.plan.ring_bytes and accounted <= limit
    assert 0 <= live.peak - accounted < layer // 4, f"{live.peak} bytes at once, {accounted} by the engine"


def test_on_an_accelerator_what_waits_in_ram_crosses_as_stored(net, disk_map):
    counting, expected = CountingMap(disk_map.paths), [unmanaged(net, CONFIGS["disk"])(x) for x in INPUTS]
    model = enable_vram_management(copy.deepcopy(net), MAP, CONFIGS["disk"], ResidencyBudget(0, 10**9), counting)
    residency = Residency([model], FakeAccelerator(1e9))
    assert_same_bits(run_all(residency, model, Loop(steps=3, sides=2)), expected)
    assert sorted(counting.reads) == sorted(disk_map)
    assert residency.traffic.read_bytes == sum(map(disk_map.nbytes, disk_map))
    assert residency.traffic.moved_bytes >= 3 * residency.traffic.read_bytes


@pytest.mark.parametrize("most_locks", [1000, 7, 0])
def test_what_waits_in_ram_is_locked_as_long_as_it_waits(net, disk_map, caplog, most_locks):
    """A piece for each layer; where the system does not lock as many, the others go by way of staging."""
    bus, expected = FakeAccelerator(1e9, most_locks), [unmanaged(net, CONFIGS["disk"])(x) for x in INPUTS]
    model = enable_vram_management(copy.deepcopy(net), MAP, CONFIGS["disk"], ResidencyBudget(0, 10**9), disk_map)
    residency, layers = Residency([model], bus), list(iter_managed(model))
    for _ in range(2):
        caplog.clear()
        with torch.no_grad(), residency.loop(Loop(steps=3, sides=2)):
            for _ in range(3):
                assert_same_bits([residency.run([partial(model, x.to(torch.float32)) for x in INPUTS])], expected)
                assert len(bus.locked) == min(most_locks, len(layers))
        assert not bus.locked and caplog.text.count("does not lock more memory") == (most_locks < len(layers))


def test_locked_memory_is_copied_from_without_a_detour(net, disk_map, monkeypatch):
    model = enable_vram_management(copy.deepcopy(net), MAP, CONFIGS["disk"], ResidencyBudget(0, 10**9), disk_map)
    staged: list[str] = []
    stage = transport.Transport._upload_staged
    monkeypatch.setattr(transport.Transport, "_upload_staged",
                        lambda self, part, *rest: (staged.append(part.name), stage(self, part, *rest)))
    run_all(Residency([model], FakeAccelerator(1e9)), model, Loop(steps=3))
    assert not staged
    run_all(Residency([model], FakeAccelerator(1e9, most_locks=0)), model, Loop(steps=3))
    assert set(staged) == set(disk_map)


def test_two_readers_at_visits_of_one_layer_read_it_once(net, disk_map):
    reading, go_on = threading.Event(), threading.Event()

    class Gated(CountingMap):
        def load_into(self, name: str, out: Tensor) -> Tensor:
            reading.set()
            go_on.wait(10)
            return super().load_into(name, out)

    counting = Gated(disk_map.paths)
    model = manage(net, counting, CONFIGS["disk"], 0)
    layer = next(managed.management for managed in iter_managed(model) if isinstance(managed, AutoWrappedLinear))
    bus = Bus(torch.device("cpu"))
    for managed in iter_managed(model):
        managed.management.waits = True
        managed.onload()
    carrier, entries = transport.Transport(bus), [Entry(layer, layer.streamed_bytes(bus)) for _ in range(2)]
    carrier.open([layer])
    readers = [threading.Thread(target=carrier.bring, args=(entry, None)) for entry in entries]
    readers[0].start()
    reading.wait(10)
    readers[1].start()
    readers[1].join(0.05)  # where it would read, if it did not have to wait
    go_on.set()
    for reader in readers:
        reader.join()
    once = [slot.name for slot in layer.slots]
    assert counting.reads == once and sum(entry.read_bytes for entry in entries) == sum(map(counting.nbytes, once))
    assert all(torch.equal(a, b) for a, b in zip(entries[0].weights, entries[1].weights, strict=True))
    carrier.close()


def test_memory_that_is_dropped_is_unlocked_first():
    bus = FakeAccelerator(1e9)
    memory = HostMemory(bus, 10_000, pieces=2)
    assert (memory.take(5_000) + memory.arena.memory.data_ptr()) % 4096 == 0
    memory.take(5_000)
    with pytest.raises(ValueError, match="bytes asked of .* that are left"):
        memory.take(9_000)
    assert list(bus.locked.values()) == [8192, 8192]
    del memory
    assert not bus.locked


@pytest.mark.parametrize("worth", [0, 1 << 18], ids=["eager readers", "sleeping readers"])
def test_a_pass_of_which_nothing_is_known_is_read_by_the_computation_itself(tmp_path, monkeypatch, worth):
    monkeypatch.setattr(streaming, "WORTH_WAKING", worth)
    net = Net(blocks=1).requires_grad_(False).to(BF16)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    counting = CountingMap(str(tmp_path / "net.safetensors"))
    model = manage(net, counting, CONFIGS["disk"], 0)
    run_all(Residency([model]), model, Loop(steps=1))
    assert sorted(counting.reads) == sorted(counting) and set(counting.readers) == {threading.current_thread()}


def wait_for_a_reader(counting: CountingMap, *_: object) -> None:
    for _ in range(500):
        if {*counting.readers} - {threading.current_thread()}:
            return
        threading.Event().wait(0.01)
    raise AssertionError("nobody reads ahead")


def test_in_the_first_pass_blocks_are_read_ahead_from_the_second_on(net, disk_map):
    counting = CountingMap(disk_map.paths)
    model = manage(net, counting, CONFIGS["disk"], 0)
    model.blocks[1].down.register_forward_hook(partial(wait_for_a_reader, counting))
    residency, plain = Residency([model]), unmanaged(net, CONFIGS["disk"])
    assert_same_bits(run_all(residency, model, Loop(steps=1)), [plain(INPUTS[0])])
    assert sorted(counting.reads) == sorted(disk_map), "and nothing is read in vain"


@pytest.mark.parametrize("route", [[0, 1, 3, 4], [0, 1, 0, 1, 2], [4, 3, 1, 0], [0, 2, 2, 2, 1]])
def test_a_first_pass_that_does_not_go_on_as_expected_reads_at_most_a_ring_in_vain(net, disk_map, route):
    counting = CountingMap(disk_map.paths)
    model, plain = manage(net, counting, CONFIGS["disk"], 0), unmanaged(net, CONFIGS["disk"])
    model.route = plain.route = route
    residency = Residency([model])
    with torch.no_grad(), residency.loop(Loop(steps=1)):
        result, = residency.run([partial(model, INPUTS[0])])
        needed = sum(disk_map.nbytes(name) * route.count(int(name.split(".")[1])) if name.startswith("blocks.")
                     else disk_map.nbytes(name) for name in disk_map)
        assert torch.equal(result, plain(INPUTS[0]))
        assert needed <= residency.traffic.read_bytes <= needed + residency.plan.ring_bytes


def test_the_next_layers_are_read_while_one_computes(net, disk_map):
    counting, net.route = CountingMap(disk_map.paths), [0]  # nothing repeats, so readers begin with the second pass
    model = manage(net, counting, CONFIGS["disk"], 0)
    with torch.no_grad(), Residency([model]).loop(Loop(steps=2)) as residency:
        residency.run([partial(model, INPUTS[0])])
        next(iter_managed(model)).register_forward_pre_hook(partial(wait_for_a_reader, counting))
        residency.run([partial(model, INPUTS[0])])


def test_the_order_is_learnt_again_when_it_changes(net, disk_map):
    counting = CountingMap(disk_map.paths)
    model = manage(net, counting, CONFIGS["disk"], 0)
    plain = unmanaged(net, CONFIGS["disk"])
    residency = Residency([model])
    routes = [[0, 1, 2, 3, 4]] * 2 + [[0, 3, 1, 4]] * 3 + [[2, 2, 0]] * 3 + [[0, 1, 2, 3, 4]] * 2
    with torch.no_grad(), residency.loop(Loop(steps=len(routes))):
        for step, route in enumerate(routes):
            model.route = plain.route = route
            result, = residency.run([partial(model, INPUTS[0])])
            assert torch.equal(result, plain(INPUTS[0])), f"step {step}"
    assert residency.traffic.passes == len(routes)
    assert len(counting.reads) < 1.6 * sum(1 + 6 * len(route) for route in routes), "most was foreseen rightly"


def test_sides_may_take_different_ways(net, disk_map):
    model = manage(net, disk_map, CONFIGS["disk"], 0)
    plain = unmanaged(net, CONFIGS["disk"])

    def along(model: Net, route: list[int], x: Tensor) -> Tensor:
        shift, parts = model.table()
        for index in route:
            x = model.blocks[index](x)
        return x + shift

    routes = ([0, 1, 2, 3, 4], [0, 2, 1, 4, 4])
    expected = [along(plain, route, x) for route, x in zip(routes, INPUTS)]
    residency = Residency([model])
    with torch.no_grad(), residency.loop(Loop(steps=3, sides=2)):
        for _ in range(3):
            got = residency.run([partial(along, model, route, x) for route, x in zip(routes, INPUTS)])
            assert_same_bits([got], expected)


def test_a_thread_of_its_own_gets_copies(net, disk_map):
    """Somebody else calls the model while a loop runs: right results, and the loop is not disturbed."""
    model = manage(net, disk_map, CONFIGS["disk"], 0)
    expected = [unmanaged(net, CONFIGS["disk"])(x) for x in INPUTS]
    residency, found = Residency([model]), []

    def intrude() -> None:
        with torch.no_grad():
            found.append(model(INPUTS[1]))

    def step(x: Tensor) -> Tensor:
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
        return model(x)

    with torch.no_grad(), residency.loop(Loop(steps=2)):
        for _ in range(2):
            assert_same_bits([residency.run([partial(step, INPUTS[0])])], expected[:1])
    assert_same_bits([[result] for result in found], expected[1:])


# ---- the time -------------------------------------------------------------------------------------------------------

def timed(tmp_path: Path, layers: list[tuple[int, float]], bandwidth: float
          ) -> tuple[FakeAccelerator, nn.Module, DiskMap]:
    bus = FakeAccelerator(bandwidth)
    net = TimedNet(layers, bus).requires_grad_(False)
    save_file(net.state_dict(), tmp_path / "timed.safetensors")
    return bus, net, DiskMap(str(tmp_path / "timed.safetensors"))


def seconds_of_a_step(residency: Residency, bus: FakeAccelerator, passes: list, warm: int = 4, steps: int = 8) -> float:
    """Virtual seconds of a step, once the stream has settled."""
    with torch.no_grad(), residency.loop(Loop(steps=warm + steps, sides=len(passes))):
        for step in range(warm + steps):
            if step == warm:
                began = bus.calculated
            residency.run(passes)
        return (bus.calculated - began) / steps


TIMED_MAP = {TimedLinear: AutoWrappedModule}
FP32_DISK = states(None, None, torch.float32)
CASES = {"bound by copies": (1e6, 0.001), "bound by computation": (1e6, 0.03), "even": (1e6, 0.016)}


@pytest.mark.parametrize("bandwidth, seconds", CASES.values(), ids=CASES)
def test_a_step_takes_the_longer_of_copies_and_computation(tmp_path, bandwidth, seconds):
    sizes = [(64, seconds)] * 12
    bus, net, disk_map = timed(tmp_path, sizes, bandwidth)
    model = manage(net, disk_map, FP32_DISK, 0, TIMED_MAP)
    x = torch.randn(2, 64)
    took = seconds_of_a_step(Residency([model], bus), bus, [partial(model, x)])
    bound = max(12 * seconds, 12 * 64 * 64 * 4 / bandwidth)
    assert 0.999 * bound <= took <= 1.05 * bound


def test_both_sides_cost_one_copy(tmp_path):
    """Copies take longer than one side's computation and not as long as both: the step is bound by computation."""
    bus, net, disk_map = timed(tmp_path, [(64, 0.01)] * 12, 64 * 64 * 4 / 0.018)
    model = manage(net, disk_map, FP32_DISK, 0, TIMED_MAP)
    x = torch.randn(2, 64)
    took = seconds_of_a_step(Residency([model], bus), bus, [partial(model, x)] * 2)
    assert 0.999 * 24 * 0.01 <= took <= 1.05 * 24 * 0.01


def test_mixed_sizes_take_as_long_as_the_planner_expects(tmp_path):
    sizes = [(64, 0.004), (16, 0.002), (96, 0.02), (32, 0.001)] * 4
    bus, net, disk_map = timed(tmp_path, sizes, 1e6)
    model = manage(net, disk_map, FP32_DISK, 0, TIMED_MAP)
    residency = Residency([model], bus)
    took = seconds_of_a_step(residency, bus, [partial(model, torch.randn(2, 96))])
    layers = [LayerSize(str(i), 0, 4 * dim * dim, seconds) for i, (dim, seconds) in enumerate(sizes)]
    expected = simulate(layers, frozenset(), frozenset(), Machine(0, 0, 1e6, 1e6), residency.plan.ring_bytes)
    assert took == pytest.approx(expected, rel=0.1)


def test_what_stays_hides_the_copies_of_what_does_not(tmp_path):
    """Half of the weights stay: the copies of the others fit into the computation of all, where all would not."""
    bus, net, disk_map = timed(tmp_path, [(64, 0.01)] * 12, 64 * 64 * 4 / 0.018)
    x, size = torch.randn(2, 64), 64 * 64 * 4
    model = manage(net, disk_map, FP32_DISK, 9 * size, TIMED_MAP)
    residency = Residency([model], bus)
    took = seconds_of_a_step(residency, bus, [partial(model, x)])
    assert len(residency.plan.resident) == 6
    assert 0.999 * 12 * 0.01 <= took <= 1.1 * 12 * 0.01


# ---- ends that nobody planned ---------------------------------------------------------------------------------------

class Stop(BaseException):
    """As an interrupt, no Exception."""


def failing(model: nn.Module, x: Tensor, error: BaseException) -> Tensor:
    model.blocks[0](model.blocks[1](x))
    raise error


@pytest.mark.parametrize("error", [ValueError("broken"), Stop("stop")], ids=["exception", "interrupt"])
@pytest.mark.parametrize("failing_side", [0, 1])
def test_an_end_on_either_side_ends_both_and_the_next_run_works(net, disk_map, failing_side, error):
    model = manage(net, disk_map, CONFIGS["disk"], 0)
    expected = [unmanaged(net, CONFIGS["disk"])(x) for x in INPUTS]
    residency = Residency([model])
    passes = [partial(model, x) for x in INPUTS]
    passes[failing_side] = partial(failing, model, INPUTS[failing_side], error)
    with torch.no_grad(), pytest.raises(type(error), match=str(error)), residency.loop(Loop(steps=2, sides=2)):
        residency.run([partial(model, x) for x in INPUTS])
        residency.run(passes)
    assert residency._budget.used_bytes == 0 and residency._stream.ring_bytes == 0
    assert {layer.state for layer in iter_managed(model)} == {0}
    assert_same_bits(run_all(residency, model, Loop(steps=2, sides=2)), expected)


def test_memory_that_a_reader_still_writes_is_not_given_away(net, disk_map, monkeypatch):
    gate = threading.Event()
    net.route = [0]  # nothing repeats, so readers begin with the second pass

    class Gated(DiskMap):
        def load_into(self, name: str, out: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                gate.wait(10)
            return super().load_into(name, out)

    model = manage(net, Gated(disk_map.paths), CONFIGS["disk"], 0)
    residency, expected = Residency([model]), unmanaged(net, CONFIGS["disk"])(INPUTS[0])
    with torch.no_grad(), residency.loop(Loop(steps=4)):
        residency.run([partial(model, INPUTS[0])])
        stream = residency._stream
        while not any(entry.region for entry in stream._log.entries):  # a reader has begun the next pass
            threading.Event().wait(0.001)
        written = [entry.region for entry in stream._log.entries if entry.region]
        with monkeypatch.context() as patched, pytest.raises(Stop):
            patched.setattr(stream._arrival, "wait", failing_wait)
            residency.run([partial(model, INPUTS[0])])
        assert not any(region.free for region in written)
        gate.set()
        for _ in range(2):
            assert torch.equal(residency.run([partial(model, INPUTS[0])])[0], expected)


def failing_wait() -> None:
    raise Stop


def test_a_file_that_is_cut_is_an_error_that_names_it(net, tmp_path):
    path = tmp_path / "cut.safetensors"
    save_file(net.state_dict(), path)
    model = manage(net, DiskMap(str(path)), CONFIGS["disk"], 0)
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    with pytest.raises(Exception, match="cut.safetensors") as caught:
        run_all(Residency([model]), model, Loop(steps=1))
    assert "again" in str(caught.value)


def test_a_file_that_disappears_is_an_error_that_names_it(net, tmp_path):
    path = tmp_path / "gone.safetensors"
    save_file(net.state_dict(), path)
    model = manage(net, DiskMap(str(path)), CONFIGS["disk"], 0)
    path.unlink()
    with pytest.raises(OSError, match="gone.safetensors"):
        run_all(Residency([model]), model, Loop(steps=1, sides=2))


@pytest.mark.parametrize("limit", [30_000, None])
def test_out_of_memory_keeps_less_and_does_the_step_again(net, disk_map, limit, caplog):
    model = manage(net, disk_map, CONFIGS["disk"], limit)
    expected = [unmanaged(net, CONFIGS["disk"])(x) for x in INPUTS]
    residency, failures = Residency([model]), [True, True]

    def step() -> list[Tensor]:
        results = residency.run([partial(model, x) for x in INPUTS])
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("the device is full")
        return results

    with torch.no_grad(), residency.loop(Loop(steps=2, sides=2)):
        before = residency.plan.resident_bytes
        assert_same_bits([residency.with_room(step), residency.with_room(step)], expected)
        assert residency.plan.resident_bytes <= before / 4
    assert "vram_limit" in caplog.text
    assert residency._budget.used_bytes == 0


def test_out_of_memory_with_nothing_left_to_give_is_raised(net, disk_map):
    model = manage(net, disk_map, CONFIGS["disk"], 0)
    residency = Residency([model])

    def step() -> None:
        raise torch.OutOfMemoryError("the device is full")

    with pytest.raises(torch.OutOfMemoryError), residency.loop(Loop(steps=1)):
        residency.with_room(step)


def test_a_limit_below_the_floor_says_what_the_floor_is(net, disk_map):
    model = manage(net, disk_map, CONFIGS["disk"], 20_000)
    with pytest.raises(ValueError, match="vram_limit.*GiB"):
        run_all(Residency([model]), model, Loop(steps=1, activation_bytes=1_000_000))
    assert {layer.state for layer in iter_managed(model)} == {0}


def test_a_model_that_is_dropped_while_in_use_takes_its_stream_with_it(net, disk_map):
    import gc
    import weakref

    model = manage(net, disk_map, CONFIGS["disk"], 0)
    residency = Residency([model])
    residency.onload()
    with torch.no_grad():
        model(INPUTS[0])
    threads = [thread for thread in threading.enumerate() if thread.name == "weight stream"]
    gone = weakref.ref(model)
    del model, residency
    gc.collect()
    assert gone() is None
    for thread in threads:
        thread.join(timeout=5)


def test_closing_twice_and_before_opening_is_harmless():
    stream = WeightStream(Bus(torch.device("cpu")))
    stream.close()
    stream.open(1024)
    stream.close()
    stream.close()
    assert stream.ring_bytes == 0


# ---- the plan -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("on_accelerator", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bytes_are_known_before_anything_is_onloaded(net, disk_map, config, on_accelerator):
    bus = FakeAccelerator(1e9) if on_accelerator else Bus(torch.device("cpu"))
    model = manage(net, disk_map, config, 0)
    for layer in iter_managed(model):
        before = layer.management.streamed_bytes(bus)
        layer.onload()
        assert layer.management.transfer(bus).nbytes == before, layer.management.name


def test_a_preview_is_the_plan_that_the_loop_gets(net, disk_map):
    model = manage(net, disk_map, CONFIGS["disk"], 60_000)
    residency, loop = Residency([model]), Loop(steps=1, sides=2, activation_bytes=10_000)
    preview = residency.preview(loop)
    assert {layer.state for layer in iter_managed(model)} == {0}
    with residency.loop(loop):
        assert residency.plan == preview
    assert preview.resident_bytes + preview.ring_bytes + 20_000 <= 60_000


def test_wrong_foresight_leaves_room_for_many_sides(net, disk_map):
    """What was read ahead in vain must not keep the ring from sides that wait for each other."""
    model = manage(net, disk_map, CONFIGS["disk"], 0)
    plain = unmanaged(net, CONFIGS["disk"])
    residency = Residency([model])
    with torch.no_grad(), residency.loop(Loop(steps=4, sides=6)):
        for route in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [1, 0], [0, 1, 2, 3, 4]):
            model.route = plain.route = route
            got = residency.run([partial(model, INPUTS[0] * side) for side in range(6)])
            assert_same_bits([got], [plain(INPUTS[0] * side) for side in range(6)])
