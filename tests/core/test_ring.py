"""The ring: regions in order, never over live ones, and the events that have to pass before one is written."""
from __future__ import annotations

import random
from collections import deque

import pytest

from diffsynth_backend.core.vram.ring import ALIGNMENT, Ring, aligned

UNIT = ALIGNMENT


def test_sizes_are_aligned():
    assert [aligned(n) for n in (0, 1, UNIT, UNIT + 1)] == [0, UNIT, UNIT, 2 * UNIT]


def test_regions_follow_each_other_and_wrap():
    ring = Ring(4 * UNIT)
    a, b = ring.reserve(2 * UNIT), ring.reserve(UNIT)
    assert (a.start, a.end, b.start, b.end) == (0, 2 * UNIT, 2 * UNIT, 3 * UNIT)
    assert ring.reserve(2 * UNIT) is None
    ring.free(a)
    c = ring.reserve(2 * UNIT)
    assert (c.start, c.end) == (0, 2 * UNIT)
    assert ring.reserve(1) is None, "what is left lies between the regions' order"
    ring.free(b)
    assert ring.reserve(1).start == 2 * UNIT


def test_a_region_freed_early_waits_for_its_elders():
    ring = Ring(3 * UNIT)
    a, b, c = (ring.reserve(UNIT) for _ in range(3))
    ring.free(b)
    assert ring.reserve(UNIT) is None
    ring.free(a)
    assert [ring.reserve(UNIT).start, ring.reserve(UNIT).start] == [0, UNIT]
    assert ring.reserve(UNIT) is None and not c.free


def test_what_nobody_used_makes_room_before_its_elders():
    ring = Ring(3 * UNIT)
    ring.reserve(UNIT)
    foreseen = [ring.reserve(UNIT) for _ in range(2)]
    for region in reversed(foreseen):
        ring.take_back(region)
    assert ring.reserve(2 * UNIT).start == UNIT


def test_a_region_knows_the_events_of_those_that_it_lies_on():
    ring = Ring(4 * UNIT)
    for name in "abcd":
        ring.free(ring.reserve(UNIT), used_until=name)
    assert ring.reserve(2 * UNIT).after == ("a", "b")
    assert ring.reserve(UNIT).after == ("c",)


def test_more_than_the_ring_is_an_error():
    with pytest.raises(ValueError, match=f"{3 * UNIT} bytes asked of a ring of {2 * UNIT}"):
        Ring(2 * UNIT).reserve(2 * UNIT + 1)


def test_live_regions_never_overlap():
    rng, ring, live = random.Random(0), Ring(64 * UNIT), deque()
    for _ in range(3000):
        region = ring.reserve(rng.randint(1, 20 * UNIT))
        if region is not None:
            assert 0 <= region.start < region.end <= ring.capacity
            assert not any(region.overlaps(other) for other in live)
            live.append(region)
        if region is None or rng.random() < 0.3:
            ring.free(live.popleft())
    assert ring.free_bytes == ring.capacity - sum(region.end - region.start for region in live)
