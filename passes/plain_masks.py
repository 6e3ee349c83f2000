"""Finds the masks of a decoder that hide padding and later positions, and nothing else.

What an exporter writes for such a mask is some fifty nodes on a few numbers, and a step of one
token waits for each of them. The attention kernel hides later positions itself, so that the
padding is left, which the attention mask says in five nodes. The proof is by running: the mask
alone, cut out of the graph, on short batches that are padded left and right, on a longer prompt,
and at the end of the context, where a local window or a chunk would show.

Left out: models whose context length is not known, masks that read anything but sizes and the
attention mask (they fail the proof or cannot be cut out).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from edgec.passes.contract import Context, PassError
from edgec.passes.decode_trials import IDS, MASK, Decoder, decoder_of
from edgec.passes.execution import open_session, run_feeds
from edgec.passes.match_decoder import Mask
from edgec.passes.weights import Array

_HIDES = -1e4  # and numbers below: nothing is left of a score behind Softmax
_SHORT, _LONG = 9, 512  # tokens of a prompt


def hides_padding_alone(model: ir.Model, mask: Mask, context: Context) -> bool:
    """True if a mask shows every position that is no padding, up to the query's own.

    model: in which the mask is computed from ids, attention mask and constants.
    """
    decoder, length = decoder_of(model), context.context_length or 0
    alone = _cut_out(model, mask.root)
    if length < _SHORT + 1 or alone is None or not isinstance(decoder, Decoder):
        return False
    random = np.random.default_rng(context.seed)
    try:
        session = open_session(alone, optimized=False)
        for shown, new in _cases(length):
            ids = random.integers(0, decoder.vocabulary, (len(shown), new))
            [found] = run_feeds(session, {IDS: ids, MASK: shown})
            if not _is_plain(np.asarray(found), mask, shown, new):
                return False
    except PassError:  # it reads what is not there without the model around it
        return False
    return True


def _cases(length: int) -> list[tuple[Array, int]]:
    """Attention masks int64 [batch, past + new], and how many positions are new."""
    prompt = np.ones((4, _SHORT), np.int64)
    prompt[0, :1] = prompt[2, :3] = prompt[3, -3:] = 0
    step = np.concatenate([prompt, np.ones((4, 1), np.int64)], axis=1)
    whole = np.ones((2, length), np.int64)
    whole[1, :3] = 0
    long = np.ones((1, min(_LONG, length)), np.int64)
    return [(prompt, _SHORT), (step, 1), (prompt[1:2], 4), (long, long.shape[1]), (whole, 2)]


def _is_plain(found: Array, mask: Mask, shown: Array, new: int) -> bool:
    """Whether a mask [batch or 1, 1, new, all] does what ``shown`` asks; rows of padding aside."""
    batch, length = shown.shape
    try:
        found = np.broadcast_to(found, (batch, 1, new, length))[:, 0]
    except ValueError:
        return False
    if mask.shown is not None and mask.hidden is not None:
        found = np.where(found, mask.shown, mask.hidden)
    keys, queries = np.arange(length), np.arange(length - new, length)
    expected = (shown[:, None] == 1) & (keys <= queries[:, None])
    right = np.where(expected, found == 0, found <= _HIDES)
    return bool(right[shown[:, -new:] == 1].all())


def _cut_out(model: ir.Model, root: ir.Value) -> ir.Model | None:
    """What computes a value, as a model of ids and attention mask; None if it reads more."""
    clone = model.clone()
    graph = clone.graph
    value = next((v for n in graph for v in n.outputs if v.name == root.name), None)
    if value is None:
        return None
    graph.outputs.clear()
    graph.outputs.append(value)
    common.RemoveUnusedNodesPass()(clone)
    for one in [v for v in graph.inputs if not v.uses()]:
        graph.inputs.remove(one)
    read = {str(v.name) for v in graph.inputs}
    return clone if {MASK} <= read <= {IDS, MASK} else None
