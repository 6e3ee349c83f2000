"""Cuts the graph of an encoder-decoder in two: what a prompt needs once, and what a step needs.

Passes see an encoder-decoder as one graph (``edgec.decoder``), so that all of them serve it. A
device that generates would then encode its prompt anew for every token. Here the graph falls into
the part that depends on the tokens of the answer, ``main``, and the part that does not,
``encoder``. Values that cross from one to the other are outputs of the encoder and inputs of main,
named ``memory.*``: keys and values of the cross-attention, in whatever form the passes left them,
and masks. So nothing that is the same in every step is computed in a step.

    features ─▶ encoder ─▶ memory.0 memory.1 ...
                               ▼
    decoder_input_ids, past_key_values.* ─▶ main ─▶ logits, present.*

Weights that both read are the same tensors in both, and stored once (``edgec.emit``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.decoder import encoder_inputs, input_names
from edgec.errors import ExportError
from edgec.passes.execution import open_session, run_feeds
from edgec_runtime.adapters import SLOT
from edgec_runtime.generation import ENCODER, MAIN

Array = np.ndarray[Any, Any]
Run = Callable[[Mapping[str, Array]], dict[str, Array]]

_MEMORY = "memory."


def cut(model: ir.Model) -> dict[str, ir.Model]:
    """The graphs of a bundle by role: ``main``, and ``encoder`` if the model has one.

    They share the model's tensors. Raises ExportError where that cannot be.
    """
    read = set(encoder_inputs(input_names(model)))
    if not read:
        return {MAIN: model}
    whole = model.clone()
    graph = whole.graph
    slot = next((name for name in graph.initializers if name.startswith(SLOT)), None)
    if slot is not None:
        raise ExportError(
            f"the model has slots for adapters ('{slot}') and an encoder; adapters change models "
            "of one graph alone: leave the pass that makes the slots out of the recipe"
        )
    fed = [value for value in graph.inputs if value.name in read]
    stepped = [value for value in graph.inputs if value.name not in read]
    handed = _handed_over(graph, fed, stepped)
    for value in handed:
        if value.dtype is None:
            raise ExportError(
                f"the value '{value.name}' goes from the encoder to the decoder, and its dtype is "
                "not known; leave the last pass out of the recipe and report it"
            )
    parts = {
        ENCODER: ir.convenience.extract(graph, fed, handed),
        MAIN: ir.convenience.extract(graph, [*stepped, *handed], list(graph.outputs)),
    }
    for number, value in enumerate(parts[ENCODER].outputs):
        value.name = f"{_MEMORY}{number}"
    for number, value in enumerate(parts[MAIN].inputs[len(stepped) :]):
        value.name = f"{_MEMORY}{number}"
    return {role: _model(whole, role, part) for role, part in parts.items()}


def run_parts(parts: Mapping[str, ir.Model]) -> Run:
    """Feeds of the whole model -> outputs of main; the encoder runs once for the same arrays."""
    sessions = {role: open_session(part, threads=0) for role, part in parts.items()}
    names = {role: [o.name for o in session.get_outputs()] for role, session in sessions.items()}
    read = [i.name for i in sessions[ENCODER].get_inputs()]
    last: tuple[list[Array], dict[str, Array]] | None = None

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        nonlocal last
        given = [feeds[name] for name in read]
        if last is None or any(a is not b for a, b in zip(last[0], given, strict=True)):
            values = run_feeds(sessions[ENCODER], dict(zip(read, given, strict=True)))
            last = given, dict(zip(names[ENCODER], values, strict=True))
        rest = {name: array for name, array in feeds.items() if name not in read}
        outputs = run_feeds(sessions[MAIN], {**rest, **last[1]})
        return dict(zip(names[MAIN], outputs, strict=True))

    return run


def _handed_over(
    graph: ir.Graph, fed: Sequence[ir.Value], stepped: Sequence[ir.Value]
) -> list[ir.Value]:
    """Values that depend on the encoder's inputs alone and that a step reads, in order.

    An input of the encoder that a step reads itself is handed over as its Identity.
    """
    early, late = set(fed), set(stepped)
    stepping = []
    for node in graph:
        values = set(_reads(node))
        if values & late:
            late.update(node.outputs)
            stepping.append(node)
        elif values & early:
            early.update(node.outputs)
    for value in fed:
        _copy_for(graph, value, stepping, early)
    read = (value for node in stepping for value in _reads(node))
    return list(dict.fromkeys(value for value in read if value in early))


def _copy_for(
    graph: ir.Graph, value: ir.Value, users: Collection[ir.Node], early: set[ir.Value]
) -> None:
    """Let ``users`` read a copy of an input of the graph, where they read it at all."""
    uses = [(user, index) for user, index in value.uses() if user in set(users)]
    if not uses:
        return
    node = ir.node("Identity", [value], name=f"{value.name}.handed")
    [copied] = node.outputs
    copied.name, copied.type, copied.shape = f"{value.name}.handed", value.type, value.shape
    graph.insert_before(graph[0], node)
    for user, index in uses:
        user.replace_input_with(index, copied)
    early.add(copied)


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """The values that a node reads, with those that its subgraphs do."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            bodies: Sequence[ir.Graph] = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies = attribute.as_graphs()
        else:
            continue
        for body in bodies:
            for inner in body:
                yield from _reads(inner)


def _model(whole: ir.Model, role: str, graph: ir.Graph) -> ir.Model:
    """A part as a model of its own, its initializers in the order of the whole."""
    for name in whole.graph.initializers:
        if name in graph.initializers:
            graph.initializers[name] = graph.initializers.pop(name)
    graph.name = role
    return ir.Model(
        graph,
        ir_version=whole.ir_version,
        producer_name=whole.producer_name,
        functions=[function.clone() for function in whole.functions.values()],
    )
