"""An encoder-decoder of transformers (T5, Whisper) -> one graph of encoder and decoder.

The transformers model is called once with what the encoder reads, the ids of the answer and the
cache of the decoder's own attention, and traced by torch.export; keys and values of the
cross-attention are values inside of the graph, that depend on the encoder's inputs alone
(``edgec.cut`` makes outputs of them). The causal mask is given from outside, since that of
transformers asks for lengths while it is traced.

The judge is transformers as its own ``generate()`` calls it: no mask given, the encoder run on its
own. Its examples are a step with a past, a prompt, and a step of a batch of two, in which a text
is padded.

Left out on purpose: models whose encoder reads something else than token ids or Whisper's
features, those that optimum takes for fillers of masks (BART), and decoders that are models of
their own (VisionEncoderDecoder).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgec.data import InputSpec
from edgec.decoder import (
    DECODER_IDS,
    IDS,
    LOGITS,
    MASK,
    PAST,
    encoder_inputs,
    first_feeds,
    next_feeds,
    present_name,
)
from edgec.errors import ExportError

Array = np.ndarray[Any, Any]
Eager = Callable[[Mapping[str, Array]], dict[str, Array]]

FEATURES = "input_features"  # of Whisper: float32 [batch, mel bins, frames]

_BATCH, _NEW, _PASTS, _TEXT = 2, 3, 5, 7  # sizes while it is traced: all different, none is 1
_TOKENS = 12  # of an example's text
_STARTED = 4  # of an example's past


def trace(module: Any, opset: int) -> ir.Model:
    """The graph of a transformers model in evaluation mode, with eager attention.

    Raises ExportError if torch cannot trace it.
    """
    import torch

    given = encoder_feeds(module, _BATCH, _TEXT)
    cache = eager_encoder_decoder(module)({**given, DECODER_IDS: np.full((_BATCH, _PASTS), 1)})
    presents = {name: array for name, array in cache.items() if name != LOGITS}
    pasts = [PAST + name.removeprefix("present.") for name in presents]
    tensors = [torch.from_numpy(array) for array in presents.values()]
    arguments = (
        [torch.from_numpy(array) for array in given.values()],
        torch.ones((_BATCH, _NEW), dtype=torch.int64),
        tensors,
    )
    open_ = {0: "batch", 1: "source"}
    dynamic = (
        [open_ if name != FEATURES else {0: "batch"} for name in given],
        {0: "batch", 1: "new"},
        [{0: "batch", 2: "past"} for _ in tensors],
    )
    with torch.no_grad():
        program = torch.onnx.export(
            _one_call(module, list(given)),
            arguments,
            dynamic_shapes=dynamic,
            input_names=[*given, DECODER_IDS, *pasts],
            output_names=[LOGITS, *presents],
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned nothing")
    return program.model


def encoder_feeds(module: Any, batch: int, tokens: int) -> dict[str, Array]:
    """Made-up feeds of the encoder, of a fixed seed; in the last row of several texts a third of
    the tokens is padding.

    Raises ExportError for a model whose encoder reads something else than ids or Whisper's
    features.
    """
    random, config = np.random.default_rng(0), module.config
    bins, positions = (
        getattr(config, name, None) for name in ("num_mel_bins", "max_source_positions")
    )
    if module.main_input_name == IDS:
        shown = np.ones((batch, tokens), np.int64)
        if batch > 1:
            shown[-1, tokens - tokens // 3 :] = 0
        return {IDS: random.integers(0, config.vocab_size, shown.shape), MASK: shown}
    if module.main_input_name == FEATURES and bins and positions and config.model_type == "whisper":
        features = random.standard_normal((batch, bins, 2 * positions)) / 2
        return {FEATURES: features.astype(np.float32)}
    raise ExportError(
        f"a {type(module).__name__} reads '{module.main_input_name}'; of encoder-decoders those "
        "that read token ids, and Whisper, can be built: export its parts to .onnx yourself"
    )


def eager_encoder_decoder(module: Any) -> Eager:
    """Feeds of the graph -> its outputs by name, computed by the transformers model itself.

    The encoder runs once for the same arrays.
    """
    last: tuple[list[Array], Any] | None = None

    def eager(feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        nonlocal last
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
        read = encoder_inputs(list(feeds))
        given = [feeds[name] for name in read]
        with torch.no_grad():
            if last is None or any(a is not b for a, b in zip(last[0], given, strict=True)):
                encoder = module.get_encoder()
                last = given, encoder(**{name: tensors[name] for name in read}, return_dict=True)
            mask = {MASK: tensors[MASK]} if MASK in tensors else {}
            result = module(
                encoder_outputs=last[1],
                **mask,
                decoder_input_ids=tensors[DECODER_IDS],
                past_key_values=_cache([t for n, t in tensors.items() if n.startswith(PAST)]),
                use_cache=True,
            )
        outputs = {LOGITS: result.logits.numpy()}
        for layer, (keys, values) in enumerate(_held(result.past_key_values)):
            outputs[_name(layer, "key")] = keys.numpy()
            outputs[_name(layer, "value")] = values.numpy()
        return outputs

    return eager


def encoder_decoder_examples(
    module: Any, eager: Eager, specs: Sequence[InputSpec], *, vocabulary: int
) -> tuple[dict[str, Array], ...]:
    """A step with a past, a prompt with none, and a step of a batch of two, one of them padded."""
    random, found = np.random.default_rng(0), []
    for batch in (1, 2):
        ids = random.integers(0, vocabulary, (batch, _STARTED))
        encoded = encoder_feeds(module, batch, _TOKENS)
        prompt = first_feeds(specs, ids, encoded=encoded)
        outputs = eager(prompt)
        chosen = outputs[LOGITS][:, -1].argmax(-1)
        shown = np.ones(ids.shape, np.int64)
        found += [next_feeds(specs, prompt, shown, outputs, chosen)[0], prompt]
    return tuple(found[:3])


def _one_call(module: Any, names: Sequence[str]) -> Any:
    """A torch module: (what the encoder reads, ids, pasts) -> (logits, presents...)."""
    import torch

    class OneCall(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, given: list[Any], ids: Any, pasts: list[Any]) -> tuple[Any, ...]:
            past, new = pasts[0].shape[2], ids.shape[1]
            keys, queries = torch.arange(past + new), torch.arange(new) + past
            lowest = torch.finfo(pasts[0].dtype).min
            later = keys[None, :] > queries[:, None]
            mask = torch.zeros(later.shape, dtype=pasts[0].dtype).masked_fill(later, lowest)
            result = self.model(
                **dict(zip(names, given, strict=True)),
                decoder_input_ids=ids,
                decoder_attention_mask=mask[None, None],  # [1, 1, new, past + new]
                past_key_values=_cache(pasts),
                use_cache=True,
            )
            held = _held(result.past_key_values)
            return (result.logits, *(tensor for pair in held for tensor in pair))

    return OneCall().eval()


def _cache(pasts: Sequence[Any]) -> Any:
    """Keys and values by turns -> the cache of transformers, that of the encoder still empty."""
    import transformers

    own = transformers.DynamicCache()
    for layer in range(len(pasts) // 2):
        keys, values = pasts[2 * layer : 2 * layer + 2]
        if not isinstance(keys.shape[2], int) or keys.shape[2]:  # an empty one has no layers
            own.update(keys, values, layer)
    return transformers.EncoderDecoderCache(own, transformers.DynamicCache())


def _held(cache: Any) -> list[tuple[Any, Any]]:
    return [(layer.keys, layer.values) for layer in cache.self_attention_cache.layers]


def _name(layer: int, kind: str) -> str:
    return present_name(f"{PAST}{layer}.{kind}")
