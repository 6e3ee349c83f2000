"""The bundle: the one file that edgec ships to a device. This is the format's definition.

    weights.bin     always first, its data at byte 65,536 of the file
    graph.onnx ...  ONNX graphs; their large tensors point into the bundle itself
    golden/...      a sample and its outputs, for the self-test on the device
    ...             other files (tokenizer, adapters)
    manifest.json   always last: canonical JSON, lists all others with size, sha256, offset

in a stored zip with canonical headers (``edgec_runtime.container``). A graph's external
tensor has the location LOCATION, a placeholder of fixed length, and an offset from the
start of the bundle; ``Bundle.graph`` overwrites the placeholder with the present name of
the file, so that a renamed, moved or linked bundle works and ONNX Runtime maps the weights
from the file instead of copying them.

Left out on purpose: compression, encryption, code, pickles, names of other files.
docs/bundle-format.md says it on one page.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Literal

from edgec_runtime.container import (
    FIRST_OFFSET,
    Chunk,
    ContainerWriter,
    Member,
    read_chunks,
    read_members,
)
from edgec_runtime.errors import BundleError, EdgecError
from edgec_runtime.graph import external_tensors
from edgec_runtime.manifest import MAX_MANIFEST_BYTES, Entry, Manifest

Check = Literal["auto", "full"]

WEIGHTS = "weights.bin"
MANIFEST = "manifest.json"
WEIGHTS_OFFSET = FIRST_OFFSET  # of the weights in the bundle
LOCATION_BYTES = 257  # a file name of 255 bytes and the shortest padding, "./"
LOCATION = "./" * 125 + "weights"  # what the compiler writes into the graph
AUTO_FULL_BYTES = 64 << 20  # below, the check "auto" hashes everything
GOLDEN_SHARE = 0.02  # of the bundle's size, at most, for the self-test's sample

_ALIGNMENT, _PAGE, _LARGE = 64, 4096, 1 << 20
_MAX_FILE_NAME = 255


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and checked. path: of the file itself, links resolved."""

    path: pathlib.Path
    size: int
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """The bytes of one entry, checked against its digest.

        Raises BundleError if there is no such entry or the file changed since it was read.
        """
        found = [entry for entry in self.manifest.entries if entry.name == name]
        if not found:
            raise BundleError(f"bundle {self.path}: it has no entry '{name}'")
        with _naming(self.path), open(self.path, "rb") as stream:
            return _read_checked(stream, found[0])

    def graph(self, role: str = "main") -> bytes:
        """The ONNX graph of that role, its external tensors pointing at this file.

        Raises BundleError for an unknown role, or for an external tensor that does not lie
        in the weights.
        """
        if role not in self.manifest.graphs:
            known = ", ".join(self.manifest.graphs)
            raise BundleError(f"bundle {self.path}: it has no graph '{role}'; it has {known}")
        data = self.read(self.manifest.graphs[role].file)
        with _naming(self.path):
            return _relocate(data, self.manifest.entries[0], self.path.name)


def weight_offsets(sizes: Iterable[int]) -> tuple[int, ...]:
    """Where each tensor of that many bytes starts in weights.bin.

    Multiples of 64, of 4,096 from 1 MiB up. In the graph's external data, the offset is
    WEIGHTS_OFFSET more.
    """
    offsets, position = [], 0
    for size in sizes:
        step = _PAGE if size >= _LARGE else _ALIGNMENT
        position = -(-position // step) * step
        offsets.append(position)
        position += size
    return tuple(offsets)


def weight_chunks(tensors: Iterable[Chunk]) -> Iterator[Chunk]:
    """The bytes of weights.bin for these tensors, laid out as by ``weight_offsets``."""
    position = 0
    for tensor in tensors:
        size = memoryview(tensor).nbytes
        step = _PAGE if size >= _LARGE else _ALIGNMENT
        yield bytes(-position % step)
        yield tensor
        position += -position % step + size


def write_bundle(
    path: str | os.PathLike[str],
    manifest: Manifest,
    *,
    weights: Iterable[Chunk],
    files: Mapping[str, bytes],
) -> Manifest:
    """Write a bundle and return its manifest, with the entries filled in.

    weights: the bytes of weights.bin, in pieces. files: the other entries by name; graphs
    come first, then golden/, then the rest, each sorted by name.
    The file appears complete or not at all, replaces an older one in one step and is read
    back before that. Raises EdgecError if it cannot be written, BundleError if what was
    given is no valid bundle.
    """
    goal = pathlib.Path(path)
    graphs = {graph.file for graph in manifest.graphs.values()}
    names = sorted(files, key=lambda n: (n not in graphs, not n.startswith("golden/"), n))
    with _temporary_beside(goal) as (temporary, stream):
        writer = ContainerWriter(stream)
        written = [writer.add_first(WEIGHTS, weights)]
        written += [writer.add(name, files[name]) for name in names]
        entries = tuple(
            Entry(item.member.name, item.member.size, item.sha256, item.member.offset)
            for item in written
        )
        complete = dataclasses.replace(manifest, entries=entries)
        writer.add(MANIFEST, complete.to_json())
        writer.close()
        stream.flush()
        os.fsync(stream.fileno())
        with open(temporary, "rb") as check:
            return _read(check, os.path.getsize(temporary), "auto")


def read_bundle(path: str | os.PathLike[str], check: Check = "auto") -> Bundle:
    """Read and check a bundle; nothing is taken from it before it was checked.

    check: "full" compares the digest of every byte; "auto" does so below 64 MiB, else it
    compares those of all entries but the weights. Headers, names, sizes and places are
    always checked. Raises BundleError with the first thing that is wrong.
    """
    if check not in ("auto", "full"):
        raise EdgecError(f"check is {check!r}, expected 'auto' or 'full'")
    given = pathlib.Path(path)
    with _naming(given):
        real = given.resolve()
        if real.is_dir():
            raise BundleError("it is a directory, expected a file")
        with open(real, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size == 0:
                raise BundleError("it is empty")
            return Bundle(real, size, _read(stream, size, check))


def _read(stream: IO[bytes], size: int, check: Check) -> Manifest:
    members = read_members(stream, size)
    last = members[-1]
    if last.name != MANIFEST:
        raise BundleError(f"its last entry is '{last.name}', expected {MANIFEST}")
    if last.size > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{MANIFEST} has {last.size} bytes, at most {MAX_MANIFEST_BYTES} are allowed"
        )
    raw = b"".join(read_chunks(stream, last))
    if zlib.crc32(raw) != last.crc32:
        raise BundleError(f"the entry '{MANIFEST}' is altered: its checksum differs")
    manifest = Manifest.from_json(raw)
    _check_entries(manifest, members)
    full = check == "full" or size < AUTO_FULL_BYTES
    for entry, member in zip(manifest.entries, members, strict=False):
        if full or entry.name != WEIGHTS:
            _check_data(stream, entry, member)
    for graph in manifest.graphs.values():
        entry = next(entry for entry in manifest.entries if entry.name == graph.file)
        _relocate(_read_checked(stream, entry), manifest.entries[0], "checked")
    return manifest


def _check_entries(manifest: Manifest, members: tuple[Member, ...]) -> None:
    """The manifest lists what the zip holds, and every file that it names is there."""
    listed = {entry.name: entry for entry in manifest.entries}
    if len(listed) != len(manifest.entries):
        raise BundleError(f"{MANIFEST} lists an entry twice")
    for member in members[:-1]:
        if member.name not in listed:
            raise BundleError(f"the entry '{member.name}' is not listed in {MANIFEST}")
        entry = listed[member.name]
        if entry.size != member.size:
            raise BundleError(
                f"the entry '{entry.name}' has {member.size} bytes, {MANIFEST} says {entry.size}"
            )
        if entry.offset != member.offset:
            raise BundleError(
                f"the entry '{entry.name}' starts at {member.offset}, "
                f"{MANIFEST} says {entry.offset}"
            )
    present = [member.name for member in members[:-1]]
    for name in listed:
        if name not in present:
            raise BundleError(f"the entry '{name}' of {MANIFEST} is missing")
    if present[:1] != [WEIGHTS] or list(listed) != present:
        raise BundleError(f"{MANIFEST} lists the entries in another order than the file")
    needed = [graph.file for graph in manifest.graphs.values()]
    needed += [name for g in manifest.golden for name in (g.inputs_file, g.outputs_file)]
    needed += manifest.generation.files if manifest.generation is not None else ()
    for name in needed:
        if name not in listed or name == WEIGHTS:
            raise BundleError(f"the file '{name}' that {MANIFEST} names is missing")


def _check_data(stream: IO[bytes], entry: Entry, member: Member) -> None:
    digest, crc = hashlib.sha256(), 0
    for chunk in read_chunks(stream, member):
        digest.update(chunk)
        crc = zlib.crc32(chunk, crc)
    if digest.hexdigest() != entry.sha256 or crc != member.crc32:
        raise BundleError(f"the entry '{entry.name}' is altered: its checksum differs")


def _read_checked(stream: IO[bytes], entry: Entry) -> bytes:
    stream.seek(entry.offset)
    data = stream.read(entry.size)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise BundleError(f"the entry '{entry.name}' is altered: its checksum differs")
    return data


def _relocate(graph: bytes, weights: Entry, file_name: str) -> bytes:
    """The graph with every placeholder overwritten by ``file_name``, same length.

    Raises BundleError if a tensor points anywhere but into the weights.
    """
    location = _padded_location(file_name)
    result = bytearray(graph)
    for tensor in external_tensors(graph):
        if tensor.location != LOCATION.encode():
            raise BundleError(
                f"its tensor '{tensor.name}' lies in another file "
                f"({tensor.location[:40].decode('utf-8', 'replace')}); expected the bundle itself"
            )
        first, last = weights.offset, weights.offset + weights.size
        inside = first <= tensor.offset and 0 <= tensor.length <= last - tensor.offset
        if not inside or tensor.offset % _ALIGNMENT:
            raise BundleError(
                f"its tensor '{tensor.name}' has offset {tensor.offset} and length "
                f"{tensor.length}; expected a multiple of {_ALIGNMENT} within the weights, "
                f"{first} to {last}"
            )
        result[tensor.location_at : tensor.location_at + LOCATION_BYTES] = location
    return bytes(result)


def _padded_location(file_name: str) -> bytes:
    """The file name behind as many "./" as give LOCATION_BYTES; a double "/" for odd rests."""
    try:
        name = file_name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BundleError("its file name is not valid Unicode; rename it") from error
    if len(name) > _MAX_FILE_NAME:
        raise BundleError(
            f"its file name has {len(name)} bytes in UTF-8, at most {_MAX_FILE_NAME} are "
            "allowed; rename it"
        )
    padding = LOCATION_BYTES - len(name)
    return b"./" * (padding // 2) + b"/" * (padding % 2) + name


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Errors from inside name the bundle; an OSError becomes a BundleError."""
    try:
        yield
    except BundleError as error:
        if str(error).startswith("bundle "):
            raise
        raise BundleError(f"bundle {path}: {error}") from error
    except FileNotFoundError as error:
        raise BundleError(f"bundle {path}: there is no such file") from error
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"bundle {path}: cannot be read: {reason}") from error


@contextlib.contextmanager
def _temporary_beside(goal: pathlib.Path) -> Iterator[tuple[str, IO[bytes]]]:
    """A stream to a temporary file in the folder of ``goal``, moved there on success."""
    temporary = ""
    try:
        if goal.is_dir():
            raise IsADirectoryError(None, "it is a directory")
        name = goal.parent / f".edgec-{os.urandom(8).hex()}.part"
        with open(name, "x+b") as stream:
            temporary = str(name)
            yield temporary, stream
        os.replace(temporary, goal)
        temporary = ""
    except BundleError as error:
        raise BundleError(f"cannot write the bundle {goal}: {error}") from error
    except OSError as error:
        reason = error.strerror or error
        raise EdgecError(
            f"cannot write the bundle {goal}: {reason}; choose a folder that exists and is writable"
        ) from error
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
