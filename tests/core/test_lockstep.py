"""Lock step: each side sees the caller's world, runs alone, and the baton changes hands once a window."""
from __future__ import annotations

import contextvars
import threading

import pytest
import torch

from diffsynth_backend.core.vram.bus import Bus
from diffsynth_backend.core.vram.lockstep import LockStep
from diffsynth_backend.core.vram.streaming import Unwind, WeightStream

NAME = contextvars.ContextVar("name", default="nobody")


@pytest.fixture
def together():
    stream = WeightStream(Bus(torch.device("cpu")))
    stream.open(1024)
    with LockStep(stream, 3) as lock_step:
        yield lock_step
    stream.close()


def world() -> dict:
    """What torch and Python keep for the thread that asks."""
    return {"inference": torch.is_inference_mode_enabled(), "gradients": torch.is_grad_enabled(),
            "device": torch.empty(0).device.type, "autocast": torch.is_autocast_enabled("cpu"),
            "autocast dtype": torch.get_autocast_dtype("cpu"), "name": NAME.get()}


@pytest.mark.parametrize("inference", [True, False])
def test_each_side_sees_the_callers_world(together, inference):
    NAME.set("caller")
    with torch.inference_mode(inference), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = world()
        assert together.run([world] * 3) == [expected] * 3
    assert expected["device"] == "meta" and expected["autocast"] and expected["name"] == "caller"
    assert together.run([world] * 3) == [world()] * 3, "and not what was there before"


def test_one_side_runs_at_a_time(together):
    running, most = [], []

    def side() -> int:
        running.append(1)
        most.append(len(running))
        sum(range(20000))
        running.pop()
        return threading.get_ident()

    assert len(set(together.run([side] * 3))) == 3
    assert max(most) == 1


def test_results_come_in_the_order_of_the_functions(together):
    for _ in range(3):
        assert together.run([lambda: "a", lambda: "b", lambda: "c"]) == ["a", "b", "c"]
    assert together.run([lambda: "alone"]) == ["alone"]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_the_first_error_is_raised_and_the_next_run_works(together, failing):
    ended = []

    def side(number: int) -> int:
        if number == failing:
            raise LookupError(f"side {number}")
        ended.append(number)
        return number

    with pytest.raises(LookupError, match=f"side {failing}"):
        together.run([lambda number=number: side(number) for number in range(3)])
    assert all(number < failing for number in ended), "sides that had not begun do not begin"
    assert together.run([lambda: 1, lambda: 2, lambda: 3]) == [1, 2, 3]


def test_unwinding_is_no_exception_that_models_would_catch():
    assert not issubclass(Unwind, Exception)
