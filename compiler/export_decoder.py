"""A causal language model of transformers as the judge of its own graph.

The cache goes in as transformers' DynamicCache and comes out as the tensors that the graph names
``present.*``. Examples are a step with a past, a prompt, and a step of a left-padded batch.

A head that shares the embedding table comes from the exporter as a transposed copy of it: the
copy is replaced by a Transpose of the table, so that the weights are stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.data import InputSpec
from edgec.decoder import IDS, LOGITS, MASK, PAST, POSITIONS, first_feeds, next_feeds, present_name

Array = np.ndarray[Any, Any]
Eager = Callable[[Mapping[str, Array]], dict[str, Array]]

_TOKENS = 16  # of an example's past


def eager_decoder(module: Any) -> Eager:
    """Feeds of the graph -> its outputs by name, computed by the transformers model itself."""

    def eager(feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch
        import transformers

        tensors = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
        cache = transformers.DynamicCache()
        for layer, (keys, values) in enumerate(_layers(tensors)):
            if keys.shape[2]:  # an empty cache is one without layers
                cache.update(keys, values, layer)
        plain = {n: tensors[n] for n in (IDS, MASK, POSITIONS) if n in tensors}
        with torch.no_grad():
            result = module(**plain, past_key_values=cache, use_cache=True)
        outputs = {LOGITS: result.logits.numpy()}
        for layer, held in enumerate(result.past_key_values.layers):
            outputs[_name(layer, "key")] = held.keys.numpy()
            outputs[_name(layer, "value")] = held.values.numpy()
        return outputs

    return eager


def decoder_examples(
    eager: Eager, specs: Sequence[InputSpec], *, vocabulary: int, context_length: int
) -> tuple[dict[str, Array], ...]:
    """A step with a past, a prompt with none, and a step of a left-padded batch of two.

    Token ids are random, of a fixed seed; the pasts are what the model gives for them.
    """
    random = np.random.default_rng(0)
    tokens = max(min(_TOKENS, context_length // 2), 2)
    alone = random.integers(0, vocabulary, (1, tokens))
    batch = random.integers(0, vocabulary, (2, tokens))
    shown = np.ones(batch.shape, np.int64)
    shown[1, : tokens // 3] = 0
    prompt = first_feeds(specs, alone)
    padded = first_feeds(specs, batch, shown)
    steps = []
    for feeds, mask in ((prompt, np.ones_like(alone)), (padded, shown)):
        outputs = eager(feeds)
        following = outputs[LOGITS][:, -1].argmax(-1)
        steps.append(next_feeds(specs, feeds, mask, outputs, following)[0])
    return steps[0], prompt, steps[1]


def share_tables(model: ir.Model) -> int:
    """Let products read the embedding table itself where their weight is a transposed copy.

    Returns the number of copies that went.
    """
    graph, gone = model.graph, 0
    weights = [v for v in graph.initializers.values() if v.shape is not None and len(v.shape) == 2]
    for table in weights:
        if not any(user.op_type == "Gather" and index == 0 for user, index in table.uses()):
            continue
        for copy in weights:
            users = [user for user, _ in copy.uses()]
            if copy is table or not users or not _is_transposed(copy, table):
                continue
            turned = ir.node("Transpose", [table], {"perm": [1, 0]}, name=f"{table.name}.turned")
            turned.outputs[0].name = f"{table.name}.turned"
            turned.outputs[0].type, turned.outputs[0].shape = copy.type, copy.shape
            next(node for node in graph if node in users).prepend(turned)
            copy.replace_all_uses_with(turned.outputs[0])
            graph.initializers.pop(str(copy.name))
            gone += 1
    return gone


def _is_transposed(copy: ir.Value, table: ir.Value) -> bool:
    a, b = copy.const_value, table.const_value
    if a is None or b is None or a.dtype != b.dtype:
        return False
    if tuple(a.shape.numpy()) != tuple(b.shape.numpy())[::-1]:
        return False
    return bool(np.array_equal(a.numpy(), b.numpy().T))


def _layers(tensors: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """The keys and values of each layer, in order."""
    count = sum(name.startswith(PAST) and name.endswith(".key") for name in tensors)
    return [
        (tensors[f"{PAST}{layer}.key"], tensors[f"{PAST}{layer}.value"]) for layer in range(count)
    ]


def _name(layer: int, kind: str) -> str:
    return present_name(f"{PAST}{layer}.{kind}")
