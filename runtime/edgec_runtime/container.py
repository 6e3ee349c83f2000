"""The zip around a bundle: stored, dated 1980, in one canonical form.

Every header byte follows from the members' names, sizes and checksums, so one list of
members has exactly one encoding: the reader derives the headers again and compares them,
and a flipped bit in a header or in the padding is found without parsing it. Any zip tool
can list and unpack the file.

Left out on purpose: compression (weights are mapped from the file), folders, comments,
encryption, reading zips that other tools wrote. Layout of the records: PKWARE APPNOTE
6.3.10, sections 4.3.7 to 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from edgec_runtime.errors import BundleError

Chunk = bytes | bytearray | memoryview

FIRST_OFFSET = 65536  # of the first member's data: a page boundary on every system
MAX_MEMBERS = 4096
READ_BYTES = 1 << 20

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_MAX_NAME = 200
_DATE_1980 = 0x21  # the earliest date of the format: 1980-01-01
_PERMISSIONS = 0o100644 << 16
_PADDING_ID = 0x6465  # extra field of zeros that moves the data to a boundary
_ZIP64_ID = 0x0001
_LIMIT = 0xFFFFFFFF  # a value that does not fit below goes to a zip64 field

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR = struct.Struct("<IIQI")
_END = struct.Struct("<IHHHHIIH")
_LOCAL_SIGNATURE, _CENTRAL_SIGNATURE, _END_SIGNATURE = 0x04034B50, 0x02014B50, 0x06054B50
_END64_SIGNATURE, _LOCATOR_SIGNATURE = 0x06064B50, 0x07064B50


@dataclass(frozen=True)
class Member:
    """One file of the container. header, offset: where its header and its data start."""

    name: str
    size: int
    crc32: int
    header: int
    offset: int

    @property
    def end(self) -> int:
        """Position behind the data."""
        return self.offset + self.size


@dataclass(frozen=True)
class Written:
    """A member with the digest of its data."""

    member: Member
    sha256: str


class ContainerWriter:
    """Appends members to a seekable binary stream; ``close`` adds the directory."""

    def __init__(self, stream: IO[bytes]) -> None:
        """Start an empty container; ``add_first`` comes before ``add``."""
        self._stream = stream
        self._members: list[Member] = []

    def add_first(self, name: str, chunks: Iterable[Chunk]) -> Written:
        """Stream the first member to FIRST_OFFSET; nothing is held in memory."""
        digest, crc, size = hashlib.sha256(), 0, 0
        self._stream.seek(FIRST_OFFSET)
        for chunk in chunks:
            self._stream.write(chunk)
            digest.update(chunk)
            crc = zlib.crc32(chunk, crc)
            size += memoryview(chunk).nbytes
        member = Member(name, size, crc, header=0, offset=FIRST_OFFSET)
        self._write_header(member)
        return Written(member, digest.hexdigest())

    def add(self, name: str, data: bytes) -> Written:
        """Append one member. Raises BundleError for a name that is not allowed."""
        header = self._members[-1].end
        offset = _data_offset(name, len(data), header)
        member = Member(name, len(data), zlib.crc32(data), header, offset)
        self._write_header(member)
        self._stream.write(data)
        return Written(member, hashlib.sha256(data).hexdigest())

    def close(self) -> None:
        """Write the directory behind the last member."""
        self._stream.seek(self._members[-1].end)
        self._stream.write(_directory(self._members))

    def _write_header(self, member: Member) -> None:
        check_name(member.name)
        if any(other.name == member.name for other in self._members):
            raise BundleError(f"the entry '{member.name}' is given twice")
        self._stream.seek(member.header)
        self._stream.write(_header_of(member))
        self._members.append(member)


def check_name(name: str) -> None:
    """Raise BundleError unless ``name`` is a plain relative path of ASCII letters and digits."""
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise BundleError(
            f"the entry name {name[:_MAX_NAME]!r} is not allowed: expected a relative path of "
            "letters, digits, '.', '_' and '-', without '..'"
        )


def read_members(stream: IO[bytes], size: int) -> tuple[Member, ...]:
    """The members of a container of ``size`` bytes, in file order.

    Checks everything but the data: that every byte outside the members' data is what the
    writer would have put there. Raises BundleError; the caller adds the path.
    """
    start, count, end_size = _read_end(stream, size)
    if count > MAX_MEMBERS:
        raise BundleError(f"it lists {count} entries, at most {MAX_MEMBERS} are allowed")
    largest = count * (_CENTRAL.size + _MAX_NAME + 28)
    length = size - end_size - start
    if not 0 < length <= largest:
        raise BundleError("its directory does not lie inside the file")
    stream.seek(start)
    raw = stream.read(length)
    members = tuple(_parse_directory(raw, count))
    _check_places(members, start)
    for member in members:
        stream.seek(member.header)
        if stream.read(member.offset - member.header) != _header_of(member):
            raise BundleError(f"the header or padding of the entry '{member.name}' is altered")
    stream.seek(start)
    if stream.read() != _directory(members):
        raise BundleError("its directory is altered")
    return members


def read_chunks(stream: IO[bytes], member: Member) -> Iterator[bytes]:
    """The data of a member, 1 MiB at a time."""
    stream.seek(member.offset)
    left = member.size
    while left:
        chunk = stream.read(min(left, READ_BYTES))
        if not chunk:
            raise BundleError(f"the file ends inside the entry '{member.name}'")
        left -= len(chunk)
        yield chunk


def _read_end(stream: IO[bytes], size: int) -> tuple[int, int, int]:
    """Start of the directory, number of entries, bytes of the records behind it."""
    stream.seek(0)
    if stream.read(4) != _LOCAL_SIGNATURE.to_bytes(4, "little"):
        raise BundleError("it is not a bundle (a zip written by edgec)")
    truncated = BundleError("it is truncated or has bytes added at its end")
    if size < _END.size:
        raise truncated
    stream.seek(size - _END.size)
    signature, _, _, _, count, _, start, comment = _END.unpack(stream.read(_END.size))
    if signature != _END_SIGNATURE or comment:
        raise truncated
    if start != _LIMIT:
        return start, count, _END.size
    tail = _END64.size + _LOCATOR.size + _END.size
    if size < tail:
        raise truncated
    stream.seek(size - tail)
    record = _END64.unpack(stream.read(_END64.size))
    if record[0] != _END64_SIGNATURE:
        raise truncated
    return record[9], record[7], tail


def _parse_directory(raw: bytes, count: int) -> Iterator[Member]:
    position = 0
    names: set[str] = set()
    for _ in range(count):
        if position + _CENTRAL.size > len(raw):
            raise BundleError("its directory ends too early")
        fields = _CENTRAL.unpack_from(raw, position)
        signature, method, crc, packed, size = fields[0], fields[4], *fields[7:10]
        name_length, extra_length, header = fields[10], fields[11], fields[16]
        if signature != _CENTRAL_SIGNATURE:
            raise BundleError("its directory is altered")
        position += _CENTRAL.size
        name = raw[position : position + name_length].decode("ascii", "backslashreplace")
        check_name(name)
        if name in names:
            raise BundleError(f"the entry '{name}' is listed twice")
        names.add(name)
        if method != 0 or packed != size:
            raise BundleError(f"the entry '{name}' is compressed; entries must be stored")
        position += name_length
        size, header = _from_zip64(raw[position : position + extra_length], size, header)
        position += extra_length
        yield Member(name, size, crc, header, _data_offset(name, size, header))


def _check_places(members: Sequence[Member], directory_start: int) -> None:
    """Members follow one another without a gap, from byte 0 to the directory."""
    position = 0
    for member in members:
        if max(member.offset, member.end) > directory_start:
            raise BundleError(f"the entry '{member.name}' reaches outside of the file")
        if member.header < position:
            raise BundleError(f"the entry '{member.name}' overlaps the one before it")
        if member.header > position:
            raise BundleError(f"unknown bytes stand before the entry '{member.name}'")
        position = member.end
    if position != directory_start:
        raise BundleError("unknown bytes stand before its directory")


def _data_offset(name: str, size: int, header: int) -> int:
    """Where the data of a member starts: the first at FIRST_OFFSET, others after the header."""
    if header == 0:
        return FIRST_OFFSET
    return header + _LOCAL.size + len(name) + len(_local_zip64(size))


def _header_of(member: Member) -> bytes:
    """The local header of a member; the first one's is padded with zeros to its data."""
    name, large = member.name.encode("ascii"), member.size >= _LIMIT
    extra = _local_zip64(member.size)
    padding = member.offset - member.header - _LOCAL.size - len(name) - len(extra)
    if padding:
        extra += struct.pack("<HH", _PADDING_ID, padding - 4) + bytes(padding - 4)
    size = _LIMIT if large else member.size
    return (
        _LOCAL.pack(
            _LOCAL_SIGNATURE,
            45 if large else 20,  # version needed: zip64 or folders
            0,
            0,
            0,
            _DATE_1980,
            member.crc32,
            size,
            size,
            len(name),
            len(extra),
        )
        + name
        + extra
    )


def _local_zip64(size: int) -> bytes:
    return struct.pack("<HHQQ", _ZIP64_ID, 16, size, size) if size >= _LIMIT else b""


def _from_zip64(extra: bytes, size: int, header: int) -> tuple[int, int]:
    """Size and header position, read from the zip64 field where the plain one is full."""
    numbers = [*struct.unpack_from(f"<{(len(extra) - 4) // 8}Q", extra, 4)] if extra else []
    if size == _LIMIT and len(numbers) >= 2:
        size, _ = numbers.pop(0), numbers.pop(0)
    if header == _LIMIT and numbers:
        header = numbers.pop(0)
    return size, header


def _directory(members: Sequence[Member]) -> bytes:
    """The central directory and the end records for these members."""
    records = bytearray()
    for member in members:
        name = member.name.encode("ascii")
        large, far = member.size >= _LIMIT, member.header >= _LIMIT
        numbers = [member.size, member.size] * large + [member.header] * far
        extra = struct.pack(f"<HH{len(numbers)}Q", _ZIP64_ID, 8 * len(numbers), *numbers)
        extra = extra if numbers else b""
        needed = 45 if numbers else 20
        size = _LIMIT if large else member.size
        records += _CENTRAL.pack(
            _CENTRAL_SIGNATURE,
            3 << 8 | needed,  # made on Unix, for the permissions
            needed,
            0,
            0,
            0,
            _DATE_1980,
            member.crc32,
            size,
            size,
            len(name),
            len(extra),
            0,
            0,
            0,
            _PERMISSIONS,
            _LIMIT if far else member.header,
        )
        records += name + extra
    start, length, count = members[-1].end, len(records), len(members)
    if start >= _LIMIT:
        records += _END64.pack(
            _END64_SIGNATURE, 44, 3 << 8 | 45, 45, 0, 0, count, count, length, start
        )
        records += _LOCATOR.pack(_LOCATOR_SIGNATURE, 0, start + length, 1)
    records += _END.pack(_END_SIGNATURE, 0, 0, count, count, length, min(start, _LIMIT), 0)
    return bytes(records)
