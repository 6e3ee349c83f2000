"""Recognises rotary position embedding written in standard operators.

    x * cos + concat(-x[size / 2:], x[:size / 2]) * sin

The halves may come from Slice or Split. cos and sin are whatever values stand there, mostly
computed once for all layers from the positions; who rewrites a match proves by running it
that both halves of their last axis are equal.
Source: Su et al. 2021 (arXiv:2104.09864), in the layout of Hugging Face's Llama.

Left out: pairs of neighbours (GPT-J), embeddings of a part of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgec.passes.matching import other_input, producer


@dataclass(frozen=True)
class Rotary:
    """One match. source: what is rotated, [batch, heads, sequence, size].

    cos, sin: broadcast to it, [batch or 1, 1, sequence, size].
    """

    source: ir.Value
    cos: ir.Value
    sin: ir.Value


def match_rotary(value: ir.Value | None) -> Rotary | None:
    """The rotation that makes a value, if one does."""
    add = producer(value, "Add")
    if add is None:
        return None
    for straight, turned in (add.inputs, reversed(add.inputs)):
        first, second = producer(straight, "Mul"), producer(turned, "Mul")
        if first is None or second is None:
            continue
        for half in second.inputs:
            source = _turned(half)
            if half is None or source is None or source not in first.inputs:
                continue
            cos, sin = other_input(first, source), other_input(second, half)
            if cos is not None and sin is not None and _four_axes(cos, sin):
                return Rotary(source, cos, sin)
    return None


def _turned(value: ir.Value | None) -> ir.Value | None:
    """x of concat(-x[size / 2:], x[:size / 2]) along the last axis."""
    concat = producer(value, "Concat")
    if (
        concat is None
        or len(concat.inputs) != 2
        or concat.attributes.get_int("axis", 0)
        not in (
            -1,
            3,
        )
    ):
        return None
    negative = producer(concat.inputs[0], "Neg")
    if negative is None:
        return None
    parts = [producer(v, "Slice", "Split") for v in (negative.inputs[0], concat.inputs[1])]
    sources = [None if part is None else part.inputs[0] for part in parts]
    return sources[0] if sources[0] is sources[1] else None


def _four_axes(*values: ir.Value) -> bool:
    return all(value.shape is not None and len(value.shape) == 4 for value in values)
