"""Weights that do not stay on the device flow through it: read ahead of use, into a ring, in the order of use.

One stream serves all models that are in use together. Its readers (threads) take the layers in the order in which the
computation will want them, as far ahead as the ring has room: disk → staging → device, or straight into the ring where
the device is the CPU. What order that is, `foresight` tells: it is guessed while a pass runs for the first time, learnt
from it, and learnt again when a pass differs.

Notable:

* Several *sides* may walk the same layers at once (the positive and the negative prompt, `lockstep`): all see the same
  log of layers. Who is ahead extends it, the others follow; a layer leaves the ring when the last of them has used it.
* Threads meet seldom, since waking one takes as long as reading 256 KiB: small layers travel in batches, and where the
  way is direct, a side that finds its layer untouched reads it itself.
* Nothing here changes values: a streamed layer computes with the bits that it would have had resident.
* The ring's memory is used again and again. A module's own parameters that its children compute inside of (a block's)
  are held too long for a ring and have memory of their own.
* Weights in the ring live for one call. With gradients on, which would need them later, layers fetch copies instead.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .bus import Arena, Bus
from .foresight import Foresight
from .ring import Ring, aligned
from .traffic import Traffic
from .transport import Transport
from .visits import Entry, Log, Side

if TYPE_CHECKING:
    from .management import Management, Weights

BATCH_BYTES = 1 << 20  # up to which small layers are read, and announced, together
WORTH_WAKING = 256 << 10  # bytes: below, the computation has read them before a reader is awake
IDLE_SECONDS = 1.0  # after which a reader ends: another is started when there is something to read


class Unwind(BaseException):
    """Raised in sides that have to stop because another one failed. Not an Exception: nothing should catch it."""


class Lease:
    """The weights of a streamed layer for the time of a `with` block."""

    __slots__ = ("_entry", "_stream", "_weights")

    def __init__(self, stream: WeightStream, entry: Entry, weights: Weights) -> None:
        self._stream, self._entry, self._weights = stream, entry, weights

    def __enter__(self) -> Weights:
        return self._weights

    def __exit__(self, *_: object) -> None:
        self._stream._give_back(self._entry)


class WeightStream:
    """Streams the layers of models in use to the device of `bus`, through `ring_bytes` of its memory.

    `traffic` counts what is moved. A reader that fails keeps its error for the layer that asks for these weights.
    `close` ends the readers and gives the memory back.
    """

    def __init__(self, bus: Bus, traffic: Traffic | None = None) -> None:
        self.bus = bus
        self.traffic = traffic or Traffic()
        self._transport = Transport(bus)
        self._lock = threading.Lock()
        self._arrival = threading.Condition(self._lock)  # sides wait for weights
        self._work = threading.Condition(self._lock)  # readers wait for something to read, and for room
        self._foresight = Foresight()
        self._is_open = False
        self._sides: dict[int, Side] = {}  # by thread
        self._is_explicit = False  # the current pass is one of `one_pass`
        self._readers: set[threading.Thread] = set()
        self._still_read = 0  # entries that were dropped while a reader was at them
        # A lock step sets these: what lets the side that is furthest behind go on, and whether all have to stop.
        self.hand_over: Callable[[], None] | None = None
        self.unwinding = False

    # ---- life -----------------------------------------------------------------------------------------------------
    def open(self, ring_bytes: int, passes: int = 0, order: Sequence[Management] = (),
             names: Mapping[Management, str] | None = None) -> None:
        """Be ready to stream. `passes`: how many will come, if known; the next one's weights are then read ahead.

        `order`: the layers in the order of a pass, if that was seen before; else their `names` tell what to expect.
        """
        with torch.inference_mode(False):  # readers write into it, whatever mode the caller is in
            self._arena = Arena(self.bus.allocate(aligned(ring_bytes)))
            self._transport.open([layer for layer in names or () if layer.waits])
        self._ring = Ring(aligned(ring_bytes))
        self._batch_bytes, self._room_awaited = min(BATCH_BYTES, self._ring.capacity // 4), 0
        self._log, self._foresight = Log(), Foresight(order, passes, names)
        self._stayers: dict[Management | None, list[Management]] = {}  # by the layer that was visited before
        self._is_open, self.unwinding, self._still_read = True, False, 0

    def close(self) -> None:
        """End the readers and drop the ring. Safe at any time, also after an error, and more than once."""
        with self._lock:
            self._is_open = False
            self._arrival.notify_all()
            self._work.notify_all()
            readers = list(self._readers)
        for reader in readers:
            reader.join()
        self._transport.close()
        self._sides = {}
        self._log = self._ring = self._arena = None

    @property
    def order(self) -> tuple[Management, ...]:
        """The layers of the last complete pass, in the order of their visits."""
        return tuple(self._foresight.order)

    @property
    def visits(self) -> tuple[Management, ...]:
        """The layers in that order, and between them those that stay on the device, which another plan may stream."""
        stayers = dict(self._stayers)
        visits = list(stayers.pop(None, ()))
        for layer in self._foresight.order:
            visits += [layer, *stayers.pop(layer, ())]
        return tuple(visits)

    @property
    def ring_bytes(self) -> int:
        """What the ring takes of the device now."""
        return self._arena.memory.numel() if self._is_open else 0

    # ---- passes ---------------------------------------------------------------------------------------------------
    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """What runs inside is one pass over the layers, by the thread that enters and by those that `join`."""
        with self._lock:
            self._begin_pass(explicit=True)
        completed = False
        try:
            yield
            completed = True
        finally:
            with self._lock:
                self._end_pass(completed)

    def join(self) -> Side:
        """The side of a further thread, which takes part in the current pass."""
        with self._lock:
            return self._sides.setdefault(threading.get_ident(), Side())

    def leave(self) -> None:
        """This thread's side has finished its walk: what it did not visit need not be kept for it."""
        with self._lock:
            side = self._sides.get(threading.get_ident())
            if self._is_open and side is not None:
                side.finished = True
                self._reclaim()
                self._wake_readers()

    def side_of_caller(self) -> Side:
        """The calling thread's side of the current pass."""
        return self._sides[threading.get_ident()]

    def _begin_pass(self, explicit: bool) -> None:
        """A pass that the calling thread walks, alone so far."""
        self._log.start_again()
        self._foresight.begin_pass(is_counted=explicit, nothing_taken=not self._log.entries)
        self._sides, self._is_explicit = {threading.get_ident(): Side()}, explicit
        if self._foresight.order:
            self._wake_readers()

    def _end_pass(self, completed: bool) -> None:
        """Learn the order. If it is not the known one, what was read ahead for the next pass is dropped."""
        if not self._is_open:
            return
        for side in self._sides.values():
            side.finished = True
        self._reclaim()
        for entry in self._log.entries[self._log.freed:self._log.lead]:
            if not entry.ready:  # who waited for it was interrupted
                self._drop(entry)
        if completed and self._foresight.end_pass([entry.layer for entry in self._log.entries[:self._log.lead]]):
            self._cut(self._log.lead)
        self._sides, self._is_explicit = {}, False
        self.traffic.passes += 1
        if self._foresight.more_passes:
            self._wake_readers()

    # ---- the computation's end ------------------------------------------------------------------------------------
    def borrow(self, layer: Management) -> Lease | None:
        """The layer's weights, on the device in the computation's dtype; waits until they have arrived.

        None when the stream cannot serve the calling thread; it then fetches copies of its own. Raises what reading
        them raised, and Unwind when another side has failed.
        """
        while True:
            with self._lock:
                side = self._walking_side(layer)
                if side is None:
                    return None
                if not self._must_yield(side, layer):
                    entry = self._claim(side, layer)
                    if entry is None:
                        return None
                    is_untouched = self.bus.direct and self._is_next(entry) and self._allot() is entry
                    break
            self.hand_over()
        try:
            if not entry.ready:
                self._obtain(entry, is_untouched)
            if entry.error is not None:
                raise entry.error
            self.bus.compute_after(entry.arrived)
            return Lease(self, entry, self._computable(entry))
        except BaseException:  # of the reading, an interrupt, or the device is full when they are cast
            self._give_back(entry)
            raise

    def pass_by(self, layer: Management) -> None:
        """The caller visits a layer that has just come to stay on the device."""
        with self._lock:
            side = self._sides.get(threading.get_ident())
            if self._is_open and side is not None:
                before = self._log.entries[side.at - 1].layer if side.at else None
                self._stayers.setdefault(before, []).append(layer)
                self._foresight.visited(layer)

    def _walking_side(self, layer: Management) -> Side | None:
        """The caller's side. Outside of `one_pass` the first thread that asks walks alone, pass after pass."""
        me = threading.get_ident()
        if not self._is_open:
            return None
        if self.unwinding:
            raise Unwind
        if not self._is_explicit and self._is_new_pass(layer, self._sides.get(me)):
            self._end_pass(completed=True)
        if not self._sides:
            self._begin_pass(explicit=False)
        return self._sides.get(me)

    def _is_new_pass(self, layer: Management, side: Side | None) -> bool:
        """Whether an implicit pass is over: it has reached the end of the order, or begins again."""
        if side is None or side.at == 0:
            return False
        at_end = side.at == len(self._log.entries) and self._foresight.is_at_end
        return at_end or self._log.entries[0].layer is layer

    def _must_yield(self, side: Side, layer: Management) -> bool:
        """Whether the side would hold more of the ring than its share, which others have yet to walk over."""
        if side.at < self._log.lead or len(self._sides) == 1:
            return False
        behind = any(other.at < self._log.lead for other in self._sides.values() if not other.finished)
        return behind and self._log.held_bytes + self._size_of(layer) > self._ring.capacity // 2

    def _claim(self, side: Side, layer: Management) -> Entry | None:
        log = self._log
        if side.at < log.lead:
            return self._follow(side, layer)
        if side.at < len(log.entries) and log.entries[side.at].layer is not layer:
            self._cut(side.at)
            self._foresight.was_wrong()
        if side.at == len(log.entries):
            log.entries.append(Entry(layer, self._size_of(layer)))  # whoever is ahead of the readers extends it
            self._foresight.go_on_from(layer)
        self._foresight.visited(layer)
        entry = log.entries[side.at]
        side.at = log.lead = side.at + 1
        log.held_bytes += entry.nbytes
        entry.leases += 1
        return entry

    def _follow(self, side: Side, layer: Management) -> Entry | None:
        """The entry that another side has visited; None if it did not come by this layer."""
        entries = self._log.entries
        place = next((i for i in range(side.at, self._log.lead) if entries[i].layer is layer), None)
        if place is None:
            return None
        side.at = place + 1
        entries[place].leases += 1
        return entries[place]

    def _obtain(self, entry: Entry, is_untouched: bool) -> None:
        """Read the entry's weights in this thread, if that is left to it, or wait until they have arrived."""
        began = time.perf_counter()
        if is_untouched:
            with torch.inference_mode(False):
                self._fill([entry])
        else:
            self._await(entry)
        self.traffic.stall_seconds += time.perf_counter() - began

    def _await(self, entry: Entry) -> None:
        with self._lock:
            self._wake_readers()
            while not entry.ready:
                if not self._is_open:
                    raise RuntimeError("the model was offloaded while it computed")
                self._arrival.wait()

    def _computable(self, entry: Entry) -> Weights:
        """In the computation's dtype; unless the way is direct, bus and ring carry the stored one, mostly narrower."""
        if self.bus.direct:
            return entry.weights
        computation = entry.layer.placements.computation
        return tuple(slot.place(tensor, computation) for slot, tensor in zip(entry.layer.slots, entry.weights))

    def _give_back(self, entry: Entry) -> None:
        event = self.bus.computed() if entry.region is not None else None
        with self._lock:
            entry.leases -= 1
            if entry.region is not None:
                entry.region.used_until = event
            if self._is_open and self._reclaim() and self._ring.free_bytes >= self._room_awaited:
                self._wake_readers()

    def _reclaim(self) -> bool:
        """Give back the memory of what every side has used; whether there was any."""
        log, first = self._log, self._log.freed
        walking = [side.at for side in self._sides.values() if not side.finished]
        limit = min(walking, default=log.lead)
        while log.freed < limit:
            entry = log.entries[log.freed]
            if entry.region is not None:
                if entry.leases or not entry.ready:
                    break
                self._ring.free(entry.region, entry.region.used_until)
                entry.region = None
            if not entry.leases:
                entry.weights = ()
            log.freed += 1
            log.held_bytes -= entry.nbytes
        return log.freed > first

    # ---- foresight ------------------------------------------------------------------------------------------------
    def _foresee(self) -> bool:
        """Append the next visit to the log, if there is one to expect."""
        layer = self._foresight.next_after(self._log.entries[-1].layer if self._log.entries else None)
        if layer is not None:
            self._log.entries.append(Entry(layer, self._size_of(layer)))
        return layer is not None

    def _cut(self, place: int) -> None:
        """Drop the visits from `place` on, which were foreseen wrongly."""
        log = self._log
        for entry in reversed(log.entries[place:]):
            self._drop(entry)
        del log.entries[place:]
        log.allotted = min(log.allotted, place)

    def _drop(self, entry: Entry) -> None:
        """Have the memory of an entry that nobody wants back as soon as no reader writes it."""
        if entry.region is not None:
            if entry.ready:
                self._ring.take_back(entry.region)
            else:
                entry.dropped = True
                self._still_read += 1

    def _size_of(self, layer: Management) -> int:
        """Bytes of the ring that a visit takes."""
        return layer.transfer(self.bus).nbytes

    # ---- the readers' end -----------------------------------------------------------------------------------------
    def _wake_readers(self) -> None:
        """There may be something to read: start the readers unless they are there."""
        while len(self._readers) < self.bus.readers:
            reader = threading.Thread(target=self._read, daemon=True, name="weight stream")
            self._readers.add(reader)
            reader.start()
        self._work.notify_all()

    def _read(self) -> None:
        """A reader's life. It does not wait for ever, because it keeps the stream, and so the models, alive."""
        while batch := self._next_to_read():
            self._fill(batch)

    def _next_to_read(self) -> list[Entry]:
        """The next entries that there is memory for; none, for good, when there are none for a while."""
        with self._lock:
            was_woken = True
            while self._is_open:
                if batch := self._allot_batch():
                    return batch
                if not was_woken:
                    break  # only after a last look: who wants an entry counts on readers that are there
                was_woken = self._work.wait(IDLE_SECONDS)
            self._readers.discard(threading.current_thread())
            return []

    def _allot_batch(self) -> list[Entry]:
        """One entry, or several small ones."""
        batch, nbytes = [], 0
        while nbytes < self._batch_bytes and (entry := self._allot()) is not None:
            batch.append(entry)
            nbytes += entry.nbytes
        return batch

    def _is_next(self, entry: Entry) -> bool:
        """Whether all before it have been given to readers, and it has not."""
        log = self._log
        return log.allotted < len(log.entries) and log.entries[log.allotted] is entry

    def _allot(self) -> Entry | None:
        log = self._log
        if self._still_read or (log.allotted == len(log.entries) and not self._foresee()):
            return None  # what was dropped has to end first: regions behind it would keep its room from being used
        entry = log.entries[log.allotted]
        if entry.nbytes and not (entry.layer.nested or entry.nbytes > self._ring.capacity):
            entry.region = self._ring.reserve(entry.nbytes)
            if entry.region is None:
                self._room_awaited = max(entry.nbytes, self._batch_bytes, WORTH_WAKING if self.bus.direct else 0)
                return None
        log.allotted += 1
        return entry

    def _fill(self, batch: Sequence[Entry]) -> None:
        """Bring the entries' weights to the device. An error is kept for the side that wants them."""
        began = time.perf_counter()
        for entry in batch:
            try:
                self._transport.bring(entry, self._arena)
            except BaseException as error:  # noqa: BLE001 - the computation must learn of it, and not wait for ever
                entry.error = error
        with self._lock:
            self.traffic.busy_seconds += time.perf_counter() - began
            for entry in batch:
                self._arrived(entry)
            self._arrival.notify_all()

    def _arrived(self, entry: Entry) -> None:
        self.traffic.moved_bytes += entry.nbytes
        self.traffic.read_bytes += entry.read_bytes
        entry.ready = True
        if entry.dropped and self._is_open:
            self._ring.take_back(entry.region)
            self._still_read -= 1
            self._work.notify_all()
