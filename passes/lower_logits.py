"""Lets a decoder compute the logits of its last positions alone.

A prompt needs the logits behind its last token. Those of all others take as long as a fifth of a
small model, and a float for each word of the vocabulary: 50 MB for 256 tokens and 49,152 words.

    logits = head(hidden)  ->  head(Slice(hidden, from, end, axis 1))

``from`` is an initializer of 0, so that every position is kept; the bundle makes it an input with a
default, which the runtime sets to -1.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, Result
from edgec.passes.decode_trials import decoder_of
from edgec.passes.matching import add_initializer, is_op, rank, sole_user
from edgec.passes.weights import constant
from edgec_runtime.generation import LOGITS_FROM

_PRODUCTS = ("MatMul", "MatMulNBits")
_ROWWISE = ("Add", "Cast", "Div", "Mul", "Tanh")  # with constants, they keep positions apart
_END = np.iinfo(np.int64).max


def lower_logits(model: ir.Model, context: Context) -> Result:
    """Put the Slice in front of the output layer of a decoder; ``changed`` is 1 then."""
    del context
    graph = model.graph
    if isinstance(decoder_of(model), str) or LOGITS_FROM in graph.initializers:
        return Result(model, 0)
    product = _head(graph.outputs[0])
    hidden = None if product is None else product.inputs[0]
    if product is None or hidden is None or hidden.shape is None or len(hidden.shape) != 3:
        return Result(model, 0)
    begin = add_initializer(graph, LOGITS_FROM, np.zeros(1, np.int64))
    end = add_initializer(graph, f"{LOGITS_FROM}_end", np.array([_END]))
    axis = add_initializer(graph, f"{LOGITS_FROM}_axis", np.array([1]))
    node = ir.node("Slice", [hidden, begin, end, axis], name=f"{LOGITS_FROM}_slice")
    node.outputs[0].name = f"{hidden.name}_from"
    node.outputs[0].type = hidden.type
    node.outputs[0].shape = ir.Shape([hidden.shape[0], None, hidden.shape[2]])
    graph.insert_before(product, node)
    product.replace_input_with(0, node.outputs[0])
    return Result(model, 1)


def _head(logits: ir.Value) -> ir.Node | None:
    """The product of hidden states and vocabulary behind the logits, if nothing mixes positions."""
    value, node = logits, logits.producer()
    while node is not None and is_op(node, *_ROWWISE):
        sources = [v for v in node.inputs if v is not None and constant(v) is None]
        if len(sources) != 1:
            return None
        value, node = sources[0], sources[0].producer()
    if node is None or node.op_type not in _PRODUCTS:
        return None
    if value is not logits and sole_user(value) is None:
        return None  # another node reads all positions
    return node if node.domain or rank(node.inputs[1]) == 2 else None
