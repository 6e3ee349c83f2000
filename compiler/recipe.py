"""Recipes: an ordered list of passes with parameters, from TOML, names or the target.

    [[pass]]
    name = "quantize-static"
    ranges = "mse"

The order of stages is checked (clean, prune, train, quantize, train, lower; pruning and
training may take turns), every parameter too; a mistake is an error with a suggestion.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import onnx_ir as ir

from edgec.decoder import encoder_inputs, input_names, is_decoder_graph
from edgec.errors import RecipeError, suggestion
from edgec.passes import PASSES, Pass, Stage
from edgec.targets import Target

_TIDIED = ("cleanup",)
_NEED_DATA = ("smooth-activations",)  # left out of a default recipe without calibration data
ModelKind = Literal["convolutional", "transformer", "recurrent", "decoder"]

P = typing.TypeVar("P", bound=Pass)
_BY_NAME = {cls.name: cls for cls in PASSES}
# a stage, and one further on that it may stand behind all the same
_BACKWARDS = ((Stage.TRAIN, Stage.QUANTIZE), (Stage.PRUNE, Stage.TRAIN))


def load_recipe(given: str | pathlib.Path | Sequence[str]) -> tuple[Pass, ...]:
    """The passes that a TOML file, a comma-separated text or a list of names stands for.

    Raises RecipeError for an unknown pass or parameter, a wrong type or a wrong order.
    """
    if isinstance(given, (str, pathlib.Path)):
        text = str(given)
        if text.endswith(".toml"):
            return from_toml(_read(pathlib.Path(text)), f"recipe {text}")
        given = [name.strip() for name in text.split(",") if name.strip()]
    return check_order(tuple(make_pass(name, {}, "recipe") for name in given))


def make_pass(name: str, parameters: Mapping[str, Any], where: str) -> Pass:
    """The pass of that name with those parameters, the others at their defaults."""
    if name not in _BY_NAME:
        raise RecipeError(
            f"{where}: unknown pass '{name}'{suggestion(name, _BY_NAME)}; "
            f"the passes are {', '.join(_BY_NAME)}"
        )
    return with_parameters(_BY_NAME[name], parameters, where)


def with_parameters(kind: type[P], parameters: Mapping[str, Any], where: str) -> P:
    """A pass of a kind with those parameters, the others at their defaults.

    Raises RecipeError, that begins with ``where``, for an unknown name or a wrong type.
    """
    cls: Any = kind
    name = cls.name
    known = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in parameters.items():
        key = key.replace("-", "_")
        if key not in known:
            raise RecipeError(
                f"{where}: pass '{name}' has no parameter '{key}'{suggestion(key, known)}; "
                f"its parameters are {', '.join(known) or 'none'}"
            )
        values[key] = _typed(value, hints[key], f"{where}: pass '{name}', parameter '{key}'")
    made: P = cls(**values)
    return made


def with_settings(passes: tuple[Pass, ...], settings: Sequence[str]) -> tuple[Pass, ...]:
    """The recipe with ``PASS.PARAMETER=VALUE`` settings of the command line applied."""
    for name, (where, parameters) in _by_pass(settings).items():
        if name not in _BY_NAME or name not in {p.name for p in passes}:
            names = ", ".join(p.name for p in passes)
            raise RecipeError(
                f"{where}: no pass '{name}' in this recipe"
                f"{suggestion(name, [p.name for p in passes])}; it has {names}"
            )
        passes = tuple(
            make_pass(name, parameters_of(p) | parameters, where) if p.name == name else p
            for p in passes
        )
    return passes


def check_settings(settings: Sequence[str]) -> None:
    """Refuse settings that no recipe could take, before the minutes of an export."""
    for name, (where, parameters) in _by_pass(settings).items():
        if name not in _BY_NAME:
            raise RecipeError(
                f"{where}: unknown pass '{name}'{suggestion(name, _BY_NAME)}; "
                f"the passes are {', '.join(_BY_NAME)}"
            )
        make_pass(name, parameters, where)


def parameters_of(pass_: Pass) -> dict[str, Any]:
    """The parameters of a pass as TOML data, in the order of its fields."""
    fields = dataclasses.fields(pass_)  # type: ignore[arg-type]
    return {f.name: _data(getattr(pass_, f.name)) for f in fields}


def to_toml(passes: Sequence[Pass]) -> str:
    """The recipe as TOML text that ``load_recipe`` reads back to equal passes.

    The versions of the passes stand in comments: decisions in a lock file belong to them.
    """
    lines = []
    for pass_ in passes:
        lines += ["[[pass]]", f'name = "{pass_.name}"  # version {pass_.version}']
        for key, value in parameters_of(pass_).items():
            if value is not None:
                lines.append(f"{key} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def default_recipes(target: Target, model: ir.Model, calibrated: bool) -> list[tuple[Pass, ...]]:
    """The target's recipes for this kind of model, the preferred one first.

    calibrated: there is calibration data. The others are for models that come out slower
    than float32 or lose too much; the last is the model as it was exported, tidied.
    """
    names = getattr(target.recipe, model_kind(model))
    if not calibrated and "quantize-static" in names:
        names = target.recipe.uncalibrated
    if not calibrated:
        names = tuple(name for name in names if name not in _NEED_DATA)
    recipe = target.recipe
    distinct = dict.fromkeys((names, recipe.compact, recipe.lossless, _TIDIED))
    return [load_recipe(recipe) for recipe in distinct]


def missed_without_data(target: Target, model: ir.Model) -> str:
    """What the target's recipe would do with calibration data; empty if the same."""
    taken, wanted = (
        [pass_.name for pass_ in default_recipes(target, model, calibrated)[0]]
        for calibrated in (False, True)
    )
    if taken == wanted:
        return ""
    return (
        f"no calibration data was given: the recipe is {', '.join(taken)} in place of "
        f"{', '.join(wanted)}; give typical inputs with --calibration for that"
    )


def model_kind(model: ir.Model) -> ModelKind:
    """What most of the weight bytes serve: convolutions, matrix products or recurrences.

    A decoder with past is a kind of its own: its steps read every weight for one token. With an
    encoder, which reads hundreds of positions at once, it is a transformer.
    Recurrences decide from a third of the bytes: they carry the noise of integer layers in
    front of them from step to step (silero-vad: mean absolute error .024 with static int8,
    .001 with ranges taken at run time).
    """
    if is_decoder_graph(model) and not encoder_inputs(input_names(model)):
        return "decoder"
    shares = {"convolutional": 0, "transformer": 0, "recurrent": 0}
    kinds = {
        "Conv": "convolutional",
        "ConvTranspose": "convolutional",
        "Gemm": "transformer",
        "MatMul": "transformer",
        "LSTM": "recurrent",
        "GRU": "recurrent",
        "RNN": "recurrent",
    }
    known: dict[ir.Value, frozenset[ir.Value] | None] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        kind = kinds.get(node.op_type)
        for value in node.inputs if kind else ():
            behind = _constants_behind(value, known) if value is not None else None
            for constant in behind or ():
                tensor = ir.convenience.get_const_tensor(constant)
                if tensor is not None and kind is not None:
                    shares[kind] += tensor.nbytes
    if shares["recurrent"] * 3 >= sum(shares.values()) > 0:
        return "recurrent"
    # a classifier's head belongs to its convolutions: they decide from a fifth of the bytes
    if shares["convolutional"] * 5 >= sum(shares.values()) > 0:
        return "convolutional"
    return "transformer"


def _constants_behind(
    value: ir.Value, known: dict[ir.Value, frozenset[ir.Value] | None]
) -> frozenset[ir.Value] | None:
    """The constants that a value is computed from (itself, if it is one); None if it is not.

    An exporter may slice and join the weights of an LSTM in the graph.
    """
    stack = [value]
    while stack:
        current = stack[-1]
        if current in known:
            stack.pop()
            continue
        if ir.convenience.get_const_tensor(current) is not None:
            known[current] = frozenset([current])
            continue
        node = current.producer()
        inputs = [v for v in node.inputs if v is not None] if node is not None else []
        waiting = [v for v in inputs if v not in known]
        if waiting:
            stack += waiting
            continue
        parts = [known[v] for v in inputs]
        computed = bool(parts) and all(part is not None for part in parts)
        found = frozenset(c for part in parts if part is not None for c in part)
        known[current] = found if computed else None
    return known[value]


def check_order(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """The passes, if their stages never go backwards, but for two cases.

    TRAIN may follow QUANTIZE, and PRUNE may follow TRAIN as long as nothing is quantized.
    """
    highest = Stage.CLEAN
    for pass_ in passes:
        stage = pass_.stage
        if stage < highest and (stage, highest) not in _BACKWARDS:
            raise RecipeError(
                f"recipe: '{pass_.name}' ({stage.name.lower()}) stands after a pass of stage "
                f"{highest.name.lower()}; the order is clean, prune, train, quantize, train, "
                "lower, and prune and train may take turns"
            )
        highest = max(highest, stage)
    return passes


def from_toml(text: str, where: str) -> tuple[Pass, ...]:
    """The passes of a recipe's TOML text. Raises RecipeError."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{where}: not valid TOML: {error}") from error
    unknown = sorted(set(table) - {"pass"})
    entries = table.get("pass")
    if unknown or not isinstance(entries, list):
        raise RecipeError(f"{where}: expected [[pass]] tables, each with a name")
    passes = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise RecipeError(f"{where}: a [[pass]] table without a name")
        parameters = {k: v for k, v in entry.items() if k != "name"}
        passes.append(make_pass(entry["name"], parameters, where))
    return check_order(tuple(passes))


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"recipe {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path}: not valid TOML: {error}") from error


def _by_pass(settings: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Pass -> its settings as they were given, for messages, and its parameters.

    Together: one parameter may need another, whichever was given first.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for setting in settings:
        name, key, value = _split(setting)
        where, parameters = found.get(name, ("", {}))
        found[name] = f"{where} --set {setting}".strip(), parameters | {key: value}
    return found


def _split(setting: str) -> tuple[str, str, Any]:
    """Pass, parameter and value of ``PASS.PARAMETER=VALUE``."""
    path, equals, text = setting.partition("=")
    name, dot, key = path.partition(".")
    if not (equals and dot and name and key):
        raise RecipeError(f"--set {setting}: expected PASS.PARAMETER=VALUE")
    return name, key.replace("-", "_"), _parse(text)


def _typed(value: Any, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif typing.get_origin(option) is tuple:
            items = [value] if isinstance(value, str) else value
            of = (typing.get_args(option) or (str,))[0]
            if isinstance(items, (list, tuple)):
                return tuple(_typed(item, of, f"{where}: an item") for item in items)
        elif option is float and type(value) in (int, float):
            return float(value)
        elif type(value) is option:
            return value
    raise RecipeError(f"{where} is {value!r}, expected {_describe(hint)}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _describe(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(_describe(h) for h in typing.get_args(hint) if h is not type(None))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return "a list"
    return f"a {hint.__name__}" if isinstance(hint, type) else str(hint)


def _parse(text: str) -> Any:
    """A TOML value if ``text`` is one, else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _data(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return repr(value)
