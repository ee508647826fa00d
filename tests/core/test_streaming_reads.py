"""Streaming: each byte is read once a step, by whom, and what waits in RAM."""
from __future__ import annotations

import copy
import threading
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth_backend.core.vram import (
    AutoWrappedLinear,
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
from diffsynth_backend.core.vram.visits import Entry
from tests.helpers.fake_accelerator import FakeAccelerator
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.streamed import (
    BF16,
    CONFIGS,
    INPUTS,
    MAP,
    CountingMap,
    Net,
    assert_same_bits,
    manage,
    run_all,
    unmanaged,
)

pytestmark = pytest.mark.usefixtures("one_thread", "no_thread_is_left")


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
