"""Who stays on the device, who waits in RAM and who is read from disk while a denoise loop runs.

Pure functions from sizes, limits, visiting order and measured bandwidths to a `Plan`: no I/O, no device, no clock.
A layer is resident, or it is streamed: at each visit its bytes cross into a ring buffer on the device, ahead of its
computation and in visiting order, from RAM ("host") or from disk. Both sets are fixed for the whole loop: in a cyclic
order, what was used least recently is what is needed next, so a cache that drops it is never hit.

Notable:

* A step takes at least max(computation, transfer). `simulate` says how far a placement is from that, and it alone
  judges; everything else only proposes.
* A proposal is one walk over the layers as the pipeline would take it, at a chosen pace: what could not arrive in time
  has to be nearer (on the device; of the rest, in RAM). The fastest pace whose bytes fit the limit is taken.
* Then a search makes up for sizes that fill a limit badly, which matters for models of few layers. It tries a bounded
  number of moves, small ones first, in a fixed order: equal input gives an equal plan.

Sizes are in bytes, times in seconds, bandwidths in bytes per second.
"""
from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, groupby, product

from ..device import GIB

DEVICE, HOST, DISK = range(3)  # where a layer's weights are during the loop
Tiers = tuple[int, ...]        # a placement: the tier of each layer, in visiting order
Pace = tuple[bool, float]      # whether a walk's clock runs with the bytes, and the part of a full ring kept in hand

RING_LAYERS = 3          # one is computed, one is ready, one arrives
PASSES = 8               # simulated; the first half fills the ring and is not counted
NEAR_BOUND = 1.005       # close enough: bandwidths are not measured better than that
SAME_DENSITY = 0.95      # layers stand in for each other if a byte of theirs saves nearly the same time
RINGS = 2                # how many sizes of the ring proposals are made for
# The even one first: it depends least on times, which are measured or unknown.
PACES: tuple[Pace, ...] = ((True, 0.0), (False, 0.0), (False, 0.25), (False, 0.5), (False, 0.75))
PACE_BISECTIONS = 10
SEARCH_VISITS = 200_000  # layers that the search looks at, in all: some hundredths of a second
ROUNDING = 1e-9
TINY = 1e-99             # seconds per byte, to have a logarithm


@dataclass(frozen=True)
class LayerSize:
    """What a layer takes: device memory while resident, the bus at each visit if not, and time (0: unknown).

    `in_host_memory`: its weights are in RAM anyway; streaming it never reads the disk nor counts against the RAM limit.
    Raises ValueError for a size or a time below 0.
    """

    name: str
    resident_bytes: int
    stream_bytes: int
    compute_seconds: float = 0.0
    in_host_memory: bool = False

    def __post_init__(self) -> None:
        if not all(0 <= value < math.inf for value in (self.resident_bytes, self.stream_bytes, self.compute_seconds)):
            raise ValueError(f"sizes and times must be finite and at least 0, got {self}")


class LimitTooLow(ValueError):
    """A limit with which nothing can be computed; `floor_gib` is the least that would do."""

    def __init__(self, floor_gib: float, message: str) -> None:
        super().__init__(message)
        self.floor_gib = floor_gib


@dataclass(frozen=True)
class Machine:
    """Limits (None: unlimited) and measured bandwidths; that of the disk includes the copy to the device.

    Raises ValueError for a limit below 0 and for a bandwidth that is not above 0.
    """

    limit_bytes: int | None
    ram_limit_bytes: int | None
    host_bandwidth: float
    disk_bandwidth: float

    def __post_init__(self) -> None:
        if any(limit is not None and limit < 0 for limit in (self.limit_bytes, self.ram_limit_bytes)):
            raise ValueError(f"limits must be at least 0, or None for no limit, got {self}")
        if not (0 < self.host_bandwidth < math.inf and 0 < self.disk_bandwidth < math.inf):
            raise ValueError(f"bandwidths must be finite and above 0, got {self}")


@dataclass(frozen=True)
class Plan:
    """Where each layer's weights are, by name, and what a step costs.

    Resident layers, ring, activations and tables are within the limit together. `host_bytes` counts all streamed layers
    that wait in RAM, limited or not. `step_seconds` is simulated; `bound_seconds`, the larger of computation and
    transfer, is what no schedule of this placement can beat. `once_bytes` cross before the loop, not in it.
    """

    resident: frozenset[str]
    host: frozenset[str]
    disk: frozenset[str]
    ring_bytes: int
    activation_bytes: int
    table_bytes: int
    once_bytes: int
    resident_bytes: int
    host_bytes: int
    bytes_per_step: int
    read_bytes_per_step: int
    step_seconds: float
    bound_seconds: float

    def describe(self) -> str:
        """One line for the log."""
        once = f" after {_words(self.once_bytes)} once" if self.once_bytes else ""
        return (f"{_words(self.resident_bytes)} stay on the device, {_words(self.host_bytes)} wait in RAM, "
                f"{_words(self.read_bytes_per_step)} on disk; {_words(self.bytes_per_step)} cross per step{once}, "
                f"{self.step_seconds:.2f} s expected")


def plan_residency(layers: Sequence[LayerSize], machine: Machine, activation_bytes: int = 0, table_bytes: int = 0,
                   once_bytes: int = 0, ring_bytes: int | None = None) -> Plan:
    """The placement of the layers, given in visiting order, that makes a step the shortest.

    The limit is hard: resident layers, ring, activations and tables fit it together. At limit 0 nothing stays resident;
    ring, activations and tables are what they have to be. If all layers fit, or without a limit, all are resident and
    there is no ring. `ring_bytes` is by default 3 × the largest streamed layer; layers larger than a given ring are
    resident. Raises LimitTooLow for a limit below what streaming needs, ValueError for a name that occurs twice.
    """
    if len({layer.name for layer in layers}) < len(layers):
        raise ValueError("each layer must be given once, in the order of the visits: a name occurs twice")
    case = _Case(tuple(layers), machine, activation_bytes + table_bytes, ring_bytes)
    tiers: Tiers = (DEVICE,) * len(layers)
    if not case.fits(tiers):
        starts = _starts(case)
        _check_floor(case, starts, activation_bytes, table_bytes)
        tiers = _search(case, *_propose(case, starts))
    return _report(case, tiers, activation_bytes, table_bytes, once_bytes)


def simulate(layers: Sequence[LayerSize], resident: AbstractSet[str], host: AbstractSet[str], machine: Machine,
             ring_bytes: int, passes: int = PASSES) -> float:
    """Seconds a step takes once the stream has settled. Layers in neither set are read from disk.

    A transfer starts when the one before it has ended and the ring has room for it; room is freed, in order, when the
    computation of a streamed layer ends. A computation starts when the one before it and its own transfer have ended.
    Passes follow each other without a gap. Raises ValueError for an unknown name and for a layer larger than the ring.
    """
    unknown = (resident | host) - {layer.name for layer in layers}
    if unknown:
        raise ValueError(f"no such layers: {', '.join(sorted(unknown))}")
    case = _Case(tuple(layers), machine, 0, ring_bytes)
    tiers = tuple(DEVICE if layer.name in resident else HOST if layer.name in host or layer.in_host_memory else DISK
                  for layer in layers)
    _check_ring(case, tiers)
    return case.step_seconds(tiers, passes)


# ---- what a placement costs -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Case:
    """One problem, and what each placement of its layers costs."""

    layers: tuple[LayerSize, ...]
    machine: Machine
    fixed_bytes: int
    given_ring: int | None

    @cached_property
    def compute_seconds(self) -> float:
        return sum(layer.compute_seconds for layer in self.layers)

    @cached_property
    def resident_bytes(self) -> list[int]:
        """At least 1 each, so that at limit 0 not even an empty layer stays."""
        return [max(layer.resident_bytes, 1) for layer in self.layers]

    @cached_property
    def seconds(self) -> list[tuple[float, float, float]]:
        """Of each layer's transfer, by tier."""
        host, disk = self.machine.host_bandwidth, self.machine.disk_bandwidth
        return [(0.0, layer.stream_bytes / host, layer.stream_bytes / disk) for layer in self.layers]

    @cached_property
    def streamed_tiers(self) -> list[Tiers]:
        """Where each layer may be if it is streamed, nearest first."""
        limited = (HOST,) if self.machine.ram_limit_bytes is None else (HOST, DISK)
        source = limited if self.machine.host_bandwidth >= self.machine.disk_bandwidth else (DISK,)
        return [(HOST,) if layer.in_host_memory else source for layer in self.layers]

    @cached_property
    def near(self) -> list[float]:
        """Seconds of each layer's transfer if there is RAM for it."""
        return [seconds[tiers[0]] for seconds, tiers in zip(self.seconds, self.streamed_tiers)]

    @cached_property
    def far(self) -> list[float]:
        """And if there is none."""
        return [seconds[tiers[-1]] for seconds, tiers in zip(self.seconds, self.streamed_tiers)]

    def ring_bytes(self, tiers: Tiers) -> float:
        """Infinite if the given ring cannot hold what is streamed."""
        largest = max((layer.stream_bytes for layer, tier in zip(self.layers, tiers) if tier), default=0)
        if self.given_ring is None or not largest:
            return RING_LAYERS * largest
        return self.given_ring if largest <= self.given_ring else math.inf

    def left_bytes(self, tiers: Tiers) -> float:
        """Of the limit; below 0 if the placement exceeds it."""
        resident = sum(nbytes for nbytes, tier in zip(self.resident_bytes, tiers) if not tier)
        if not self.machine.limit_bytes:
            return math.inf if self.machine.limit_bytes is None else -resident
        return self.machine.limit_bytes - self.fixed_bytes - self.ring_bytes(tiers) - resident

    def fits(self, tiers: Tiers) -> bool:
        hosted = sum(layer.stream_bytes for layer, tier in zip(self.layers, tiers)
                     if tier == HOST and not layer.in_host_memory)
        ram = self.machine.ram_limit_bytes
        return self.left_bytes(tiers) >= 0 and (ram is None or hosted <= ram)

    def transfer_seconds(self, tiers: Tiers) -> float:
        return sum(seconds[tier] for seconds, tier in zip(self.seconds, tiers))

    def bound_seconds(self, tiers: Tiers) -> float:
        return max(self.compute_seconds, self.transfer_seconds(tiers))

    def cost(self, tiers: Tiers) -> tuple[float, float]:
        """What is minimised; of equally long steps, the one that moves less is better."""
        return self.step_seconds(tiers), self.transfer_seconds(tiers)

    def step_seconds(self, tiers: Tiers, passes: int = PASSES) -> float:
        """See `simulate`."""
        visits = [(seconds[tier], layer.stream_bytes if tier else 0, layer.compute_seconds)
                  for seconds, layer, tier in zip(self.seconds, self.layers, tiers)]
        ring, arrived, computed, settled = _Ring(self.ring_bytes(tiers)), 0.0, 0.0, 0.0
        for number in range(passes):
            if number == passes // 2:
                settled = computed
            for transfer, size, compute in visits:
                if size:
                    arrived = max(arrived, ring.make_room(size)) + transfer
                    computed = max(arrived, computed) + compute
                    ring.put(size, computed)
                else:
                    computed += compute
        return (computed - settled) / (passes - passes // 2)


class _Ring:
    """The buffer on the device that streamed layers pass through, first in, first out."""

    def __init__(self, nbytes: float) -> None:
        self._free_bytes, self._free_at = nbytes, 0.0
        self._layers: deque[tuple[int, float]] = deque()

    def make_room(self, nbytes: int) -> float:
        """The time from which so many bytes are free."""
        while self._free_bytes < nbytes:
            size, self._free_at = self._layers.popleft()
            self._free_bytes += size
        return self._free_at

    def put(self, nbytes: int, until: float) -> None:
        self._free_bytes -= nbytes
        self._layers.append((nbytes, until))


# ---- limits ---------------------------------------------------------------------------------------------------------

def _starts(case: _Case) -> list[Tiers]:
    """Placements to start from: the largest streamed layer makes the ring, so each size of it is a choice."""
    sizes = sorted({0, *(layer.stream_bytes for layer in case.layers)}, reverse=True)
    return [tuple(DEVICE if layer.stream_bytes > largest else DISK for layer in case.layers)
            for largest in (sizes[:1] if case.machine.limit_bytes == 0 else sizes)]


def _check_floor(case: _Case, starts: Sequence[Tiers], activation_bytes: int, table_bytes: int) -> None:
    """Raises LimitTooLow if the limit admits none of the starts."""
    limit = case.machine.limit_bytes
    if limit == 0:
        _check_ring(case, starts[0])
    floor = limit - max(case.left_bytes(start) for start in starts)
    if floor > limit:
        at_least = math.ceil(100 * floor / GIB) / 100  # rounded up, so that following the advice is enough
        streaming = floor - activation_bytes - table_bytes
        raise LimitTooLow(at_least, f"vram_limit is {limit / GIB:.2f} GiB, but the floor is {at_least:.2f} GiB: "
                          f"activations take {activation_bytes / GIB:.2f}, streaming {streaming / GIB:.2f} and tables "
                          f"{table_bytes / GIB:.2f}. Raise vram_limit to at least {at_least:.2f}, or draw a smaller "
                          "picture or fewer frames")


def _check_ring(case: _Case, tiers: Tiers) -> None:
    """Raises ValueError if a streamed layer is larger than the given ring."""
    if case.ring_bytes(tiers) == math.inf:
        largest = max((layer for layer, tier in zip(case.layers, tiers) if tier), key=lambda layer: layer.stream_bytes)
        raise ValueError(f"{largest.name} is streamed with {largest.stream_bytes} bytes, which a ring of "
                         f"{case.given_ring} bytes cannot hold: raise ring_bytes to that at least")


# ---- proposals ------------------------------------------------------------------------------------------------------

def _propose(case: _Case, starts: Iterable[Tiers]) -> tuple[Tiers, float]:
    """The best placement of all paces, and the length of a step that would be good enough."""
    largest, *smaller = ((_least_seconds(case, start), start) for start in starts if case.left_bytes(start) >= 0)
    goal = NEAR_BOUND * min([largest, *smaller])[0]
    best = (math.inf, math.inf), largest[1]
    for (bound, start), pace in product([largest, *sorted(smaller)[:RINGS - 1]], PACES):
        if best[0][0] > max(goal, bound):
            tiers = _place(case, start, pace)
            best = min(best, (case.cost(tiers), tiers))
    return best[1], goal


def _least_seconds(case: _Case, start: Tiers) -> float:
    """No placement from that start has a shorter step: parts of layers may be resident, and each tier is by itself."""
    machine = case.machine
    ram_saves = (machine.ram_limit_bytes or 0) * max(0, 1 / machine.disk_bandwidth - 1 / machine.host_bandwidth)
    return max(case.compute_seconds, _least_transfer(case, start, case.near),
               _least_transfer(case, start, case.far) - ram_saves)


def _least_transfer(case: _Case, start: Tiers, seconds: Sequence[float]) -> float:
    left, total = case.left_bytes(start), 0.0
    for i in _by_density(case, start, seconds):
        part = min(left, case.resident_bytes[i])
        total += seconds[i] * (1 - part / case.resident_bytes[i])
        left -= part
    return total


def _by_density(case: _Case, start: Tiers, seconds: Sequence[float]) -> list[int]:
    """The layers that need not be resident, those first that save most seconds per byte if they are."""
    return sorted((i for i, tier in enumerate(start) if tier),
                  key=lambda i: (-seconds[i] / case.resident_bytes[i], _scattered(i)))


def _scattered(i: int) -> float:
    """A rank by which the first few of many equal layers are spread over all of them: multiples of the golden ratio."""
    return i * (5**0.5 - 1) / 2 % 1


def _place(case: _Case, start: Tiers, pace: Pace) -> Tiers:
    """First who is resident, then who waits in RAM."""
    resident = _residents(case, start, pace)
    near, far = ([0.0 if i in resident else value for i, value in enumerate(seconds)]
                 for seconds in (case.near, case.far))
    sizes, ram = [layer.stream_bytes for layer in case.layers], case.machine.ram_limit_bytes
    hosted = _Walk(case, case.ring_bytes(start), pace, near, far).nearer(sizes, math.inf if ram is None else ram)
    return tuple(DEVICE if i in resident else tiers[0] if i in hosted else tiers[-1]
                 for i, tiers in enumerate(case.streamed_tiers))


def _residents(case: _Case, start: Tiers, pace: Pace) -> set[int]:
    """Those that save most per byte; of the kind that fits in part only, what a walk chooses; and what else fits."""
    seconds, sizes = _expected_seconds(case, start), case.resident_bytes
    order = _by_density(case, start, seconds)
    resident, left = set(range(len(start))) - set(order), case.left_bytes(start)
    for _, alike in groupby(order, key=lambda i: round(math.log(max(seconds[i] / sizes[i], TINY), SAME_DENSITY))):
        kind = set(alike)
        far = [0.0 if i in resident else value for i, value in enumerate(seconds)]
        near = [0.0 if i in kind else value for i, value in enumerate(far)]
        chosen = _Walk(case, case.ring_bytes(start), pace, near, far).nearer(sizes, left)
        resident |= chosen
        left -= sum(sizes[i] for i in chosen)
        if chosen != kind:
            break
    return _top_up(case, resident, order)


def _expected_seconds(case: _Case, start: Tiers) -> list[float]:
    """Of each layer's transfer, as if the RAM held the same part of all."""
    if case.machine.ram_limit_bytes is None:
        return case.near
    sizes = [layer.stream_bytes for layer, tiers in zip(case.layers, case.streamed_tiers) if len(tiers) > 1]
    on_disk = max(0.0, 1 - case.machine.ram_limit_bytes / max(sum(sizes) - case.left_bytes(start), 1))
    return [near + on_disk * (far - near) for near, far in zip(case.near, case.far)]


def _top_up(case: _Case, resident: set[int], order: Sequence[int]) -> set[int]:
    """Use what is left, and what the ring gives back where no large layer is streamed any more."""
    left = case.left_bytes(tuple(DEVICE if i in resident else DISK for i in range(len(case.layers))))
    added = _fill([i for i in order if i not in resident], case.resident_bytes, left)
    return _top_up(case, resident | added, order) if added else resident


def _fill(order: Iterable[int], sizes: Sequence[int], left: float) -> set[int]:
    """One after the other, what still fits."""
    chosen = set()
    for i in order:
        if sizes[i] <= left:
            chosen.add(i)
            left -= sizes[i]
    return chosen


@dataclass(frozen=True)
class _Walk:
    """A choice of the nearer or the farther tier for each layer; it is free where their seconds of transfer differ."""

    case: _Case
    ring_bytes: float
    pace: Pace
    near: Sequence[float]
    far: Sequence[float]

    def nearer(self, sizes: Sequence[int], left: float) -> set[int]:
        """The layers for the nearer tier, at most `left` bytes together: for the shortest step, those that are late."""
        free = {i for i, (near, far) in enumerate(zip(self.near, self.far)) if near != far}
        if sum(sizes[i] for i in free) <= left:
            return free
        chosen: set[int] = set()
        fast, slow = 0.0, self.case.compute_seconds + sum(self.far)
        for _ in range(PACE_BISECTIONS):
            step = (fast + slow) / 2
            late = self.late(step) & free
            if sum(sizes[i] for i in late) <= left:
                slow, chosen = step, late
            else:
                fast = step
        order = sorted(free - chosen, key=lambda i: (self.near[i] - self.far[i], _scattered(i)))
        return chosen | _fill(order, sizes, left - sum(sizes[i] for i in chosen))

    def late(self, step: float) -> set[int]:
        """The layers that would not arrive in time from the farther tier if a step took so long.

        The clock runs as the computation does. Where a step takes longer, it also waits for each layer in proportion
        to its transfer; at an even pace it does nothing else.
        """
        compute, machine, (even, part) = self.case.compute_seconds, self.case.machine, self.pace
        speed = 0.0 if even or not compute else min(1.0, step / compute)
        patience = (step - speed * compute) / sum(self.far)
        lead = part * self.ring_bytes / max(machine.host_bandwidth, machine.disk_bandwidth)
        ring, arrived, clock, late = _Ring(self.ring_bytes), 0.0, ROUNDING * step - lead, set()
        lap = [*enumerate(zip(self.case.layers, self.near, self.far))]
        for i, (layer, near, far) in lap * 2:  # the second one begins as later steps do, and decides
            late.discard(i)
            clock += patience * far
            if far:
                start = max(arrived, ring.make_room(layer.stream_bytes))
                if start + far > clock:
                    late.add(i)
                    far = near
            clock += speed * layer.compute_seconds
            if far:
                arrived = start + far
                ring.put(layer.stream_bytes, clock + lead)
        return late


# ---- search ---------------------------------------------------------------------------------------------------------

def _search(case: _Case, tiers: Tiers, goal: float) -> Tiers:
    """Take the first move that helps until none does, the goal is reached or the effort is spent."""
    cost, moves, visits = case.cost(tiers), _moves(case, tiers), SEARCH_VISITS
    while cost[0] > goal and visits > 0 and (moved := next(moves, None)):
        visits -= len(tiers)
        if case.bound_seconds(moved) <= cost[0] and case.fits(moved):
            visits -= PASSES * len(tiers)
            if case.cost(moved) < cost:
                tiers, cost, moves = moved, case.cost(moved), _moves(case, moved)
    return tiers


def _moves(case: _Case, tiers: Tiers) -> Iterator[Tiers]:
    """Every other placement of one layer, of two, …"""
    others = [[other for other in (DEVICE, *streamed) if other != tier]
              for tier, streamed in zip(tiers, case.streamed_tiers)]
    for count in range(1, len(tiers) + 1):
        for indices in combinations(range(len(tiers)), count):
            for choice in product(*(others[i] for i in indices)):
                moved = list(tiers)
                for i, tier in zip(indices, choice):
                    moved[i] = tier
                yield tuple(moved)


# ---- result ---------------------------------------------------------------------------------------------------------

def _report(case: _Case, tiers: Tiers, activation_bytes: int, table_bytes: int, once_bytes: int) -> Plan:
    resident, host, disk = ([layer for layer, at in zip(case.layers, tiers) if at == tier]
                            for tier in (DEVICE, HOST, DISK))
    host_bytes, read_bytes = (sum(layer.stream_bytes for layer in layers) for layers in (host, disk))
    return Plan(
        *(frozenset(layer.name for layer in layers) for layers in (resident, host, disk)),
        ring_bytes=case.ring_bytes(tiers), activation_bytes=activation_bytes, table_bytes=table_bytes,
        once_bytes=once_bytes, resident_bytes=sum(layer.resident_bytes for layer in resident), host_bytes=host_bytes,
        bytes_per_step=host_bytes + read_bytes, read_bytes_per_step=read_bytes,
        step_seconds=case.step_seconds(tiers), bound_seconds=case.bound_seconds(tiers))


def _words(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.1f} MiB"
