"""The description of tensors in a pickle of torch.save, read without unpickling it.

A pickle is a program for a machine with a stack and numbered notes; CPython's `pickletools.py` lists its instructions.
This machine knows those that torch's `weights_only` unpickler knows. It makes dictionaries, lists, tuples, text and
numbers, and notes of where tensors lie (`StoredTensor`). It imports nothing and calls only the few functions of
`pickle_names`, so whatever a file says it stays data.

What only torch can make, such as quantized and sparse tensors, becomes a placeholder, and `Description.others` says so:
torch.load may read such a file. It is asked only about descriptions that ran through here, since its unpickler can be
led to work or allocate without bound by a few bytes: a key that is a pair of pairs of pairs takes years to hash, one
that is nested deeply enough ends the process, and `bytearray` takes any size. So keys are text or small numbers; names
are those that tensors need, or that the user allowed torch; steps are counted, and so is what the arguments of torch's
functions stand for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .pickle_names import OTHER, NoDescription, Storage, StorageType, meaning_of

MAX_STEPS = 200_000  # of 6,600 tensors
MAX_WORK = 200_000  # values that shared tuples and arguments of torch's functions stand for
MAX_NESTING = 32  # of these arguments
MAX_KEY = 2**31  # larger numbers can be chosen so that they collide in a dictionary


class Description(NamedTuple):
    """What a pickle holds, the names in it that only torch can make something of, and the position behind it."""

    content: Any
    others: list[str]
    end: int


def read_description(code: bytes, start: int = 0) -> Description:
    """Read the pickle at `start`. Raises NoDescription for what is damaged, out of bounds or names other things than
    tensors need."""
    return _Machine(code).run(start)


# ---- the machine ----------------------------------------------------------------------------------------------------


class _Machine:
    """Each instruction is a method that gets the position behind it, and returns that of the next one."""

    def __init__(self, code: bytes):
        self.code = code
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks that a mark has put aside
        self.notes: dict[int, Any] = {}
        self.dtypes: dict[str, torch.dtype] = {}  # of storages, by their keys
        self.work = 0
        self.others: list[str] = []

    def run(self, at: int) -> Description:
        code, instructions = self.code, _INSTRUCTIONS
        try:
            for _ in range(MAX_STEPS):
                step = code[at]
                if step == _STOP:
                    return Description(self.stack.pop(), self.others, at + 1)
                at = instructions[step](self, at + 1)
        except KeyError as error:
            raise NoDescription(f"it has no instruction or note {error!s:.80}, at byte {at}") from error
        except (IndexError, struct.error) as error:
            raise NoDescription(f"it ends too early, or takes more from its stack than there is, at byte {at} of "
                                f"{len(code)}") from error
        except (TypeError, ValueError) as error:
            raise NoDescription(f"{error!s:.300}, at byte {at}") from error
        raise NoDescription(f"it takes more than {MAX_STEPS} steps")

    # Numbers and text. A piece that is cut short ends the code, so what follows it cannot be read.

    def protocol(self, at: int) -> int:
        return at + 1

    def small_number(self, at: int) -> int:
        self.stack.append(self.code[at])
        return at + 1

    def middle_number(self, at: int) -> int:
        self.stack.append(int.from_bytes(self.code[at:at + 2], "little"))
        return at + 2

    def number(self, at: int) -> int:
        self.stack.append(int.from_bytes(self.code[at:at + 4], "little", signed=True))
        return at + 4

    def long_number(self, at: int) -> int:
        end = at + 1 + self.code[at]
        self.stack.append(int.from_bytes(self.code[at + 1:end], "little", signed=True))
        return end

    def real_number(self, at: int) -> int:
        self.stack += struct.unpack_from(">d", self.code, at)
        return at + 8

    def text(self, at: int) -> int:
        start = at + 4
        end = start + int.from_bytes(self.code[at:start], "little")
        self.stack.append(self.code[start:end].decode("utf-8", "surrogatepass"))
        return end

    def short_text(self, at: int) -> int:
        end = at + 1 + self.code[at]
        self.stack.append(self.code[at + 1:end].decode())
        return end

    # Notes

    def note(self, at: int) -> int:
        self.notes[self.code[at]] = self.stack[-1]
        return at + 1

    def long_note(self, at: int) -> int:
        self.notes[int.from_bytes(self.code[at:at + 4], "little")] = self.stack[-1]
        return at + 4

    def recall(self, at: int) -> int:
        self.push_again(self.notes[self.code[at]])
        return at + 1

    def long_recall(self, at: int) -> int:
        self.push_again(self.notes[int.from_bytes(self.code[at:at + 4], "little")])
        return at + 4

    def push_again(self, value: Any) -> None:
        if type(value) is tuple:
            self.spend(value)
        self.stack.append(value)

    def spend(self, value: Any) -> None:
        """Count all that a value is made of, as often as it occurs in it."""
        pending = [(value, 0)]
        while pending:
            part, depth = pending.pop()
            self.work += 1
            if self.work > MAX_WORK or depth > MAX_NESTING:
                raise NoDescription(f"values refer to each other more than {MAX_WORK} times, or {MAX_NESTING} deep")
            if type(part) in (tuple, list):
                pending += [(item, depth + 1) for item in part]
            elif type(part) is dict:
                pending += [(item, depth + 1) for item in part.values()]

    # Tuples, lists, dictionaries

    def mark(self, at: int) -> int:
        self.below.append(self.stack)
        self.stack = []
        return at

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def close_tuple(self, at: int) -> int:
        items = tuple(self.since_mark())
        self.stack.append(items)
        return at

    def single(self, at: int) -> int:
        self.stack[-1] = (self.stack[-1],)
        return at

    def pair(self, at: int) -> int:
        self.stack[-2:] = ((self.stack[-2], self.stack[-1]),)
        return at

    def triple(self, at: int) -> int:
        self.stack[-3:] = ((self.stack[-3], self.stack[-2], self.stack[-1]),)
        return at

    def append(self, at: int) -> int:
        item = self.stack.pop()
        self.target(list).append(item)
        return at

    def extend(self, at: int) -> int:
        items = self.since_mark()
        self.target(list).extend(items)
        return at

    def set_item(self, at: int) -> int:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill([key], [value])
        return at

    def set_items(self, at: int) -> int:
        items = self.since_mark()
        self.fill(items[::2], items[1::2])
        return at

    def fill(self, keys: list[Any], values: list[Any]) -> None:
        for key in keys:
            if type(key) is not str and not (type(key) is int and -MAX_KEY <= key < MAX_KEY):
                raise NoDescription(f"a key that is no text or small number, but a {type(key).__name__}")
        self.target(dict).update(zip(keys, values, strict=True))

    def target(self, kind: type) -> Any:
        """What is filled; of something that only torch can make, nothing is kept."""
        target = self.stack[-1]
        if target is OTHER:
            return kind()
        if type(target) is not kind:
            raise NoDescription(f"a {type(target).__name__} where a {kind.__name__} is filled")
        return target

    # Names, calls and storages

    def name(self, at: int) -> int:
        middle = self.code.index(b"\n", at)
        end = self.code.index(b"\n", middle + 1)
        module, name = self.code[at:middle].decode(), self.code[middle + 1:end].decode()
        meaning = meaning_of(module, name)
        if meaning is OTHER:
            self.others.append(f"{module}.{name}")
        self.stack.append(meaning)
        return end + 1

    def call(self, at: int) -> int:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple:
            raise NoDescription(f"arguments are a {type(arguments).__name__}")
        if OTHER in arguments:
            function = OTHER  # a parameter of a tensor that only torch can make, say
        if function is OTHER:
            self.spend(arguments)
        elif not callable(function):
            raise NoDescription(f"a {type(function).__name__} is called")
        self.stack.append(OTHER if function is OTHER else function(*arguments))
        return at

    def build(self, at: int) -> int:
        """Attributes, such as the versions that a module's state dict has: nothing that tensors need."""
        self.spend(self.stack.pop())
        self.target(dict)
        return at

    def storage(self, at: int) -> int:
        identifier = self.stack.pop()
        kind, storage_type, key = identifier[:3]
        if kind != "storage" or type(key) is not str or not 5 <= len(identifier) <= 6:
            raise NoDescription("a reference to something that is no storage")
        if storage_type is not OTHER and type(storage_type) is not StorageType:
            raise NoDescription("a storage without type")
        self.stack.append(OTHER if storage_type is OTHER else self.storage_of(storage_type.dtype, key))
        return at

    def storage_of(self, dtype: torch.dtype, key: str) -> Storage:
        if self.dtypes.setdefault(key, dtype) != dtype:
            raise NoDescription(f"storage {key!r:.80} has two dtypes, {self.dtypes[key]} and {dtype}")
        return Storage(dtype, key)


def _makes(make: Callable[[], Any]) -> Callable[[_Machine, int], int]:
    def instruction(machine: _Machine, at: int) -> int:
        machine.stack.append(make())
        return at

    return instruction


def _empty_set(machine: _Machine, at: int) -> int:
    machine.others.append("set")
    machine.stack.append(OTHER)
    return at


_STOP = ord(".")
_INSTRUCTIONS: dict[int, Callable[[_Machine, int], int]] = {
    0x80: _Machine.protocol,
    ord("K"): _Machine.small_number, ord("M"): _Machine.middle_number, ord("J"): _Machine.number,
    0x8A: _Machine.long_number, ord("G"): _Machine.real_number,
    ord("X"): _Machine.text, ord("U"): _Machine.short_text,
    ord("N"): _makes(lambda: None), 0x88: _makes(lambda: True), 0x89: _makes(lambda: False),
    ord(")"): _makes(tuple), ord("]"): _makes(list), ord("}"): _makes(dict), 0x8F: _empty_set,
    ord("q"): _Machine.note, ord("r"): _Machine.long_note, ord("h"): _Machine.recall, ord("j"): _Machine.long_recall,
    ord("("): _Machine.mark, ord("t"): _Machine.close_tuple,
    0x85: _Machine.single, 0x86: _Machine.pair, 0x87: _Machine.triple,
    ord("a"): _Machine.append, ord("e"): _Machine.extend, ord("s"): _Machine.set_item, ord("u"): _Machine.set_items,
    ord("c"): _Machine.name, ord("R"): _Machine.call, 0x81: _Machine.call, ord("b"): _Machine.build,
    ord("Q"): _Machine.storage,
}  # fmt: skip
