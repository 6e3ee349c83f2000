"""Text to tokens and back: the bundle's tokenizer and its chat template.

The tokenizer is the JSON of the library ``tokenizers``, the chat template is jinja text as
transformers renders it, in jinja2's sandbox. Both libraries are optional:
``pip install 'edgec-runtime[text]'``.

``Pieces`` turns tokens into text as they come: a piece is given away when its characters are
complete and it cannot be the start of a stop string. All pieces joined are the whole text.

Left out on purpose: tools and documents of chat templates, other tokenizer formats.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgec_runtime.errors import BundleError, EdgecError, InputError

if TYPE_CHECKING:
    import jinja2
    import tokenizers

    from edgec_runtime.bundle import Bundle

Message = Mapping[str, Any]

INSTALL = "pip install 'edgec-runtime[text]'"
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for half a character


class Text:
    """Tokenizer and chat template of a bundle; ``open_text`` makes one."""

    def __init__(
        self,
        where: str,
        tokenizer: tokenizers.Tokenizer,
        template: str | None,
        special_tokens: Mapping[str, str],
    ) -> None:
        """Take over a tokenizer. where: what to call the bundle in messages."""
        self._where = where
        self._tokenizer = tokenizer
        self._template = template
        self._special_tokens = special_tokens

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the tokenizer adds to it (such as bos)."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, up to where the model's answer starts."""
        return self._encode(self.render_chat(messages), add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without the special ones."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def special_token(self, text: str) -> int | None:
        """The token that ``decode`` leaves out and whose text this is, if there is one."""
        token = self._tokenizer.token_to_id(text)
        added = self._tokenizer.get_added_tokens_decoder()
        return token if token in added and added[token].special else None

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to where the model's answer starts.

        messages: with the keys ``role`` and ``content``.
        Raises InputError for other messages, or if the template refuses them.
        """
        if self._template is None:
            raise InputError(f"{self._where}: it has no chat template; give the prompt as one text")
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise InputError(
                    f"message {number} is {message!r:.80}, expected a dict with 'role' and "
                    "'content'"
                )
        try:
            import jinja2
        except ImportError as error:
            raise _not_installed("jinja2", "chat templates") from error
        try:
            template = _environment().from_string(self._template)
        except jinja2.TemplateError as error:
            raise BundleError(f"{self._where}: its chat template is wrong: {error}") from error
        try:
            return template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise InputError(
                f"{self._where}: its chat template refuses these messages: {error}"
            ) from error

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the prompt is not valid Unicode: {error}") from error
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


def open_text(bundle: Bundle) -> Text:
    """Tokenizer and chat template of a bundle.

    Raises InputError if it has no tokenizer, EdgecError if ``tokenizers`` is not installed,
    BundleError if the tokenizer is damaged.
    """
    where, generation = f"model {bundle.path}", bundle.manifest.generation
    if generation is None or generation.tokenizer is None:
        raise InputError(
            f"{where}: its bundle has no tokenizer; give the prompt as token ids, without stop "
            "and stream"
        )
    try:
        import tokenizers
    except ImportError as error:
        raise _not_installed("tokenizers", "text") from error
    raw = bundle.read(generation.tokenizer)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
    except Exception as error:  # tokenizers' errors derive from Exception alone
        raise BundleError(
            f"{where}: its tokenizer cannot be read: {error}; upgrade tokenizers"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    template = None
    if generation.chat_template is not None:
        template = bundle.read(generation.chat_template).decode("utf-8", "replace")
    return Text(where, tokenizer, template, generation.special_tokens)


class Pieces:
    """The text of one answer while it grows.

    What was given away stays: a decoder with byte fallback would take back characters before a
    byte that is wrong.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        """decode: tokens to text. stop: strings that end the answer and are no part of it."""
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._context, self._given = 0, 0  # tokens[context:given] have been turned into text
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after one more token; often empty."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith(_INCOMPLETE):
            return ""
        return self._release(text)

    def end(self) -> str:
        """The rest of the text, once there are no more tokens."""
        if self.stopped:
            return ""
        rest = self._release(self._new_text())
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _new_text(self) -> str:
        """The text behind what was given. Decoded with the tokens before it: they may join."""
        before = self._decode(self._tokens[self._context : self._given])
        return self._decode(self._tokens[self._context :])[len(before) :]

    def _release(self, text: str) -> str:
        if text:
            self._context, self._given = self._given, len(self._tokens)
        self._held += text
        places = [place for place in map(self._held.find, self._stop) if place >= 0]
        if places:
            self.stopped = True
            return self._held[: min(places)]
        ready = len(self._held) - max((_start_of(s, self._held) for s in self._stop), default=0)
        given, self._held = self._held[:ready], self._held[ready:]
        return given


def _start_of(stop: str, text: str) -> int:
    """Length of the longest beginning of ``stop`` that ``text`` ends with."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


def _environment() -> jinja2.Environment:
    """Jinja as chat templates expect it; a template can neither run code nor change objects."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks the model's words for training; here it is transparent."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _not_installed(package: str, what: str) -> EdgecError:
    return EdgecError(f"{what} needs the package {package}, which is not installed; {INSTALL}")
