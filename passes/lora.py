"""Low-rank branches beside layers: y = W x + up (down x), with up and down narrow.

LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1), on MatMul, Gemm and ungrouped Conv with
a constant weight. Beside a Conv, ``down`` has the layer's own kernel, strides and pads and
``rank`` channels, ``up`` is 1 x 1. ``up`` starts at zero, so a new branch changes nothing.
The factor alpha / rank of the paper is no part of the graph: see `edgec.passes.adapt`.

A branch is either added to the weight afterwards (``merge``) or stays in the graph, where
another pair of matrices may take its place at run time (`edgec.passes.adapter_slots`).

Left out: grouped convolutions, whose blocks are small already, embeddings, and DoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import PassError, Skip
from edgec.passes.linear import LINEAR_OPS, Linear, linear, set_constant
from edgec.passes.matching import is_op, producer
from edgec.passes.weights import Array, Editor, Refused, graph_of, label
from edgec_runtime.errors import suggestion


@dataclass(frozen=True)
class Branch:
    """A place for two small matrices beside a layer of a graph.

    layer: name of the node. source, result: names of the value that the layer reads and of the
    one that it gives, behind its bias. down, up: shapes of the two, in the layout of the graph:
    [in, rank] and [rank, out] for products, [rank, in, *kernel] and [out, rank, 1, ...] for Conv.
    """

    layer: str
    source: str
    result: str
    down: tuple[int, ...]
    up: tuple[int, ...]
    attributes: tuple[ir.Attr, ...] = ()  # of the Conv: kernel, strides, pads, dilations

    @property
    def is_conv(self) -> bool:
        """True if the branch is two convolutions, else two matrix products."""
        return len(self.down) > 2

    @property
    def rank(self) -> int:
        """Width between the two."""
        return self.down[0] if self.is_conv else self.down[1]

    def start(self, random: np.random.Generator) -> tuple[Array, Array]:
        """Numbers to begin a training with: ``down`` normal with variance 1 / in, ``up`` zero."""
        inputs = int(np.prod(self.down)) // self.rank
        down = random.standard_normal(self.down) / np.sqrt(inputs)
        return down.astype(np.float32), np.zeros(self.up, np.float32)

    def merge(self, model: ir.Model, down: Array, up: Array) -> None:
        """Add up * down to the layer's weight: the branch at no cost at run time."""
        node = next(n for n in model.graph if label(n) == self.layer)
        layer = linear(node)
        if self.is_conv:
            rows = up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
        else:
            rows = (down @ up).T
        factor = 1.0
        if node.op_type == "Gemm" and "alpha" in node.attributes:
            factor = node.attributes["alpha"].as_float()
        blocks = layer.blocks
        added = rows.reshape(blocks.shape).astype(np.float32) / np.float32(factor)
        set_constant(node, 1, layer.layout.stored(blocks + added))


def branches(
    model: ir.Model, rank: int, layers: Sequence[str] = (), *, of: str = "adapt"
) -> tuple[tuple[Branch, ...], tuple[Skip, ...]]:
    """The branches that a graph has room for, and the layers that get none, with the reason.

    rank: of every branch. layers: names of nodes; all if empty. of: the pass, for its errors.
    Raises PassError if a layer of ``layers`` cannot have a branch of that rank, or if none can.
    """
    known = [label(node) for node in model.graph]
    for name in layers:
        if name not in known:
            raise PassError(
                f"{of}: layers has '{name}', no node of the model{suggestion(name, known)}; give "
                "names of MatMul, Gemm or Conv nodes, or leave layers out to take all"
            )
    found: list[Branch] = []
    skipped: list[Skip] = []
    for node in model.graph:
        if not is_op(node, *LINEAR_OPS) or (layers and label(node) not in layers):
            continue
        try:
            found.append(_branch(linear(node), rank))
        except Refused as reason:
            if layers:
                raise PassError(
                    f"{of}: node '{label(node)}': {reason}; choose rank and layers so that every "
                    "layer that is named can have a branch"
                ) from None
            skipped.append(Skip(label(node), str(reason)))
    if not found:
        reasons = "; ".join(f"'{s.node}': {s.reason}" for s in skipped[:3])
        raise PassError(
            f"{of}: no layer can have a branch of rank {rank}"
            f"{f' ({reasons})' if reasons else ': none is a MatMul, Gemm or Conv'}; expected one "
            "with a constant weight and without groups: choose a lower rank or another model"
        )
    return tuple(found), tuple(skipped)


def _branch(layer: Linear, rank: int) -> Branch:
    node = layer.node
    if layer.layout.groups > 1:
        raise Refused(f"a convolution of {layer.layout.groups} groups gets no branch")
    blocks = layer.blocks
    _, outputs, inputs, taps = blocks.shape
    most = min(outputs, inputs * taps)
    if rank > most:
        raise Refused(
            f"rank {rank} is larger than its weight, {inputs * taps} -> {outputs}, expected at "
            f"most {most}"
        )
    source = node.inputs[0]
    assert source is not None
    names = label(node), str(source.name), str(layer.output.name)
    if not layer.is_conv:
        return Branch(*names, (inputs, rank), (rank, outputs))
    kernel = layer.layout.shape[2:]
    own = tuple(a for a in node.attributes.values() if a.name != "group")
    return Branch(*names, (rank, inputs, *kernel), (outputs, rank, *(1 for _ in kernel)), own)


def add_branches(
    model: ir.Model,
    found: Sequence[Branch],
    names: Mapping[str, tuple[str, str]],
    matrices: Mapping[str, tuple[Array, Array]],
) -> tuple[Skip, ...]:
    """Put branches into a graph, in which layers may have become other nodes by now.

    names, matrices: of the two initializers, and their numbers, by the branch's ``layer``.
    Returns the layers whose values the graph does not have, with the reason.
    """
    editor, skipped = Editor(model), list[Skip]()
    values = {str(v.name): v for v in model.graph.inputs}
    values |= {str(v.name): v for node in model.graph for v in node.outputs}
    for branch in found:
        result = values.get(branch.result)
        source = values.get(branch.source)
        if result is not None and result.producer() is not None:
            node = _layer_of(result)
            source = source if node is None else node.inputs[0]
        if source is None or result is None or result.producer() is None:
            gone = branch.result if result is None else branch.source
            skipped.append(Skip(branch.layer, f"the graph has no value '{gone}' any more"))
        elif not {source.dtype, result.dtype} <= {ir.DataType.FLOAT, None}:  # None: not inferred
            skipped.append(Skip(branch.layer, f"it is {result.dtype}, a branch needs float32"))
        else:
            pair = names[branch.layer], matrices[branch.layer]
            values[branch.result] = _add(editor, branch, source, result, *pair)
    return tuple(skipped)


def _layer_of(result: ir.Value) -> ir.Node | None:
    """The Conv, Gemm or MatMul that gives a value, perhaps through the Add of its bias."""
    node = result.producer()
    if is_op(node, "Add"):
        assert node is not None
        node = next((p for v in node.inputs if (p := producer(v, "MatMul"))), None)
    return node if is_op(node, *LINEAR_OPS) else None


def _add(
    editor: Editor,
    branch: Branch,
    source: ir.Value,
    result: ir.Value,
    names: tuple[str, str],
    matrices: tuple[Array, Array],
) -> ir.Value:
    """Add one branch; the value that takes the place of ``result``."""
    anchor = result.producer()
    assert anchor is not None
    graph = graph_of(anchor)
    down, up = (editor.constant(graph, n, a) for n, a in zip(names, matrices, strict=True))
    kind = "Conv" if branch.is_conv else "MatMul"
    stem = f"{branch.layer}_branch"
    first = ir.node(kind, [source, down], name=editor.fresh(f"{stem}_down"))
    for attribute in branch.attributes:
        first.attributes.add(attribute)
    second = ir.node(kind, [first.outputs[0], up], name=editor.fresh(f"{stem}_up"))
    total = ir.node("Add", [result, second.outputs[0]], name=editor.fresh(f"{stem}_add"))
    for node in (first, second, total):
        node.outputs[0].name = editor.fresh(f"{node.name}_output")
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    output = total.outputs[0]
    output.shape = result.shape
    graph.insert_after(anchor, (first, second, total))
    for use in tuple(result.uses()):
        if use.node is not total:
            use.node.replace_input_with(use.idx, output)
    if result.is_graph_output():
        name = str(result.name)
        graph.outputs[list(graph.outputs).index(result)] = output
        result.name, output.name = editor.fresh(f"{name}_base"), name
    return output
