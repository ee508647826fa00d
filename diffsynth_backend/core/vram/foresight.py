"""Which layer a stream of weights expects next, so that it can be read before it is asked for.

A pass is expected to be like the last one. Of the first pass, blocks tell: a model visits the layers of a block as it
did those of the block before, so after `blocks.0.up` → `blocks.0.down` → `blocks.1.up`, what follows `blocks.1.up` is
`blocks.1.down`. One wrong guess ends the guessing, so at most a ring of weights is read in vain.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .management import Management

_NUMBER = re.compile(r"\d+")


class Foresight:
    """Expects visits of layers, as far as they are known. Who reads ahead takes them one by one (`next_after`).

    `order`: the layers of a pass, if it was seen before. `passes`: how many will come, if that is known; what lies
    beyond the end of a pass is then the beginning of the next. `names`: of all layers that may be visited.
    """

    def __init__(self, order: Sequence[Management] = (), passes: int = 0,
                 names: Mapping[Management, str] | None = None) -> None:
        self.order = list(order)
        self._taken = 0  # of the order, by this pass or by one that is expected after it
        self._is_lost = False  # the order does not know where the pass is
        self._passes_left = passes  # to come after the current one
        self._passes_ahead = 0  # of them, those whose beginning was taken
        self._repetition = Repetition(names or {}) if not order else None

    @property
    def is_at_end(self) -> bool:
        """Whether all of the known order was taken."""
        return self._taken == len(self.order) > 0

    @property
    def more_passes(self) -> bool:
        """Whether passes are known to come after the current one."""
        return self._passes_left > 0

    def begin_pass(self, is_counted: bool, nothing_taken: bool) -> None:
        """A pass begins: one of the number that was announced, or not; and of what it will visit, nothing was taken."""
        self._passes_ahead = max(self._passes_ahead - 1, 0)
        if nothing_taken:
            self._taken, self._is_lost = 0, False
        if is_counted:
            self._passes_left = max(self._passes_left - 1, 0)

    def visited(self, layer: Management) -> None:
        """A pass has come by this layer, for the first time."""
        if self._repetition is not None:
            self._repetition.visited(layer)

    def end_pass(self, visited: list[Management]) -> bool:
        """A pass is complete. Whether it was another one than expected, so that what was taken is worth nothing."""
        self._repetition = None
        if visited == self.order:
            return False
        self.order, self._taken, self._passes_ahead, self._is_lost = visited, len(visited), 0, False
        return True

    def next_after(self, last: Management | None) -> Management | None:
        """Take the next visit, `last` being the one before; None if there is none to expect."""
        if self._repetition is not None:
            return self._repetition.after(last)
        if self._is_lost:
            return None
        if self._taken == len(self.order) and self._passes_ahead < self._passes_left:
            self._taken, self._passes_ahead = 0, self._passes_ahead + 1
        if self._taken == len(self.order):
            return None
        self._taken += 1
        return self.order[self._taken - 1]

    def go_on_from(self, layer: Management) -> None:
        """A visit that was not taken before it was made. If the order has the layer, it is expected to go on there."""
        if not self._is_lost and self._taken < len(self.order) and self.order[self._taken] is layer:
            self._taken += 1
            return
        places = [place for place, known in enumerate(self.order) if known is layer]
        ahead = [place for place in places if place >= self._taken]
        self._is_lost = not places
        if places:
            self._taken = (ahead or places)[0] + 1

    def was_wrong(self) -> None:
        """Something else was visited than was taken."""
        self._repetition = None


class Repetition:
    """Guesses from names how a model goes on that repeats itself: layers are alike whose names differ in one number."""

    def __init__(self, names: Mapping[Management, str]) -> None:
        self._names = dict(names)
        self._layers = {name: layer for layer, name in names.items()}
        self._last: str | None = None
        self._pairs: dict[str, tuple[str, str]] = {}  # by a name without one number: the last such, and what followed

    def visited(self, layer: Management) -> None:
        """The pass has come by this layer."""
        name = self._names.get(layer)
        if self._last is not None and name is not None:
            self._pairs |= dict.fromkeys(_without_a_number(self._last), (self._last, name))
        self._last = name

    def after(self, layer: Management | None) -> Management | None:
        """The next layer that does not stay on the device; None if nothing like it was seen yet."""
        name = self._names.get(layer)
        for _ in self._layers:
            name = None if name is None else self._follower(name)
            follower = self._layers.get(name)
            if follower is None or not follower.stays:
                return follower
        return None

    def _follower(self, name: str) -> str | None:
        """What followed a layer that is alike, with a number that is as much larger; the first number counts most."""
        for place, alike in enumerate(_without_a_number(name)):
            if alike in self._pairs:
                before, after = self._pairs[alike]
                guess = _shifted(after, place, _numbers(name)[place] - _numbers(before)[place])
                if guess in self._layers:
                    return guess
        return None


def _numbers(name: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(name)]


def _without_a_number(name: str) -> list[str]:
    """The name without the first number, without the second, …"""
    return [f"{name[:number.start()]}#{name[number.end():]}" for number in _NUMBER.finditer(name)]


def _shifted(name: str, place: int, step: int) -> str:
    """The name with `step` more as its number at `place`, if it has that many."""
    numbers = list(_NUMBER.finditer(name))[place:place + 1]
    return "".join(f"{name[:number.start()]}{int(number[0]) + step}{name[number.end():]}" for number in numbers) or name
