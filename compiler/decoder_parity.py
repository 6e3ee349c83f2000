"""An exported decoder against its source, token by token.

Both sides decode greedily, each with its own cache, a single prompt and a left-padded batch; with
an encoder a batch whose texts are padded. At
every step the scores must agree within float noise and the chosen tokens must be the same, but for
a tie; both then go on with the source's token. So an error of the mask, the positions or the cache
that builds up over steps is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgec.data import InputSpec
from edgec.decoder import LOGITS, encoder_inputs, first_feeds, next_feeds
from edgec.errors import ExportError
from edgec.passes.execution import sqnr_db
from edgec.report import Parity

STEPS = 20

_TIE = 1e-4  # of the largest score: a distance between two that float noise may turn over

Array = np.ndarray[Any, Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


def check_decoding(
    graph: Run,
    source: Run,
    specs: Sequence[InputSpec],
    *,
    vocabulary: int,
    context_length: int,
    min_db: float,
    examples: Sequence[Mapping[str, Array]] = (),
) -> Parity:
    """The worst difference of the scores over all steps; ``samples`` counts the steps.

    examples: of an encoder-decoder, feeds from which those of the encoder are taken: one for each
    number of rows. Raises ExportError below ``min_db``, and where the two sides choose different
    tokens.
    """
    random = np.random.default_rng(1)
    tokens = max(min(10, context_length // 2), 2)
    worst_db, worst_error, count = 200.0, 0.0, 0
    for what, shown, encoded in _prompts(tokens, examples):
        ids = np.asarray(random.integers(0, vocabulary, shown.shape))
        mine = theirs = first_feeds(specs, ids, shown, encoded)
        judged = shown > 0
        for step in range(min(STEPS, context_length - tokens) + 1):
            expected, actual = source(theirs), graph(mine)
            right, scores = expected[LOGITS], actual[LOGITS]
            where = f"{what}, step {step}"
            if right.shape != scores.shape:
                raise ExportError(
                    f"{where}: '{LOGITS}' has the shape {list(scores.shape)} in ONNX, "
                    f"{list(right.shape)} in transformers"
                )
            error = float(np.abs(right[judged].astype(float) - scores[judged]).max())
            lost = sqnr_db(right[judged], scores[judged])
            worst_db, worst_error = min(worst_db, lost), max(worst_error, error)
            if lost < min_db:
                raise ExportError(
                    f"the exported decoder does not compute what transformers does: {where}, "
                    f"scores differ by up to {error:.3g} (SQNR {lost:.1f} dB, at least "
                    f"{min_db:.0f} expected)"
                )
            chosen = right[:, -1].argmax(-1)
            _require_same(right[:, -1], scores[:, -1].argmax(-1), where)
            theirs, after = next_feeds(specs, theirs, shown, expected, chosen)
            mine, shown = next_feeds(specs, mine, shown, actual, chosen)[0], after
            judged, count = np.ones((len(chosen), 1), bool), count + 1
    return Parity(max_abs_error=worst_error, sqnr_db=round(worst_db, 1), samples=count)


def _prompts(
    tokens: int, examples: Sequence[Mapping[str, Array]]
) -> list[tuple[str, Array, Mapping[str, Array] | None]]:
    """Of each prompt its name, its mask, and what the encoder reads, if there is one."""
    padded = np.ones((2, tokens), np.int64)
    if not examples:
        padded[1, : tokens // 2] = 0
        return [("a single prompt", padded[:1], None), ("a left-padded batch", padded, None)]
    encoded = [{name: feeds[name] for name in encoder_inputs(list(feeds))} for feeds in examples]
    rows = {len(next(iter(given.values()))): given for given in encoded}
    return [
        ("a single prompt", padded[:1], rows[1]),
        ("a batch of padded texts", padded, rows[2]),
    ]


def _require_same(right: Array, chosen: Array, where: str) -> None:
    """Raise ExportError if a row chose another token than its scores [batch, vocabulary] do.

    But for a tie: two scores that float noise decides between.
    """
    behind = right.max(-1) - right[np.arange(len(chosen)), chosen]
    if (behind > _TIE * np.abs(right).max()).any():
        row = int(behind.argmax())
        raise ExportError(
            f"the exported decoder chooses another token than transformers: {where}, row {row}, "
            f"{chosen[row]} for {right[row].argmax()}"
        )
