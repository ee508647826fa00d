"""What benchmarks share: measuring in turns, memory figures, and tables of ratios.

Notable: machines differ and disks have moods, so nothing is quoted in seconds. All cases of a comparison take turns,
and a ratio is formed within each turn before minimum, median and maximum are taken over the turns.
"""
from __future__ import annotations

import math
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

Step = Callable[[], object]
Entered = Callable[[], AbstractContextManager[Step]]
Seconds = dict[str, list[float]]  # of a step, by case: one figure a turn
STEPS = 3  # timed in one stretch, after one of warming up


@dataclass(frozen=True)
class Setup:
    """What the command line says; `folder` is ours alone."""

    device: torch.device
    turns: int
    layers: int
    folder: Path


@dataclass(frozen=True)
class Case:
    """Something to measure: in the context made by `enter`, a call of its value is a step.

    `between` runs before each step, off the clock. It is for cases that do nothing between steps themselves.
    """

    enter: Entered
    between: Step | None = None


def plain(step: Step, at_exit: Step = lambda: None) -> Entered:
    """Something that needs no preparation."""

    @contextmanager
    def enter() -> Iterator[Step]:
        with torch.no_grad():
            yield step
        at_exit()

    return enter


def installed(peers: Mapping[str, Callable[..., Case]], *arguments: object) -> dict[str, Case]:
    found = {}
    for name, case in peers.items():
        try:
            found[name] = case(*arguments)
        except ImportError as error:
            say(f"Without {name}: {error}")
    return found


def measure(cases: Mapping[str, Case], turns: int, steps: int = STEPS) -> Seconds:
    """Seconds of a step of each case. Every turn enters each case anew, warms it up by a step and times `steps`."""
    seconds: Seconds = {name: [] for name in cases}
    for _ in range(turns):
        for name, case in cases.items():
            with case.enter() as step:
                _timed(step, case.between)
                seconds[name].append(sum(_timed(step, case.between) for _ in range(steps)) / steps)
    return seconds


def _timed(step: Step, between: Step | None) -> float:
    if between is not None:
        between()
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Turn by turn."""
    return [a / b for a, b in zip(above, below, strict=True)]


# ---- tables ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Target:
    """What the median should be: at most (or least) `bound`."""

    bound: float
    at_least: bool = False

    def verdict(self, value: float) -> str:
        met = value >= self.bound if self.at_least else value <= self.bound
        return f"{'>=' if self.at_least else '<='} {self.bound:g}: {'met' if met else 'MISSED'}"


Row = tuple[str, Sequence[float], Target | None]


def table(title: str, rows: Iterable[Row], digits: int = 2) -> None:
    """Print a table in Markdown: minimum, median and maximum of each row's figures."""
    say(f"\n{title}\n\n| what | min / median / max | target for the median |\n|---|---|---|")
    for label, values, target in rows:
        median = statistics.median(values)
        figures = " / ".join(f"{value:.{digits}f}" for value in (min(values), median, max(values)))
        say(f"| {label} | {figures} | {target.verdict(median) if target else ''} |")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def machine(device: torch.device) -> str:
    """One line: when, and on what."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no accelerator used"
    return (f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, {name}, {platform.system()}, "
            f"Python {platform.python_version()}, torch {torch.__version__}")


# ---- memory ---------------------------------------------------------------------------------------------------------

def anonymous_bytes() -> int | None:
    """Memory of this process that no file backs; None if neither the system nor psutil says."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return _own_bytes()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)


def _own_bytes() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return psutil.Process().memory_full_info().uss


@contextmanager
def peak_memory(seconds: float = 0.02) -> Iterator[list[int]]:
    """Looks at the anonymous memory all the time. The list's one item: the most seen above the start, in bytes."""
    start, peak, ended = anonymous_bytes() or 0, [0], threading.Event()

    def watch() -> None:
        while not ended.wait(seconds):
            peak[0] = max(peak[0], (anonymous_bytes() or 0) - start)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def slope(values: Sequence[float]) -> tuple[float, float]:
    """Of a straight line through equally spaced values: its slope and the slope's standard error."""
    count = len(values)
    xs = [i - (count - 1) / 2 for i in range(count)]
    spread, mean = sum(x * x for x in xs), statistics.fmean(values)
    per_step = sum(x * y for x, y in zip(xs, values)) / spread
    rest = sum((y - mean - per_step * x) ** 2 for x, y in zip(xs, values))
    return per_step, math.sqrt(rest / (count - 2) / spread)
