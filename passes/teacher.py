"""A teacher that is another model than the reference: an .onnx file in the student's form.

Its inputs and outputs take over the student's names, so that the same feeds and the same
names of answers serve both: matched by name where all are the same, else by position. Inner
values keep theirs; one that stands in the way of a new name gives it up.

Left out: teachers that need other inputs than the student, and several teachers at once.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import onnx_ir as ir

from edgec.passes.contract import PassError


def load_teacher(path: pathlib.Path, student: ir.Model) -> ir.Model:
    """The model of an .onnx file, with the student's names of inputs and outputs.

    Raises PassError if there is no such file, or if its inputs or outputs differ from the
    student's in number or type.
    """
    if not path.is_file():
        raise PassError(
            f"recover: teacher {path}: no such file; give the path of an .onnx file, for example "
            "the reference that a build leaves beside its bundle"
        )
    try:
        model = ir.load(path)
        ir.external_data.load_to_model(model)
    except Exception as error:  # protobuf's and onnx_ir's own, of many kinds
        reason = " ".join(str(error).split())[:200]
        raise PassError(f"recover: teacher {path}: not an ONNX file: {reason}") from error
    if not len(model.graph) or not model.graph.outputs:
        raise PassError(f"recover: teacher {path}: not an ONNX file, or a graph without nodes")
    where = f"recover: teacher {path}"
    inputs = [v for v in model.graph.inputs if not v.is_initializer()]
    _take_names(model, inputs, student.graph.inputs, f"{where}: input")
    _take_names(model, model.graph.outputs, student.graph.outputs, f"{where}: output")
    return model


def _take_names(
    model: ir.Model, values: Sequence[ir.Value], wanted: Sequence[ir.Value], where: str
) -> None:
    """Give values the names of others, pair by pair."""
    if len(values) != len(wanted):
        raise PassError(
            f"{where}s are {len(values)}, the model has {len(wanted)}; a teacher takes and "
            "answers what its student does"
        )
    by_name = {v.name: v for v in values}
    if {v.name for v in wanted} == set(by_name):
        pairs = [(by_name[v.name], v) for v in wanted]
    else:
        pairs = list(zip(values, wanted, strict=True))
    for value, other in pairs:
        if value.dtype != other.dtype:
            raise PassError(
                f"{where} '{value.name}' is {value.dtype}, the model's '{other.name}' is "
                f"{other.dtype}; a teacher takes and answers what its student does"
            )
    names = {str(other.name) for _, other in pairs}
    ours = {value for value, _ in pairs}
    for value in _values(model):
        if value.name in names and value not in ours:
            value.name = _unused(model, f"{value.name}_inner")
    for value, other in pairs:  # two may swap their names: none may be taken while it is held
        value.name = _unused(model, f"{other.name}_renamed")
    for value, other in pairs:
        value.name = other.name


def _values(model: ir.Model) -> list[ir.Value]:
    """All values of the main graph."""
    graph = model.graph
    computed = [v for node in graph for v in node.outputs]
    return list(dict.fromkeys([*graph.inputs, *graph.initializers.values(), *computed]))


def _unused(model: ir.Model, wish: str) -> str:
    taken = {value.name for value in _values(model)}
    name, count = wish, 0
    while name in taken:
        count += 1
        name = f"{wish}_{count}"
    return name
