"""Where each tensor of a zip-format pickle lies in the file, found without reading tensor data.

`torch.save` writes a zip archive: the record `data.pkl` describes the tensors as views of storages, and `data/<key>`
holds the bytes of one storage, uncompressed. The description is read without unpickling it (`description`). Where a
record starts is asked of the zip's own headers and not of torch: torch 2.5 does not tell, and later ones compute it
from the order in which torch writes, which is false for an archive packed again.

Whatever torch.save does not usually write is `Unmappable`: torch.load decides about it. What would take memory out of
proportion is `DamagedArchive`: nothing reads it.
"""

from __future__ import annotations

import struct
import sys
import zipfile
from typing import BinaryIO, NamedTuple

from torch.serialization import LoadEndianness, get_default_load_endianness

from ..platform import PositionedFile
from .containment import check_regular, open_regular
from .description import read_description
from .pickle_names import StoredTensor

ZIP_MAGIC = b"PK\x03\x04"
DESCRIPTION = "data.pkl"
READ_AT_ONCE = {DESCRIPTION, "byteorder"}
MAX_DESCRIPTION_BYTES = 1_000_000  # of 8,000 tensors
MAX_DIRECTORY_BYTES = 2_500_000  # of 25,000 records
MAX_GROWTH = 8  # of a compressed archive; weights shrink by a tenth
SMALL_ARCHIVE = 1 << 24  # bytes that may come out of any
LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, lengths of the name and of the extra field, which the data follow
ENCRYPTED = 0x2041  # the flags of a record whose bytes are not its content, although it is not compressed


class Unmappable(Exception):
    """This file has to be read by torch.load, which may refuse it too; the message says why."""


class DamagedArchive(ValueError):
    """The records contradict the description of the tensors, or are larger than any model's."""


class Record(NamedTuple):
    """A record's content: `size` bytes from absolute position `start`, None if that was not looked for."""

    start: int | None
    size: int


class ZipPickle:
    """A pickle's `content`, with a StoredTensor for each tensor, and with `places`, which take a read each, where their
    data are. Holds no file open.

    Raises Unmappable, NoDescription, and DamagedArchive as `check_archive`.
    """

    def __init__(self, path: str, places: bool = True):
        file = PositionedFile(path)
        self._records = _read_records(path, file, places)
        description = read_description(_content(file, self._records[DESCRIPTION]))
        if description.others:
            raise Unmappable(f"it holds more than plain tensors: {description.others[0]}")
        self.content = description.content

    def offset(self, tensor: StoredTensor) -> int | None:
        """The absolute position of the tensor's bytes; None if it was not looked for, or the file does not hold them as
        they are in memory.

        That is so for strides other than contiguous, and for pending conjugation or negation. Raises DamagedArchive if
        the tensor reaches beyond its record.
        """
        if tensor.reach == 0:  # nothing to read, and maybe no record either
            return 0
        size = tensor.dtype.itemsize
        start = self._start(f"data/{tensor.key}", (tensor.first + tensor.reach) * size)
        return start + tensor.first * size if tensor.as_stored and start is not None else None

    def _start(self, name: str, needed: int) -> int | None:
        record = self._records.get(name)
        if record is None:
            raise DamagedArchive(f"a tensor lies in record {name!r}, which is not there")
        if needed > record.size:
            raise DamagedArchive(f"a tensor needs {needed} bytes of record {name!r}, which has {record.size}")
        return record.start


def check_archive(path: str) -> None:
    """Raises DamagedArchive if reading a zip, by torch too, would take memory out of proportion to its tensors; what is
    no zip that can be read is left to others."""
    try:
        entries = _read_directory(path)
    except Unmappable:
        return
    _check_entries(entries, check_regular(path).st_size)


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    for entry in entries:
        kind = entry.filename.partition("/")[2]
        if entry.file_size > MAX_DESCRIPTION_BYTES and not kind.startswith("data/"):
            raise DamagedArchive(f"its record {kind!r:.200} has {entry.file_size} bytes, {MAX_DESCRIPTION_BYTES} "
                                 "allowed for what is no tensor")
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > max(MAX_GROWTH * size, SMALL_ARCHIVE):
        raise DamagedArchive(f"it has {size} bytes and would unpack to {unpacked}, at most {MAX_GROWTH} times as many "
                             "allowed: weights do not shrink that much")


def is_mappable(path: str) -> bool:
    """Whether the file is a zip whose records hold the tensors' bytes as they are in memory. Raises DamagedArchive."""
    try:
        _read_records(path, PositionedFile(path))
    except Unmappable:
        return False
    return True


def _read_records(path: str, file: PositionedFile, places: bool = True) -> dict[str, Record]:
    """The archive's records by their names in it, all stored uncompressed and in this machine's byte order; without
    `places` their sizes, and where those are that are read now."""
    if _content(file, Record(0, len(ZIP_MAGIC))) != ZIP_MAGIC:
        raise Unmappable("it is not in torch's zip format")
    entries = _read_directory(path)
    folder, size = entries[0].filename.partition("/")[0] + "/", file.status().st_size
    _check_entries(entries, size)
    start = memoryview(bytearray(LOCAL_HEADER.size))
    named = {entry.filename.removeprefix(folder): entry for entry in entries}
    if len(named) != len(entries):
        raise Unmappable("it has two records of one name")
    if DESCRIPTION not in named or "constants.pkl" in named:
        raise Unmappable("it is a zip archive, but not one of torch.save")
    for entry in entries:
        _check_stored(entry, size)
    records = {name: _find(file, entry, size, start) if places or name in READ_AT_ONCE
               else Record(None, entry.file_size) for name, entry in named.items()}
    if (order := _byte_order(file, records)) != sys.byteorder:
        raise Unmappable(f"its byte order is {order}, this machine's {sys.byteorder}")
    return records


def _read_directory(path: str) -> list[zipfile.ZipInfo]:
    try:
        with open_regular(path) as file, zipfile.ZipFile(_SmallReads(file)) as archive:
            entries = archive.infolist()
    except DamagedArchive:
        raise
    except Exception as error:  # damaged bytes can raise any exception
        raise Unmappable(f"its zip directory cannot be read: {error!r:.200}") from error
    if not entries:
        raise Unmappable("its zip directory is empty")
    return entries


class _SmallReads:
    """A file for zipfile, which reads a directory of any size at once. Raises DamagedArchive for a large one."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        content = self._file.read(MAX_DIRECTORY_BYTES + 1 if count < 0 else min(count, MAX_DIRECTORY_BYTES + 1))
        if len(content) > MAX_DIRECTORY_BYTES:
            raise DamagedArchive(f"its zip directory has more than {MAX_DIRECTORY_BYTES} bytes")
        return content


def _check_stored(entry: zipfile.ZipInfo, file_size: int) -> None:
    """Raises Unmappable if the directory says that a record's bytes are not its content, or not in the file."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise Unmappable(f"record {entry.filename!r} is compressed")
    if entry.flag_bits & ENCRYPTED:
        raise Unmappable(f"record {entry.filename!r} is encrypted")
    if not LOCAL_HEADER.size <= entry.header_offset + LOCAL_HEADER.size <= file_size:
        raise Unmappable(f"record {entry.filename!r} lies outside the file")


def _find(file: PositionedFile, entry: zipfile.ZipInfo, file_size: int, start: memoryview) -> Record:
    """The place of a record's content, which its local header tells: the lengths in the zip's directory may differ.
    `start` is memory for that header."""
    complete = file.read_into(start, entry.header_offset) == LOCAL_HEADER.size  # unless it was cut meanwhile
    magic, name, extra = LOCAL_HEADER.unpack(start)
    if not complete or magic != ZIP_MAGIC:
        raise Unmappable(f"record {entry.filename!r} is not at byte {entry.header_offset}")
    first = entry.header_offset + LOCAL_HEADER.size + name + extra
    if first + entry.file_size > file_size:
        raise Unmappable(f"record {entry.filename!r} reaches beyond the end of the file")
    return Record(first, entry.file_size)


def _content(file: PositionedFile, record: Record) -> bytes:
    """The record's bytes. No checksum is compared: torch does not compare it either, nor always write it."""
    buffer = bytearray(record.size)
    if file.read_into(memoryview(buffer), record.start) != record.size:
        raise Unmappable(f"the file ends before byte {record.start + record.size}")
    return bytes(buffer)


def _byte_order(file: PositionedFile, records: dict[str, Record]) -> str:
    if "byteorder" in records:
        return _content(file, records["byteorder"]).decode(errors="replace")
    default = get_default_load_endianness() or LoadEndianness.LITTLE  # files before torch 2.1 do not tell
    return sys.byteorder if default is LoadEndianness.NATIVE else default.name.lower()
