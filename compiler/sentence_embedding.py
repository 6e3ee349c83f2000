"""The head of a sentence-transformers directory: pooling and normalisation as part of the graph.

``modules.json`` lists what follows the transformer. A Pooling makes one vector of the hidden
states of a text, a Normalize scales it to length 1. Both become nodes behind the exported
transformer, so that the bundle's one output is ``embedding``, float32 [batch, width]. The same is
written in torch, as sentence-transformers computes it, for the comparison with the source.

Left out on purpose: Dense and other modules, which have weights of their own; prompts, which are
the app's text; the length at which texts are cut, which is the tokenizer's.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.decoder import MASK
from edgec.errors import ExportError, SourceError

EMBEDDING, HIDDEN = "embedding", "last_hidden_state"
_MODULES = "modules.json"
_FLAG = "pooling_mode_"  # of the keys in a Pooling's config.json
_PROMPT = "include_prompt"
_NEVER = -1e9  # in place of padding, where the largest is taken
_LEAST_COUNT, _LEAST_LENGTH = 1e-9, 1e-12  # sentence-transformers', torch.nn.functional.normalize's


@dataclass(frozen=True)
class Head:
    """What follows the transformer in ``folder``.

    pooling: keys of ``POOLINGS``; the vectors of several are joined in this order.
    longest: tokens at which sentence-transformers cuts a text; None if it states none.
    """

    folder: pathlib.Path
    pooling: tuple[str, ...]
    normalize: bool
    longest: int | None = None

    @property
    def finding(self) -> str:
        """A line for the report."""
        scaled = ", scaled to length 1" if self.normalize else ""
        told = f"the output is '{EMBEDDING}': {' + '.join(self.pooling)}{scaled}"
        if self.longest:
            told += f"; sentence-transformers cuts texts at {self.longest} tokens, so must the app"
        return told


def read_head(path: pathlib.Path) -> Head | None:
    """The head that a directory describes; None for one without modules.json.

    Raises SourceError for what the graph cannot hold.
    """
    file = path / _MODULES
    if not file.is_file():
        return None
    listed = _json(file)
    if not isinstance(listed, list) or not all(
        isinstance(one, Mapping) and isinstance(one.get("type"), str) for one in listed
    ):
        raise SourceError(f"{file}: expected a list of modules, each with a type and a path")
    kinds = [one["type"].rpartition(".")[2] for one in listed]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise SourceError(
            f"{file}: the modules are {', '.join(kinds) or 'none'}; expected Transformer, Pooling "
            "and at most a Normalize behind them; write a function that returns the whole as a "
            "torch module (docs/build.md, Sources)"
        )
    folders = [path / str(one.get("path", "")) for one in listed]
    limits = _json(folders[0] / "sentence_bert_config.json", missing={})
    longest = limits.get("max_seq_length") if isinstance(limits, Mapping) else None
    return Head(folders[0], _pooling(folders[1] / "config.json"), len(kinds) == 3, longest)


def add_head(model: ir.Model, head: Head) -> None:
    """Make ``embedding`` the only output of an exported transformer.

    Raises ExportError if the graph has no hidden states or no mask.
    """
    graph = model.graph
    hidden = next((value for value in graph.outputs if value.name == HIDDEN), None)
    mask = next((value for value in graph.inputs if value.name == MASK), None)
    if hidden is None or mask is None:
        names = ", ".join(str(value.name) for value in (*graph.inputs, *graph.outputs))
        raise ExportError(
            f"pooling needs the input '{MASK}' and the output '{HIDDEN}'; the graph has {names}"
        )
    nodes = _Nodes(graph)
    kept = nodes("Unsqueeze", nodes("Cast", mask, to=ir.DataType.FLOAT), nodes.axis(2))
    parts = [POOLINGS[name].nodes(nodes, hidden, kept) for name in head.pooling]
    vector = parts[0] if len(parts) == 1 else nodes("Concat", *parts, axis=-1)
    if head.normalize:
        length = nodes("Sqrt", nodes("ReduceSum", nodes("Mul", vector, vector), nodes.axis(-1)))
        vector = nodes("Div", vector, nodes("Max", length, nodes.number(_LEAST_LENGTH)))
    width = hidden.shape[-1] if hidden.shape is not None else None
    batch = mask.shape[0] if mask.shape is not None else None
    vector.name = EMBEDDING
    vector.type = ir.TensorType(ir.DataType.FLOAT)
    vector.shape = ir.Shape([batch, width * len(parts) if isinstance(width, int) else None])
    graph.outputs[:] = [vector]


def torch_embedding(head: Head, hidden: Any, mask: Any) -> Any:
    """The embedding in torch, as sentence-transformers computes it.

    hidden: float32 [batch, tokens, width]; mask: [batch, tokens]. Returns [batch, width].
    """
    import torch

    kept = mask[..., None].to(hidden.dtype)
    vector = torch.cat([POOLINGS[name].torch(hidden, kept) for name in head.pooling], -1)
    return torch.nn.functional.normalize(vector, dim=-1) if head.normalize else vector


class _Nodes:
    """Appends nodes and constants to a graph, with names that are the same in every export."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._count = 0

    def __call__(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """The output of a new node."""
        node = ir.node(op_type, inputs, attributes, name=self._name(op_type))
        node.outputs[0].name = node.name
        self._graph.append(node)
        return node.outputs[0]

    def number(self, value: float) -> ir.Value:
        """A float32 scalar."""
        return self._constant(np.float32(value))

    def integer(self, value: int) -> ir.Value:
        """An int64 scalar."""
        return self._constant(np.int64(value))

    def axis(self, value: int) -> ir.Value:
        """An axis, where operators take a list of them as an input."""
        return self._constant(np.array([value]))

    def squeezed(self, column: ir.Value) -> ir.Value:
        """Sums over the tokens: [batch, tokens, n] -> [batch, n]."""
        return self("ReduceSum", column, self.axis(1), keepdims=0)

    def _constant(self, array: Any) -> ir.Value:
        tensor = ir.tensor(array, name=self._name("constant"))
        value = ir.Value(
            name=tensor.name,
            const_value=tensor,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
        )
        self._graph.register_initializer(value)
        return value

    def _name(self, what: str) -> str:
        self._count += 1
        return f"{EMBEDDING}.{self._count}.{what}"


@dataclass(frozen=True)
class _Pooling:
    """One way to make a vector of tokens, as nodes and in torch.

    Both take the hidden states [batch, tokens, width] and the mask as float32 [batch, tokens, 1]
    and return [batch, width].
    """

    nodes: Callable[[_Nodes, ir.Value, ir.Value], ir.Value]
    torch: Callable[[Any, Any], Any]


def _first_nodes(nodes: _Nodes, hidden: ir.Value, kept: ir.Value) -> ir.Value:
    return nodes("Gather", hidden, nodes.integer(0), axis=1)


def _mean_nodes(nodes: _Nodes, hidden: ir.Value, kept: ir.Value) -> ir.Value:
    count = nodes("Max", nodes.squeezed(kept), nodes.number(_LEAST_COUNT))
    return nodes("Div", nodes.squeezed(nodes("Mul", hidden, kept)), count)


def _mean_sqrt_nodes(nodes: _Nodes, hidden: ir.Value, kept: ir.Value) -> ir.Value:
    count = nodes("Max", nodes.squeezed(kept), nodes.number(_LEAST_COUNT))
    return nodes("Div", nodes.squeezed(nodes("Mul", hidden, kept)), nodes("Sqrt", count))


def _max_nodes(nodes: _Nodes, hidden: ir.Value, kept: ir.Value) -> ir.Value:
    shown = nodes("Where", nodes("Cast", kept, to=ir.DataType.BOOL), hidden, nodes.number(_NEVER))
    return nodes("ReduceMax", shown, nodes.axis(1), keepdims=0)


def _weighted_nodes(nodes: _Nodes, hidden: ir.Value, kept: ir.Value) -> ir.Value:
    return _mean_nodes(nodes, hidden, nodes("Mul", _positions(nodes, kept), kept))


def _last_nodes(nodes: _Nodes, hidden: ir.Value, kept: ir.Value) -> ir.Value:
    numbers = nodes("Mul", _positions(nodes, kept), kept)
    last = nodes("Equal", numbers, nodes("ReduceMax", numbers, nodes.axis(1)))
    chosen = nodes("Mul", nodes("Cast", last, to=ir.DataType.FLOAT), kept)
    return nodes.squeezed(nodes("Mul", hidden, chosen))


def _positions(nodes: _Nodes, kept: ir.Value) -> ir.Value:
    """1, 2, 3 ... along the tokens, padding counted."""
    ones = nodes("Add", nodes("Sub", kept, kept), nodes.number(1.0))
    return nodes("CumSum", ones, nodes.integer(1))


def _mean(hidden: Any, weights: Any) -> Any:
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=_LEAST_COUNT)


def _mean_sqrt(hidden: Any, kept: Any) -> Any:
    return (hidden * kept).sum(1) / kept.sum(1).clamp(min=_LEAST_COUNT).sqrt()


def _weighted(hidden: Any, kept: Any) -> Any:
    import torch

    numbers = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype)[:, None]
    return _mean(hidden, numbers * kept)


def _last(hidden: Any, kept: Any) -> Any:
    import torch

    behind = kept[..., 0].flip(1).argmax(1)  # tokens of padding on the right
    rows = torch.arange(len(hidden))
    return hidden[rows, hidden.shape[1] - 1 - behind] * kept.amax(1)


# in the order in which sentence-transformers joins them, by the end of their key in config.json
POOLINGS: Mapping[str, _Pooling] = {
    "cls_token": _Pooling(_first_nodes, lambda hidden, kept: hidden[:, 0]),
    "max_tokens": _Pooling(
        _max_nodes, lambda hidden, kept: hidden.masked_fill(kept == 0, _NEVER).amax(1)
    ),
    "mean_tokens": _Pooling(_mean_nodes, _mean),
    "mean_sqrt_len_tokens": _Pooling(_mean_sqrt_nodes, _mean_sqrt),
    "weightedmean_tokens": _Pooling(_weighted_nodes, _weighted),
    "lasttoken": _Pooling(_last_nodes, _last),
}


def _pooling(file: pathlib.Path) -> tuple[str, ...]:
    """The ways that a Pooling's config.json switches on. Raises SourceError."""
    stated = _json(file)
    if not isinstance(stated, Mapping):
        raise SourceError(f"{file}: expected an object with keys such as {_FLAG}mean_tokens")
    modes = {key.removeprefix(_FLAG): on for key, on in stated.items() if key.startswith(_FLAG)}
    wrong = [key for key, on in modes.items() if key not in POOLINGS or not isinstance(on, bool)]
    if wrong:
        raise SourceError(
            f"{file}: {_FLAG}{wrong[0]} is {json.dumps(modes[wrong[0]])}; expected true or false "
            f"for one of {', '.join(_FLAG + name for name in POOLINGS)}"
        )
    chosen = tuple(name for name in POOLINGS if modes.get(name))
    if not chosen:
        raise SourceError(
            f"{file}: no pooling is true; expected at least one of "
            f"{', '.join(_FLAG + name for name in POOLINGS)}"
        )
    if stated.get(_PROMPT) is False:
        raise SourceError(
            f"{file}: {_PROMPT} is false, so that a prompt's tokens are left out of the pooling, "
            "but the graph cannot know a prompt; set it to true if the app uses none"
        )
    return chosen


def _json(file: pathlib.Path, missing: Any = None) -> Any:
    """What a JSON file holds; ``missing``, if given, where there is no file. Raises SourceError."""
    if missing is not None and not file.is_file():
        return missing
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise SourceError(f"{file}: cannot be read as JSON: {reason}") from error
