"""LSTM, GRU and RNN of the twin: torch's own where it has the form, else one loop over time.

torch's layers take a quarter of the loop's time. In the loop the products with the inputs are
taken for all steps at once, those with the state step by step. Layouts, directions, sequence
lengths, peepholes, clipping and activations as in the ONNX operator specification, opset 14 to
22.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgec.passes.torch_call import Call, Operator

_Activation = Callable[[Tensor], Tensor]
_State = tuple[Tensor, ...]  # h, and c of an LSTM: [batch, hidden]
_Cell = Callable[[Tensor, _State], _State]
_TORCH_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}  # places in ONNX's order


@dataclass(frozen=True)
class _Weights:
    """Those of one direction: w [gates, inputs], r [gates, hidden], biases [gates], or None."""

    w: Tensor
    r: Tensor
    input_bias: Tensor | None
    state_bias: Tensor | None
    peepholes: Tensor | None
    activations: tuple[_Activation, ...]
    clip: float | None

    def bounded(self, gate: Tensor) -> Tensor:
        """A gate before its activation."""
        return gate if self.clip is None else gate.clamp(-self.clip, self.clip)


def _recurrent(
    cell: Callable[[Call, _Weights], _Cell], defaults: tuple[str, ...], states: int
) -> Operator:
    """An operator whose inputs 5, 6 are its initial states."""

    def run(c: Call) -> tuple[Tensor, ...]:
        batch_first = bool(c.get("layout", 0))
        x = c[0].transpose(0, 1) if batch_first else c[0]  # [time, batch, inputs]
        starts = [c[5], c[6]][:states]
        if batch_first:
            starts = [None if s is None else s.transpose(0, 1) for s in starts]
        if _is_plain(c, defaults):
            y, *last = _by_torch(c, x, starts)
        else:
            y, *last = _by_steps(c, x, starts)
        if batch_first:
            return y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in last)
        return y, *last

    def _by_steps(c: Call, x: Tensor, starts: list[Tensor | None]) -> tuple[Tensor, ...]:
        outputs, finals = [], []
        for index, (weights, backwards) in enumerate(_directions(c, defaults)):
            zero = x.new_zeros((x.shape[1], weights.r.shape[1]))
            start = tuple(zero if s is None else s[index] for s in starts)
            steps, final = _run(cell(c, weights), weights, x, start, c[4], backwards)
            outputs.append(steps)
            finals.append(final)
        # [time, directions, batch, hidden], and the states [directions, batch, hidden]
        return torch.stack(outputs, 1), *(torch.stack(p) for p in zip(*finals, strict=True))

    return run


def _is_plain(c: Call, defaults: tuple[str, ...]) -> bool:
    """True if torch has a layer of this form."""
    names = c.get("activations") or defaults
    return (
        all(name.lower() == d.lower() for name, d in zip(names, cycle(defaults), strict=False))
        and c[4] is None
        and c[7] is None
        and c.get("clip") is None
        and not c.get("input_forget", 0)
        and (c.node.op_type != "GRU" or bool(c.get("linear_before_reset", 0)))
    )


def _by_torch(c: Call, x: Tensor, starts: list[Tensor | None]) -> tuple[Tensor, ...]:
    """All steps [time, directions, batch, hidden] and the last states, by torch's own layer."""
    kind = c.node.op_type
    directions, _, hidden = (int(n) for n in c[2].shape)  # numbers under torch.jit.trace, too
    flat = []
    for index in range(directions):
        biases = () if c[3] is None else c[3][index].chunk(2)
        for part in (c[1][index], c[2][index], *biases):
            gates = part.chunk(len(_TORCH_GATES[kind]))
            flat.append(torch.cat([gates[place] for place in _TORCH_GATES[kind]]))
    zero = x.new_zeros((directions, x.shape[1], hidden))
    state = [zero if s is None else s for s in starts]
    backwards = c.get("direction", "forward") == "reverse"
    settings = (flat, c[3] is not None, 1, 0.0, True, directions == 2, False)
    given = x.flip(0) if backwards else x
    if kind == "LSTM":
        y, *last = torch.lstm(given, state, *settings)
    else:
        y, *last = (torch.gru if kind == "GRU" else torch.rnn_tanh)(given, state[0], *settings)
    y = y.flip(0) if backwards else y
    return y.reshape(*y.shape[:2], directions, hidden).transpose(1, 2), *last


def _run(
    cell: _Cell,
    weights: _Weights,
    x: Tensor,
    state: _State,
    lengths: Tensor | None,
    backwards: bool,
) -> tuple[Tensor, _State]:
    """All steps [time, batch, hidden] and the last state of each sample."""
    given = F.linear(x, weights.w, weights.input_bias)  # [time, batch, gates]
    steps: list[Tensor] = [x] * len(x)
    for time in reversed(range(len(x))) if backwards else range(len(x)):
        new = cell(given[time], state)
        if lengths is None:
            steps[time] = new[0]
        else:  # behind its end a sample keeps its state and gives zeros
            inside = (lengths > time)[:, None]
            steps[time] = torch.where(inside, new[0], torch.zeros_like(new[0]))
            new = tuple(torch.where(inside, n, s) for n, s in zip(new, state, strict=True))
        state = new
    return torch.stack(steps), state


def _lstm(c: Call, weights: _Weights) -> _Cell:
    f, g, h = weights.activations
    coupled, peepholes = bool(c.get("input_forget", 0)), weights.peepholes

    def step(given: Tensor, state: _State) -> _State:
        hidden, memory = state
        gates = weights.bounded(given + F.linear(hidden, weights.r, weights.state_bias))
        i, o, forget, candidate = gates.chunk(4, 1)
        if peepholes is not None:
            of_input, of_output, of_forget = peepholes.chunk(3)
            i, forget = i + of_input * memory, forget + of_forget * memory
        i = f(i)
        memory = (1 - i if coupled else f(forget)) * memory + i * g(candidate)
        if peepholes is not None:
            o = o + of_output * memory
        return f(o) * h(memory), memory

    return step


def _gru(c: Call, weights: _Weights) -> _Cell:
    f, g = weights.activations
    after = bool(c.get("linear_before_reset", 0))
    of_gates, of_candidate = weights.r.tensor_split([2 * weights.r.shape[1]])
    bias = weights.state_bias
    gate_bias, candidate_bias = (
        (None, None) if bias is None else bias.tensor_split([2 * weights.r.shape[1]])
    )

    def step(given: Tensor, state: _State) -> _State:
        (hidden,) = state
        gates, candidate = given.tensor_split([2 * hidden.shape[1]], 1)
        gates = f(weights.bounded(gates + F.linear(hidden, of_gates, gate_bias)))
        update, reset = gates.chunk(2, 1)
        if after:
            candidate = candidate + reset * F.linear(hidden, of_candidate, candidate_bias)
        else:
            candidate = candidate + F.linear(reset * hidden, of_candidate, candidate_bias)
        return ((1 - update) * g(weights.bounded(candidate)) + update * hidden,)

    return step


def _rnn(c: Call, weights: _Weights) -> _Cell:
    (f,) = weights.activations

    def step(given: Tensor, state: _State) -> _State:
        gate = given + F.linear(state[0], weights.r, weights.state_bias)
        return (f(weights.bounded(gate)),)

    return step


def _directions(c: Call, defaults: tuple[str, ...]) -> Iterator[tuple[_Weights, bool]]:
    """The weights of each direction, and True where time runs backwards."""
    backwards = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
    ways = backwards[c.get("direction", "forward")]
    names = tuple(c.get("activations") or defaults * len(ways))
    alphas, betas = iter(c.get("activation_alpha") or ()), iter(c.get("activation_beta") or ())
    activations = [_activation(name, alphas, betas) for name in names]
    clip = c.get("clip")
    for index, way in enumerate(ways):
        input_bias, state_bias = (None, None) if c[3] is None else c[3][index].chunk(2)
        own = activations[index * len(defaults) : (index + 1) * len(defaults)]
        yield (
            _Weights(
                c[1][index],
                c[2][index],
                input_bias,
                state_bias,
                None if c[7] is None else c[7][index],
                tuple(own),
                None if clip is None else float(clip),
            ),
            way,
        )


def _activation(name: str, alphas: Iterator[Any], betas: Iterator[Any]) -> _Activation:
    """alphas, betas: consumed by the functions that have such a number, in order."""
    simple = _SIMPLE.get(name.lower())
    if simple is not None:
        return simple
    parametric, alpha, beta = _PARAMETRIC[name.lower()]
    a = float(next(alphas, alpha))
    b = 0.0 if beta is None else float(next(betas, beta))
    return lambda x: parametric(x, a, b)


_SIMPLE: dict[str, _Activation] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}
# function of x, alpha, beta; their defaults; None where it has no beta
_PARAMETRIC: dict[str, tuple[Callable[[Tensor, float, float], Tensor], float, float | None]] = {
    "affine": (lambda x, a, b: a * x + b, 1.0, 0.0),
    "elu": (lambda x, a, b: F.elu(x, a), 1.0, None),
    "hardsigmoid": (lambda x, a, b: torch.clamp(a * x + b, 0.0, 1.0), 0.2, 0.5),
    "leakyrelu": (lambda x, a, b: F.leaky_relu(x, a), 0.01, None),
    "scaledtanh": (lambda x, a, b: a * torch.tanh(b * x), 1.0, 1.0),
    "thresholdedrelu": (lambda x, a, b: torch.where(x > a, x, torch.zeros_like(x)), 1.0, None),
}

RECURRENT: dict[str, Operator] = {
    "GRU": _recurrent(_gru, ("Sigmoid", "Tanh"), 1),
    "LSTM": _recurrent(_lstm, ("Sigmoid", "Tanh", "Tanh"), 2),
    "RNN": _recurrent(_rnn, ("Tanh",), 1),
}
