"""Values of many samples on disk, and a graph that runs over all of them some nodes at a time.

What is alive between two parts of the graph lies in files, one for each value, so that memory
holds one sample and the weights of one part, whatever the number of samples and the size of
the model. Files are written in the ordinary way, which tells of a full disk, and read as maps.

Left out: values that are no tensors of numbers.
"""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Feeds, PassError
from edgec.passes.execution import open_session, run_feeds
from edgec.passes.weights import Array


@dataclass(frozen=True)
class _Place:
    """Where an array lies in its file."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass
class Spill:
    """Arrays by name, in files of a folder that has to exist; sample after sample."""

    folder: pathlib.Path
    _files: dict[str, pathlib.Path] = field(default_factory=dict)
    _places: dict[str, list[_Place]] = field(default_factory=dict)
    _opened: int = 0

    def add(self, name: str, array: Array) -> None:
        """Append the array of the next sample. Raises PassError if the disk is full."""
        if name not in self._files:
            self._files[name] = self.folder / str(self._opened)
            self._places[name] = []
            self._opened += 1
        try:
            with open(self._files[name], "ab") as stream:
                offset = stream.tell()
                stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        except OSError as error:
            size = sum(file.stat().st_size for file in self.folder.iterdir())
            raise PassError(
                f"intermediate values do not fit on the disk: {self.folder}: "
                f"{error.strerror or error}, after {size / 1e6:.0f} MB; free some space, give "
                "fewer calibration samples, or build into a folder on a larger disk"
            ) from error
        self._places[name].append(_Place(offset, array.shape, array.dtype))

    def get(self, name: str, sample: int) -> Array:
        """The array of a sample, read only; mapped into memory as long as it is used."""
        place = self._places[name][sample]
        if 0 in place.shape:
            return np.zeros(place.shape, place.dtype)
        return np.asarray(np.memmap(self._files[name], place.dtype, "r", place.offset, place.shape))

    def shapes(self, name: str) -> set[tuple[int, ...]]:
        """The shapes that the samples' arrays have."""
        return {place.shape for place in self._places[name]}

    def drop(self, name: str) -> None:
        """Remove the arrays of a name."""
        self._files.pop(name).unlink()
        del self._places[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(tuple(self._files))


class Chain:
    """A graph on its way over all samples: nodes that were run, and what the rest will read."""

    def __init__(
        self, model: ir.Model, samples: Iterable[Feeds], spill: Spill, keep: Collection[str] = ()
    ) -> None:
        """spill: of its own. keep: names of inner values that stay until ``release``.

        The model's weights may change on the way, its nodes may not.
        """
        self._model, self._spill = model, spill
        self._nodes = tuple(model.graph)
        self._outputs = tuple(str(value.name) for value in model.graph.outputs)
        self._kept = {*keep, *self._outputs}
        fixed = _fixed(self._nodes)  # made anew in every part, from the weights as they are then
        self._last_use = {
            str(value.name): i
            for i, node in enumerate(self._nodes)
            for value in _read(node)
            if value not in fixed
        }
        self._at = self._count = 0
        for feeds in samples:
            self._count += 1
            for value in model.graph.inputs:
                name = str(value.name)
                if name in feeds and (name in self._last_use or name in self._kept):
                    spill.add(name, feeds[name])

    def position(self, node: ir.Node) -> int:
        """Where the node stands in the order of the graph."""
        return self._nodes.index(node)

    def advance(self, stop: int) -> None:
        """Run the nodes before position ``stop`` that have not been run."""
        nodes = self._nodes[self._at : stop]
        made = {str(v.name) for node in nodes for v in node.outputs if v.name}
        wanted = sorted(n for n in made if n in self._kept or self._last_use.get(n, -1) >= stop)
        if wanted:
            read = {str(value.name) for node in nodes for value in _read(node)}
            given = [name for name in self._spill if name in read]
            session = open_session(self._part(given, wanted))
            for sample in range(self._count):
                feeds = {name: self._spill.get(name, sample) for name in given}
                for name, array in zip(wanted, run_feeds(session, feeds), strict=True):
                    self._spill.add(name, array)
        self._at = max(self._at, stop)
        self._clear()

    def value(self, name: str, sample: int) -> Array:
        """A value of one sample that a node which was not run will read, or that is kept."""
        return self._spill.get(name, sample)

    def outputs(self, sample: int) -> list[Array]:
        """The graph's outputs for a sample; the chain then is at its end."""
        self.advance(len(self._nodes))
        return [self._spill.get(name, sample) for name in self._outputs]

    def release(self, name: str) -> None:
        """No longer keep an inner value."""
        self._kept -= {name} - set(self._outputs)
        self._clear()

    def _part(self, inputs: list[str], outputs: list[str]) -> ir.Model:
        """The nodes between values as a model of their own, with their weights alone in memory."""
        graph = ir.convenience.extract(self._model.graph, inputs, outputs)
        for value in graph.inputs:
            name = str(value.name)
            shapes = self._spill.shapes(name)
            dims: list[int | None] = list(next(iter(shapes)))
            if len(shapes) > 1:
                dims = [None] * len(dims)
            dtype = ir.DataType.from_numpy(self._spill.get(name, 0).dtype)
            value.type, value.shape = ir.TensorType(dtype), ir.Shape(dims)
        functions = tuple(self._model.functions.values())
        part = ir.Model(graph, ir_version=self._model.ir_version, functions=functions)
        return ir.external_data.load_to_model(part)

    def _clear(self) -> None:
        for name in self._spill:
            if name not in self._kept and self._last_use.get(name, -1) < self._at:
                self._spill.drop(name)


def _fixed(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    """The values that follow from weights alone, a dequantized weight for example."""
    fixed: set[ir.Value] = set()
    for node in nodes:
        if all(value.is_initializer() or value in fixed for value in _read(node)):
            fixed.update(node.outputs)
    return fixed


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, its subgraphs included."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        graphs: Iterable[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = (attribute.as_graph(),)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = attribute.as_graphs()
        for graph in graphs:
            for inner in ir.traversal.RecursiveGraphIterator(graph):
                yield from (value for value in inner.inputs if value is not None)
