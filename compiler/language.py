"""What a language model needs besides its graph: tokenizer, chat template, special tokens.

They are read from the Hugging Face directory as transformers reads it, and become the section
``generation`` of the manifest and two entries of the bundle. The tokenizer is the JSON of the
library tokenizers, without padding and truncation. A directory without a tokenizer gives a
model that takes ids alone.

Left out on purpose: tokenizers that exist in Python alone (slow ones), named chat templates but
the default.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from edgec.decoder import (
    DECODER_IDS,
    IDS,
    LOGITS,
    MASK,
    PAST,
    POSITIONS,
    encoder_inputs,
    input_names,
    present_name,
)
from edgec.errors import ExportError, SourceError
from edgec.language_encoder import context_length, encoder_section
from edgec.token_windows import Encode
from edgec_runtime.bundle import Bundle
from edgec_runtime.generation import CachePair, Generation, Sampling

_TOKENIZER, _TEMPLATE = "tokenizer.json", "chat_template.jinja"
_TOKENIZER_FILES = (_TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_CONTEXT_LENGTH = 2048  # where a configuration states none (ALiBi)


@dataclass(frozen=True)
class Language:
    """How a decoder is spoken to.

    files: entries of the bundle. vocabulary: number of tokens that the logits score.
    encode: text -> ids, without special tokens; None without a tokenizer.
    """

    generation: Generation
    files: Mapping[str, bytes]
    vocabulary: int
    encode: Encode | None
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """The text half of a directory: tokenizer, chat template and special tokens; may be empty.

    tokenizer: JSON. special: name -> text of the special tokens. ids: of eos, pad and bos.
    """

    tokenizer: str | None = None
    template: str | None = None
    special: Mapping[str, str] = field(default_factory=dict)
    ids: Mapping[str, int | None] = field(default_factory=dict)
    finding: str = ""


def make_language(text: Text, module: Any, model: ir.Model) -> Language:
    """How a decoder is spoken to: the transformers model ``module``, whose graph is ``model``."""
    findings = [text.finding] if text.finding else []
    stated = [module.generation_config, module.config]
    eos = _ids(_first(stated, "eos_token_id", text.ids.get("eos")))
    if not eos:
        findings.append(
            "no token ends an answer (eos_token_id): generation goes on up to the number of tokens "
            "that it is asked for"
        )
    pad = _ids(_first(stated, "pad_token_id", text.ids.get("pad"))) or eos or (0,)
    bos = _ids(_first(stated, "bos_token_id", text.ids.get("bos")))
    context = context_length(module.config)
    if not context:
        findings.append(
            f"config.json states no context length; {_CONTEXT_LENGTH} tokens are assumed"
        )
    inputs, vocabulary, encoder = input_names(model), _vocabulary(model), None
    read = encoder_inputs(inputs)
    if read:
        encoder, found = encoder_section(module, read, vocabulary)
        findings += found
    generation = Generation(
        ids=DECODER_IDS if read else IDS,
        mask=None if read else MASK,
        positions=POSITIONS if POSITIONS in inputs else None,
        logits=LOGITS,
        pairs=tuple(CachePair(n, present_name(n)) for n in inputs if n.startswith(PAST)),
        cache="growing",
        eos=eos,
        pad=pad[0],
        bos=bos[0] if bos else None,
        context_length=context or _CONTEXT_LENGTH,
        sampling=_sampling(module.generation_config),
        tokenizer=_TOKENIZER if text.tokenizer is not None else None,
        chat_template=_TEMPLATE if text.template is not None else None,
        special_tokens=dict(text.special),
        encoder=encoder,
    )
    contents = {_TOKENIZER: text.tokenizer, _TEMPLATE: text.template}
    files = {name: content.encode() for name, content in contents.items() if content is not None}
    # a text alone is no data for a model with an encoder, which needs answers, too
    encode = None if text.tokenizer is None or read else encoder_of(text.tokenizer)
    return Language(generation, files, vocabulary, encode, tuple(findings))


def bundle_encoder(bundle: Bundle) -> Encode | None:
    """Text -> ids of the tokenizer in a bundle; None where a text is no data for it."""
    generation = bundle.manifest.generation
    if generation is None or generation.tokenizer is None or generation.encoder is not None:
        return None
    return encoder_of(bundle.read(generation.tokenizer).decode("utf-8"))


def encoder_of(tokenizer: str) -> Encode:
    """Text -> ids of a tokenizer's JSON, without special tokens."""
    import tokenizers

    loaded = tokenizers.Tokenizer.from_str(tokenizer)
    return lambda text: list(loaded.encode(text, add_special_tokens=False).ids)


def read_text(path: pathlib.Path) -> Text:
    """Tokenizer and chat template of a directory; without them a Text that says so.

    Raises SourceError for a tokenizer that cannot be loaded.
    """
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return Text(
            finding="the directory has no tokenizer: the bundle takes and gives token ids alone; "
            "save the tokenizer into it with tokenizer.save_pretrained()"
        )
    import tokenizers
    import transformers

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # whatever a tokenizer's files can raise
        reason = " ".join(str(error).split())[:300]
        raise SourceError(f"{path}: its tokenizer cannot be loaded: {reason}") from error
    if not loaded.is_fast:
        return Text(
            finding=f"its tokenizer ({type(loaded).__name__}) exists in Python alone: the bundle "
            "takes and gives token ids; convert it to tokenizer.json"
        )
    plain = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    plain.no_padding()
    plain.no_truncation()
    template = loaded.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    special = {n: t for n, t in loaded.special_tokens_map.items() if isinstance(t, str)}
    ids = {name: getattr(loaded, f"{name}_token_id") for name in ("eos", "pad", "bos")}
    return Text(plain.to_str(), template, special, ids)


def _sampling(config: Any) -> Sampling:
    """The settings of generation_config, at transformers' own defaults where it has none."""
    return Sampling(
        temperature=float(_or(config.temperature, 1.0)) if config.do_sample else 0.0,
        top_k=int(_or(config.top_k, 0)),
        top_p=float(_or(config.top_p, 1.0)),
        min_p=float(_or(getattr(config, "min_p", None), 0.0)),
        repetition_penalty=float(_or(config.repetition_penalty, 1.0)),
    )


def _or(value: Any, default: float) -> Any:
    return default if value is None else value


def _first(stated: Sequence[Any], name: str, otherwise: Any) -> Any:
    """The first value of a name that is stated at all; an id may be 0."""
    found = (getattr(config, name, None) for config in stated)
    return next((value for value in found if value is not None), otherwise)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)


def _vocabulary(model: ir.Model) -> int:
    [logits] = [value for value in model.graph.outputs if value.name == LOGITS]
    size = logits.shape[-1] if logits.shape is not None else None
    if not isinstance(size, int):
        raise ExportError(f"the output '{LOGITS}' of the decoder has no fixed size of vocabulary")
    return size
