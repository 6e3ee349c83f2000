"""What an encoder-decoder says about its answers: how they begin, and which tokens are no choice.

Read from generation_config, the beginning also from config, as ``generate()`` of
transformers reads them. Whisper's answers begin with several tokens: the start, language and task
of a multilingual model, and that there are no timestamps.

Left out on purpose: the detection of a language (whoever knows it gives ``start=``), timestamps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgec.decoder import IDS, MASK
from edgec.errors import ExportError
from edgec_runtime.generation import Encoder

# settings of a search that the runtime does not have -> their value where they do nothing
_UNHEEDED = {"num_beams": 1, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0}


def encoder_section(
    module: Any, inputs: Sequence[str], vocabulary: int
) -> tuple[Encoder, tuple[str, ...]]:
    """How the encoder of a transformers model is fed and its answers begin; findings.

    inputs: of the encoder. vocabulary: number of tokens that the logits score.
    Raises ExportError if nothing says how an answer begins.
    """
    stated = (module.generation_config, module.config)
    findings = []
    start = _start(stated)
    if getattr(module.generation_config, "lang_to_id", None) and len(start) < 3:
        findings.append(
            "the model knows several languages and generation_config names none: answers begin "
            "without one; save it with language and task, or give generate() the tokens with start"
        )
    for name, idle in _UNHEEDED.items():
        value = getattr(module.generation_config, name, None)
        if value is not None and value > idle:
            findings.append(
                f"generation_config asks for {name} = {value}, which bundles do not have: the "
                "answers are those of transformers without it"
            )
    read = next(name for name in inputs if name != MASK)
    section = Encoder(
        input=read,
        mask=MASK if read == IDS else None,
        start=tuple(start),
        suppress=_known(module.generation_config, "suppress_tokens", vocabulary),
        begin_suppress=_known(module.generation_config, "begin_suppress_tokens", vocabulary),
    )
    return section, tuple(findings)


def context_length(config: Any) -> int | None:
    """Tokens that the decoder has positions for; None where they are not counted."""
    names = ("max_position_embeddings", "max_target_positions", "n_positions")
    found = (getattr(config, name, None) for name in names)
    return next((int(value) for value in found if value), None)


def _start(stated: Sequence[Any]) -> list[int]:
    """The tokens that stand in front of every answer."""
    first = _first(stated, "decoder_start_token_id")
    first = _first(stated, "bos_token_id") if first is None else first
    if not isinstance(first, int):
        raise ExportError(
            "nothing says which token an answer begins with: set decoder_start_token_id in "
            "generation_config.json"
        )
    generation, start = stated[0], [first]
    language, task = (getattr(generation, name, None) for name in ("language", "task"))
    if language is not None or task is not None:
        start += _language_and_task(generation, language, task)
    else:
        forced = _first(stated, "forced_decoder_ids") or ()
        for place, token in forced:
            if token is not None and place == len(start):
                start.append(int(token))
    silent = getattr(generation, "no_timestamps_token_id", None)
    wants_times = getattr(generation, "return_timestamps", False)
    if silent is not None and not wants_times and start[-1] != silent:
        start.append(int(silent))
    begin = getattr(generation, "forced_bos_token_id", None)
    return start if begin is None else [*start, int(begin)]


def _language_and_task(generation: Any, language: str | None, task: str | None) -> list[int]:
    """The tokens of a multilingual Whisper. Raises ExportError for an unknown language or task."""
    languages = getattr(generation, "lang_to_id", None) or {}
    tasks = getattr(generation, "task_to_id", None) or {}
    found = []
    for wanted, known, what in ((language, languages, "language"), (task, tasks, "task")):
        names = (wanted, f"<|{wanted}|>")
        token = next((known[name] for name in names if name in known), None)
        if wanted is not None and token is None:
            raise ExportError(
                f"generation_config.json: the {what} '{wanted}' is not among its tokens; expected "
                f"one of {', '.join(known) or 'none'}"
            )
        if token is not None:
            found.append(int(token))
    if task is None and "transcribe" in tasks:
        found.append(int(tasks["transcribe"]))
    return found


def _first(stated: Sequence[Any], name: str) -> Any:
    """The first value of a name that is stated at all."""
    found = (getattr(config, name, None) for config in stated)
    return next((value for value in found if value is not None), None)


def _known(config: Any, name: str, vocabulary: int) -> tuple[int, ...]:
    """The tokens that the logits score; a configuration may say -1 for none."""
    tokens = getattr(config, name, None) or ()
    return tuple(int(token) for token in tokens if 0 <= token < vocabulary)
