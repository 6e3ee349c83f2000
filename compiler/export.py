"""Source -> reference: the model as ONNX, checked against what it came from.

The reference is the judge of everything that follows, so it is compared here with eager
torch on real inputs; a difference beyond float noise stops the build and names the first
node that diverges. Metadata with source paths is stripped: the same model gives the same
bytes in every directory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from edgec.cut import cut, run_parts
from edgec.decoder import encoder_inputs, input_names
from edgec.decoder_parity import check_decoding
from edgec.entrypoint import describe_failure, repeatable
from edgec.errors import EdgecError, ExportError, SourceError
from edgec.export_onnx import load_onnx
from edgec.language import Language
from edgec.passes.execution import open_session, run_feeds, run_values, sqnr_db
from edgec.report import Parity
from edgec.shapes import input_specs
from edgec.source import Source
from edgec.targets import Target
from edgec.token_windows import Encode

# Float noise between two correct float32 implementations is 80 dB and above; one wrong
# operator, weight or mask costs far more than this leaves room for.
MIN_PARITY_DB = 60.0

Feeds = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Exported:
    """The reference graph, its example feeds and the way back to the source.

    examples: feeds that came with the source; empty for an .onnx file.
    eager: runs the source itself on feeds -> outputs by name; None for an .onnx file.
    locate: names the first diverging node on feeds; None where there is no node by node view.
    language: of a language model from a Hugging Face directory.
    state: input -> the output that is its next value, of a recurrent model (``edgec.state``).
    """

    model: ir.Model
    examples: tuple[Feeds, ...]
    eager: Any = None
    locate: Any = None
    findings: tuple[str, ...] = field(default=())
    language: Language | None = None
    state: Mapping[str, str] = field(default_factory=dict)

    @property
    def encode(self) -> Encode | None:
        """Text -> token ids; None for a model without a tokenizer."""
        return self.language.encode if self.language is not None else None

    def alone(self) -> Exported:
        """The reference without its source, whose weights need not stay in memory."""
        return replace(self, eager=None, locate=None)


def export(source: Source, target: Target) -> Exported:
    """The reference of a source, at the target's opset.

    Raises SourceError or ExportError with the reason.
    """
    with repeatable():  # optimum draws its example inputs
        if source.kind == "onnx":
            exported = Exported(load_onnx(source.module), ())
        elif source.kind == "huggingface":
            from edgec.export_huggingface import export_directory

            exported = export_directory(source.module, target)
        else:
            exported = _from_torch(source, target)
    _strip(exported.model)
    _require_tensors(exported.model)
    return exported


def check_parity(exported: Exported, samples: Iterable[Feeds], limit: int = 4) -> Parity | None:
    """The reference's outputs against the source's on up to ``limit`` real inputs.

    A language model is followed token by token besides (``edgec.decoder_parity``), one with an
    encoder in the two graphs that the bundle will hold. Returns None if the source is itself an
    ONNX file. Raises ExportError below ``MIN_PARITY_DB`` and names
    the first diverging node.
    """
    if exported.eager is None:
        return None
    session = open_session(exported.model, threads=0)
    names = [output.name for output in session.get_outputs()]
    worst_db, worst_error, count = 200.0, 0.0, 0
    for feeds in samples:
        if count == limit:
            break
        count += 1
        expected = _run_eager(exported.eager, feeds)
        actual = dict(zip(names, run_feeds(session, feeds), strict=True))
        for name in names:
            e, a = expected[name], actual[name]
            if e.shape != a.shape:
                raise ExportError(
                    f"output '{name}' has shape {list(a.shape)} in ONNX, {list(e.shape)} in torch"
                )
            if e.dtype.kind == "f":  # equal infinities and NaN in the same place agree
                judged = np.isfinite(e) | ~((e == a) | (np.isnan(e) & np.isnan(a)))
                e, a = e[judged], a[judged]
            if not e.size:
                continue
            worst_error = max(worst_error, float(np.max(np.abs(e.astype(float) - a.astype(float)))))
            worst_db = min(worst_db, sqnr_db(e, a))
            if worst_db < MIN_PARITY_DB:
                where = exported.locate(feeds) if exported.locate else f"output '{name}'"
                raise ExportError(
                    f"the exported graph does not compute what the torch model does: {where}; "
                    f"output '{name}' differs by up to {worst_error:.3g} (SQNR {worst_db:.1f} dB, "
                    f"at least {MIN_PARITY_DB:.0f} expected)"
                )
    if exported.language is not None:
        encodes = bool(encoder_inputs(input_names(exported.model)))
        decoded = check_decoding(
            run_parts(cut(exported.model))
            if encodes
            else lambda feeds: dict(zip(names, run_feeds(session, feeds), strict=True)),
            exported.eager,
            input_specs(exported.model),
            examples=exported.examples if encodes else (),
            vocabulary=exported.language.vocabulary,
            context_length=exported.language.generation.context_length,
            min_db=MIN_PARITY_DB,
        )
        worst_error = max(worst_error, decoded.max_abs_error)
        worst_db, count = min(worst_db, decoded.sqnr_db), count + decoded.samples
    return Parity(max_abs_error=worst_error, sqnr_db=round(worst_db, 1), samples=count)


def _run_eager(eager: Any, feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
    try:
        outputs: dict[str, np.ndarray[Any, Any]] = eager(feeds)
    except EdgecError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        raise ExportError(
            f"the torch model cannot run the inputs that its graph accepts ({shapes}): "
            f"{describe_failure(None, error)}"
        ) from error
    return outputs


def _from_torch(source: Source, target: Target) -> Exported:
    import torch

    findings: list[str] = []
    module = source.module
    if source.kind == "module":
        _require_float32(module)
        if module.training:
            findings.append("the module was in training mode; it was switched to eval()")
        module = module.eval()
    arguments, keywords = _arguments(source)
    dynamic_shapes = _dynamic_shapes(source, arguments, keywords)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                arguments,
                kwargs=keywords or None,
                input_names=list(source.input_names) or None,
                output_names=list(source.output_names) or None,
                dynamic_shapes=dynamic_shapes,
                opset_version=target.opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(f"torch.onnx.export failed: {_cause(error)}") from error
    if program is None:
        raise ExportError("torch.onnx.export returned nothing")
    model = program.model
    names = [str(v.name) for v in model.graph.inputs]
    outputs = [str(v.name) for v in model.graph.outputs]
    flat = _flatten([*arguments, *keywords.values()])
    if len(flat) != len(names):
        raise ExportError(
            f"the exported graph has {len(names)} inputs ({', '.join(names)}) for "
            f"{len(flat)} example tensors; an input that the module does not use must be dropped"
        )
    example = dict(zip(names, (_to_numpy(t) for t in flat), strict=True))
    runner = source.module.module() if source.kind == "exported" else module

    def eager(feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        tensors = [torch.from_numpy(np.array(feeds[n])) for n in names]
        rebuilt, rebuilt_keywords = _rebuild(arguments, keywords, tensors)
        with torch.no_grad():
            value = runner(*rebuilt, **rebuilt_keywords)
        arrays = [_to_numpy(t) for t in _flatten(value)]
        if len(arrays) != len(outputs):
            raise ExportError(
                f"the module returns {len(arrays)} tensors, its graph has {len(outputs)} outputs "
                f"({', '.join(outputs)}); return each tensor once"
            )
        return dict(zip(outputs, arrays, strict=True))

    def locate(feeds: Feeds) -> str:
        tensors = tuple(torch.from_numpy(np.array(feeds[n])) for n in names)
        return _first_divergence(
            program, model, _rebuild(arguments, keywords, list(tensors)), feeds
        )

    return Exported(model, (example,), eager, locate, tuple(findings))


def _first_divergence(program: Any, model: ir.Model, call: Any, feeds: Feeds) -> str:
    """Names the first node of the graph whose value differs from the traced program's.

    The exporter names values after the program's nodes, so both sides are run once and
    compared by name.
    """
    traced = _traced_values(program.exported_program.module(), *call)
    order = [(node, str(v.name)) for node in model.graph for v in node.outputs if v.name in traced]
    (values,) = run_values(model, [name for _, name in order], [feeds])
    for node, name in order:
        expected, actual = traced[name], values[name]
        if expected.shape != actual.shape or sqnr_db(expected, actual) < MIN_PARITY_DB:
            return f"the first node to diverge is '{node.name}' ({node.op_type}), value '{name}'"
    return (
        "every node agrees with the traced program, so tracing froze something that forward() "
        "computes in Python (randomness, state or a branch on data)"
    )


def _traced_values(graph_module: Any, arguments: Any, keywords: Any) -> dict[str, Any]:
    """Every tensor that a traced program computes, by the name of its node."""
    import torch

    values: dict[str, Any] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor) and n.op == "call_function":
                values[n.name] = _to_numpy(value)
            return value

    with torch.no_grad():
        Recorder(graph_module).run(*_flatten((arguments, keywords)))
    return values


def _require_float32(module: Any) -> None:
    import torch

    for name, parameter in module.named_parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise SourceError(
                f"parameter '{name}' is {parameter.dtype}; the reference is computed in float32: "
                "return module.float() with float32 inputs (the recipe decides on float16)"
            )


def _arguments(source: Source) -> tuple[tuple[Any, ...], dict[str, Any]]:
    examples = source.example_inputs
    if not examples and source.kind == "exported" and source.module.example_inputs:
        arguments, keywords = source.module.example_inputs
        return tuple(arguments), dict(keywords)
    if not examples:
        raise SourceError("the source has no example_inputs; they are needed to trace the module")
    call = ((), dict(examples)) if isinstance(examples, Mapping) else (tuple(examples), {})
    arguments, keywords = _apart(call)
    return arguments, keywords


def _apart(call: Any) -> Any:
    """A call with a copy of each tensor that stands in two places of it.

    torch.export takes both for one input: h0 for c0, where the same zeros are given for both.
    """
    import torch
    from torch.utils._pytree import tree_map_only

    seen: set[int] = set()

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        again = id(tensor) in seen
        seen.add(id(tensor))
        return tensor.clone() if again else tensor

    return tree_map_only(torch.Tensor, apart, call)


def _dynamic_shapes(source: Source, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """The user's names of dynamic dimensions in the form that torch.export expects."""
    if not source.dynamic or source.kind == "exported":
        return None
    import inspect

    if keywords:
        order = list(keywords)
    else:
        order = list(inspect.signature(source.module.forward).parameters)[: len(arguments)]
    aliases = dict(zip(source.input_names, order, strict=False))
    shapes = {aliases.get(name, name): dict(axes) for name, axes in source.dynamic.items()}
    unknown = sorted(set(shapes) - set(order))
    if unknown:
        raise SourceError(
            f"dynamic names an argument '{unknown[0]}'; forward() has {', '.join(order)}"
        )
    if keywords:
        return {name: shapes.get(name) for name in order}
    return tuple(shapes.get(name) for name in order)


def _flatten(value: Any) -> list[Any]:
    """The tensors of nested tuples, lists, dicts and dataclass-like outputs, in order."""
    import torch
    from torch.utils._pytree import tree_flatten

    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _rebuild(
    arguments: tuple[Any, ...], keywords: Mapping[str, Any], tensors: list[Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with the example tensors replaced in order."""
    import torch
    from torch.utils._pytree import tree_flatten, tree_unflatten

    leaves, spec = tree_flatten((arguments, dict(keywords)))
    remaining = iter(tensors)
    leaves = [next(remaining) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    rebuilt, rebuilt_keywords = tree_unflatten(leaves, spec)
    return rebuilt, rebuilt_keywords


def _to_numpy(tensor: Any) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().cpu().numpy()
    return array


def _strip(model: ir.Model) -> None:
    """Drop metadata and doc strings: they carry source paths and lines."""
    common_passes.ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "edgec", None
    model.doc_string = None
    model.graph.name = "main"


def _require_tensors(model: ir.Model) -> None:
    for side, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            if isinstance(value.type, (ir.SequenceType, ir.OptionalType)):
                raise ExportError(f"{side} '{value.name}' is a {value.type}; expected a tensor")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, logging or prints of the exporter while it works."""
    loggers = [logging.getLogger(n) for n in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), open(os.devnull, "w") as sink:
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            with contextlib.redirect_stdout(sink):
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """The innermost reason of a chain of exporter errors, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:400]}"
