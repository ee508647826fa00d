"""Streaming: the bits of resident weights, each byte once, at the speed of the slower of copy and computation."""
from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffsynth_backend.core.vram import (
    AutoWrappedModule,
    DiskMap,
    Loop,
    Residency,
    iter_managed,
    transport,
)
from diffsynth_backend.core.vram.bus import Bus
from diffsynth_backend.core.vram.planner import LayerSize, Machine, simulate
from diffsynth_backend.core.vram.streaming import WeightStream
from tests.helpers.fake_accelerator import FakeAccelerator, TimedLinear, TimedNet
from tests.helpers.streamed import (
    CONFIGS,
    INPUTS,
    CountingMap,
    assert_same_bits,
    manage,
    run_all,
    states,
    unmanaged,
)

pytestmark = pytest.mark.usefixtures("one_thread", "no_thread_is_left")


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
