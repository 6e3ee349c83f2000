"""The inputs of a decoder with past, told by their names, and feeds for its prompts and steps.

A causal language model is one graph for prompt and steps: token ids [batch, new], an attention
mask [batch, past + new], positions [batch, new], and the cache, a tensor [batch, heads, past,
head size] for keys and one for values of each layer. A prompt comes with a past of length 0; the
outputs named ``present.*`` are the ``past_key_values.*`` of the next step. The names are those
that optimum's exporter gives.

An encoder-decoder is one graph, too, as long as it is worked on: what its encoder reads comes
first (``input_features``, or ``input_ids`` and their ``attention_mask``), then the ids of the
answer, ``decoder_input_ids``, and the cache of the decoder's own attention. ``edgec.cut`` makes
two graphs of it for the device.

Left out on purpose: caches in other layouts, padded answers of encoder-decoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from edgec.data import InputSpec

Array = np.ndarray[Any, Any]

IDS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
DECODER_IDS = "decoder_input_ids"  # of an encoder-decoder, whose encoder may read IDS
PAST, PRESENT = "past_key_values.", "present."
NO_LABEL = -100  # of a position that nothing is asked of, as in torch's cross entropy

_PADDED = 1  # position of a padded token, as transformers' generate() gives it


def is_decoder(inputs: Sequence[str]) -> bool:
    """True if these names of inputs are those of a decoder with past, in keys and values.

    With an encoder or without.
    """
    past = [name for name in inputs if name.startswith(PAST)]
    rest = set(inputs) - set(past)
    layers = all(name.endswith((".key", ".value")) for name in past)
    alone = {IDS} <= rest <= {IDS, MASK, POSITIONS}
    return bool(past) and layers and (alone or bool(encoder_inputs(inputs)))


def encoder_inputs(inputs: Sequence[str]) -> tuple[str, ...]:
    """The names of those inputs that an encoder reads; none of a model that has no encoder."""
    if DECODER_IDS not in inputs:
        return ()
    return tuple(name for name in inputs if name != DECODER_IDS and not name.startswith(PAST))


def is_decoder_graph(model: ir.Model) -> bool:
    """True if the model is a decoder with past that gives logits, with an encoder or without."""
    outputs = [str(value.name) for value in model.graph.outputs]
    return is_decoder(input_names(model)) and LOGITS in outputs


def input_names(model: ir.Model) -> list[str]:
    """The names of the model's inputs, in order."""
    return [str(value.name) for value in model.graph.inputs]


def has_past(feeds: Mapping[str, Array]) -> bool:
    """True if the feeds bring a cache that is not empty."""
    return any(name.startswith(PAST) and array.size > 0 for name, array in feeds.items())


def present_name(past: str) -> str:
    """The output that is the input ``past`` of the next step."""
    return PRESENT + past.removeprefix(PAST)


def first_feeds(
    specs: Sequence[InputSpec],
    ids: Array,
    shown: Array | None = None,
    encoded: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """The feeds of a prompt, with an empty cache.

    ids: integers [batch, tokens]. shown: the attention mask, 0 where a row is padded; by default
    all ones. encoded: what the encoder of an encoder-decoder reads, by input name.
    """
    if encoded is not None:
        feeds = {**encoded, DECODER_IDS: ids}
    else:
        shown = np.ones(ids.shape, np.int64) if shown is None else np.asarray(shown, np.int64)
        feeds = {IDS: ids, MASK: shown, POSITIONS: positions(shown)}
    for spec in specs:
        if spec.name.startswith(PAST):
            sizes = [ids.shape[0], *(0 if size is None else size for size in spec.dims[1:])]
            feeds[spec.name] = np.zeros(sizes)
    return {spec.name: np.asarray(feeds[spec.name], spec.dtype) for spec in specs}


def next_feeds(
    specs: Sequence[InputSpec],
    feeds: Mapping[str, Array],
    shown: Array,
    outputs: Mapping[str, Array],
    tokens: Array,
) -> tuple[dict[str, Array], Array]:
    """The feeds of the step after ``feeds``, and its mask.

    shown: the mask of ``feeds``. outputs: what the graph gave for them. tokens: the ids that
    follow, [batch]. What an encoder reads stays, the same arrays.
    """
    shown = np.concatenate([shown, np.ones((len(tokens), 1), np.int64)], axis=1)
    if DECODER_IDS in feeds:
        given = {**feeds, DECODER_IDS: tokens[:, None]}
    else:
        given = {IDS: tokens[:, None], MASK: shown, POSITIONS: positions(shown)[:, -1:]}
    for name in feeds:
        if name.startswith(PAST):
            given[name] = outputs[present_name(name)]
    return {spec.name: np.asarray(given[spec.name], spec.dtype) for spec in specs}, shown


def positions(shown: Array) -> Array:
    """Position ids [batch, tokens] of an attention mask: the tokens before each in its row."""
    counted: Array = np.where(shown > 0, np.cumsum(shown, axis=1) - 1, _PADDED)
    return counted


def completed(item: Mapping[str, Any], specs: Sequence[InputSpec]) -> dict[str, Any]:
    """A sample of token ids with what follows from them: mask, positions, empty cache, labels.

    What the item has stays; an item with a part of the cache is returned as it is. The labels
    are the ids themselves, [batch, tokens]: each is asked of the logits in front of it. Of an
    encoder-decoder these are the ids of the answer.
    """
    whole = dict(item)
    read = encoder_inputs([spec.name for spec in specs])
    if MASK in read and IDS in item:
        whole.setdefault(MASK, np.ones(np.shape(item[IDS]), np.int64))
    ids = np.asarray(item.get(DECODER_IDS if read else IDS, ()))
    if ids.ndim != 2 or any(name.startswith(PAST) for name in item):
        return whole
    if read:
        if not set(read) <= set(whole):
            return whole  # whoever reads it says what is missing
        shown, encoded = np.ones(ids.shape, np.int64), {name: whole[name] for name in read}
    else:
        shown, encoded = np.asarray(item.get(MASK, np.ones(ids.shape, np.int64))), None
    if shown.shape != ids.shape:
        return whole
    whole = {**first_feeds(specs, ids, shown, encoded), **whole}
    if not set(whole) - {spec.name for spec in specs}:
        whole["label"] = np.where(shown > 0, ids, NO_LABEL).astype(np.int64)
    return whole
