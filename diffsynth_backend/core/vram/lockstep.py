"""Several forward passes in lock step: they walk the layers together, and a streamed layer is read once for all.

Each pass is an ordinary call in a thread of its own; one runs at a time. Whoever holds the baton computes until it
would need more of the ring than its share, then the pass that is furthest behind goes on. So the baton changes hands
once for a ring's worth of layers, not for each of them, and each pass computes exactly what it would alone.

Notable: a thread that torch has not seen begins with torch's defaults, so everything thread-local of the caller is
entered explicitly: inference and gradient mode, device and stream, default device, autocast, context variables.
"""
from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from .streaming import Unwind, WeightStream
from .visits import Side


class LockStep(AbstractContextManager["LockStep"]):
    """Runs functions in lock step over the layers of one stream.

    Threads are kept from run to run; leaving the `with` block ends them.
    """

    def __init__(self, stream: WeightStream, sides: int) -> None:
        self._stream = stream
        self._pool = ThreadPoolExecutor(max(sides - 1, 1), thread_name_prefix="lock step")
        self._runners: list[_Runner] = []
        self._by_thread: dict[int, _Runner] = {}

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of the functions, which are one pass over the stream's layers, each on its own.

        The first runs in this thread. What any of them raises is raised here, after all of them have ended.
        """
        if len(functions) == 1:
            with self._stream.one_pass():
                return [functions[0]()]
        self._runners, self._by_thread = [_Runner() for _ in functions], {}
        self._stream.hand_over, self._stream.unwinding = self._hand_over, False
        with self._stream.one_pass():
            self._by_thread[threading.get_ident()] = self._runners[0]
            self._runners[0].side = self._stream.side_of_caller()
            futures = [self._start(runner, function)
                       for runner, function in zip(self._runners[1:], functions[1:], strict=True)]
            first = self._finish(self._runners[0], functions[0], futures)
        return [first, *(future.result() for future in futures)]

    def _start(self, runner: _Runner, function: Callable[[], Any]) -> Future:
        """Begin a pass in a thread of the pool; it has joined the stream, and waits, when this returns."""
        joined = threading.Semaphore(0)
        inherited, context = thread_settings(), contextvars.copy_context()

        def body() -> Any:
            with inherited():
                self._by_thread[threading.get_ident()] = runner
                runner.side = self._stream.join()
                joined.release()
                runner.turn.acquire()
                return self._go_through(runner, function)

        future = self._pool.submit(context.run, body)
        joined.acquire()
        return future

    def _finish(self, runner: _Runner, function: Callable[[], Any], futures: Sequence[Future]) -> Any:
        """This thread's pass, then the end of all others. An error of theirs goes before the unwinding it caused."""
        unwound: Unwind | None = None
        result = None
        try:
            result = self._go_through(runner, function)
        except Unwind as error:
            unwound = error
        finally:
            errors = [future.exception() for future in futures]
        first = next((error for error in errors if error is not None and not isinstance(error, Unwind)), unwound)
        if first is not None:
            raise first
        return result

    def _go_through(self, runner: _Runner, function: Callable[[], Any]) -> Any:
        try:
            if self._stream.unwinding:
                raise Unwind
            return function()
        except BaseException:
            self._stream.unwinding = True
            raise
        finally:
            runner.finished = True
            self._stream.leave()
            self._wake_next()

    def _hand_over(self) -> None:
        """Let the side that is furthest behind go on, and come back when it is this thread's turn again."""
        runner = self._by_thread[threading.get_ident()]
        self._wake_next()
        runner.turn.acquire()
        if self._stream.unwinding:
            raise Unwind

    def _wake_next(self) -> None:
        waiting = [runner for runner in self._runners if not runner.finished]
        if waiting:
            min(waiting, key=lambda runner: runner.side.at).turn.release()


class _Runner:
    """One of the passes: its side in the stream, and the baton as it sees it."""

    def __init__(self) -> None:
        self.side: Side | None = None
        self.turn = threading.Semaphore(0)
        self.finished = False


def thread_settings() -> Callable[[], AbstractContextManager[None]]:
    """What torch keeps for this thread, to be entered in another one."""
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    default_device = torch.empty(0).device  # torch 2.5's get_default_device does not see `with torch.device(…)`
    accelerator = _accelerator_settings()
    autocasts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
                 for kind in ("cpu", *accelerator_types()) if torch.is_autocast_enabled(kind)]

    @contextmanager
    def enter() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(gradients))
            if default_device.type != "cpu":
                stack.enter_context(default_device)
            for context in accelerator():
                stack.enter_context(context)
            for kind, dtype, cached in autocasts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cached))
            yield

    return enter


def accelerator_types() -> list[str]:
    """The kind of accelerator that this process has begun to use, if any: asking must not initialise one."""
    return [name for name in ("cuda", "xpu", "npu")
            if hasattr(torch, name) and getattr(getattr(torch, name), "is_initialized", lambda: False)()]


def _accelerator_settings() -> Callable[[], list[AbstractContextManager]]:
    saved = []
    for name in accelerator_types():
        api = getattr(torch, name)
        saved.append((api, api.current_device(), api.current_stream()))
    return lambda: [context for api, device, stream in saved for context in (api.device(device), api.stream(stream))]
