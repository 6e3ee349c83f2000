"""Turns attention written in standard operators into the target's attention kernel.

    Softmax(q k' * scale [+ mask]) v
        -> Attention             (standard, opset 23)
        -> MultiHeadAttention    (com.microsoft), where the target lacks the first

``match_attention`` finds them. A match is rewritten in one of two forms: "merged" takes
the projections [batch, sequence, heads * size] and gives the merged heads, which saves all
transposes; "split" takes the operands of the two products as they are, whatever made them,
and leaves the transposes standing (Attention alone can do this).

The search is generous; the proof is strict: in one model every rewriting stands beside
what it replaces and must give the same on single, right-padded and left-padded batches.
Those that differ stay as they are.

Measured with ONNX Runtime 1.31 on x86-64, 12 heads of 32 and of 64, 128 tokens, additive
mask, against the unfused graph: Attention merged 1.4 times as fast, split 1.2 times,
MultiHeadAttention 1.1 times.

A mask is cut off at -60: at 256 tokens, three quarters of them masked, Attention takes 2.3 ms
then and 8.1 ms with the lowest float32 (see ``_LEAST_MASK``).

Left out: packed projections are not taken apart (their heads come in split form), caches,
and the Softmax that replaces the NaN of fully masked rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir

from edgec.passes.contract import Context, Feeds, PassError, Result, Skip
from edgec.passes.equivalence import difference, padded_variants, proof_feeds
from edgec.passes.execution import run_values
from edgec.passes.match_attention import Attention, Merged, find_attentions
from edgec.passes.matching import add_initializer, insert, producer, take_over

STANDARD, CONTRIB = "Attention", "MultiHeadAttention"
TOLERANCE = 1e-4  # of the output's largest number: float noise of another summation order
_OPSETS = (21, 22, 23)  # from which the import may be raised to 23: only types were added
# Masks hold the lowest float32, whose exponential ONNX Runtime gives as a denormal; a product
# with denormals takes x86 four times as long. exp(-60) is 1e-26 of the largest weight: what is
# masked stays invisible unless its score is some 40 above all that is not.
_LEAST_MASK = -60.0
Form = Literal["merged", "split"]
_Expanded = dict[tuple[str, ...], ir.Value]


def lower_attention(model: ir.Model, context: Context) -> Result:
    """Rewrite every attention that is found and proven; ``changed`` counts them.

    Decisions: ``attention`` maps the result of each rewritten attention's second product to
    its form; a lock that has it is followed without a proof.
    """
    kernel = _kernel(model, context)
    if kernel is None:
        return Result(model, 0)
    found, skipped = find_attentions(model)
    forms: dict[str, tuple[Form, ...]] = {}
    for match in found:
        possible = _forms(match, kernel)
        if isinstance(possible, str):
            skipped.append(Skip(_name(match), possible))
        else:
            forms[_name(match)] = possible
    if not forms:
        return Result(model, 0, tuple(skipped))
    if "attention" in context.lock:
        locked = context.lock["attention"]
        chosen = {name: locked[name] for name in forms if name in locked}
    else:
        chosen = _proven(model, context, kernel, forms, skipped)
    if chosen:
        model = _rewritten(model, kernel, chosen)
    return Result(model, len(chosen), tuple(skipped), decisions={"attention": chosen})


def _kernel(model: ir.Model, context: Context) -> str | None:
    """The operator to emit, or None where the target has none."""
    if STANDARD in context.target.kernels and model.opset_imports.get("", 0) in _OPSETS:
        return STANDARD
    return CONTRIB if CONTRIB in context.target.kernels else None


def _forms(match: Attention, kernel: str) -> tuple[Form, ...] | str:
    """Forms to try, the fastest first, or why there is none."""
    if kernel == STANDARD:
        return ("merged", "split") if match.merged is not None else ("split",)
    if match.merged is None:
        return match.why_not
    mask = match.mask
    if mask is not None and (mask.dtype == ir.DataType.BOOL or len(mask.shape or ()) != 4):
        return f"its mask '{mask.name}' is not known to be numbers with four axes"
    return ("merged",)


def _name(match: Attention) -> str:
    return str(match.result.name)


def _proven(
    model: ir.Model,
    context: Context,
    kernel: str,
    forms: Mapping[str, tuple[Form, ...]],
    skipped: list[Skip],
) -> dict[str, Form]:
    """The fastest form of each attention that is right; where none is, it joins ``skipped``."""
    feeds = proof_feeds(model, context)
    if feeds is None:
        skipped.extend(Skip(n, "no feeds found to prove it; give calibration data") for n in forms)
        return {}
    samples = padded_variants(model, feeds)
    tried = [(name, form) for name, possible in forms.items() for form in possible]
    try:
        errors = _errors(model, kernel, tried, samples)
    except PassError:  # one of them does not even run
        errors = {}
        for one in tried:
            try:
                errors |= _errors(model, kernel, [one], samples)
            except PassError:
                errors[one] = math.inf
    chosen: dict[str, Form] = {}
    for name, possible in forms.items():
        right = [form for form in possible if errors[name, form] <= TOLERANCE]
        if right:
            chosen[name] = right[0]
        else:
            least = min(errors[name, form] for form in possible)
            skipped.append(Skip(name, f"{kernel} differs by {least:.1e} of its largest number"))
    return chosen


def _errors(
    model: ir.Model, kernel: str, tried: list[tuple[str, Form]], samples: list[Feeds]
) -> dict[tuple[str, Form], float]:
    """How far each rewriting is from what stands there, at its own result.

    Both are computed side by side in one model from the same operands: behind layers that
    round to integers, noise of one attention would otherwise grow on its way to the outputs.
    Raises PassError if ONNX Runtime cannot run the model.
    """
    work = model.clone()
    _import(work, kernel)
    matches = {_name(match): match for match in find_attentions(work)[0]}
    pairs: dict[tuple[str, Form], tuple[str, str]] = {}
    expanded: _Expanded = {}
    for name, form in tried:
        old, new = _emit(matches[name], form, kernel, expanded)
        new.name, new.type = f"{old.name}_{form}_twin", old.type
        pairs[name, form] = str(old.name), new.name
    names = list(dict.fromkeys(name for pair in pairs.values() for name in pair))
    errors, shown = dict.fromkeys(pairs, 0.0), dict.fromkeys(pairs, False)
    for values in run_values(work, names, samples):
        for one, (old_name, new_name) in pairs.items():
            errors[one] = max(errors[one], difference(values[old_name], values[new_name]))
            shown[one] |= bool(np.isfinite(values[old_name]).any())
    # where all is masked there is only NaN, and nothing is proven
    return {one: error if shown[one] else math.inf for one, error in errors.items()}


def _rewritten(model: ir.Model, kernel: str, chosen: Mapping[str, Form]) -> ir.Model:
    """A copy of the model in which the chosen attentions are rewritten."""
    work = model.clone()
    _import(work, kernel)
    expanded: _Expanded = {}
    for match in find_attentions(work)[0]:
        if _name(match) in chosen:
            take_over(*_emit(match, chosen[_name(match)], kernel, expanded))
    return work


def _import(model: ir.Model, kernel: str) -> None:
    if kernel == STANDARD:
        model.opset_imports[""] = 23
    else:
        model.opset_imports["com.microsoft"] = 1


def _emit(
    match: Attention, form: Form, kernel: str, expanded: _Expanded
) -> tuple[ir.Value, ir.Value]:
    """The value that the attention makes now, and the same made by the kernel."""
    if form == "merged" and match.merged is not None:
        return match.merged.end, _emit_merged(match, match.merged, kernel, expanded)
    return match.result, _emit_split(match, expanded)


def _emit_merged(match: Attention, merged: Merged, kernel: str, expanded: _Expanded) -> ir.Value:
    """The kernel on projections [batch, sequence, heads * size]."""
    anchor = merged.end.producer()
    assert anchor is not None
    inputs: list[ir.Value | None] = [merged.query, merged.key, merged.value]
    mask = _whole_mask(anchor, match, (merged.query, 1), (merged.key, 1), expanded)
    if kernel == STANDARD:
        inputs += [mask] if mask is not None else []
        heads = {"q_num_heads": merged.heads, "kv_num_heads": merged.heads}
        node = insert(anchor, STANDARD, inputs, scale=merged.scale, **heads)
    else:
        # no bias of the projections, no padding mask
        inputs += [None, None, mask] if mask is not None else []
        node = insert(
            anchor,
            CONTRIB,
            inputs,
            domain="com.microsoft",
            num_heads=merged.heads,
            scale=merged.scale,
        )
    node.name = f"{merged.end.name}_attention"
    return node.outputs[0]


def _emit_split(match: Attention, expanded: _Expanded) -> ir.Value:
    """Attention on operands [batch, heads, sequence, size], or [heads, sequence, size]."""
    anchor, result = match.result.producer(), match.result
    assert anchor is not None and match.query.shape is not None
    axes = len(match.query.shape)
    mask = _whole_mask(anchor, match, (match.query, axes - 2), (match.key, axes - 1), expanded)
    inputs = [match.query, _untransposed(anchor, match.key, axes), match.value]
    graph = anchor.graph
    assert isinstance(graph, ir.Graph)
    if axes == 3:
        batch = add_initializer(graph, f"{result.name}_batch_axis", np.zeros(1, np.int64))
        inputs = [_moved(anchor, "Unsqueeze", [value, batch]) for value in inputs]
    operands = [*inputs, mask] if mask is not None else [*inputs]
    node = insert(anchor, STANDARD, [*operands], scale=match.scale)
    node.name, output = f"{result.name}_attention", node.outputs[0]
    if axes == 3:
        output.name, output.type = f"{result.name}_batch", result.type
        output = _moved(anchor, "Squeeze", [output, batch])
    return output


def _untransposed(anchor: ir.Node, key: ir.Value, axes: int) -> ir.Value:
    """[.., size, keys] -> [.., keys, size]: what was transposed before, or a new Transpose."""
    value, turned = key, False
    while (node := producer(value, "Reshape", "Transpose")) is not None and node.inputs[0]:
        value, turned = node.inputs[0], turned or node.op_type == "Transpose"
        if turned and value.shape is not None and key.shape is not None:
            same_heads = len(value.shape) == axes and value.shape[:-2] == key.shape[:-2]
            if same_heads and value.shape[-1] == key.shape[-2]:
                return value
    before = producer(key, "Transpose")
    order = [*range(axes - 2), axes - 1, axes - 2]
    if before is not None and before.inputs[0] is not None and "perm" in before.attributes:
        permutation = before.attributes["perm"].as_ints()
        order, key = [permutation[axis] for axis in order], before.inputs[0]
    return _moved(anchor, "Transpose", [key], perm=order)


def _whole_mask(
    anchor: ir.Node,
    match: Attention,
    queries: tuple[ir.Value, int],
    keys: tuple[ir.Value, int],
    expanded: _Expanded,
) -> ir.Value | None:
    """The mask with the last two axes [queries, keys]: the kernels do not broadcast these.

    queries, keys: a value and the axis of it that has the length.
    """
    mask = match.mask
    if mask is None or mask.shape is None:
        return None
    # by position too: a node that stands behind one reader may stand in front of the next
    axes = str(len(queries[0].shape or ()))
    mask = _floored(anchor, mask, axes, expanded)
    dims = [None if v.shape is None else v.shape[axis] for v, axis in (queries, keys)]
    known = all(isinstance(d, int) or (d is not None and d.value) for d in dims)
    if known and mask.shape is not None and list(mask.shape[-2:]) == dims:
        return mask
    key = (str(mask.name), str(dims[0]), str(dims[1]), axes)
    if key not in expanded:
        lengths = []
        for value, axis in (queries, keys):
            length = insert(anchor, "Shape", [value], start=axis, end=axis + 1).outputs[0]
            length.type, length.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
            lengths.append(length)
        size = insert(anchor, "Concat", list(lengths), axis=0).outputs[0]
        size.type, size.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([2])
        names = ("query_length", "key_length", "size")
        for value, name in zip((*lengths, size), names, strict=True):
            value.name = f"{mask.name}_{len(expanded)}_{name}"
        expanded[key] = _moved(anchor, "Expand", [mask, size])
    return expanded[key]


def _floored(anchor: ir.Node, mask: ir.Value, axes: str, expanded: _Expanded) -> ir.Value:
    """The mask with nothing below ``_LEAST_MASK``; a mask of truth values stays as it is."""
    graph = anchor.graph
    if mask.dtype != ir.DataType.FLOAT or not isinstance(graph, ir.Graph):
        return mask
    key = (str(mask.name), "floored", axes)
    if key not in expanded:
        floor = add_initializer(graph, f"{mask.name}_least", np.array(_LEAST_MASK, np.float32))
        value = insert(anchor, "Max", [mask, floor]).outputs[0]
        value.name = f"{mask.name}_{len(expanded)}_floored"
        value.type, value.shape = mask.type, mask.shape
        expanded[key] = value
    return expanded[key]


def _moved(
    anchor: ir.Node, op_type: str, inputs: list[ir.Value], **attributes: list[int]
) -> ir.Value:
    """The result of a node that moves the data of its first input."""
    value = insert(anchor, op_type, [*inputs], **attributes).outputs[0]
    value.name = f"{anchor.outputs[0].name}_{inputs[0].name}_{op_type.lower()}"
    value.type = inputs[0].type
    return value
