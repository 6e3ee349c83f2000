"""Turns a decoder's attention over its cache into one kernel a layer.

    keys = concat(past keys, rotated new keys);  values likewise
    Softmax(rotated q keys' * scale + mask) values
        -> RotaryEmbedding(q), RotaryEmbedding(k), GroupQueryAttention     (com.microsoft)

``match_decoder`` finds them, ``emit_decoder`` writes them. The kernel concatenates the caches,
shares key heads among query heads, attends to no later position and adds a bias that hides
what the model's mask hides; repetitions of heads, transposes and the mask's copies in every
layer go. Angles are those that the model computes: one row of a table for each new position, so
that any scaling of them and any length is kept. Where the context length is known and angles
grow evenly, the kernel rotates queries and keys itself, by a table of all positions
(``rotary_tables``); it numbers a prompt's positions by their place in the cache, and conversations
of the whole graph prove that padding makes no difference.

Signature and caches stay as they are: present = past + new along axis 2. As lengths are taken from
mask and ids, past and present may also be one buffer (``can_share_cache``). The search is
generous, the proof strict: every rewriting stands beside what it replaces and must give the
same results and caches in whole conversations (``decode_trials``); what differs stays.

Left out: local windows as an attribute (the mask hides what lies outside), sinks, caches of
integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from edgec.passes.contract import Context, PassError, Result, Skip
from edgec.passes.decode_trials import (
    MASK,
    POSITIONS,
    Decoder,
    Trial,
    Twin,
    decoder_of,
    largest_errors,
    run_trial,
    trials_for,
)
from edgec.passes.emit_decoder import KERNEL, ROTARY, Emission
from edgec.passes.equivalence import difference
from edgec.passes.lower_weights import with_float_products
from edgec.passes.match_decoder import CachedAttention, find_cached_attentions
from edgec.passes.matching import (
    add_initializer,
    insert,
    is_op,
    remove_unused,
    take_over,
)
from edgec.passes.plain_masks import hides_padding_alone
from edgec.passes.rotary_tables import LARGEST_BYTES, evaluated, grow_evenly, nodes_between

TOLERANCE = 1e-4  # of the largest number: float noise of another summation order


def lower_decoder(model: ir.Model, context: Context) -> Result:
    """Rewrite every attention over a cache that is proven; ``changed`` counts them.

    Decisions: ``decoder`` lists the results of the rewritten attentions, ``rotates`` says whether
    the kernel rotates queries and keys, ``plain_masks`` names the masks that hide padding and later
    positions alone. A lock that has them is followed without a proof.
    """
    if KERNEL not in context.target.kernels:
        return Result(model, 0)
    rotary = ROTARY in context.target.kernels
    found, refused = find_cached_attentions(model, rotary=rotary)
    skipped, names = list(refused), [_name(match) for match in found]
    if "decoder" in context.lock:
        locked = set(context.lock["decoder"])
        chosen = [name for name in names if name in locked]
    else:
        chosen = _proven(model, rotary, context, names, skipped) if names else []
    findings = _findings(len(chosen), len(names) + len(refused))
    decisions: dict[str, object] = {"decoder": chosen} if names else {}
    if chosen:
        plain = _plain_masks(model, rotary, chosen, context)
        model, rotates, told = _lowered(model, rotary, chosen, plain, context)
        decisions |= {"rotates": rotates, "plain_masks": sorted(plain)}
        findings += told
    return Result(model, len(chosen), tuple(skipped), decisions=decisions, findings=findings)


def can_share_cache(model: ir.Model) -> bool:
    """True if past and present of every cache may be one buffer, longer than what it holds.

    So it is where the kernel alone reads a cache: it finds the new tokens' place from the
    lengths of mask and ids.
    """
    caches = [value for value in model.graph.inputs if len(value.shape or ()) == 4]
    readers = [{use.node.op_type for use in value.uses()} for value in caches]
    return bool(caches) and all(found == {KERNEL} for found in readers)


def _name(match: CachedAttention) -> str:
    return str(match.end.name)


def _findings(done: int, total: int) -> tuple[str, ...]:
    """What the user should know."""
    found = []
    if done:
        found.append(
            f"{done} of {total} attentions over a cache run as {KERNEL}, proven on padded batches; "
            "it takes several new tokens behind a past in batches of one row only"
        )
    if done < total:
        found.append(
            f"{total - done} of {total} attentions over a cache stay as they were exported; "
            "the skipped nodes say why"
        )
    return tuple(found)


def _proven(
    model: ir.Model, rotary: bool, context: Context, names: Sequence[str], skipped: list[Skip]
) -> list[str]:
    """The attentions whose rewriting is right; the others join ``skipped``."""
    decoder = decoder_of(model)
    if isinstance(decoder, str):
        skipped.extend(Skip(name, f"{KERNEL} not proven: {decoder}") for name in names)
        return []
    trials = trials_for(decoder, context)
    reasons: dict[str, str] = {}
    try:
        errors = _errors(model, rotary, decoder, trials, names)
    except PassError:  # one of them does not even run
        errors = {}
        for name in names:
            try:
                errors |= _errors(model, rotary, decoder, trials, [name])
            except PassError as problem:
                errors[name], reasons[name] = math.inf, f"{KERNEL}: {problem}"
    for name in names:
        if not errors[name] <= TOLERANCE:
            text = f"{KERNEL} differs by {errors[name]:.1e} of its largest number"
            skipped.append(Skip(name, reasons.get(name, text)))
    return [name for name in names if errors[name] <= TOLERANCE]


def _errors(
    model: ir.Model,
    rotary: bool,
    decoder: Decoder,
    trials: Sequence[Trial],
    names: Sequence[str],
) -> dict[str, float]:
    """How far each rewriting is from what stands there, in its result and its caches.

    Raises PassError if ONNX Runtime cannot run the model.
    """
    work = model.clone()
    emission = Emission(work)
    shapes = _past_shapes(work, emission)
    matches = {_name(m): m for m in find_cached_attentions(work, rotary=rotary)[0]}
    pairs: list[tuple[ir.Value, ir.Value]] = []
    for name in names:
        match = matches[name]
        result, key, value = emission.emit(match)
        pairs += [(match.end, result), (match.keys.present, key), (match.values.present, value)]
    for old, new in (*pairs, *shapes):
        new.name, new.type = f"{old.name}_twin", old.type
    ends = {match.end for match in matches.values()}
    twins = [
        Twin(str(old.name), str(new.name), at_queries=old in ends) for old, new in (*pairs, *shapes)
    ]
    found = largest_errors(work, decoder, trials, twins)
    lengths = max(found[len(pairs) :], default=0.0)
    return {name: max(lengths, *found[3 * i : 3 * i + 3]) for i, name in enumerate(names)}


def _plain_masks(
    model: ir.Model, rotary: bool, names: Sequence[str], context: Context
) -> frozenset[str]:
    """The masks of these attentions that are ``plain`` to an ``Emission``."""
    if "plain_masks" in context.lock:
        return frozenset(context.lock["plain_masks"])
    work = model.clone()
    for old, new in _past_shapes(work, Emission(work)):
        take_over(old, new)
    matches = find_cached_attentions(work, rotary=rotary)[0]
    masks = {str(m.mask.root.name): m.mask for m in matches if m.mask and _name(m) in names}
    return frozenset(n for n, mask in masks.items() if hides_padding_alone(work, mask, context))


def _lowered(
    model: ir.Model, rotary: bool, names: Sequence[str], plain: frozenset[str], context: Context
) -> tuple[ir.Model, bool, tuple[str, ...]]:
    """The model with these attentions rewritten, whether the kernel rotates, and findings.

    It rotates where the lock says so; without a lock where that is possible and proven.
    """
    rows = _table_rows(model, rotary, names, context)
    if not rows or not context.lock.get("rotates", True):
        return _rewritten(model, rotary, names, plain), False, ()
    inside = _rewritten(model, rotary, names, plain, rows)
    if "rotates" in context.lock:
        return inside, True, ()
    outside = _rewritten(model, rotary, names, plain)
    error = _conversation_error(outside, inside, context)
    if error <= TOLERANCE:
        return inside, True, ()
    text = f"rotating inside {KERNEL} changes the logits by {error:.1e} of the largest"
    return outside, False, (f"{text}: queries and keys are rotated in front of it",)


def _table_rows(model: ir.Model, rotary: bool, names: Sequence[str], context: Context) -> int:
    """Rows of the tables for rotating inside the kernel; 0 if it cannot."""
    matches = [m for m in find_cached_attentions(model, rotary=rotary)[0] if _name(m) in names]
    inputs = {str(value.name): value for value in model.graph.inputs}
    angles = {pair: m.size for m in matches if (pair := m.rotary) is not None}
    rows = context.context_length or 0
    if POSITIONS not in inputs or MASK not in inputs:
        return 0
    source = inputs[POSITIONS]
    if not rows or not angles or sum(4 * rows * size for size in angles.values()) > LARGEST_BYTES:
        return 0
    for pair in angles:
        tables = []
        for angle in pair:
            nodes = nodes_between(source, angle)
            if nodes is None:
                return 0
            tables.append(evaluated(nodes, source, angle, rows))
        if not grow_evenly(*tables):
            return 0
    return rows


def _conversation_error(old: ir.Model, new: ir.Model, context: Context) -> float:
    """Largest difference of the logits in whole conversations, each model with its own caches.

    Relative to the largest logit of a run, at the positions that the mask shows. Products are
    computed in float32: rounded activations would tell nothing.
    """
    old, new = (with_float_products(one) or one for one in (old, new))
    decoder = decoder_of(old)
    assert isinstance(decoder, Decoder)  # the attentions were proven on it
    logits, worst = str(old.graph.outputs[0].name), 0.0
    for trial in trials_for(decoder, context):
        runs = (run_trial(model, decoder, trial, [logits]) for model in (old, new))
        for (shown, first), (_, second) in zip(*runs, strict=True):
            worst = max(worst, difference(first[logits][shown], second[logits][shown]))
    return worst


def _past_shapes(model: ir.Model, emission: Emission) -> list[tuple[ir.Value, ir.Value]]:
    """The shapes of caches that the graph reads, and the same from ids and mask."""
    found = []
    for value in model.graph.inputs:
        shape = value.shape
        if shape is None or len(shape) != 4:
            continue
        heads, size = shape[1], shape[3]
        for node in [use.node for use in value.uses()]:
            whole = is_op(node, "Shape") and not node.attributes
            if whole and isinstance(heads, int) and isinstance(size, int):
                found.append((node.outputs[0], emission.past_shape(node, heads, size)))
    return found


def _rewritten(
    model: ir.Model, rotary: bool, names: Sequence[str], plain: frozenset[str], rows: int = 0
) -> ir.Model:
    """A copy of the model in which these attentions are rewritten. plain, rows: of ``Emission``."""
    work = model.clone()
    emission = Emission(work, rows, plain)
    matches = find_cached_attentions(work, rotary=rotary)[0]
    for old, new in _past_shapes(work, emission):
        take_over(old, new)
    for match in matches:
        if _name(match) in names:
            result, key, value = emission.emit(match)
            _replace_result(match, result)
            _replace_output(work.graph, match.keys.present, key)
            _replace_output(work.graph, match.values.present, value)
    common.RemoveUnusedNodesPass()(work)
    return work


def _replace_result(match: CachedAttention, result: ir.Value) -> None:
    """Let the kernel's merged heads stand for the result."""
    end, anchor = match.end, match.end.producer()
    assert anchor is not None and isinstance(anchor.graph, ir.Graph) and end.shape is not None
    if len(end.shape) == 4:
        split = np.array([0, 0, match.heads, match.size], np.int64)
        target = add_initializer(anchor.graph, f"{end.name}_split", split)
        result.name = f"{end.name}_merged"
        result = insert(anchor, "Reshape", [result, target]).outputs[0]
    take_over(end, result)


def _replace_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let an output of the graph be another value; what else reads the old one still does."""
    name, new.type, new.shape = old.name, old.type, old.shape
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
    old.name, new.name = f"{name}_apart", name
    remove_unused(old.producer())
