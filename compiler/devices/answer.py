"""A language model's answer on a device that this machine runs: an emulated CPU, another Python.

The device gets the tokens of the prompt and gives those of the answer, one by one; tokenizer and
chat template stay here, so that it needs numpy and onnxruntime alone.

Left out on purpose: boards over ssh and phones over adb, whose replies come whole; browsers
(docs/web.md).
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edgec.devices.check import check_fits
from edgec.devices.connect import open_device
from edgec.devices.guest_answer import ASKED
from edgec.devices.local import LocalPython
from edgec.errors import DeviceError
from edgec_runtime.bundle import read_bundle
from edgec_runtime.text import Pieces, Text

if TYPE_CHECKING:
    from edgec_runtime.generate import Options


def answer_tokens(
    device: str,
    path: pathlib.Path,
    prompt: Sequence[int],
    *,
    options: Options,
    threads: int | None = None,
    any_target: bool = False,
) -> Iterator[int]:
    """The tokens of an answer as the device gives them.

    options: of ``Model.generate``. any_target: also run a bundle that was built for other devices.
    Raises EdgecError if the device is not there, is not for the bundle, or cannot run it, when the
    first token is asked for.
    """
    bundle = read_bundle(path, check="full")
    with open_device(device) as there:
        if not isinstance(there, LocalPython):
            raise DeviceError(
                f"device {device}: its answers cannot be followed while they are written; expected "
                "native or an emulated CPU (qemu) of `edgec devices`"
            )
        if not any_target:
            check_fits(bundle, there.profile)
        asked = {
            "bundle": bundle.path.name,
            "tokens": list(prompt),
            "threads": threads,
            "options": dict(options),
        }
        reason: str | None = None
        for line in there.follow(bundle.path, {ASKED: json.dumps(asked)}):
            told: dict[str, Any] = json.loads(line)
            if "token" in told:
                yield told["token"]
            reason = told.get("end")
    if reason:
        raise DeviceError(f"device {device}: {reason}")


def answer_pieces(tokens: Iterator[int], text: Text, stops: Sequence[str]) -> Iterator[str]:
    """The text of an answer, piece by piece, up to a text that stops it."""
    pieces = Pieces(text.decode, stops)
    specials = {text.special_token(stop) for stop in stops}
    for token in tokens:
        if token in specials:
            break
        yield pieces.push(token)
        if pieces.stopped:
            return
    yield pieces.end()
