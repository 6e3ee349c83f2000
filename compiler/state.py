"""Which outputs of a model are inputs of its next call: as the user says, or by their names.

Recurrent networks are exported with their state as inputs and outputs, since a graph keeps
nothing from call to call. The names follow a few conventions: h0 and hn, c0 and cn (torch's own
documentation), state and stateN (silero-vad), h_in and h_out, in_cache0 and out_cache0, hidden
and next_hidden. A pair is taken by its names if both go back to one stem that stands for state,
no other name does, and dtype and shape are equal; the report says so. A wrong pair does no harm to
a call of the model itself; ``check_carried`` refuses one whose output has not the shape of its
input.

Left out on purpose: names of other kinds (x and y are no state, however alike), and finding the
pairs by following the graph from an LSTM, which models spell out in many ways.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgec.decoder import is_decoder_graph
from edgec.emit import graph_entry
from edgec.errors import EdgecError, SourceError, suggestion
from edgec.passes import Feeds
from edgec.runners import reference_runner
from edgec.shapes import input_specs
from edgec_runtime.manifest import Graph, Value
from edgec_runtime.state import misfit

if TYPE_CHECKING:
    from edgec.export import Exported

NONE = "none"  # what --state is given for a model whose names mislead

_STEM = (
    r"(?P<stem>(?:\w+[_.])??(?:hidden[_.]?state|cell[_.]?state|state|hidden|cell|cache\d*|[hc]x?))"
)
_BEFORE = re.compile(
    rf"(?:(?:in|init|initial|old|past|prev|previous)[_.])?{_STEM}"
    r"(?:[_.]?(?:0|in|init|initial|input|old|past|prev|previous))?"
)
_AFTER = re.compile(
    rf"(?:(?:out|last|new|next)[_.])?{_STEM}(?:[_.]?(?:1|n|out|output|last|new|next))?"
)


def parse_state(texts: Sequence[str]) -> dict[str, str] | None:
    """``INPUT=OUTPUT`` of the command line, by input; {} for "none", None if nothing is given."""
    if not texts:
        return None
    if list(texts) == [NONE]:
        return {}
    state: dict[str, str] = {}
    for text in texts:
        before, equals, after = text.partition("=")
        if not (before and equals and after):
            raise EdgecError(
                f"--state {text}: expected INPUT=OUTPUT, for example --state h0=hn, or none"
            )
        if before in state:
            raise EdgecError(f"--state: the input '{before}' is given twice; expected one output")
        state[before] = after
    return state


def with_state(exported: Exported, asked: Mapping[str, str] | None) -> Exported:
    """The reference with its state: input -> output, in the order of the inputs.

    asked: what the user states; None: what the names tell. Raises SourceError for a pair that
    cannot be state, and for names that tell it in two ways.
    """
    if is_decoder_graph(exported.model):
        if asked:
            raise SourceError(
                "state: a language model keeps a cache of its own, in model.generate(); leave "
                "the state out"
            )
        return exported
    input_specs(exported.model)  # refuses what has no dtype or shape
    graph = graph_entry(exported.model)
    findings: tuple[str, ...] = ()
    if asked is not None:
        state = _stated(graph, asked)
    else:
        state, findings = _found(graph)
    ordered = {value.name: state[value.name] for value in graph.inputs if value.name in state}
    return replace(exported, state=ordered, findings=exported.findings + findings)


def check_carried(exported: Exported, feeds: Feeds) -> None:
    """Run the reference once: the state comes back in the shape in which it was given.

    A file may state no shape of an output. Raises SourceError.
    """
    if not exported.state:
        return
    outputs = reference_runner(exported.model)(feeds)
    for before, after in exported.state.items():
        given, made = feeds[before].shape, outputs[after].shape
        if given != made:
            raise SourceError(
                f"state {before}={after}: the model was given {list(given)} and gives "
                f"{list(made)} back, which cannot go into the next call; state other pairs with "
                f"--state INPUT=OUTPUT, or --state {NONE}"
            )


def _stated(graph: Graph, asked: Mapping[str, Any]) -> dict[str, str]:
    inputs, outputs = _by_name(graph.inputs), _by_name(graph.outputs)
    if not isinstance(asked, Mapping):
        raise SourceError(f"state is {asked!r}, expected names of outputs by names of inputs")
    for before, after in asked.items():
        where = f"state {before}={after}"
        for side, name, known in (("input", before, inputs), ("output", after, outputs)):
            if name not in known:
                near = suggestion(str(name), known)
                raise SourceError(
                    f"{where}: the model has no {side} '{name}'{near}; it has {', '.join(known)}"
                )
        reason = misfit(inputs[before], outputs[after])
        if reason:
            raise SourceError(f"{where}: {reason}")
    taken = list(asked.values())
    for after in taken:
        if taken.count(after) > 1:
            both = " and ".join(f"'{b}'" for b, a in asked.items() if a == after)
            raise SourceError(f"state: the output '{after}' is the next value of {both}; give one")
    return dict(asked)


def _found(graph: Graph) -> tuple[dict[str, str], tuple[str, ...]]:
    """The pairs that the names tell, and what is to be said of them."""
    before, after = _by_stem(graph.inputs, _BEFORE), _by_stem(graph.outputs, _AFTER)
    state: dict[str, str] = {}
    findings = []
    for stem, ins in before.items():
        outs = after.get(stem, [])
        if len(ins) > 1 or len(outs) > 1:
            if outs:
                raise SourceError(
                    f"the names of {_listed(ins)} and {_listed(outs)} tell the recurrent state in "
                    "more than one way; say which with --state INPUT=OUTPUT for each, or with "
                    f"--state {NONE} that there is none"
                )
            continue
        reason = misfit(ins[0], outs[0]) if outs else ""
        if reason:
            findings.append(
                f"by their names '{ins[0].name}' and '{outs[0].name}' are recurrent state, but "
                f"{reason}; they are not kept from call to call"
            )
        elif outs:
            state[ins[0].name] = outs[0].name
        elif any(not misfit(ins[0], value) and value.shape for value in graph.outputs):
            findings.append(
                f"by its name the input '{ins[0].name}' is recurrent state, but no output's name "
                f"goes with it; if one is its next value, give --state {ins[0].name}=OUTPUT"
            )
    if state:
        pairs = ", ".join(f"{b}={a}" for b, a in state.items())
        findings.insert(
            0,
            f"recurrent state, by the names: {pairs}; model.stream() of the runtime keeps it "
            f"(--state {NONE} if it is none)",
        )
    return state, tuple(findings)


def _by_stem(values: Sequence[Value], pattern: re.Pattern[str]) -> dict[str, list[Value]]:
    found: dict[str, list[Value]] = {}
    for value in values:
        match = pattern.fullmatch(value.name.lower())
        if match is not None:
            found.setdefault(match["stem"], []).append(value)
    return found


def _by_name(values: Sequence[Value]) -> dict[str, Value]:
    return {value.name: value for value in values}


def _listed(values: Sequence[Value]) -> str:
    return ", ".join(f"'{value.name}'" for value in values)
