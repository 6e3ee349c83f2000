"""Moves what a session has allocated to huge pages of memory (Linux).

ONNX Runtime repacks weights into memory of its own, and Linux gives that pages of 4 KiB unless
the program asks for more (its setting "madvise", which most distributions ship). A decoder
reads all its weights for every token: 25,000 pages of 4 KiB or 50 of 2 MiB, each of which the
CPU has to look up. ``collapse`` asks for what was allocated since ``private_memory`` was called:
the kernel copies it at once (MADV_COLLAPSE, Linux 6.1), and takes hardly more memory: an eighth
of a page at most was not in use before.

Left out on purpose: systems where an app cannot ask (macOS, Windows without a privilege),
memory of the caller's, and pages of which less than 7 in 8 parts are in use.
"""

from __future__ import annotations

import ctypes
import mmap
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

Region = tuple[int, int]  # first address, address behind the last

_KERNEL = pathlib.Path("/sys/kernel/mm/transparent_hugepage")
_MADV_COLLAPSE = 25  # Linux's asm-generic/mman-common.h
_SMALL = 4096  # bytes of a page; a system with larger ones is left alone
_IN_USE = 7 / 8


def private_memory() -> tuple[Region, ...]:
    """Regions that this process has allocated and may write; none where there is no advice."""
    if not _page_bytes():
        return ()
    found = []
    for line in _read(pathlib.Path("/proc/self/maps")).splitlines():
        addresses, mode, _, _, inode, *name = line.split(maxsplit=5)
        if mode == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            first, _, end = addresses.partition("-")
            found.append((int(first, 16), int(end, 16)))
    return tuple(found)


def collapse(before: Sequence[Region]) -> int:
    """Move what was allocated since to huge pages. Returns the bytes that were moved.

    before: of ``private_memory``. A kernel that has no room or no such advice moves nothing.
    """
    size = _page_bytes()
    if not size:
        return 0
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    moved = 0
    for first, end in new_regions(private_memory(), before):
        for start, stop in _used(library, -(-first // size) * size, end // size * size, size):
            if library.madvise(start, stop - start, _MADV_COLLAPSE) == 0:
                moved += stop - start
    return moved


def new_regions(now: Sequence[Region], before: Sequence[Region]) -> list[Region]:
    """The parts of ``now`` that lie in none of ``before``."""
    found = []
    for first, end in now:
        for old_first, old_end in sorted(before):
            if old_end <= first or old_first >= end:
                continue
            if first < old_first:
                found.append((first, old_first))
            first = max(first, old_end)
        if first < end:
            found.append((first, end))
    return found


def _page_bytes() -> int:
    """Bytes of a huge page, 0 where the system has none or its owner forbids them."""
    if not sys.platform.startswith(("linux", "android")) or mmap.PAGESIZE != _SMALL:
        return 0
    if "[never]" in _read(_KERNEL / "enabled"):
        return 0
    size = _read(_KERNEL / "hpage_pmd_size").strip()
    return int(size) if size.isdecimal() else 0


def _used(library: ctypes.CDLL, first: int, end: int, size: int) -> list[Region]:
    """The runs of huge pages between two of their borders that are in use nearly everywhere."""
    if first >= end:
        return []
    resident = np.zeros((end - first) // _SMALL, np.uint8)
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    if library.mincore(first, end - first, resident.ctypes.data) != 0:
        return []  # the region is gone
    shares = (resident & 1).reshape(-1, size // _SMALL).mean(axis=1)
    edges = np.flatnonzero(np.diff(shares >= _IN_USE, prepend=False, append=False))
    borders = (first + edges * size).tolist()
    return list(zip(borders[::2], borders[1::2], strict=True))


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system, or a sandbox
        return ""
