"""How a native library wants to be loaded: Android 15 has phones with pages of 16 KiB.

There, a 64-bit library is loaded only if its segments are aligned to 16 KiB. Read from the
program headers of the ELF file (System V ABI, chapter 5); nothing is executed.

Left out on purpose: where an .apk stores its libraries (zipalign -P 16 tells).
"""

from __future__ import annotations

import pathlib
import struct
from dataclasses import dataclass

from edgec.errors import SourceError

PAGE_BYTES = 16384

_MACHINES = {3: "x86", 40: "armv7", 62: "x86_64", 183: "arm64", 243: "riscv64"}
_LOAD = 1  # p_type
_SHARED = 3  # e_type: a shared library, or a program that is one
# class -> (is 64-bit, header behind e_ident, a program header, positions of its fields)
_HEADER = {1: struct.Struct("<HHIIIIIHHH"), 2: struct.Struct("<HHIQQQIHHH")}
_SEGMENT = {1: struct.Struct("<IIIIIIII"), 2: struct.Struct("<IIQQQQQQ")}
_ALIGN = 7  # index of p_align in both; offset and address are at 1, 2 or 2, 3


@dataclass(frozen=True)
class Library:
    """A native library. align_bytes: the smallest alignment of a segment that is loaded."""

    path: pathlib.Path
    arch: str
    bits: int
    align_bytes: int

    @property
    def loads_with_16k_pages(self) -> bool:
        """Whether a phone with pages of 16 KiB loads it; 32-bit code never runs on one."""
        return self.bits == 32 or self.align_bytes >= PAGE_BYTES


def read_library(path: pathlib.Path) -> Library:
    """The facts of one shared library. Raises SourceError if the file is none."""
    where = f"library {path}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{where}: cannot be read: {error.strerror or error}") from error
    if data[:4] != b"\x7fELF" or len(data) < 64 or data[5] != 1 or data[4] not in _HEADER:
        raise SourceError(f"{where}: it is no library of Android (a little-endian ELF file)")
    kind, machine, _, _, start, _, _, _, size, count = _HEADER[data[4]].unpack_from(data, 16)
    segment, wide = _SEGMENT[data[4]], data[4] == 2
    if kind != _SHARED:
        raise SourceError(f"{where}: it is an ELF file, but no shared library")
    if size != segment.size or start + count * size > len(data):
        raise SourceError(f"{where}: it is damaged: its program headers lie outside of it")
    aligns = []
    for i in range(count):
        fields = segment.unpack_from(data, start + i * size)
        offset, address = fields[2:4] if wide else fields[1:3]
        align = fields[_ALIGN]
        if fields[0] != _LOAD:
            continue
        if align > 1 and (offset - address) % align:
            raise SourceError(f"{where}: it is damaged: a segment contradicts its alignment")
        aligns.append(align)
    if not aligns:
        raise SourceError(f"{where}: it has nothing to load")
    arch = _MACHINES.get(machine, f"machine {machine}")
    return Library(path, arch, 64 if wide else 32, min(aligns))
